"""Checks laid out to be read: those that failed one by one, those that passed by candidate."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..records.report import Candidate, Check, Report


@dataclass(frozen=True)
class Found:
    """One check of one candidate, with the columns of its rows."""

    candidate: str
    name: str
    detail: str
    rows: list[dict[str, str | float | int | bool]]
    keys: list[str]
    numbers: set[str]
    """Those of the keys whose values are figures."""

    @classmethod
    def of(cls, candidate: Candidate, check: Check) -> Found:
        """The check as it is shown."""
        keys = list(dict.fromkeys(key for row in check.rows for key in row))
        values = {key: [row[key] for row in check.rows if key in row] for key in keys}
        numbers = {key for key in keys if all(_is_number(value) for value in values[key])}
        return cls(candidate.name, check.name, check.detail, check.rows, keys, numbers)


@dataclass(frozen=True)
class Sorted:
    """All checks of a report."""

    failed: list[Found] = field(default_factory=list)
    passed: dict[str, list[Found]] = field(default_factory=dict)
    """By the candidate's name."""


def sorted_checks(report: Report) -> Sorted:
    """Those that failed first, in the order of the report."""
    found = Sorted()
    for candidate, check in report.checks():
        told = Found.of(candidate, check)
        if check.passed:
            found.passed.setdefault(candidate.name, []).append(told)
        else:
            found.failed.append(told)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
