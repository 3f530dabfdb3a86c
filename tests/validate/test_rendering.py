"""Renderings: every file is written, untrusted text stays text, and the counts are those of the report."""

from __future__ import annotations

import io
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from limbeck.validate.gates import apply_gates
from limbeck.validate.rendering import render_html, render_junit, render_markdown, render_table, write_report
from limbeck.validate.rendering.charts import Point, latency_histogram, pareto_front
from limbeck.validate.rendering.figures import Figure, columns, plain
from limbeck.validate.rendering.svg import Scale
from limbeck.validate.report import (
    Candidate,
    Check,
    Curve,
    Gate,
    Latency,
    LayerWidths,
    Metric,
    ReliabilityBin,
    Report,
    Step,
    load_report,
)

EVIL = "<script>alert(1)</script>\"'&|`@all [x](y) [red]\x1b[31m\x00"


def latency(median: float) -> Latency:
    return Latency(
        batch_size=1, sequence_length=128, threads=2, rounds=3, samples=30, p50_ms=median, p90_ms=median * 1.2,
        p99_ms=median * 1.5, mean_ms=median, histogram_edges_ms=[median * 0.8, median, median * 1.6],
        histogram_counts=[20, 10], speedup=2.0,
    )  # fmt: skip


def candidate(name: str, kind: Any = "artifact", value: float = 0.9, **more: Any) -> Candidate:
    accuracy = Metric(
        name="accuracy",
        value=value,
        low=value - 0.02,
        high=value + 0.02,
        count=500,
        higher_is_better=True,
        description=name,
    )
    return Candidate(name=name, kind=kind, backend="onnx", precision="fp32", path=name, metrics=[accuracy], **more)


def full_report(word: str = "student") -> Report:
    checks = [Check(name="parity", passed=True, detail="close", rows=[{word: word, "within": True, "distance": 1e-5}])]
    checks.append(Check(name="weight audit", passed=False, detail=word))
    report = Report(
        kind="validation",
        title=word,
        created="2026-01-01T00:00:00Z",
        command=word,
        teacher=candidate("teacher", "teacher", 0.93, latencies=[latency(20.0)]),
        candidates=[
            candidate(word, value=0.9, latencies=[latency(1.0)], checks=checks, size_bytes=12_000_000, unverified=word,
                      reliability=[ReliabilityBin(confidence=0.8, accuracy=0.7, count=9)]),
            candidate("bad", value=0.5),
        ],
        steps=[Step(verb="prune", method=word, settings={word: {"a": [1, word]}}, rationale=word,
                    curves=[Curve(name=word, steps=[1, 2, 3], values=[3.0, math.nan, 1.0]),
                            Curve(name="none", steps=[], values=[])],
                    widths=[LayerWidths(layer=word, before=1536, after=768)])],
        environment={"cpu": {"name": word}, "gpus": []},
        notes=[word],
    )  # fmt: skip
    report.gates = apply_gates(report, [Gate(metric="accuracy", min=0.89, why=word), Gate(metric="accuracy", max=0.99)])
    return report


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_every_file_is_written_whole(tmp_path: Path) -> None:
    page = write_report(full_report(), tmp_path / "new")
    assert page.name == "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "junit.xml",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert load_report(page.parent).verdict == "fail"


def test_text_from_a_report_stays_text_in_html() -> None:
    page = render_html(full_report(EVIL))
    found = _Tags()
    found.feed(page)
    assert "script" not in found.tags and "img" not in found.tags
    assert not [name for name in found.attributes if name.startswith("on")]
    assert "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page and "url(" not in page


def test_html_says_the_verdict_in_words_and_draws_every_part() -> None:
    page = render_html(full_report())
    assert "<strong>Fail</strong>" in page
    for part in (
        "candidates",
        "gates",
        "latency",
        "trade-off",
        "calibration",
        "training",
        "cuts",
        "checks",
        "steps",
        "environment",
    ):
        assert f'<section id="{part}"' in page and f'href="#{part}"' in page
    assert page.count("<svg") == page.count("</svg>")
    assert "nan" not in page.split("</style>")[1].lower()


def test_an_empty_report_renders_everywhere() -> None:
    empty = Report(kind="run", title="t", created="", command="")
    assert "No verdict" in render_html(empty)
    assert "No verdict" in render_markdown(empty)
    ElementTree.fromstring(render_junit(empty))
    Console(quiet=True).print(render_table(empty))


def test_markdown_cannot_be_broken_by_text() -> None:
    text = render_markdown(full_report(EVIL))
    assert "<script" not in text and "@all" not in text and "[x](y)" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    first = table[: next(index for index, line in enumerate(table) if "Verdict" in line)]
    assert len({line.replace("\\|", "").count("|") for line in first}) == 1


@pytest.mark.parametrize("word", ["student", EVIL])
def test_junit_parses_and_counts(word: str) -> None:
    root = ElementTree.fromstring(render_junit(full_report(word)))
    gates, checks = root.findall("testsuite")
    assert (gates.get("tests"), gates.get("failures"), gates.get("errors")) == ("4", "1", "1")
    assert (checks.get("tests"), checks.get("failures"), checks.get("errors")) == ("2", "1", "0")
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("6", "2", "1")
    types = [item.get("type") for item in root.iter() if item.tag in ("failure", "error")]
    assert sorted(map(str, types)) == ["CheckFailed", "GateFailed", "GateInconclusive"]


def test_the_terminal_shows_the_teacher_first_and_the_verdict_in_words() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_table(full_report(EVIL)))
    text = console.export_text()
    assert text.index("teacher") < text.index("Gates") < text.rindex("Fail")
    assert "Inconclusive" in text and "[red]" in text and "\x1b" not in text and "\x00" not in text


def test_columns_hold_the_figures_that_decide() -> None:
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


def test_a_histogram_is_titled_for_those_who_cannot_see_it() -> None:
    drawn = latency_histogram(latency(2.0), (1.0, 4.0), EVIL, 1)
    assert "median 2.00 ms" in drawn and 'role="img"' in drawn and "<script" not in drawn


def test_nested_facts_become_flat_rows() -> None:
    assert plain({"cpu": {"cpus": 8, "sets": []}, "gpus": [{"name": "A"}]}) == [
        ("cpu.cpus", "8"),
        ("cpu.sets", "none"),
        ("gpus 1.name", "A"),
    ]
