"""The words of a comparison of two reports that every rendering of it shows."""

from __future__ import annotations

import math

from ..diff import CandidateDiff, FigureChange, Meaning, ReportDiff, VerdictChange
from ..records.report import short_number
from .figures import VERDICT_WORDS


def diff_verdict(diff: ReportDiff) -> str:
    """`Verdict: Pass, was Inconclusive`."""
    old, new = VERDICT_WORDS[diff.old.verdict], VERDICT_WORDS[diff.new.verdict]
    return f"{new} as before" if old == new else f"{new}, was {old}"


def diff_summary(diff: ReportDiff) -> str:
    """`2 better, 1 worse, 3 without a clear change, 4 changed, 9 equal; 5 not comparable.`"""
    words: dict[Meaning, str] = {"better": "better", "worse": "worse", "no clear change": "without a clear change",
             "changed": "changed, without an interval to judge by", "equal": "equal",
             "not comparable": "not comparable"}  # fmt: skip
    counts = [(diff.count(meaning), said) for meaning, said in words.items()]
    return (", ".join(f"{count} {said}" for count, said in counts if count) or "Nothing is in both reports") + "."


def change_text(figure: FigureChange) -> str:
    """`+0.0120 (0.0010 to 0.0230)`, `−1.20 (−15 %)`, `–` where there is none."""
    change = figure.change
    if change is None:
        return "–"
    text = _signed(change.value)
    if change.low is not None or change.high is not None:
        return f"{text} ({_signed(change.low)} to {_signed(change.high)})"
    if figure.old.value > 0 and change.value:
        percent = 100 * change.value / figure.old.value
        return f"{text} ({_signed(percent, 2)} %)" if math.isfinite(percent) else text
    return text


def _signed(value: float | None, digits: int = 3) -> str:
    text = short_number(value, digits)
    if value is None or math.isinf(value):
        return text
    return f"+{text}" if value > 0 else text.replace("-", "−", 1) if value < 0 else text


def cells(row: FigureChange | VerdictChange) -> tuple[str, str, str, str, str]:
    """Name, old, new, change and meaning; the interval is that of the change."""
    if isinstance(row, VerdictChange):
        return row.name, row.old, row.new, "–", row.meaning
    name = f"{row.name} ({row.unit})" if row.unit else row.name
    meaning = f"{row.meaning}: {row.why}" if row.why else row.meaning
    return name, short_number(row.old.value), short_number(row.new.value), change_text(row), meaning


def unequal(candidate: CandidateDiff) -> list[FigureChange | VerdictChange]:
    """The rows that a table shows."""
    return [row for row in candidate.rows if row.meaning != "equal"]


def equal_text(candidate: CandidateDiff) -> str:
    """What needs no row: `Equal: size, parameters, check parity.`"""
    names = [row.name for row in candidate.rows if row.meaning == "equal"]
    return f"Equal: {'; '.join(names)}." if names else ""


def alone(diff: ReportDiff) -> list[tuple[str, list[str]]]:
    """What only one report has: `Only in OLD` and `Only in NEW`, with lines of candidates, then of their figures."""
    sides = (
        ("Only in OLD", diff.only_old, [(item, item.only_old) for item in diff.candidates]),
        ("Only in NEW", diff.only_new, [(item, item.only_new) for item in diff.candidates]),
    )
    found = []
    for title, candidates, figures in sides:
        lines = [f"candidate {name}" for name in candidates]
        lines += [f"{item.name}: {line}" for item, rows in figures for line in rows]
        found.append((title, lines))
    return [(title, lines) for title, lines in found if lines]
