"""Parity: a program's outputs against those of the module it was made from, at shapes where exports go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...errors import InputError
from ...exporters.artifact import CacheFacts, CheckRecord
from ...exporters.settings import Precision
from ...models.batching import Batch
from .tolerances import tolerance_of

Run = Callable[[Mapping[str, torch.Tensor]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Difference:
    """How far one output is from the reference at one shape."""

    output: str
    shape: str
    largest: float
    relative: float
    cosine: float
    passed: bool


def check_parity(
    program: Run,
    reference: Run,
    probes: Iterable[tuple[str, Batch]],
    precision: Precision,
    cache: CacheFacts | None = None,
) -> CheckRecord:
    """Run both on every probe. A shape that the program refuses is a failure: it was baked in."""
    rows: list[Difference] = []
    tolerance = tolerance_of(precision, cache).module
    known = [(shape, batch, reference(batch)) for shape, batch in probes]
    # Of all shapes together: one text's output may happen to be near zero, and rounding is no smaller there.
    scales = _largest(known)
    for shape, batch, expected in known:
        try:
            found = program(batch)
        except InputError as error:
            rows += [Difference(f"{name}: {error.message}", shape, np.inf, np.inf, 0.0, False) for name in expected]
            continue
        for name, values in expected.items():
            rows.append(_compare(name, shape, found.get(name), values, batch, scales[name], tolerance))
    failed = [row for row in rows if not row.passed]
    return CheckRecord(
        name="parity",
        passed=not failed,
        detail=_detail(rows, failed, tolerance),
        rows=[
            {
                "output": row.output,
                "shape": row.shape,
                "largest difference": _finite(row.largest),
                "share of the output": _finite(row.relative),
                "cosine": _finite(row.cosine),
                "passed": row.passed,
            }
            for row in rows
        ],
    )


def _largest(known: list[tuple[str, Batch, Mapping[str, np.ndarray]]]) -> dict[str, float]:
    """The largest magnitude of each output over all probes."""
    scales: dict[str, float] = {}
    for _, batch, expected in known:
        for name, values in expected.items():
            scales[name] = max(scales.get(name, 0.0), float(np.max(np.abs(without_padding(values, batch)))))
    return scales


def _compare(
    name: str,
    shape: str,
    found: np.ndarray | None,
    expected: np.ndarray,
    batch: Batch,
    scale: float,
    tolerance: float,
) -> Difference:
    if found is None or found.shape != expected.shape:
        what = "missing" if found is None else f"of shape {found.shape} instead of {expected.shape}"
        return Difference(f"{name} ({what})", shape, np.inf, np.inf, 0.0, False)
    found, expected = without_padding(found, batch), without_padding(expected, batch)
    largest = float(np.max(np.abs(found - expected)))
    relative = largest / scale if scale > 0 else largest
    lengths = float(np.linalg.norm(found) * np.linalg.norm(expected))
    cosine = float(np.vdot(found, expected)) / lengths if lengths > 0 else 1.0
    return Difference(name, shape, largest, relative, cosine, bool(relative <= tolerance))


def without_padding(values: np.ndarray, batch: Batch) -> np.ndarray:
    """Outputs per token at real tokens only: what a program computes for padding does not matter."""
    mask = batch["attention_mask"].numpy().astype(bool)
    return values[mask] if values.ndim >= 3 and values.shape[:2] == mask.shape else values


def _detail(rows: list[Difference], failed: list[Difference], tolerance: float) -> str:
    worst = max(failed or rows, key=lambda row: np.inf if np.isnan(row.relative) else row.relative)
    said = f"{worst.output} at {worst.shape} differs by {worst.relative:.2g} of its magnitude"
    bound = f"tolerance {tolerance:g}"
    return f"{said}, {bound}" if failed else f"{len(rows)} shapes; the worst: {said}, {bound}"


def _finite(value: float) -> float:
    """JSON has no infinity: the largest double stands in."""
    return value if np.isfinite(value) else float(np.finfo(np.float64).max)
