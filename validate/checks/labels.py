"""Whether the labels mean what they say."""

from __future__ import annotations

import numpy as np
from scipy import stats
from scipy.optimize import linear_sum_assignment

from ...files import read_json
from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked

LABELLED = ("text-classification", "token-classification")
_DOUBT = 1e-6
"""Probability of so many answers for the other order by chance, below which the order is wrong."""
_GAIN = 0.1
_SHOWN = 5


class LabelNames(SubjectCheck):
    """`id2label` of the artifact's `config.json` equals the checkpoint's, id by id. It cannot see columns that the
    program itself has exchanged: see `label order`, `parity` and the `weight audit`."""

    name = "label names"
    from_files = True

    def look(self, subject: Subject) -> Check | Unchecked | None:
        if subject.manifest.task not in LABELLED:
            return None
        if subject.reference is None:
            return Unchecked(subject.student_missing)
        ours = _names(read_json(subject.folder / "config.json").get("id2label") or {})
        theirs = _names(subject.reference.model.config.id2label or {})
        wrong = [index for index in sorted({*ours, *theirs}) if ours.get(index) != theirs.get(index)]
        if not wrong:
            return self.passes(f"{len(ours)} labels in the checkpoint's order")
        exchanged = set(ours.values()) == set(theirs.values())
        what = "the order of the labels is swapped" if exchanged else "they are other labels"
        told = [f"{index} is {ours.get(index)!r} instead of {theirs.get(index)!r}" for index in wrong[:_SHOWN]]
        return self.fails(f"{what}: {', '.join(told)}")


def _names(id2label: dict[str, str] | dict[int, str]) -> dict[int, str]:
    return {int(index): str(name) for index, name in id2label.items()}


class LabelOrder(SubjectCheck):
    """No other order of the output's columns explains the teacher's answers far better than the order as it is: the
    best assignment of columns to the teacher's labels (Hungarian algorithm, Kuhn 1955) against the identity, by an
    exact McNemar test on the same examples. Sees exchanged columns without a student at hand; not an exchange of labels
    that are hardly ever answered."""

    name = "label order"

    def look(self, subject: Subject) -> Check | Unchecked | None:
        if subject.manifest.task not in LABELLED or subject.standard is None:
            return None
        ours, theirs = subject.answers["logits"], subject.standard.predictions["logits"]
        if ours.dtype == object:
            rows = [(a, b) for a, b in zip(ours, theirs[: len(ours)], strict=True) if len(a) == len(b)]
            if not rows:
                return Unchecked("it splits texts otherwise than its teacher")
            ours, theirs = (np.concatenate(side) for side in zip(*rows, strict=True))
        if ours.shape[1] != theirs.shape[1]:
            return self.fails(f"it has {ours.shape[1]} labels and its teacher {theirs.shape[1]}")
        ours, theirs = ours.argmax(axis=1), theirs[: len(ours)].argmax(axis=1)
        order = _best_order(ours, theirs, subject.answers["logits"][0].shape[-1])
        same, other = ours == theirs, order[ours] == theirs
        better, worse = int((other & ~same).sum()), int((same & ~other).sum())
        doubt = stats.binomtest(better, better + worse, alternative="greater").pvalue if better else 1.0
        if doubt < _DOUBT and (better - worse) / len(ours) > _GAIN:
            names = subject.standard.label_names
            moved = [f"{names[i]!r} answers for {names[to]!r}" for i, to in enumerate(order) if i != to][:_SHOWN]
            return self.fails(
                f"the order of the labels is swapped ({', '.join(moved)}): in the other order it agrees with its "
                f"teacher on {other.mean():.1%} of {len(ours)} answers instead of {same.mean():.1%}"
            )
        return self.passes(f"no other order fits {len(ours)} of the teacher's answers better ({same.mean():.1%} agree)")


def _best_order(ours: np.ndarray, theirs: np.ndarray, labels: int) -> np.ndarray:
    """For each of our labels the teacher's that it answers for, int64 [labels]."""
    counts = np.zeros((labels, labels))
    np.add.at(counts, (ours, theirs), 1)
    counts[np.diag_indices(labels)] += 0.5  # of equally good orders, the one as it is
    assigned: np.ndarray = linear_sum_assignment(-counts)[1]
    return assigned
