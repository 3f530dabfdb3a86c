"""Checks of an artifact by name: each sees one kind of defect and names its cause."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import InputError
from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked, subject_of
from .behaviour import Causality, LongInputs, PaddingMask, Repeatability, Shapes
from .cache import KeptTokens
from .labels import LabelNames, LabelOrder
from .parity import ParityWithStudent
from .precision import RuntimePrecision, StoredPrecision
from .ranges import ActivationRanges
from .sparsity import SparsePattern
from .teacher import TeacherSkill
from .threads import Threads
from .tokenizer import SameTokenizer, Truncation
from .weights import WeightAudit

CHECKS: dict[str, type[SubjectCheck]] = {
    check.name: check
    for check in (
        SameTokenizer,
        Truncation,
        LabelNames,
        StoredPrecision,
        SparsePattern,
        WeightAudit,
        Shapes,
        RuntimePrecision,
        Threads,
        LongInputs,
        Repeatability,
        PaddingMask,
        Causality,
        KeptTokens,
        ParityWithStudent,
        LabelOrder,
        ActivationRanges,
        TeacherSkill,
    )
}

__all__ = ["CHECKS", "Examined", "Subject", "SubjectCheck", "Unchecked", "examine", "subject_of"]


@dataclass(frozen=True)
class Examined:
    """What the checks found."""

    checks: list[Check]
    unchecked: dict[str, str]
    """Checks that would apply and could not be made, by name, with the reason."""

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return all(check.passed for check in self.checks)

    @property
    def refuses_shapes(self) -> bool:
        """The program does not take what its manifest lists, so nothing can be measured on it."""
        return any(check.name == Shapes.name and not check.passed for check in self.checks)

    def beside(self, recorded: Iterable[Check]) -> list[Check]:
        """These checks, after those recorded at the export that were not made again."""
        made = {check.name for check in self.checks}
        return [*(check for check in recorded if check.name not in made), *self.checks]

    @property
    def notes(self) -> list[str]:
        """One sentence for each reason, with what could not be checked."""
        reasons = dict.fromkeys(self.unchecked.values())
        named = {reason: [name for name, why in self.unchecked.items() if why == reason] for reason in reasons}
        return [f"not checked, since {reason}: {', '.join(names)}." for reason, names in named.items()]


def examine(subject: Subject, *, from_files: bool = False) -> Examined:
    """Every check that applies to the artifact, the cheapest first. A program that refuses shapes of its own manifest
    is not run any further.

    Args:
        from_files: only those that run nothing.
    """
    found, unchecked = list[Check](), dict[str, str]()
    for check in CHECKS.values():
        runs = not check.from_files
        if (runs and from_files) or (runs and Examined(found, unchecked).refuses_shapes and check is not TeacherSkill):
            continue
        try:
            result = check().look(subject)
        except InputError as error:  # such as tokens that the program has no embedding for
            result = Unchecked(error.message.removesuffix("."))
        if isinstance(result, Unchecked):
            unchecked[check.name] = result.reason
        elif result is not None:
            found.append(result)
    return Examined(found, unchecked)
