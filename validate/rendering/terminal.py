"""Tables for a terminal: a report (the teacher first, candidates under it, then the gates and the verdict), and what
changed between two."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ..diff import CandidateDiff, ReportDiff
from ..records.report import Candidate, GateResult, Report, Verdict
from .attribution import attribution
from .changes import alone, cells, diff_summary, diff_verdict, equal_text, unequal
from .figures import VERDICT_WORDS, Column, columns, summary, worst_first
from .performance import (
    GENERATION_HEADINGS,
    SCENARIO_HEADINGS,
    TOKEN_HEADINGS,
    generation_note,
    generation_rows,
    remarks,
    scenario_rows,
    token_rows,
)
from .slices import worst_slice
from .stages import TITLE, stages

_ICONS: dict[Verdict | None, str] = {"pass": "✔", "fail": "✘", "inconclusive": "?", None: "–"}
_STYLES: dict[Verdict | None, str] = {
    "pass": "bold green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    None: "bold",
}
_MEANING_STYLES = {"better": "bold green", "worse": "bold red", "not comparable": "yellow", "equal": "dim"}
_WIDEST_NAME = 22
_BETWEEN = 3
"""Columns of a terminal between those of a table."""
# a terminal obeys these: a name in a report could otherwise recolour it, or rewrite what was printed
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render_table(report: Report) -> RenderableType:
    """What `limbeck validate`, `bench` and `gate` print. The verdict is coloured, and a word as well. Text from the
    report is never read as rich markup, nor as a terminal's control codes."""
    parts: list[RenderableType] = [_Candidates(report)] if report.measured else []
    if written := generation_rows(report):
        parts += [_figures("Written text", GENERATION_HEADINGS, written, 1), _text(generation_note(report), "dim")]
    if any(candidate.scenarios for candidate in report.measured):
        parts += _scenarios(report)
    if tokens := token_rows(report):
        parts.append(_figures("MLPerf scenarios: tokens", TOKEN_HEADINGS, tokens, 2))
    parts += [_text(remark, "dim") for remark in remarks(report)]
    parts += _stages(report)
    parts += _steps(report)
    if report.gates:
        parts.append(_gates(report.gates))
    for candidate, check in report.checks():
        if not check.passed:
            told = _text(f"{check.name} of {candidate.name}: {check.detail}")
            parts.append(Text.assemble((f"{_ICONS['fail']} Check failed", _STYLES["fail"]), "  ", told))
    if worst := worst_slice(report):
        parts.append(_text(worst))
    parts.append(Text.assemble(_verdict(report.verdict), f"  {summary(report)}"))
    return Group(*parts)


def _text(words: str, style: str = "") -> Text:
    return Text(_CONTROL.sub("\ufffd", words), style=style)


def _verdict(verdict: Verdict | None) -> Text:
    return Text(f"{_ICONS[verdict]} {VERDICT_WORDS[verdict]}", style=_STYLES[verdict])


class _Candidates:
    """The candidate table at whatever width the terminal has: columns that matter less make room for the others."""

    _FIRST_TO_GO = ("Peak memory", "p99", "ECE", "Energy", "Size")

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = [_name(self._report, candidate) for candidate in self._report.measured]
        widest = max(len("Candidate"), min(max(map(_longest_line, names)), _WIDEST_NAME))
        shown, left_out = columns(self._report), []
        for title in self._FIRST_TO_GO:
            room = options.max_width - widest - _BETWEEN
            if sum(_least_width(column) + _BETWEEN for column in shown) <= room:
                break
            left_out += [column.title for column in shown if column.title == title]
            shown = [column for column in shown if column.title != title]
        yield _candidates(self._report.title, names, widest, shown)
        if left_out:
            yield Text(f"No room for {', '.join(left_out)}: see the report.", style="dim")


def _least_width(column: Column) -> int:
    """What a column needs: its longest word, since headings wrap between words."""
    return max(map(len, [*column.heading.split(), *(figure.text for figure in column.figures if figure)]))


def _candidates(title: str, names: list[Text], widest: int, shown: list[Column]) -> Table:
    """Without intervals, which need the width of a page; the gates under it name those that decide."""
    table = Table(title=_text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    # widths are given: where room is short, rich would cut words of one column while another has room to spare
    table.add_column("Candidate", overflow="fold", width=widest)
    for column in shown:
        table.add_column(_text(column.heading), justify="right", width=_least_width(column))
    for index, name in enumerate(names):
        table.add_row(name, *(_cell(column, index) for column in shown))
    return table


def _longest_line(words: Text) -> int:
    return max(line.cell_len for line in words.split())


def _name(report: Report, candidate: Candidate) -> Text:
    name = _text(candidate.name, "bold")
    role = "teacher, " if candidate is report.teacher and candidate.name != "teacher" else ""
    name.append_text(_text(f"\n{role}{candidate.backend} {candidate.precision}", "not bold dim"))
    if candidate.unverified:
        name.append_text(_text(f"\n! {candidate.unverified}", "not bold yellow"))
    return name


def _cell(column: Column, index: int) -> Text:
    figure = column.figures[index]
    return Text("–", style="dim") if figure is None else Text(figure.text)


def _figures(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="right" if index >= numbers_from else "left")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _scenarios(report: Report) -> list[RenderableType]:
    """The figures as a table; what a scenario asked and why it is not valid under it, where sentences have room."""
    table = Table(title="MLPerf scenarios", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(SCENARIO_HEADINGS):
        table.add_column(heading, overflow="fold", justify="right" if index > 2 else "left", no_wrap=index == 1)
    notes = []
    for candidate, scenario, said, *figures in scenario_rows(report):
        name, asked, _ = scenario.partition(",")
        verdict, _, reason = said.partition(": ")
        table.add_row(*map(_text, (candidate, name, verdict, *figures)))
        if asked or reason:
            notes.append(_text(f"{candidate}, {scenario}: {said}", "dim"))
    return [table, *notes]


def _stages(report: Report) -> list[RenderableType]:
    """What each stage of a run cost; what was done stands under its name."""
    found = stages(report)
    if found is None:
        return []
    table = Table(title=TITLE, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Stage", overflow="fold", min_width=12)
    for heading in found.headings:
        table.add_column(_text(heading), justify="right")
    for row in found.rows:
        table.add_row(Text.assemble(_text(row.name, "bold"), "\n", _text(row.done, "dim")), *map(_text, row.figures))
    return [table]


def _steps(report: Report) -> list[RenderableType]:
    """What each step from the teacher to a candidate lost."""
    found = attribution(report)
    if found is None:
        return []
    table = Table(title="What each step lost", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Candidate", overflow="fold", min_width=12)
    table.add_column("Point")
    for heading in (found.metric, "Lost (95% interval)", "Answers moved by"):
        table.add_column(_text(heading), justify="right")
    before = ""
    for row in found.rows:
        table.add_row(
            *map(_text, ("" if row.candidate == before else row.candidate, row.point, row.quality, row.lost, row.moved))
        )
        before = row.candidate
    notes = dict.fromkeys(f"! {row.candidate}: {row.note}" for row in found.rows if row.note)
    return [table, *map(_text, notes)]


def _gates(results: list[GateResult]) -> Table:
    """Those that do not pass with what was found, then those that do: a line each, whatever the width."""
    table = Table(title="Gates", title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    passed: dict[str, list[str]] = {}
    for result in worst_first(results):
        if result.verdict == "pass":
            passed.setdefault(result.asked, []).append(result.candidate)
        else:
            title = _text(f"{result.asked}: {result.candidate}", "bold")
            table.add_row(_verdict(result.verdict), Text.assemble(title, "\n", _text(result.reason)))
    for asked, candidates in passed.items():
        table.add_row(_verdict("pass"), _text(f"{asked}: {', '.join(candidates)}"))
    return table


def render_diff_table(diff: ReportDiff) -> RenderableType:
    """What `limbeck diff` prints: what makes figures incomparable first, a table a candidate, then what only one report
    has. Text from the reports is never read as markup."""
    parts: list[RenderableType] = []
    for found in diff.differences:
        effect = f" ({found.effect})" if found.effect else ""
        parts.append(Text.assemble(("! ", "yellow"), _text(f"{found.topic}: {found.old} → {found.new}{effect}")))
    for item in diff.candidates:
        parts += _changes(item) if item.rows else []
    for title, lines in alone(diff):
        parts.append(Text.assemble((title, "bold"), *(_text(f"\n  {line}") for line in lines)))
    verdict = Text(f"{_ICONS[diff.new.verdict]} {diff_verdict(diff)}", style=_STYLES[diff.new.verdict])
    parts.append(Text.assemble(verdict, f"  {diff_summary(diff)}"))
    return Group(*parts)


def _changes(candidate: CandidateDiff) -> list[RenderableType]:
    title = _text(candidate.name, "bold")
    if candidate.note:
        title.append_text(_text(f"\n{candidate.note}", "not bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Figure", overflow="fold", min_width=18)
    for heading in ("Old", "New", "Change (95% interval)"):
        table.add_column(heading, justify="right")
    table.add_column("Means", overflow="fold")
    shown = unequal(candidate)
    for row in shown:
        *words, meaning = cells(row)
        table.add_row(*map(_text, words), _text(meaning, _MEANING_STYLES.get(row.meaning, "")))
    equal = equal_text(candidate)
    return [title, *([table] if shown else []), *([_text(f"{equal}\n", "dim")] if equal else [])]
