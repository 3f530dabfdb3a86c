"""Files whose rows belong together: two sides of a pair, or all the ways in which one thing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...errors import InputError, UsageError, did_you_mean
from ...models.checkpoint import Checkpoint
from ...models.data import Data, Field, read_data
from ...models.tasks.base import texts_of

PairKind = Literal["invariance", "counterfactual", "bias"]
"""What the answers to rows that belong together should do: stay the same, change with the label, favour no side."""
PAIR_KINDS: tuple[str, ...] = get_args(PairKind)

_FIRST = Field("first", ("original", "sentence_pro", "pro", "sent_more", "before"))
_SECOND = Field("second", ("perturbed", "sentence_anti", "anti", "sent_less", "after", "revised", "counterfactual"))
_GROUP = Field("group", ("pair_id", "group_id", "pair"))
_SIDE = Field("side", ())
_OWN_FIELDS = (_FIRST, _SECOND, _GROUP, _SIDE)
PAIR_FIELDS = tuple(field.name for field in _OWN_FIELDS)
"""Fields that `--column` maps beside those of the task: two texts of one row, or what rows have in common."""

_TASKS: Mapping[str, tuple[str, ...]] = {
    "invariance": ("text-classification", "sentence-similarity", "text-generation"),
    "counterfactual": ("text-classification",),
    "bias": ("text-classification", "sentence-similarity", "text-generation"),
}


@dataclass(frozen=True)
class PairRows:
    """Rows, one text each, and which of them belong together."""

    kind: PairKind
    data: Data
    groups: tuple[np.ndarray, ...]
    """The rows of each pair or group, counted from 0, int64 [rows of the group], the first side first."""
    places: np.ndarray
    """The row of the file, counted from 0, that each row was read from: int64 [rows]."""

    def head(self, count: int | None) -> PairRows:
        """The first `count` pairs (all when `None`)."""
        if count is None or count >= len(self.groups):
            return self
        kept = self.groups[:count]
        rows = np.sort(np.concatenate(kept))
        return replace(
            self,
            data=replace(self.data, rows=self.data.rows.select(rows)),
            groups=tuple(np.searchsorted(rows, group) for group in kept),
            places=self.places[rows],
        )


def read_pairs(
    teacher: Checkpoint, kind: str, source: str | Path, columns: Mapping[str, str] | None = None
) -> PairRows:
    """Read a file of pairs: two texts in each row (fields `first` and `second`), or a text in each row (with a label,
    where it has one) and what the rows of a pair have in common (field `group`). The first side of such a pair is the
    one that comes first, or whose `side` does.

    Raises:
        UsageError: a kind that does not exist, or that the task has no measure for.
        InputError: neither layout, a row that belongs to no other, or a pair of more than two where sides are compared.
    """
    checked = check_kind(kind, teacher.task.name)
    own = {name: column for name, column in (columns or {}).items() if name in PAIR_FIELDS}
    data = read_data(source, (), columns=own, optional=_OWN_FIELDS)
    if data.has("first") and data.has("second"):
        return _two_texts_a_row(checked, data)
    if not data.has("group"):
        raise InputError(
            f"{source} has neither two columns of texts that belong together (fields 'first' and 'second') nor one "
            "that says which rows do (field 'group').",
            "Name them: --column first=COLUMN --column second=COLUMN, or --column group=COLUMN.",
        )
    task = teacher.task
    optional = (*task.optional_fields, _GROUP, _SIDE)
    known = {**(columns or {}), **{name: data.columns[name] for name in PAIR_FIELDS if data.has(name)}}
    return _text_a_row(checked, read_data(source, task.fields, columns=known, optional=optional))


def check_kind(kind: str, task: str) -> PairKind:
    """The kind, refused where it does not exist or the task's answers cannot be held to it.

    Raises:
        UsageError: says which and why.
    """
    for known in get_args(PairKind):
        if kind != known:
            continue
        if task not in _TASKS[known]:
            able = ", ".join(_TASKS[known])
            raise UsageError(f"Pairs of the kind {kind!r} cannot be measured for {task}; they can for {able}.")
        return known  # type: ignore[no-any-return]
    raise UsageError(
        f"There are no pairs of the kind {kind!r}; there are {', '.join(PAIR_KINDS)}.{did_you_mean(kind, PAIR_KINDS)}"
    )


def _two_texts_a_row(kind: PairKind, data: Data) -> PairRows:
    from datasets import Dataset

    sides = [texts_of(data, name) for name in ("first", "second")]
    texts = [text for both in zip(*sides, strict=True) for text in both]
    rows = np.arange(len(texts), dtype=np.int64)
    own = Data(Dataset.from_dict({"text": texts}), data.source, {"text": data.columns["first"]}, data.first_row)
    return PairRows(kind, own, tuple(rows.reshape(-1, 2)), rows // 2)


def _text_a_row(kind: PairKind, data: Data) -> PairRows:
    groups: dict[Any, list[int]] = {}
    for row, value in enumerate(data.values("group")):
        groups.setdefault(value, []).append(row)
    _check_groups(kind, data, groups)
    sides = data.values("side") if data.has("side") else [""] * len(data)
    order = {side: place for place, side in enumerate(dict.fromkeys(sides))}
    if data.has("side") and kind == "bias":
        _check_sides(data, groups, sides)
    members = [np.array(sorted(rows, key=lambda row: order[sides[row]]), dtype=np.int64) for rows in groups.values()]
    dropped = [name for name in PAIR_FIELDS if data.has(name)]
    own = replace(
        data,
        rows=data.rows.remove_columns(dropped),
        columns={name: column for name, column in data.columns.items() if name not in dropped},
    )
    return PairRows(kind, own, tuple(members), np.arange(len(data), dtype=np.int64))


def _check_groups(kind: PairKind, data: Data, groups: Mapping[Any, Sequence[int]]) -> None:
    for value, rows in groups.items():
        if value is None:
            raise InputError(f"Row {rows[0] + 1} of {data.source} has no {data.columns['group']!r}.", "Fill it in.")
        if len(rows) < 2:
            raise InputError(
                f"Row {rows[0] + 1} of {data.source} is the only one whose {data.columns['group']!r} is {value!r}: "
                "rows of one pair have it in common.",
                "Drop the row, or name another column: --column group=COLUMN.",
            )
        if kind == "bias" and len(rows) > 2:
            raise InputError(
                f"{data.source} has {len(rows)} rows whose {data.columns['group']!r} is {value!r}; a bias pair has two "
                "sides."
            )


def _check_sides(data: Data, groups: Mapping[Any, Sequence[int]], sides: Sequence[Any]) -> None:
    known = set(sides)
    for value, rows in groups.items():
        if len(known) != 2 or {sides[row] for row in rows} != known:
            raise InputError(
                f"The column {data.columns['side']!r} of {data.source} must have two values, and each pair one row of "
                f"each; the pair {value!r} has {', '.join(repr(sides[row]) for row in rows)}."
            )
