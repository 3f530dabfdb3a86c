"""The card of an artifact (`README.md`): what it is, how it was made, what was checked, and how it is run without
limbeck. It restates the manifest, for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import read_json
from ..models.card import plain, tags, title, write_card
from ..models.embedding import read_pooling
from ..models.shapes import KEY as SHAPES_KEY
from ..models.tasks import TASKS
from ..models.terms import Terms
from .artifact import CheckRecord, Manifest, TensorSpec

_TEMPLATE = Path(__file__).parent / "artifact_card.md.j2"
_RUNTIMES = {
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-engine": "TensorRT",
    "torch-aot": "torch (AOTInductor)",
    "torch-inductor": "torch.compile",
    "torch-eager": "torch",
    "executorch": "ExecuTorch",
}
"""Format to what runs it, for those that the template has examples for."""
_LIBRARIES = {
    "tensorrt-engine": "tensorrt",
    "torch-aot": "pytorch",
    "torch-inductor": "transformers",
    "torch-eager": "transformers",
}
_OF_TRANSFORMERS = ("torch-inductor", "torch-eager")
"""Formats that transformers loads, where their sizes are ones that its configurations can say."""
_DTYPES = ("float16", "bfloat16")
_MOST_ROWS = 20


def write_model_card(manifest: Manifest, folder: Path, terms: Terms) -> None:
    """Write the card and the licence files into an artifact's folder, before it is sealed. No time and no path of this
    machine is in it."""
    terms.save(folder)
    settings, known = manifest.settings, manifest.format in _RUNTIMES and manifest.task in TASKS
    if manifest.format in _OF_TRANSFORMERS and SHAPES_KEY in read_json(folder / "config.json"):
        known = False
    header = {
        "library_name": _LIBRARIES.get(manifest.format, plain(manifest.format)),
        "pipeline_tag": plain(manifest.task),
        "tags": [*tags(manifest.lineage), settings.precision, *([settings.sparsity] if settings.sparsity else [])],
    }
    facts = {
        **_examples_facts(manifest),
        **_torch_facts(manifest, folder),
        "has_example": known,
        "title": title(manifest.lineage),
        "runtime": _RUNTIMES.get(manifest.format, plain(manifest.format)),
        "parameters": manifest.parameters,
        "limbeck": plain(manifest.limbeck),
        "is_kit": manifest.is_kit,
        "cache": _cache(manifest),
        "tensors": list(_tensors(manifest)),
        "sparsity": _sparsity(manifest),
        "parent_hash": plain(manifest.parent_hash),
        "checks": [(plain(check.name), check.passed, plain(check.detail)) for check in manifest.checks],
        "tables": [_table(check) for check in manifest.checks if check.rows],
        "unverified": plain(_sentence(manifest.unverified)) if manifest.unverified else None,
        "caveats": [plain(_sentence(caveat)) for caveat in manifest.caveats],
        "versions": {plain(name): plain(version) for name, version in manifest.versions.items()},
        "lineage": manifest.lineage,
    }
    write_card(folder, _TEMPLATE, terms, header, facts)


def _examples_facts(manifest: Manifest) -> dict[str, Any]:
    """What the programs in the card are filled in with. Names come from the manifest, which may be anybody's: the
    template quotes them."""
    shapes = manifest.settings.shapes.within(manifest.max_length)
    dtype = manifest.outputs[0].dtype
    return {
        "format": plain(manifest.format),
        "task": plain(manifest.task),
        "precision": manifest.settings.precision,
        "tokenizer_graph": manifest.settings.tokenizer_graph,
        "host_code": manifest.settings.options.get("version_compatible") is True,
        "properties": {plain(name): plain(value) for name, value in manifest.compile_properties.items() if value},
        "inputs": [spec.name for spec in manifest.inputs],
        "output": manifest.outputs[0].name,
        "dtype": dtype if dtype in _DTYPES else "float32",
        "longest": shapes.max_sequence,
        "min_batch": shapes.min_batch,
        "padded": shapes.min_sequence > 1,
        "batch": _range(shapes.min_batch, shapes.max_batch),
        "sequence": _range(shapes.min_sequence, shapes.max_sequence),
    }


def _torch_facts(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What the examples for torch are filled in with beside those facts."""
    if not manifest.format.startswith("torch-") or manifest.task not in TASKS:
        return {}
    pooling = read_pooling(folder)
    return {
        "cuda": manifest.settings.options.get("device") == "cuda",
        "auto_class": TASKS[manifest.task].auto_class,
        "pooling": pooling.mode,
        "normalize": pooling.normalize,
        "torch_version": plain(manifest.versions.get("torch", "").partition("+")[0]),
    }


def _range(smallest: int, largest: int) -> str:
    return f"{smallest} to {largest}" if smallest < largest else f"just {smallest}"


def _tensors(manifest: Manifest) -> Iterator[tuple[str, str]]:
    def said(spec: TensorSpec) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in spec.shape)
        return f"`{plain(spec.name)}`: {plain(spec.dtype)} [{sizes}]"

    yield from (("input", said(spec)) for spec in manifest.inputs)
    yield from (("output", said(spec)) for spec in manifest.outputs)


def _cache(manifest: Manifest) -> str | None:
    kept = manifest.cache
    if kept is None:
        return None
    return f"{kept.values_per_token:,} numbers of each token of each text, in {plain(kept.precision)}"


def _sparsity(manifest: Manifest) -> str | None:
    eligible = [layer for layer in manifest.sparse_layers if layer.eligible]
    if not any(layer.pattern for layer in eligible):
        return None
    return f"{sum(layer.pattern for layer in eligible)} of {len(eligible)} layers that a sparse kernel could take"


def _table(check: CheckRecord) -> str:
    """A check's figures as a table of Markdown."""
    columns = list(check.rows[0])
    lines = [[f"{check.name}: {columns[0]}", *columns[1:]], ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in check.rows[:_MOST_ROWS]]
    return "\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
