"""Whether the zeros that the manifest promises are in the files."""

from __future__ import annotations

from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked

_SHOWN = 3


class SparsePattern(SubjectCheck):
    """Every layer that the manifest lists as 2:4 is 2:4 in the files, along the axis that the compiler sums over, and
    an artifact that was exported as 2:4 has such layers. Names the layer and the four weights where the pattern breaks.
    Means nothing for dense artifacts. It cannot see which kernels the compiler will pick."""

    name = "2:4 pattern"
    from_files = True

    def look(self, subject: Subject) -> Check | Unchecked | None:
        manifest = subject.manifest
        promised = [layer.layer for layer in manifest.sparse_layers if layer.eligible and layer.pattern]
        if manifest.settings.sparsity is None and not promised:
            return None
        facts = subject.program_facts()
        if isinstance(facts, Unchecked):
            return facts
        found = {layer.layer: layer for layer in facts.layers}
        broken = [name for name in promised if name not in found or not found[name].pattern]
        if broken:
            told = [f"{name}: {found[name].reason or 'dense'}" if name in found else f"{name}: gone" for name in broken]
            return self.fails(
                f"the 2:4 pattern is broken in {len(broken)} of {len(promised)} layers: {'; '.join(told[:_SHOWN])}",
                [{"layer": line.partition(": ")[0], "problem": line.partition(": ")[2]} for line in told],
            )
        if not promised:
            return self.fails("2:4 is claimed, but the manifest lists no layer that has it")
        return self.passes(f"{len(promised)} layers are 2:4 in the files")
