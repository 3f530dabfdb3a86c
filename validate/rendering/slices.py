"""Slices beside each other: what each candidate keeps of the teacher on each, and the examples that it changed most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..metrics.headline import headline_among
from ..records.report import FEWEST_IN_A_SLICE, Candidate, ChangedExample, Metric, Report, Slice, short_number
from .figures import Figure, figure_of

_WHOLE = "all examples"
_BESIDE = ("invariance", "consistency", "counterfactual_flips", "gap", "same_continuation", "next_token_kl")
"""Metrics that are shown with what is kept: those that only some kinds of slices have, and of language models the
divergence, which sees what perplexity does not."""
_LEAST_FULL = 0.05
"""The loss that is drawn in full colour where none is larger: what is smaller should look small."""


@dataclass(frozen=True)
class Cell:
    """What a candidate keeps on one slice: 1 is all that the teacher reaches there. Rows without labels, as pairs often
    are, may have nothing that is kept and yet what their kind asks."""

    kept: Figure | None
    few: bool
    lost: float
    """How full its colour is, 0 to 1: the square root of its share of the largest loss."""
    moved: str
    """What the slice's kind asks beside that, with the teacher's, in words."""

    @property
    def text(self) -> str:
        return self.kept.text if self.kept else "–"

    @property
    def interval(self) -> str:
        """The ends of the 95% interval, where it has one."""
        return self.kept.interval if self.kept else ""


@dataclass(frozen=True)
class Row:
    """One slice of every candidate; `None` where it was not measured."""

    name: str
    kind: str
    count: int | None
    note: str | None
    cells: list[Cell | None]


@dataclass(frozen=True)
class SliceMap:
    """All slices (rows) of all candidates (columns), the whole first."""

    meaning: str
    candidates: list[str]
    rows: list[Row]


class Changed(NamedTuple):
    """Examples that one candidate changed most, of all rows or of a slice."""

    name: str
    changed: list[ChangedExample]


class PlainTable(NamedTuple):
    """A table of text, with the words over it."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def slice_map(report: Report) -> SliceMap | None:
    """What each candidate keeps of its headline metric on each slice; nothing where there are no slices."""
    sliced = [candidate for candidate in report.candidates if candidate.slices]
    metric = _headline(sliced)
    if metric is None:
        return None
    parts = {part.name: part for candidate in sliced for part in candidate.slices}
    measured = [{part.name: part for part in [*candidate.slices, _whole(candidate)]} for candidate in sliced]
    judged = [part for each in measured for part in each.values() if not part.too_small]
    full = max([_LEAST_FULL, *(_loss(_kept(part, metric)) for part in judged)])
    rows = []
    for part in [_whole(sliced[0]), *parts.values()]:
        cells = [_cell(each.get(part.name), metric, full) for each in measured]
        own = part.name in parts
        rows.append(Row(part.name, part.kind if own else "", part.count if own else None, part.note, cells))
    return SliceMap(_meaning(metric), [candidate.name for candidate in sliced], rows)


def worst_slice(report: Report) -> str | None:
    """In one line, the slice on which a candidate keeps least, of those with enough examples to be judged by; nothing
    where it keeps no less than on the whole."""
    gated = [candidate for candidate in report.candidates if candidate.slices and not candidate.baseline]
    metric = _headline(gated)
    if metric is None:
        return None
    found = [
        (figure.value, candidate, part, figure)
        for candidate in gated
        for part in candidate.slices
        if not part.too_small and (figure := _kept(part, metric)) and math.isfinite(figure.value)
    ]
    if not found:
        return None
    _, candidate, part, figure = min(found, key=lambda item: item[0])
    whole = _kept(_whole(candidate), metric)
    if whole and figure.value >= whole.value:
        return None
    between = f" ({figure.interval})" if figure.interval else ""
    kept = f"{candidate.name} keeps {figure.text}{between} of the teacher's {_named(metric)}"
    beside = f"; on all examples {whole.text}" if whole else ""
    return f"Worst slice: {part.name} ({part.count:,} examples), where {kept}{beside}."


def changed_examples(report: Report) -> list[Changed]:
    """The examples of each candidate, then those of its slices that have rows of their own."""
    found = []
    for candidate in report.candidates:
        found.append(Changed(candidate.name, candidate.changed))
        found += [Changed(f"{candidate.name}, {part.name}", part.changed) for part in candidate.slices]
    return [each for each in found if each.changed]


def slice_tables(report: Report, escape: Callable[[str], str]) -> Iterator[PlainTable]:
    """The slices, and the examples that changed most, as tables in the markup that `escape` makes of a text."""
    for title, headings, rows in _plain_tables(report):
        yield PlainTable(title, [*map(escape, headings)], [[*map(escape, row)] for row in rows])


def _plain_tables(report: Report) -> Iterator[PlainTable]:
    found = slice_map(report)
    if found is not None:
        headings = ["Slice", "Examples", *found.candidates, "Note"]
        yield PlainTable(f"Slices: {found.meaning}", headings, [_plain_row(row) for row in found.rows])
    rows = [
        [each.name, f"{item.row:,}", item.text, item.label or "–", item.teacher, item.candidate,
         f"{short_number(item.distance, 3)} ({item.measure})"]
        for each in changed_examples(report)
        for item in each.changed
    ]  # fmt: skip
    if rows:
        headings = ["Changed by", "Row", "Text", "Label", "Teacher", "Candidate", "Distance"]
        yield PlainTable("Examples that changed most", headings, rows)


def _plain_row(row: Row) -> list[str]:
    count = "–" if row.count is None else f"{row.count:,}"
    return [row.name, count, *map(_cell_text, row.cells), row.note or ""]


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    told = ", ".join(filter(None, (cell.interval, cell.moved)))
    return f"{cell.text} ({told})" if told else cell.text


def _headline(candidates: Sequence[Candidate]) -> str | None:
    """Of the whole: a slice may lack what it has too few examples for."""
    return headline_among({metric.name for candidate in candidates for metric in candidate.metrics})


def _whole(candidate: Candidate) -> Slice:
    """All examples as if they were a slice."""
    return Slice(name=_WHOLE, kind="file", count=FEWEST_IN_A_SLICE, metrics=candidate.metrics)


def _kept(part: Slice, metric: str) -> Figure | None:
    """1 where the candidate is as the teacher, less where it is worse."""
    if metric == "perplexity":
        return _turned(part.metric("perplexity_ratio"), lambda ratio: 1 / ratio if ratio else math.inf)
    if metric == "flip_rate":
        return _turned(part.metric(metric), lambda flipped: 1 - flipped)
    return figure_of(part.metric(_kept_name(metric)))


def _kept_name(metric: str) -> str:
    """An agreement is relative to the teacher as it is."""
    return metric if metric == "agreement_spearman" else f"{metric}_kept"


def _named(metric: str) -> str:
    return {"agreement_spearman": "ranking", "flip_rate": "answers"}.get(metric, metric.replace("_", " "))


def _turned(metric: Metric | None, better: Callable[[float], float]) -> Figure | None:
    """A figure that is better lower as one that is better higher: its ends change places."""
    if metric is None:
        return None
    low, high = (None if end is None else better(end) for end in (metric.high, metric.low))
    return Figure(better(metric.value), low, high)


def _meaning(metric: str) -> str:
    if metric == "agreement_spearman":
        return "Agreement with the teacher (spearman) on each slice; 1 is full agreement."
    if metric == "perplexity":
        return "The teacher's perplexity over the candidate's on each slice; 1 is as good as the teacher."
    return f"Share of the teacher's {_named(metric)} that is kept on each slice."


def _loss(kept: Figure | None) -> float:
    return min(max(1 - kept.value, 0.0), 1.0) if kept is not None and math.isfinite(kept.value) else 0.0


def _cell(part: Slice | None, metric: str, full: float) -> Cell | None:
    if part is None:
        return None
    kept, moved = _kept(part, metric), _moved(part)
    if kept is None and not moved:
        return None
    return Cell(kept, part.too_small, math.sqrt(min(_loss(kept) / full, 1.0)), moved)


def _moved(part: Slice) -> str:
    found = [metric for name in _BESIDE if (metric := part.metric(name))]
    return "; ".join(f"{metric.name.replace('_', ' ')} {_beside_the_teacher(metric)}" for metric in found)


def _beside_the_teacher(metric: Metric) -> str:
    told = short_number(metric.value, 3)
    return told if metric.teacher is None else f"{told}, teacher {short_number(metric.teacher, 3)}"
