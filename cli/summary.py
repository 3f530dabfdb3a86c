"""What a checkpoint or an artifact is, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ..exporters.artifact import Manifest
    from ..models.checkpoint import Checkpoint
    from ..models.lineage import Lineage
    from ..recipes.inspection import Inspection

_FLOOR = " where the floor is "
"""What stands between a figure and its floor in the check of that name."""
_COUNTED = "matrix products, two a multiplication, zeros counted as any number"


def checkpoint_summary(checkpoint: Checkpoint, folder: Path, found: Inspection | None = None) -> dict[str, Any]:
    """Sizes, layers and history of a checkpoint that lies in `folder`."""
    from ..exporters.layer_facts import checkpoint_facts
    from ..files import total_size
    from ..models.anatomy import anatomy_of
    from ..models.shapes import shapes_of

    shapes = shapes_of(checkpoint.model)
    facts = found.facts if found and found.facts else checkpoint_facts(checkpoint, folder)
    ranges = {"batch": [1, None], "sequence": [1, checkpoint.max_length]}
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "hash": checkpoint.hash,
        "architecture": type(checkpoint.model).__name__,
        "task": checkpoint.task.name,
        "parameters": checkpoint.parameters,
        "size_bytes": total_size(folder.glob("*.safetensors")),
        **_flops(found),
        "layers": len(anatomy_of(checkpoint.model).layers(checkpoint.model)),
        "width": int(checkpoint.model.config.hidden_size),
        "heads": [layer.heads for layer in shapes.layers],
        "ffn_widths": [layer.ffn for layer in shapes.layers],
        "max_length": checkpoint.max_length,
        "inputs": [
            {"name": name, "dtype": "int64", "shape": [None, None], **ranges} for name in checkpoint.input_names
        ],
        "linear_layers": [layer.model_dump() for layer in facts.layers],
        "tables": [table.model_dump() for table in facts.tables],
        "history": _history(checkpoint.lineage),
    }


def artifact_summary(manifest: Manifest, folder: Path, found: Inspection | None = None) -> dict[str, Any]:
    """Identity, shape, checks, sparsity and history of an artifact, and its layers where they were looked at."""
    from ..exporters.artifact import artifact_size

    shapes = manifest.settings.shapes
    longest = min(shapes.max_sequence, manifest.max_length)
    ranges = {
        "batch": [shapes.min_batch, shapes.max_batch],
        "sequence": [shapes.min_sequence, longest],
        "tuned_for": [min(shapes.opt_batch, shapes.max_batch), min(shapes.opt_sequence, longest)],
    }
    return {
        "kind": "artifact",
        "path": str(folder),
        "artifact_id": manifest.artifact_id,
        "format": manifest.format,
        "precision": manifest.settings.precision,
        "task": manifest.task,
        "parameters": manifest.parameters,
        "size_bytes": artifact_size(folder),
        **_flops(found),
        "parent_hash": manifest.parent_hash,
        "max_length": manifest.max_length,
        "inputs": [{**spec.model_dump(), **ranges} for spec in manifest.inputs],
        "outputs": [spec.model_dump() for spec in manifest.outputs],
        "compile_properties": manifest.compile_properties,
        "checks": [check.model_dump() for check in manifest.checks],
        "sparse_layers": [layer.model_dump() for layer in manifest.sparse_layers],
        **_layers(found),
        "evidence": manifest.evidence,
        "unverified": manifest.unverified,
        "history": _history(manifest.lineage),
    }


def _flops(found: Inspection | None) -> dict[str, Any]:
    if found is None:
        return {}
    flops = found.facts.flops if found.facts else None
    return {"flops": {"total": flops, "shape": list(found.shape), "counted": _COUNTED}}


def _layers(found: Inspection | None) -> dict[str, Any]:
    """`None` for layers that are not known, and then why."""
    if found is None:
        return {}
    if found.facts is None:
        return {"linear_layers": None, "tables": None, "layers_unknown": found.unknown}
    return {
        "linear_layers": [layer.model_dump() for layer in found.facts.layers],
        "tables": [table.model_dump() for table in found.facts.tables],
    }


def _history(lineage: Lineage) -> list[dict[str, Any]]:
    told = ("verb", "method", "rationale", "seconds", "note", "parent", "teacher", "data", "settings", "finished")
    return [step.model_dump(mode="json", include=set(told)) for step in lineage.steps]


def summary_table(summary: dict[str, Any]) -> Iterator[Table | str]:
    """The same for people."""
    from rich.table import Column, Table

    from .layer_table import layer_tables

    facts = Table(
        "fact", Column("value", overflow="fold"), show_header=False, title=summary["path"], title_justify="left"
    )
    for name, value in _facts(summary):
        facts.add_row(name, value)
    yield facts
    yield from layer_tables(summary)


def _facts(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from ..validate.records.report import size_text

    for name, value in summary.items():
        if name == "size_bytes":
            yield "size", f"{size_text(value)} ({value:,} bytes)"
        elif name == "flops":
            yield "FLOPs", _flops_text(value)
        elif isinstance(value, str | int) and name not in ("path", "layers_unknown"):
            yield name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value
    for sizes in ("heads", "ffn_widths"):
        if sizes in summary:
            yield sizes.replace("_", " "), ", ".join(map(str, summary[sizes]))
    for kind in ("inputs", "outputs"):
        for spec in summary.get(kind, []):
            shape = " x ".join("any" if size is None else str(size) for size in spec["shape"])
            yield kind.rstrip("s"), f"{spec['name']}: {spec['dtype']} [{shape}]{_ranges_text(spec)}"
    for name, value in summary.get("compile_properties", {}).items():
        yield "compile property", f"{name} = {value}"
    for check in summary.get("checks", []):
        yield check["name"], f"{'passed' if check['passed'] else 'FAILED'}: {check['detail']}"
    for number, step in enumerate(summary["history"], 1):
        why = f" ({step['rationale']})" if step["rationale"] else ""
        data = f", on {step['data']['rows']:,} rows of {step['data']['source']}" if step["data"] else ""
        yield f"step {number}", f"{step['verb']}: {step['method']}{why}{data}"


def _flops_text(flops: dict[str, Any]) -> str:
    batch, sequence = flops["shape"]
    if flops["total"] is None:
        return "not known"
    return f"{_scaled(flops['total'])}FLOPs for {batch} x {sequence} tokens ({flops['counted']})"


def _scaled(number: float) -> str:
    for power, name in ((12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:,.3g} {name}"
    return f"{number:,} "


def _ranges_text(spec: dict[str, Any]) -> str:
    parts = []
    for axis in ("batch", "sequence"):
        if axis in spec:
            low, high = spec[axis]
            parts.append(f"{axis} {low}" if low == high else f"{axis} {low} to {high or 'any'}")
    if "tuned_for" in spec:
        parts.append(f"tuned for {' x '.join(map(str, spec['tuned_for']))}")
    return "".join(f", {part}" for part in parts)


def precision_table(manifest: Manifest) -> Table:
    """What `--precision auto` tried, and what became of each."""
    from rich.table import Column, Table

    shapes, attempts = manifest.settings.shapes, manifest.evidence["precision auto"]
    floors = {attempt["quality"].partition(_FLOOR)[2] for attempt in attempts if "quality" in attempt}
    base = next(attempt["beside"] for attempt in attempts if "beside" in attempt)
    timed = f"Timed at {shapes.opt_batch} x {shapes.opt_sequence} tokens; speed-up over {base}."
    caption = f"{timed} Floor of quality: {', '.join(sorted(floors))}."
    table = Table(
        "precision", "quality", "median", "speed-up", "size", Column("outcome", overflow="fold"), caption=caption
    )
    for attempt in attempts:
        ms, ratio, low, size = (attempt.get(name) for name in ("p50_ms", "speedup", "speedup_low", "size_mb"))
        table.add_row(
            attempt["precision"],
            attempt.get("quality", "-").partition(_FLOOR)[0],
            "-" if ms is None else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms",
            "-" if ratio is None or attempt["beside"] == attempt["precision"] else _speed_up(ratio, low),
            f"{size:.1f} MB" if size is not None else "-",
            attempt["outcome"],
        )
    return table


def _speed_up(ratio: float, low: float | None) -> str:
    return f"{ratio:.2f}x" + (f" (at least {low:.2f}x)" if low is not None else "")
