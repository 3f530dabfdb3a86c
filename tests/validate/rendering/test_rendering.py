"""Renderings: every file is written, untrusted text stays text, and the counts are those of the report."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from limbeck.validate.records.report import Report, load_report
from limbeck.validate.rendering import render_html, render_junit, render_markdown, render_table, write_report
from limbeck.validate.rendering.charts import Point, latency_histogram, pareto_front
from limbeck.validate.rendering.figures import Figure, columns, plain
from limbeck.validate.rendering.svg import Scale

EVIL = "<script>alert(1)</script>\"'&|`@all [x](y) [red]\x1b[31m\x00"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_every_file_is_written_whole(full_report: Callable[..., Report], tmp_path: Path) -> None:
    page = write_report(full_report(), tmp_path / "new")
    assert page.name == "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "junit.xml",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert load_report(page.parent).verdict == "fail"


def test_text_from_a_report_stays_text_in_html(full_report: Callable[..., Report]) -> None:
    page = render_html(full_report(EVIL))
    found = _Tags()
    found.feed(page)
    assert "script" not in found.tags and "img" not in found.tags
    assert not [name for name in found.attributes if name.startswith("on")]
    assert "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page and "url(" not in page


def test_html_says_the_verdict_in_words(full_report: Callable[..., Report]) -> None:
    page = render_html(full_report())
    assert "<strong>Fail</strong>" in page
    assert page.count("<svg") == page.count("</svg>")
    assert "nan" not in page.split("</style>")[1].lower()


def test_an_empty_report_renders_everywhere() -> None:
    empty = Report(kind="run", title="t", created="", command="")
    assert "No verdict" in render_html(empty)
    assert "No verdict" in render_markdown(empty)
    ElementTree.fromstring(render_junit(empty))
    Console(quiet=True).print(render_table(empty))


def test_markdown_folds_the_gates_that_pass(full_report: Callable[..., Report]) -> None:
    text = render_markdown(full_report())
    assert (
        text.index("❌ Fail |")
        < text.index("❔ Inconclusive |")
        < text.index("2 pass</summary>")
        < text.index("✅ Pass |")
    )


def test_markdown_cannot_be_broken_by_text(full_report: Callable[..., Report]) -> None:
    text = render_markdown(full_report(EVIL))
    assert "<script" not in text and "@all" not in text and "[x](y)" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    first = table[: next(index for index, line in enumerate(table) if "Verdict" in line)]
    assert len({line.replace("\\|", "").count("|") for line in first}) == 1


@pytest.mark.parametrize("word", ["student", EVIL])
def test_junit_parses_and_counts(full_report: Callable[..., Report], word: str) -> None:
    root = ElementTree.fromstring(render_junit(full_report(word)))
    gates, checks = root.findall("testsuite")
    assert (gates.get("tests"), gates.get("failures"), gates.get("errors")) == ("4", "1", "1")
    assert (checks.get("tests"), checks.get("failures"), checks.get("errors")) == ("2", "1", "0")
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("6", "2", "1")
    types = [item.get("type") for item in root.iter() if item.tag in ("failure", "error")]
    assert sorted(map(str, types)) == ["CheckFailed", "GateFailed", "GateInconclusive"]


def test_the_terminal_shows_the_teacher_first_and_the_verdict_in_words(full_report: Callable[..., Report]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_table(full_report(EVIL)))
    text = console.export_text()
    assert text.index("teacher") < text.index("Gates") < text.rindex("Fail")
    assert "Inconclusive" in text and "[red]" in text and "\x1b" not in text and "\x00" not in text


@pytest.mark.parametrize("width", [50, 60, 80, 100, 140])
def test_the_terminal_cuts_no_word_and_no_figure(full_report: Callable[..., Report], width: int) -> None:
    report = full_report()
    report.candidates = [item.model_copy(update={"unverified": None}) for item in report.candidates]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_table(report))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    table = text[: text.index("Gates")]
    assert {"Accuracy", "0.900", "20.0", "Speed-up"} <= set(table.split())
    assert ("No room for p99" in text) == (width < 60) and ("p99" in table.split("No room")[0]) == (width >= 60)


def test_the_terminal_gives_what_passes_a_line(full_report: Callable[..., Report]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_table(full_report()))
    gates = console.export_text().split("Gates")[1]
    assert gates.index("Fail") < gates.index("Inconclusive") < gates.index("Pass")
    assert "accuracy at most 0.99: student, bad" in gates


def test_columns_hold_the_figures_that_decide(full_report: Callable[..., Report]) -> None:
    shown = {column.title: column for column in columns(full_report())}
    assert list(shown) == ["Accuracy", "p50", "p99", "Speed-up", "Size"]
    assert [figure and figure.text for figure in shown["p50"].figures] == ["20.0", "1.00", None]
    assert [figure and figure.text for figure in shown["Size"].figures] == [None, "12.0", None]


def test_the_pareto_front_holds_what_no_other_beats() -> None:
    spots = {"quick": (1, 0.8), "slow": (9, 0.9), "beaten": (5, 0.7)}
    points = [Point(name, 0, Figure(time), Figure(quality)) for name, (time, quality) in spots.items()]
    assert [point.name for point in pareto_front(points, higher_is_better=True)] == ["quick", "slow"]
    assert [point.name for point in pareto_front(points, higher_is_better=False)] == ["quick", "beaten"]


@pytest.mark.parametrize(
    "scale", [Scale(0, 1, 0, 100), Scale(0.9, 26, 0, 100, log=True), Scale(1e-5, 1e5, 0, 9, log=True)]
)
def test_ticks_are_few_and_inside(scale: Scale) -> None:
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 11 and all(scale.low <= tick <= scale.high for tick in ticks)


def test_a_histogram_is_titled_for_those_who_cannot_see_it(full_report: Callable[..., Report]) -> None:
    drawn = latency_histogram(full_report().teacher.latencies[0], (1.0, 40.0), EVIL, 1)
    assert "median 20.0 ms" in drawn and 'role="img"' in drawn and "<script" not in drawn


def test_nested_facts_become_flat_rows() -> None:
    assert plain({"cpu": {"cpus": 8, "sets": []}, "gpus": [{"name": "A"}]}) == [
        ("cpu.cpus", "8"),
        ("cpu.sets", "none"),
        ("gpus 1.name", "A"),
    ]


def test_a_report_is_drawn_without_the_libraries_that_measure() -> None:
    code = "import sys, limbeck.validate.rendering; sys.exit(any(name in sys.modules for name in ('torch', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # a gate is asked in a second
