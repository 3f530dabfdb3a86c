"""Slices: parts of the validation rows, other rows, and the same rows with mistakes put in, named so that a candidate
is measured on each (`measuring.py`), and a mean over all rows hides none of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from ...errors import InputError, UsageError, did_you_mean
from ...models.batching import IGNORED_LABEL, Feature
from ...models.data import TEXT_FIELDS, Data
from ..generation.continuations import continued
from ..predictions import Progress, predict
from ..rows.pairs import PairRows
from ..rows.perturbations import PERTURBATIONS, BuiltinSlice, Perturbation
from ..rows.prompts import PROMPT_SLICES, prompts
from ..standard import SliceStandard, Standard, examples_for, part_of, set_standard

__all__ = ["BUILTIN", "SlicesAsked", "with_slices"]

BUILTIN: tuple[str, ...] = get_args(BuiltinSlice)
MOST_VALUES = 20
"""Values of a column that slices are made of: of more, each would have too few rows to say anything."""
_QUARTERS = 4
_UNCUT = 1_000_000
"""Tokens that no text has: what tells how long one is before it is cut."""
_JOINT = "\ue000"
"""Between tagged words while they are perturbed: a private character, which no perturbation knows."""


@dataclass(frozen=True)
class SlicesAsked:
    """Which slices to measure.

    ```python
    SlicesAsked(files={"long": teacher.read("long.jsonl")}, by=["topic"], builtin=["length", "typos"])
    ```
    """

    files: Mapping[str, Data] = field(default_factory=dict)
    """Other rows by the name of their slice."""
    by: Sequence[str] = ()
    """Columns of the validation rows, kept when they were read: one slice a value."""
    builtin: Sequence[str] = ()
    """Names out of `BUILTIN`."""
    pairs: Mapping[str, PairRows] = field(default_factory=dict)
    """Other rows, of which some belong together, by the name of their slice."""


def with_slices(
    standard: Standard, asked: SlicesAsked, limit: int, progress: Progress = lambda done, total: None
) -> Standard:
    """The standard with slices that candidates will be measured on; the teacher is asked for its answers to those that
    have rows of their own.

    Args:
        limit: tokens beyond which some model that is compared cuts texts.

    Raises:
        UsageError: a slice that does not exist or does not suit the task, or two of one name.
        InputError: a column with no values to slice by, or with too many.
    """
    check_builtin(asked.builtin, standard.teacher.task.name)
    of_rows = functools.partial(set_standard, standard.teacher, max_length=standard.max_length, progress=progress)
    found = [SliceStandard(name, "file", of_rows(rows)) for name, rows in asked.files.items()]
    for name, pairs in asked.pairs.items():
        found.append(SliceStandard(name, pairs.kind, of_rows(pairs.data), together=pairs))
    for column in asked.by:
        found += _by_value(standard, column)
    for name in dict.fromkeys(asked.builtin):
        if name == "length":
            found += _by_length(standard, limit)
        elif name == "position":
            found += _by_position(standard)
        elif name in PROMPT_SLICES:
            found.append(_prompted(standard, name, limit, progress))
        else:
            found.append(_perturbed(standard, name, progress))
    names = [part.name for part in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"Two slices are called {name!r}.", "Give the one that is a file another name.")
    return replace(standard, slices=tuple(found))


def check_builtin(names: Collection[str], task: str) -> None:
    """Refuse a slice that is not built in, or that the task cannot have.

    Raises:
        UsageError: says which and why.
    """
    for name in names:
        if name not in BUILTIN:
            raise UsageError(
                f"There is no built-in slice {name!r}; there are {', '.join(BUILTIN)}.{did_you_mean(name, BUILTIN)}"
            )
        if name in PROMPT_SLICES and task != "text-generation":
            raise UsageError(
                f"The slice {name!r} is of prompts, which only a text-generation model goes on from; this one is for "
                f"{task}.",
                f"Leave it out; for {task} there are length, {', '.join(PERTURBATIONS)}.",
            )
        if name == "position" and task != "text-generation":
            raise UsageError(
                "The slice 'position' is of tokens by what stands before them, which only a text-generation model goes "
                f"by; this one is for {task}.",
                "Leave it out; length is by the tokens of a whole text.",
            )
        change = PERTURBATIONS.get(name)
        if change is not None and task == "token-classification" and not change.for_tagged_words:
            able = ", ".join(each.name for each in PERTURBATIONS.values() if each.for_tagged_words)
            raise UsageError(
                f"The slice {name!r} changes words, whose tags would no longer fit: for {task} there are {able} and "
                "length."
            )


def _part(
    standard: Standard, positions: np.ndarray, name: str, kind: Any, tokens: tuple[slice, ...] | None = None
) -> SliceStandard:
    """Some of the whole's examples, or of their tokens: nothing has to be run again."""
    rows = standard.rows[positions]
    own = replace(
        standard,
        references=_references(standard, np.unique(rows)),
        predictions=part_of(standard.predictions, positions, tokens),
        rows=rows,
        slices=(),
    )
    return SliceStandard(name, kind, own, positions, tokens)


def _references(standard: Standard, rows: np.ndarray) -> np.ndarray | None:
    if standard.references is None:
        return None
    logits = standard.predictions.get("logits")
    if logits is None or logits.dtype != object:
        return np.asarray(standard.references[rows])
    of_rows = np.split(standard.references, np.cumsum([len(row) for row in logits])[:-1])
    return np.concatenate([of_rows[row] for row in rows])


def _rows_part(standard: Standard, chosen: np.ndarray, name: str, kind: Any) -> SliceStandard:
    """The examples of the rows that a mask [rows of the data] has."""
    return _part(standard, np.flatnonzero(chosen[standard.rows]), name, kind)


def _by_value(standard: Standard, column: str) -> Iterator[SliceStandard]:
    values = np.array(values_by_row(standard.data, column), dtype=object)
    for name in sorted(set(values)):
        chosen = values == name
        if chosen[standard.rows].any():  # a row of text too short for a window has no example
            yield _rows_part(standard, chosen, f"{column}={name}", "column")


def values_by_row(data: Data, column: str) -> list[str]:
    """A column's value in every row, as slices are named after it.

    Raises:
        InputError: values that are neither text nor numbers, or more than 20 different ones.
    """
    values = [_value_name(value, column, data) for value in data.values_of_column(column)]
    if (count := len(set(values))) > MOST_VALUES:
        raise InputError(
            f"The column {column!r} of {data.source} has {count} values; slices are made of at most {MOST_VALUES}.",
            "Slice by a column with fewer values, or make one of ranges.",
        )
    return values


def _value_name(value: Any, column: str, data: Data) -> str:
    if value is None or value == "":
        return "(empty)"
    if not isinstance(value, str | int | float):
        raise InputError(
            f"The column {column!r} of {data.source} holds {type(value).__name__} values; slices are made of text and "
            "numbers."
        )
    return str(value)


def _by_length(standard: Standard, limit: int) -> Iterator[SliceStandard]:
    """Quarters of the examples by their tokens as the teacher counts them, and those that are cut beyond the limit."""
    lengths = _lengths(standard, limit)
    fitting = lengths[lengths <= limit]
    quarters = [0.25, 0.5, 0.75, 1.0] if len(fitting) else []
    low = int(fitting.min(initial=limit))
    # at lengths that occur, so that no slice is empty
    for high in map(int, np.unique(np.quantile(fitting, quarters, method="inverted_cdf")) if quarters else ()):
        yield _part(standard, np.flatnonzero((lengths >= low) & (lengths <= high)), f"length {low}-{high}", "length")
        low = high + 1
    if (lengths > limit).any():
        yield _part(standard, np.flatnonzero(lengths > limit), f"length beyond {limit}", "length")


def _by_position(standard: Standard) -> Iterator[SliceStandard]:
    """The scored tokens in quarters of the longest window, by how many tokens stand before each in its window."""
    before = [_places_scored(feature) for feature in _windows(standard)]
    longest = max(int(places[-1]) for places in before if len(places)) + 1
    edges = [longest * quarter // _QUARTERS for quarter in range(_QUARTERS + 1)]
    for low, high in itertools.pairwise([1, *edges[1:]]):
        spans = [slice(*np.searchsorted(places, (low, high))) for places in before]
        chosen = np.flatnonzero([some.start < some.stop for some in spans])
        if len(chosen):
            yield _part(
                standard, chosen, f"position {low}-{high - 1}", "position", tuple(spans[index] for index in chosen)
            )


def _windows(standard: Standard) -> list[Feature]:
    teacher = standard.teacher
    limit = standard.max_length or teacher.max_length
    return examples_for(teacher, standard.data, teacher.tokenizer, limit).features


def _places_scored(window: Feature) -> np.ndarray:
    """How many tokens stand before each that is scored, rising: int64 [scored]. The first of a window never is."""
    return np.flatnonzero(np.asarray(window["labels"][1:]) != IGNORED_LABEL) + 1


def _lengths(standard: Standard, limit: int) -> np.ndarray:
    """Tokens of every example, int64 [examples]: of a pair, those of its longer text; windows are never beyond."""
    teacher = standard.teacher
    windows = teacher.task.name == "text-generation"
    cut = standard.max_length or teacher.max_length if windows else _UNCUT
    features = examples_for(teacher, standard.data, teacher.tokenizer, cut).features
    lengths = np.array([len(feature["input_ids"]) for feature in features], dtype=np.int64)
    if standard.pairs:
        lengths = np.tile(lengths.reshape(2, -1).max(axis=0), 2)
    return np.minimum(lengths, limit) if windows else lengths


def _perturbed(standard: Standard, name: str, progress: Progress) -> SliceStandard:
    change, data = PERTURBATIONS[name], standard.data
    changed = {
        column: [_rewritten(value, change) for value in data.values(column)]
        for column in TEXT_FIELDS
        if data.has(column)
    }
    own = set_standard(standard.teacher, data.with_values(changed), max_length=standard.max_length, progress=progress)
    return SliceStandard(name, "perturbed", own)


def _prompted(standard: Standard, name: str, limit: int, progress: Progress) -> SliceStandard:
    from datasets import Dataset

    teacher, texts = standard.teacher, prompts(name)
    data = Data(Dataset.from_dict({"text": texts}), f"{name} prompts", {"text": "text"})
    examples = continued(teacher, texts, limit)
    answers = predict(teacher.run, examples, teacher.task, teacher.tokenizer, progress=progress)
    own = Standard(teacher, data, None, answers, max_length=limit, rows=examples.rows)
    return SliceStandard(name, "prompts", own, examples=examples)


def _rewritten(value: Any, change: Perturbation) -> Any:
    """A text, or tagged words, written differently; anything else as it is."""
    if isinstance(value, list):
        words = [str(word).replace(_JOINT, "") for word in value]
        return change(_JOINT.join(words)).split(_JOINT) if words else words
    return change(value) if isinstance(value, str) else value
