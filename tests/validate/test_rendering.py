"""Renderings: every file is written, untrusted text stays text, and the counts are those of the report."""

from __future__ import annotations

import io
import math
import subprocess
import sys
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
from limbeck.validate.rendering.heatmap import layer_similarity
from limbeck.validate.rendering.slices import slice_map, worst_slice
from limbeck.validate.rendering.svg import Scale
from limbeck.validate.rendering.training import ends, likeness, title_of_curve, trainings
from limbeck.validate.report import (
    Candidate,
    ChangedExample,
    Check,
    Curve,
    Gate,
    Latency,
    LayerSimilarity,
    LayerWidths,
    Metric,
    ReliabilityBin,
    Report,
    Slice,
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


def sliced(part: str, kept: float, count: int = 60, **more: Any) -> Slice:
    metrics = [
        Metric(name=name, value=value, low=value - 0.01, high=value, teacher=0.9, higher_is_better=True, description="")
        for name, value in (("accuracy_kept", kept), ("invariance", 0.8))
    ]
    return Slice(name=part, kind="perturbed", count=count, metrics=metrics, **more)


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
                      reliability=[ReliabilityBin(confidence=0.8, accuracy=0.7, count=9)],
                      slices=[sliced(word, 0.7, note=word), sliced("few", 0.1, count=3)],
                      changed=[ChangedExample(row=7, text=word, label=word, teacher=word, candidate=word, distance=2.5,
                                              measure=word)]),
            candidate("bad", value=0.5),
        ],
        steps=[Step(verb="prune", method=word, settings={word: {"a": [1, word]}}, rationale=word,
                    curves=[Curve(name=word, steps=[1, 2, 3], values=[3.0, math.nan, 1.0]),
                            Curve(name="none", steps=[], values=[])],
                    widths=[LayerWidths(layer=word, before=1536, after=768)],
                    similarity=LayerSimilarity(before=[[0.2, math.nan]], after=[[0.9, 0.4]]))],
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


def test_a_report_is_drawn_without_the_libraries_that_measure() -> None:
    code = "import sys, limbeck.validate.rendering; sys.exit(any(name in sys.modules for name in ('torch', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # a gate is asked in a second


# What a training left behind.


def traced(*names: str, values: tuple[float, ...] = (3.0, 1.0, 2.0), **more: Any) -> Step:
    curves = [Curve(name=name, steps=[10, 20, 30], values=list(values)) for name in names]
    return Step(verb="distill", method="logits-kl", curves=curves, **more)


def test_quality_is_seen_first_and_the_machinery_last() -> None:
    step = traced(
        "loss", "grad_norm", "logits-kl", "learning_rate", "throughput", "hidden", "eval/ece", "eval/cosine_mean",
        "eval/spearman_kept", "eval/agreement_spearman", "eval/spearman",
        similarity=LayerSimilarity(before=[[0.5]], after=[[0.75]]),
    )  # fmt: skip
    report = Report(kind="run", title="t", created="", command="", steps=[Step(verb="prune", method="taylor"), step])
    (training,) = trainings(report)
    assert training.title == "Step 2, distill: logits-kl"
    shown = [(group.title, [panel.title for panel in group.panels], group.folded) for group in training.groups]
    assert shown == [
        ("Quality while training", ["Spearman", "Spearman kept", "Agreement spearman"], False),
        ("Objectives", ["Total loss", "logits-kl", "hidden"], False),
        ("What each layer learnt", ["Before training", "After training"], False),
        ("More metrics", ["ECE", "Cosine mean"], True),
        ("How the training ran", ["Gradient norm", "Learning rate", "Throughput"], True),
    ]
    page = render_html(report)
    assert page.index("Quality while training") < page.index("Objectives") < page.index("What each layer learnt")
    assert "<details><summary>How the training ran" in page


def test_a_metric_is_marked_where_it_was_best() -> None:
    step = traced("eval/spearman", "eval/perplexity")
    report = Report(kind="run", title="t", created="", command="", steps=[step])
    notes = {panel.title: panel.note for panel in next(trainings(report)).groups[0].panels}
    assert notes == {
        "Spearman": "highest 3.00 at step 10, ends at 2.00",
        "Perplexity": "lowest 1.00 at step 20, ends at 2.00",
    }
    assert ends(step) == "Spearman 3.00 → 2.00, Perplexity 3.00 → 2.00"


def test_curves_of_one_training_share_their_steps() -> None:
    step = Step(
        verb="distill",
        method="m",
        curves=[
            Curve(name="loss", steps=[0, 100], values=[2, 1]),
            Curve(name="eval/accuracy", steps=[50], values=[0.5]),
        ],
    )
    report = Report(kind="run", title="t", created="", command="", steps=[step])
    drawn = [panel.drawing for group in next(trainings(report)).groups for panel in group.panels]
    roots = [ElementTree.fromstring(one) for one in drawn]
    ticks = [[item.get("x") for item in root if item.text in ("0", "50", "100")] for root in roots]
    assert ticks[0] == ticks[1] and len(ticks[0]) == 3


def test_names_of_curves_are_those_that_people_use() -> None:
    names = ["eval/recall_at_1_kept", "eval/f1", "eval/accuracy_difference", "grad_norm", "loss", "hidden-mse"]
    titles = [title_of_curve(Curve(name=name, steps=[], values=[])) for name in names]
    assert titles == ["Recall@1 kept", "F1", "Accuracy difference", "Gradient norm", "Total loss", "hidden-mse"]


def test_nothing_finite_is_still_a_page() -> None:
    step = traced("loss", "eval/accuracy", "throughput", values=(math.nan, math.inf, math.nan))
    report = Report(kind="run", title="t", created="", command="", steps=[step])
    assert "nothing finite to draw" in render_html(report)
    assert ends(step) == ""


def test_the_heat_map_says_in_words_and_figures_what_it_shows() -> None:
    drawn = layer_similarity([[0.2, 0.917, 0.1], [0.0, math.nan, 1.0]], "after training")
    root = ElementTree.fromstring(drawn)
    title = root.findtext("title") or ""
    assert title == root.get("aria-label") and root.get("role") == "img"
    assert title.endswith("most like: 0 to 1 (.92), 1 to 2 (1.00)")
    assert "student layer 0: 0.20, 0.92, 0.10; student layer 1: 0.00, unknown, 1.00" in (root.findtext("desc") or "")
    values = [item.text for item in root.findall("text") if "value" in str(item.get("class"))]
    assert values == [".20", ".92", ".10", ".00", "–", "1.00"]
    best = [item.text for item in root.findall("text") if item.get("class") == "value best"]
    assert best == [".92", "1.00"]
    cells = [float(str(item.get("fill-opacity"))) for item in root.findall("rect") if item.get("class") == "heat"]
    assert cells[1] > cells[0] > cells[2] > cells[3] == min(cells) and max(cells) == cells[5] <= 0.8
    frames = [item for item in root.findall("rect") if item.get("class") == "most-alike"]
    assert [(item.get("x"), item.get("y")) for item in frames] == [
        (root.findall("rect")[index].get("x"), root.findall("rect")[index].get("y")) for index in (1, 5)
    ]


@pytest.mark.parametrize("layers", [1, 6, 12, 17, 48])
def test_a_heat_map_of_any_depth_stays_inside_its_frame(layers: int) -> None:
    root = ElementTree.fromstring(layer_similarity([[0.5] * layers] * 3, "before training"))
    width = float(str(root.get("width")))
    assert width <= 380  # a phone
    ends_at = [float(item.get("x", 0)) + float(item.get("width", 0)) for item in root.findall("rect")]
    assert max(ends_at) <= width
    written = [item for item in root.findall("text") if str(item.get("class")).startswith("value")]
    assert len(written) == (3 * layers if layers <= 17 else 3)  # where cells are slivers, each row's largest beside it
    texts = root.findall("text")  # the last two are the titles of the axes
    numbers = [item.text for item in texts if item.get("y") == texts[-3].get("y")]
    assert numbers[0] == "0" and min(layers, 9) <= len(numbers) <= 17


def test_markdown_tells_what_the_layers_learnt() -> None:
    similarity = LayerSimilarity(before=[[0.5, 0.25, 0.1], [0.1, 0.2, 0.3]], after=[[0.75, 0.9, 0.1], [0.1, 0.2, 0.98]])
    assert likeness(similarity) == "0 ≈ 1 (0.25 → 0.90), 1 ≈ 2 (0.30 → 0.98)"
    report = Report(kind="run", title="t", created="", command="", steps=[traced("loss", similarity=similarity)])
    text = render_markdown(report)
    assert "0 ≈ 1 (0.25 → 0.90), 1 ≈ 2 (0.30 → 0.98)" in text and "Total loss 3.00 → 2.00" in text


def kept_report(metric: str, *parts: Slice) -> Report:
    whole = Metric(name=metric, value=0.9, higher_is_better=True, description="")
    student = Candidate(name="student", kind="artifact", backend="onnx", precision="fp32", path="", metrics=[whole])
    student.slices = list(parts)
    return Report(kind="validation", title="t", created="", command="", candidates=[student])


def test_slices_are_drawn_as_what_is_kept_with_the_most_lost_in_full_colour() -> None:
    found = slice_map(full_report())
    assert found is not None
    assert found.candidates == ["student"]
    assert found.meaning == "Share of the teacher's accuracy that is kept on each slice."
    whole, typos, few = (row.cells[0] for row in found.rows)
    assert whole is None  # nothing of it was measured as kept
    assert typos is not None and (typos.text, typos.interval) == ("0.700", "0.690 to 0.700")
    assert (typos.lost, typos.few) == (1, False)
    assert typos.moved == "invariance 0.800, teacher 0.900"
    assert few is not None and few.few and few.lost == 1
    assert [row.count for row in found.rows] == [None, 60, 3]
    page = render_html(full_report())
    assert page.count('class="number loss') == 2 and page.count("loss few") == 1
    assert 'href="#slices"' in page and 'href="#changed"' in page


def test_the_terminal_names_the_worst_slice_that_can_be_judged() -> None:
    kept = "student keeps 0.700 (0.690 to 0.700) of the teacher's accuracy"
    assert worst_slice(full_report()) == f"Worst slice: student (60 examples), where {kept}."
    assert worst_slice(kept_report("accuracy", sliced("few", 0.1, count=29))) is None
    assert worst_slice(kept_report("accuracy")) is None


@pytest.mark.parametrize(
    ("metric", "measured", "value", "kept"),
    [
        ("perplexity", "perplexity_ratio", 1.25, ("0.800", "0.735 to 1.00")),
        ("flip_rate", "flip_rate", 0.2, ("0.800", "0.640 to 1.00")),
        ("agreement_spearman", "agreement_spearman", 0.8, ("0.800", "0 to 0.360")),
        ("f1", "f1_kept", 0.8, ("0.800", "0 to 0.360")),
    ],
)
def test_what_is_kept_is_better_higher_whatever_the_metric(
    metric: str, measured: str, value: float, kept: tuple[str, str]
) -> None:
    low, high = (1.0, 1.36) if value > 1 else (0.0, 0.36)
    one = Metric(name=measured, value=value, low=low, high=high, higher_is_better=False, description="")
    found = slice_map(kept_report(metric, Slice(name="typos", kind="perturbed", count=60, metrics=[one])))
    assert found is not None
    cell = found.rows[1].cells[0]
    assert cell is not None and (cell.text, cell.interval) == kept


def test_examples_that_changed_are_folded_away_in_markdown() -> None:
    text = render_markdown(full_report())
    assert "<summary>Examples that changed most</summary>" in text
    assert "| student | 7 | student | student | student | student | 2.50 (student) |" in text
    assert "| student | 60 | 0.700 (0.690 to 0.700, invariance 0.800, teacher 0.900) | student |" in text
