"""Whether the program computes in what its manifest claims."""

from __future__ import annotations

from collections import Counter

from ...exporters.layer_facts import LayerFacts
from ...exporters.settings import CALIBRATED, WEIGHT_ONLY, Precision
from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked

_FLOATS: dict[Precision, set[str]] = {
    "fp32": {"float32"},
    "tf32": {"float32"},
    "fp16": {"float16", "float32"},
    "bf16": {"bfloat16", "float32"},
}
"""The types that a claim allows for products with a weight: norms and heads may stay in float32."""
_HINTS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_RUNTIME = "INFERENCE_PRECISION_HINT"
_SHOWN = 3


class StoredPrecision(SubjectCheck):
    """The types of the weights in the files, and of what they are multiplied with, are those of the claimed precision;
    what is claimed to be quantised is. Sees a `bf16` graph behind an `fp32` claim and layers that were left out of an
    int8; cannot see weights that were rounded and then stored as float32 (the weight audit does)."""

    name = "stored precision"
    from_files = True

    def look(self, subject: Subject) -> Check | Unchecked | None:
        precision = subject.manifest.settings.precision
        if precision == "native":
            return None
        facts = subject.program_facts()
        if isinstance(facts, Unchecked):
            return facts
        if not facts.layers:
            return Unchecked("its graph has no product with a stored weight that is known here")
        found = Counter(layer.precision for layer in facts.layers)
        told = ", ".join(f"{count} x {kind}" for kind, count in found.most_common())
        wrong = [layer for layer in facts.layers if not _allowed(layer, precision)]
        if precision in _FLOATS and wrong:
            named = ", ".join(f"{layer.layer} is {layer.precision}" for layer in wrong[:_SHOWN])
            return self.fails(f"{precision} is claimed, but {named} ({len(wrong)} of {len(facts.layers)} layers)")
        if precision not in _FLOATS and len(wrong) == len(facts.layers):
            return self.fails(f"{precision} is claimed, but no layer is quantised: {told}")
        return self.passes(f"{precision}: {told}")


def _allowed(layer: LayerFacts, precision: Precision) -> bool:
    if precision in _FLOATS:
        return {layer.stored, layer.computed} <= _FLOATS[precision]
    if precision in CALIBRATED:
        return layer.stored not in _HINTS.values() and layer.computed not in _HINTS.values()
    assert precision in WEIGHT_ONLY
    return layer.stored not in _HINTS.values()


class RuntimePrecision(SubjectCheck):
    """What the runtime says it computes in, read back after loading, is no coarser than what the manifest claims: a
    runtime that picks bfloat16 on its own makes an `fp32` artifact another program. Sees what the runtime tells; where
    it tells nothing (ONNX Runtime), the graph's types are all there is (`stored precision`)."""

    name = "runtime precision"

    def look(self, subject: Subject) -> Check | Unchecked | None:
        precision = subject.manifest.settings.precision
        if subject.runner is None or precision not in _FLOATS:
            return None
        told = subject.runner.properties.get(_RUNTIME)
        if told is None:
            return None
        computed = _HINTS.get(told, told)
        if computed not in _FLOATS[precision]:
            asked = subject.manifest.compile_properties.get(_RUNTIME)
            why = f"the manifest asks for {asked}" if asked else "the manifest asks for nothing, so the runtime chooses"
            return self.fails(f"{precision} is claimed, but the runtime computes in {computed}: {why}")
        return self.passes(f"{precision} is claimed, and the runtime computes in {computed}")
