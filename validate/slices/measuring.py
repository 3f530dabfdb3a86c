"""What a candidate is worth on each slice: the metrics of the whole, and what the slice's kind asks beside them (how
far answers move where rows were perturbed, whether rows that belong together get answers that do)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

from ...errors import InputError
from ...models.batching import Examples
from ...models.data import Data
from ..generation.continuations import continuation_drafts
from ..metrics.changed import SHOWN_OF_A_SLICE, most_changed
from ..metrics.drafts import MetricDraft
from ..metrics.quality import metric_drafts
from ..predictions import Predictions, broken
from ..records.report import ChangedExample, Check, Metric, Slice
from .chance import weighed_against_chance
from .invariance import invariance_drafts
from .pair_metrics import PairedAnswers, pair_drafts

if TYPE_CHECKING:
    from ..standard import SliceStandard, Standard

Answer = Callable[[Data | Examples], Predictions]
"""What a candidate answers to rows, or to these very tokens."""


def measure_slices(standard: Standard, answers: Predictions, answer: Answer) -> tuple[list[Slice], list[Check]]:
    """Every slice of the standard, measured; and a failed check for each on which the candidate's outputs are not
    finite.

    Args:
        answers: the candidate's, to the whole.
        answer: how more of them are had, for slices that have rows of their own. They are dropped once measured.
    """
    slices, checks = [], []
    for part in standard.slices:
        ours = answer(part.examples or part.standard.data) if part.positions is None else part.part_of(answers)
        if broken(ours):
            checks.append(
                Check(name="finite outputs", passed=False, detail=f"NaN or infinity on the slice {part.name}")
            )
            slices.append(_slice(part, [], ["its answers hold NaN or infinity"]))
            continue
        found = _slice(part, *_metrics(_drafts(standard, part, answers, ours), part))
        slices.append(found.model_copy(update={"changed": _changed(part, ours)}))
    return slices, checks


def _changed(part: SliceStandard, ours: Predictions) -> list[ChangedExample]:
    """Those of a slice that has rows of its own: others are among the whole's."""
    if part.positions is not None:
        return []
    found = most_changed(part.standard, ours, SHOWN_OF_A_SLICE)
    if part.together is None:
        return found
    places = part.together.places
    return [item.model_copy(update={"row": int(places[item.row - 1]) + 1}) for item in found]


def _drafts(whole: Standard, part: SliceStandard, answers: Predictions, ours: Predictions) -> Iterable[MetricDraft]:
    own, task = part.standard, whole.teacher.task.name
    drafts = metric_drafts(task, own.predictions, ours, own.references, own.label_names, own.pairs)
    if part.together is not None:
        paired = PairedAnswers(
            task, own.predictions, ours, part.together.groups, own.rows, own.references, own.label_names
        )
        return chain(pair_drafts(part.together.kind, paired), drafts)
    if part.kind == "prompts":
        return chain(drafts, continuation_drafts(own.predictions, ours))
    if part.kind != "perturbed":
        return drafts
    sides = (whole.predictions, own.predictions), (answers, ours)
    return chain(drafts, invariance_drafts(task, *sides, (whole.rows, own.rows)))


def _metrics(drafts: Iterable[MetricDraft], part: SliceStandard) -> tuple[list[Metric], list[str]]:
    """Those that the slice allows: of few rows, or of rows that are all alike, some are not defined."""
    found: list[Metric] = []
    missing: list[str] = []
    remaining = iter(drafts)
    while True:
        try:
            draft = next(remaining, None)
        except InputError as error:  # the task needs more rows than there are
            return found, [*missing, error.message.rstrip(".")]
        if draft is None:
            return found, missing
        try:
            found.append(draft.metric(f"{part.standard.data_name}, slice {part.name}"))
        except InputError:
            missing.append(f"no {draft.name}, which these examples do not define")


def _slice(part: SliceStandard, metrics: list[Metric], said: list[str]) -> Slice:
    found = Slice(name=part.name, kind=part.kind, count=part.count, metrics=metrics)
    if found.too_small:
        said = [f"{part.count} examples are too few to judge by", *said]
    else:
        metrics, doubts = weighed_against_chance(metrics, part.standard.references)
        said = [*said, *doubts]
    return found.model_copy(update={"metrics": metrics, "note": "; ".join(said) or None})
