"""What a training left behind, laid out so that what matters is seen first: quality, then the objectives, then what
each layer learnt; how the training ran is folded away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..metrics.headline import HEADLINE_METRICS, higher_is_better
from ..records.report import Curve, LayerSimilarity, Report, Step, short_number
from . import charts
from .figures import Panel, title_of
from .heatmap import closest, layer_similarity
from .svg import span

_METRIC = "eval/"
_MACHINERY = ("learning_rate", "grad_norm", "throughput")
_TITLES = {"loss": "Total loss", "sparsity": "Share of zeros", "grad_norm": "Gradient norm",
           "recall_at_1": "Recall@1", "f1": "F1", "ece": "ECE",
           "kl_mean": "KL, mean"}  # fmt: skip
_SPARSITY = "sparsity"
_METRICS_IN_SIGHT = 3
_DIGITS = 3
_METRIC_COLOUR, _SPARSITY_COLOUR, _OBJECTIVE_COLOUR, _MACHINERY_COLOUR = 1, 2, 3, 0


@dataclass(frozen=True)
class Group:
    """Panels that are read together; `folded` ones are opened by whoever wants to know."""

    title: str
    note: str
    panels: list[Panel]
    folded: bool = False
    two_a_row: bool = False


@dataclass(frozen=True)
class Training:
    """One step's training."""

    title: str
    groups: list[Group]


def trainings(report: Report) -> Iterator[Training]:
    """Every step that was traced, in the order of the history."""
    for number, step in enumerate(report.steps, 1):
        groups = list(_groups(step))
        if groups:
            yield Training(f"Step {number}, {step.verb}: {step.method}", groups)


def ends(step: Step) -> str:
    """Where the measured quality and the loss of a step started and ended, in a line; empty where none was traced."""
    metrics, objectives, _ = _sorted(step)
    shown = [*metrics[:_METRICS_IN_SIGHT], *(item for item in objectives if item.name == "loss")]
    return ", ".join(f"{title_of_curve(item)} {_first_and_last(item)}" for item in shown if _finite(item))


def likeness(similarity: LayerSimilarity) -> str:
    """Each student layer with the teacher layer that it came to be most like, in a line."""
    parts = []
    for row, (column, after) in enumerate(closest(similarity.after)):
        before = similarity.before[row][column]
        parts.append(f"{row} ≈ {column} ({short_number(before, 2)} → {short_number(after, 2)})")
    return ", ".join(parts)


def title_of_curve(curve: Curve) -> str:
    """What people call it: `eval/spearman_kept` -> `Spearman kept`; an objective keeps its own name."""
    name = curve.name.removeprefix(_METRIC)
    if name in _TITLES:
        return _TITLES[name]
    base = name.removesuffix("_kept").removesuffix("_difference")
    if base in _TITLES:
        return _TITLES[base] + name.removeprefix(base).replace("_", " ")
    return title_of(name) if curve.name.startswith(_METRIC) or name in _MACHINERY else name


def _sorted(step: Step) -> tuple[list[Curve], list[Curve], list[Curve]]:
    """The step's curves: metrics (those that stand for quality first), objectives (the total first), and the rest."""
    order = [name for names in HEADLINE_METRICS.values() for name in names]

    def rank(curve: Curve) -> tuple[int, int]:
        name = curve.name.removeprefix(_METRIC)
        kept = name.removesuffix("_kept")
        return order.index(kept) if kept in order else len(order), int(name != kept)

    metrics = sorted((curve for curve in step.curves if curve.name.startswith(_METRIC)), key=rank)
    machinery = [curve for curve in step.curves if curve.name in _MACHINERY]
    others = [*_MACHINERY, _SPARSITY]
    objectives = [curve for curve in step.curves if curve not in metrics and curve.name not in others]
    return metrics, sorted(objectives, key=lambda curve: curve.name != "loss"), machinery


def _groups(step: Step) -> Iterator[Group]:
    metrics, objectives, machinery = _sorted(step)
    steps = span([at for curve in step.curves for at in curve.steps], padding=0.0)
    if metrics:
        panels = [_metric_panel(curve, steps) for curve in metrics[:_METRICS_IN_SIGHT]]
        yield Group("Quality while training", "Measured on held-out examples; the mark is the best.", panels)
    zeros = next((curve for curve in step.curves if curve.name == _SPARSITY), None)
    if zeros is not None:
        yield _sparsity_group(zeros, [*metrics[:1], *(item for item in objectives if item.name == "loss")], steps)
    if objectives:
        panels = [_panel(curve, steps, _OBJECTIVE_COLOUR, _first_and_last(curve)) for curve in objectives]
        yield Group("Objectives", "What was made smaller: the weighted total, then each term by itself.", panels)
    if step.similarity is not None:
        yield _similarity_group(step.similarity)
    rest = [_metric_panel(curve, steps) for curve in metrics[_METRICS_IN_SIGHT:]]
    if rest:
        yield Group("More metrics", _names(metrics[_METRICS_IN_SIGHT:]), rest, folded=True)
    if machinery:
        panels = [_panel(curve, steps, _MACHINERY_COLOUR, _typical(curve)) for curve in machinery]
        yield Group("How the training ran", _names(machinery), panels, folded=True)


def _sparsity_group(zeros: Curve, measured: list[Curve], steps: tuple[float, float]) -> Group:
    """How sparsity grew, and what it did to the metric that stands for quality and to the loss."""
    panels = [_panel(zeros, steps, _SPARSITY_COLOUR, _first_and_last(zeros))]
    ends = span(zeros.values, padding=0.02)
    for item, series in zip(measured, (_METRIC_COLOUR, _OBJECTIVE_COLOUR), strict=False):
        by_zeros = _against(item, zeros)
        title = f"{title_of_curve(item)} against sparsity"
        drawn = charts.curve(by_zeros, series, ends, title, over="share of zeros")
        panels.append(Panel(title, _first_and_last(by_zeros), drawn))
    note = "Zeros in the matrices inside the layers. A cliff is where the curve against sparsity bends: cut no further."
    return Group("Sparsity", note, panels)


def _against(item: Curve, zeros: Curve) -> Curve:
    """A curve over the share of zeros: for each share the last value, which is what training at that share reached."""
    share_at = dict(zip(zeros.steps, zeros.values, strict=True))
    reached = {share_at[at]: value for at, value in zip(item.steps, item.values, strict=True) if at in share_at}
    shares = sorted(reached)
    return item.model_copy(update={"steps": shares, "values": [reached[share] for share in shares]})


def _similarity_group(similarity: LayerSimilarity) -> Group:
    panels = [
        Panel(f"{when} training", f"most alike: {_mean_of_best(matrix)} on average", layer_similarity(matrix, words))
        for when, words, matrix in (
            ("Before", "before training", similarity.before),
            ("After", "after training", similarity.after),
        )
    ]
    note = (
        "How alike the hidden states of each student layer and each teacher layer are (linear CKA): 0 is nothing in "
        "common, 1 the same up to rotation and scale. A frame marks the teacher layer that a student layer is most "
        "like; layers are counted from 0."
    )
    return Group("What each layer learnt", note, panels, two_a_row=True)


def _mean_of_best(matrix: list[list[float]]) -> str:
    best = [value for _, value in closest(matrix)]
    return short_number(sum(best) / len(best), 2)


def _names(curves: list[Curve]) -> str:
    return ", ".join(title_of_curve(curve).lower() for curve in curves)


def _panel(curve: Curve, steps: tuple[float, float], series: int, note: str, best: float | None = None) -> Panel:
    unit = f" {curve.unit}" if curve.unit else ""
    return Panel(title_of_curve(curve), note + unit, charts.curve(curve, series, steps, title_of_curve(curve), best))


def _metric_panel(curve: Curve, steps: tuple[float, float]) -> Panel:
    points = _finite(curve)
    if not points:
        return _panel(curve, steps, _METRIC_COLOUR, "empty")
    higher = higher_is_better(curve.name.removeprefix(_METRIC))
    at, best = (max if higher else min)(points, key=lambda point: point[1])
    last = "" if (at, best) == points[-1] else f", ends at {short_number(points[-1][1], _DIGITS)}"
    note = f"{'highest' if higher else 'lowest'} {short_number(best, _DIGITS)} at step {at:g}{last}"
    return _panel(curve, steps, _METRIC_COLOUR, note, best=at)


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(at, value) for at, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]


def _first_and_last(curve: Curve) -> str:
    points = _finite(curve)
    if not points:
        return "empty"
    return f"{short_number(points[0][1], _DIGITS)} → {short_number(points[-1][1], _DIGITS)}"


def _typical(curve: Curve) -> str:
    values = sorted(value for _, value in _finite(curve))
    if not values:
        return "empty"
    return f"median {short_number(values[len(values) // 2], _DIGITS)}, at most {short_number(values[-1], _DIGITS)}"
