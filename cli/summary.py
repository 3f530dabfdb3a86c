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


def checkpoint_summary(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Sizes, layers and history of a checkpoint."""
    from ..models.anatomy import anatomy_of
    from ..models.shapes import shapes_of

    shapes = shapes_of(checkpoint.model)
    anatomy = anatomy_of(checkpoint.model)
    layers = [
        {"layer": name, "shape": list(module.weight.shape), "zeros": round(_zeros(module.weight), 4)}
        for name, module in anatomy.linear_layers(checkpoint.model)
    ]
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "hash": checkpoint.hash,
        "architecture": type(checkpoint.model).__name__,
        "task": checkpoint.task.name,
        "parameters": checkpoint.parameters,
        "layers": len(anatomy.layers(checkpoint.model)),
        "width": int(checkpoint.model.config.hidden_size),
        "heads": [layer.heads for layer in shapes.layers],
        "ffn_widths": [layer.ffn for layer in shapes.layers],
        "max_length": checkpoint.max_length,
        "linear_layers": layers,
        "history": _history(checkpoint.lineage),
    }


def _zeros(weight: Any) -> float:
    return float((weight == 0).float().mean())


def artifact_summary(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Identity, shape, checks, sparsity and history of an artifact."""
    from ..exporters.artifact import artifact_size

    return {
        "kind": "artifact",
        "path": str(folder),
        "artifact_id": manifest.artifact_id,
        "format": manifest.format,
        "precision": manifest.settings.precision,
        "task": manifest.task,
        "parameters": manifest.parameters,
        "size_bytes": artifact_size(folder),
        "parent_hash": manifest.parent_hash,
        "max_length": manifest.max_length,
        "inputs": [spec.model_dump() for spec in manifest.inputs],
        "outputs": [spec.model_dump() for spec in manifest.outputs],
        "compile_properties": manifest.compile_properties,
        "checks": [check.model_dump() for check in manifest.checks],
        "sparse_layers": [layer.model_dump() for layer in manifest.sparse_layers],
        "evidence": manifest.evidence,
        "unverified": manifest.unverified,
        "history": _history(manifest.lineage),
    }


def _history(lineage: Lineage) -> list[dict[str, Any]]:
    return [
        {
            "verb": step.verb,
            "method": step.method,
            "rationale": step.rationale,
            "seconds": step.seconds,
            "note": step.note,
        }
        for step in lineage.steps
    ]


def summary_table(summary: dict[str, Any]) -> Iterator[Table]:
    """The same for people."""
    from rich.table import Column, Table

    facts = Table(
        "fact", Column("value", overflow="fold"), show_header=False, title=summary["path"], title_justify="left"
    )
    for name, value in summary.items():
        if isinstance(value, str | int) and name != "path":
            facts.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    for sizes in ("heads", "ffn_widths"):
        if sizes in summary:
            facts.add_row(sizes.replace("_", " "), ", ".join(map(str, summary[sizes])))
    for kind in ("inputs", "outputs"):
        for spec in summary.get(kind, []):
            shape = " x ".join("any" if size is None else str(size) for size in spec["shape"])
            facts.add_row(kind.rstrip("s"), f"{spec['name']}: {spec['dtype']} [{shape}]")
    for check in summary.get("checks", []):
        facts.add_row(check["name"], f"{'passed' if check['passed'] else 'FAILED'}: {check['detail']}")
    for number, step in enumerate(summary["history"], 1):
        why = f" ({step['rationale']})" if step["rationale"] else ""
        facts.add_row(f"step {number}", f"{step['verb']}: {step['method']}{why}")
    yield facts
    if summary.get("sparse_layers"):
        yield _sparse_table(summary["sparse_layers"])
    elif summary.get("linear_layers"):
        yield _layer_table(summary["linear_layers"])


def _sparse_table(layers: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("layer", "reduction x output", "2:4", "zeros", "remark")
    for layer in layers:
        pattern = "yes" if layer["pattern"] else "no" if layer["eligible"] else "not eligible"
        table.add_row(layer["layer"], " x ".join(map(str, layer["shape"])), pattern, f"{layer['zeros']:.1%}",
                      layer["reason"])  # fmt: skip
    return table


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("layer", "weight", "zeros")
    for layer in layers:
        table.add_row(layer["layer"], " x ".join(map(str, layer["shape"])), f"{layer['zeros']:.1%}")
    return table


def precision_table(attempts: list[dict[str, Any]]) -> Table:
    """What `--precision auto` tried, and what became of each."""
    from rich.table import Column, Table

    table = Table("precision", "quality", "median", "speed-up of fp32", "size", Column("outcome", overflow="fold"))
    for attempt in attempts:
        ms, ratio, low, size = (attempt.get(name) for name in ("p50_ms", "speedup", "speedup_low", "size_mb"))
        table.add_row(
            attempt["precision"],
            attempt.get("quality", "-"),
            f"{ms:.3g} ms" if ms is not None else "-",
            f"{ratio:.2f}x" + (f" (at least {low:.2f}x)" if low is not None else "") if ratio is not None else "-",
            f"{size:.1f} MB" if size is not None else "-",
            attempt["outcome"],
        )
    return table
