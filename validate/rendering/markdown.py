"""Markdown for pull requests: a report with verdict and gates in sight and the rest folded away, the gates alone, and
what changed between two reports."""

from __future__ import annotations

import html
import re
import urllib.parse
from collections.abc import Iterable, Sequence

from ..diff import CandidateDiff, ReportDiff
from ..records.report import GateResult, Report, Verdict, short_number
from .attribution import attribution_table
from .changes import alone, cells, diff_summary, diff_verdict, equal_text, unequal
from .figures import VERDICT_WORDS, Column, columns, plain, summary, worst_first
from .performance import (
    GENERATION_HEADINGS,
    SCENARIO_HEADINGS,
    TOKEN_HEADINGS,
    generation_rows,
    remarks,
    scenario_rows,
    token_rows,
)
from .slices import slice_tables
from .stages import stage_table
from .training import ends, likeness

_ICONS: dict[Verdict | None, str] = {"pass": "✅", "fail": "❌", "inconclusive": "❔", None: "➖"}
_MEANING_ICONS = {"better": "✅ ", "worse": "❌ ", "not comparable": "⚠️ "}
_CHANGE_HEADINGS = ("Figure", "Old", "New", "Change (95% interval)", "Means")
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown. Text from the report is escaped: it can draw no markup, mention nobody
    and break out of no table."""
    blocks = [
        f"## {_ICONS[report.verdict]} {VERDICT_WORDS[report.verdict]}: {_escape(report.title)}",
        _escape(summary(report)),
        _candidates(report),
        _gates(report.gates),
        _failed_checks(report),
        *(f"> **Note:** {_escape(note)}" for note in [*report.notes, *remarks(report)]),
        _folded("Written text", _rows(GENERATION_HEADINGS, generation_rows(report), 1)),
        _folded("MLPerf scenarios", _rows(SCENARIO_HEADINGS, scenario_rows(report), 3)),
        _folded("MLPerf scenarios: tokens", _rows(TOKEN_HEADINGS, token_rows(report), 2)),
        *(f"### {t.title}\n\n{_table(t.headings, t.rows, numbers_from=2)}" for t in stage_table(report, _escape)),
        *(f"### {t.title}\n\n{_table(t.headings, t.rows, numbers_from=3)}" for t in attribution_table(report, _escape)),
        *(_folded(t.title, _table(t.headings, t.rows, numbers_from=9)) for t in slice_tables(report, _escape)),
        _folded("Steps", _steps(report)),
        _folded("Every metric", _metrics(report)),
        _folded("Environment", _environment(report)),
        f"<sub>{_escape(report.kind)} of {_escape(report.created)} by limbeck · {_escape(report.command)}</sub>",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _escape(text: str) -> str:
    one_line = " ".join(html.escape(text, quote=False).split())
    # a zero-width space after @ keeps a name in a report from mentioning a person
    return _SPECIAL.sub(r"\\\1", one_line).replace("@", "@\u200b")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> str:
    """A table of cells that are Markdown already; columns from `numbers_from` on are right-aligned."""
    rules = ["---:" if index >= numbers_from else "---" for index in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows))


def _candidates(report: Report) -> str:
    if not report.measured:
        return ""
    shown = columns(report)
    rows = []
    for index, candidate in enumerate(report.measured):
        name = f"**{_escape(candidate.name)}**" + (" (teacher)" if candidate is report.teacher else "")
        if candidate.unverified:
            name += f"<br>⚠️ {_escape(candidate.unverified)}"
        program = _escape(f"{candidate.backend} {candidate.precision}")
        rows.append([name, program, *(_cell(column, index) for column in shown)])
    return _table(["Candidate", "Program", *(_escape(column.heading) for column in shown)], rows, numbers_from=2)


def _cell(column: Column, index: int) -> str:
    figure = column.figures[index]
    if figure is None:
        return "–"
    return figure.text + (f"<br><sub>{figure.interval}</sub>" if figure.interval else "")


def _gates(gates: Sequence[GateResult]) -> str:
    """Those that do not pass in sight, the others folded away."""
    if not gates:
        return ""
    found = worst_first(gates)
    open_ = [result for result in found if result.verdict != "pass"]
    passed = [result for result in found if result.verdict == "pass"]
    blocks = ["### Gates", _verdicts(open_) if open_ else ""]
    if passed:
        title = f"{len(passed)} {'passes' if len(passed) == 1 else 'pass'}"
        blocks.append(_folded(title, _verdicts(passed)) if open_ else _verdicts(passed))
    return "\n\n".join(filter(None, blocks))


def _verdicts(gates: Sequence[GateResult]) -> str:
    rows = [
        [
            f"{_ICONS[result.verdict]} {VERDICT_WORDS[result.verdict]}",
            _escape(result.asked),
            _escape(result.candidate),
            _escape(result.reason) + (f"<br><sub>why: {_escape(result.gate.why)}</sub>" if result.gate.why else ""),
        ]
        for result in gates
    ]
    return _table(["Verdict", "Gate", "Candidate", "Found"], rows, numbers_from=4)


def _rows(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A table of plain cells, or nothing where there are none."""
    return _table(headings, [[_escape(cell) for cell in row] for row in rows], numbers_from) if rows else ""


def _failed_checks(report: Report) -> str:
    failed = [(candidate, check) for candidate, check in report.checks() if not check.passed]
    lines = [
        f"- ❌ **{_escape(check.name)}** of {_escape(item.name)}: {_escape(check.detail)}" for item, check in failed
    ]
    return "### Failed checks\n\n" + "\n".join(lines) if lines else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>" if body else ""


def _steps(report: Report) -> str:
    lines = []
    for step in report.steps:
        settings = ", ".join(f"{key}={value}" for key, value in plain(step.settings) if key)
        lines.append(
            f"1. **{_escape(step.verb)}**, {_escape(step.method)}" + (f": {_escape(settings)}" if settings else "")
        )
        traced = ends(step)
        alike = f"Layers, student ≈ teacher (linear CKA): {likeness(step.similarity)}" if step.similarity else None
        lines += [f"   {_escape(text)}" for text in (step.rationale, step.note, traced, alike) if text]
    return "\n".join(lines)


def _metrics(report: Report) -> str:
    rows = [
        [
            _escape(candidate.name),
            _escape(metric.name),
            _escape(f"{short_number(metric.value)} {metric.unit}"),
            f"{short_number(metric.low)} to {short_number(metric.high)}" if metric.low is not None else "–",
            short_number(metric.teacher),
            "–" if metric.count is None else f"{metric.count:,}",
        ]
        for candidate in report.measured
        for metric in candidate.metrics
    ]
    headings = ["Candidate", "Metric", "Value", "95% interval", "Teacher", "Examples"]
    return _table(headings, rows, numbers_from=2) if rows else ""


def _environment(report: Report) -> str:
    rows = [[_escape(key), _escape(value)] for key, value in plain(report.environment) if key]
    return _table(["Fact", "Value"], rows, numbers_from=2) if rows else ""


def render_gate_summary(report: Report, page: str | None = None) -> str:
    """The verdict, then a row a gate, those that failed first: what a job's summary has room for.

    Args:
        page: where the whole report can be seen, relative to where this text will lie.
    """
    blocks = [
        f"## {_ICONS[report.verdict]} {VERDICT_WORDS[report.verdict]}: {_escape(report.title)}",
        _escape(summary(report)),
        _gates(report.gates),
        _failed_checks(report),
        f"[The whole report]({urllib.parse.quote(page)})" if page else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_diff_markdown(diff: ReportDiff) -> str:
    """What changed between two reports, fit for a comment on a pull request."""
    differences = [
        f"- **{_escape(item.topic)}**: {_escape(item.old)} → {_escape(item.new)}"
        + (f" ({_escape(item.effect)})" if item.effect else "")
        for item in diff.differences
    ]
    only = [f"### {title}\n\n" + "\n".join(f"- {_escape(line)}" for line in lines) for title, lines in alone(diff)]
    titles = f"{_escape(diff.old.title)} ({_escape(diff.old.created)}) → {_escape(diff.new.title)}"
    blocks = [
        f"## {_ICONS[diff.new.verdict]} {diff_verdict(diff)}: {diff_summary(diff)}",
        f"{titles} ({_escape(diff.new.created)})",
        "\n".join(differences),
        *(_changes(item) for item in diff.candidates if item.rows),
        *only,
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _changes(candidate: CandidateDiff) -> str:
    rows = []
    for row in unequal(candidate):
        name, old, new, change, meaning = cells(row)
        rows.append([_escape(name), old, new, change, _MEANING_ICONS.get(row.meaning, "") + meaning])
    blocks = [
        f"### {_escape(candidate.name)}",
        f"> **Note:** {_escape(candidate.note)}" if candidate.note else "",
        _table(_CHANGE_HEADINGS, rows, numbers_from=1) if rows else "",
        _escape(equal_text(candidate)),
    ]
    return "\n\n".join(block for block in blocks if block)
