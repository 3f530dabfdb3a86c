"""The report's page as a document: its sections, its outline for those who cannot see it."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from limbeck.models.anatomy import MATRIX_KINDS
from limbeck.validate.gates.applying import apply_gates
from limbeck.validate.records.report import (
    Check,
    Gate,
    Loss,
    Matrix,
    Report,
    Scenario,
    StageResult,
    Waypoint,
)
from limbeck.validate.rendering import render_html
from limbeck.validate.rendering.program_layers import KINDS

EVIL = "<script>alert(1)</script>\"'&<img src=https://example.org/x onerror=alert(1)>"
ORDER = ["candidates", "gates", "stages", "attribution", "trade-off", "calibration", "latency", "slices", "layers",
         "training", "changed", "checks", "environment", "lineage"]  # fmt: skip


class Outline(HTMLParser):
    """What the tests ask of a page; text is kept without the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self.open else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def whole(full_report: Callable[..., Report]) -> Callable[..., Report]:
    """The full report with attribution, a stage and a scenario as well: every section has something to show."""

    def build(word: str = "student") -> Report:
        report = full_report(word)
        accuracy = report.candidates[0].metrics[0]
        scenario = Scenario.model_validate({
            "name": "offline", "batch_size": 1, "sequence_length": 8, "threads": 1, "duration_seconds": 1, "queries": 9,
            "samples_per_second": 9.0, "validity": "invalid", "percentiles_ms": {}, "loadgen": "6", "reason": word,
        })  # fmt: skip
        stops = [
            Waypoint(name="teacher", runtime=word, precision="fp32", metrics=[accuracy]),
            Waypoint(name="program", runtime=word, precision="fp32", metrics=[accuracy], note=word,
                     loss=Loss(metric="accuracy", value=0.01, low=-0.01, high=0.03)),
        ]  # fmt: skip
        more = {"waypoints": stops, "scenarios": [scenario]}
        report.candidates = [report.candidates[0].model_copy(update=more), *report.candidates[1:]]
        report.stages = [
            StageResult(name=word, start=word, verb="prune", method=word, checkpoint_hash="0", parameters=1, zeros=0.5,
                        size_bytes=4, seconds=1, metrics=[accuracy], loss=stops[1].loss),
        ]  # fmt: skip
        return report

    return build


def sections(page: str) -> list[str | None]:
    return [section.get("id") for section in Outline(page).all("section")]


def test_sections_stand_in_the_order_of_what_matters_and_each_can_be_reached(whole: Callable[..., Report]) -> None:
    page = render_html(whole())
    assert sections(page) == ORDER
    outline = Outline(page)
    links = [str(link["href"]) for link in outline.all("a")]
    assert links == ["#main", *(f"#{part}" for part in ORDER)]
    ids = [str(attributes["id"]) for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} <= set(ids)
    assert not outline.open  # every element is closed where it should be
    assert page.index('class="verdict fail"') < page.index("<nav") < page.index("<main")


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ({"gates": []}, "gates"),
        ({"steps": []}, "training"),
        ({"steps": []}, "lineage"),
        ({"stages": []}, "stages"),
        ({"environment": {}, "notes": [], "data": []}, "environment"),
    ],
)
def test_a_section_without_anything_to_show_is_left_out(
    whole: Callable[..., Report], missing: dict[str, object], section: str
) -> None:
    found = sections(render_html(whole().model_copy(update=missing)))
    assert section not in found and found == [part for part in ORDER if part in found]


@pytest.mark.parametrize(
    ("field", "section"),
    [
        ("waypoints", "attribution"),
        ("reliability", "calibration"),
        ("slices", "slices"),
        ("changed", "changed"),
        ("checks", "checks"),
    ],
)
def test_what_no_candidate_has_has_no_section(whole: Callable[..., Report], field: str, section: str) -> None:
    report = whole()
    report.candidates = [item.model_copy(update={field: []}) for item in report.candidates]
    found = sections(render_html(report))
    assert section not in found and "candidates" in found


def test_a_page_of_scenarios_alone_shows_them(whole: Callable[..., Report]) -> None:
    report = whole()
    report.teacher = None
    report.candidates = [item.model_copy(update={"latencies": []}) for item in report.candidates]
    page = render_html(report)
    assert "latency" in sections(page) and "trade-off" not in sections(page)
    assert "How single calls spread" not in page and "INVALID: student" in page


def test_nothing_hostile_and_nothing_from_elsewhere_gets_in(whole: Callable[..., Report]) -> None:
    page = render_html(whole(EVIL))
    outline = Outline(page)
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "form", "base"}
    attributes = {name for _, given in outline.tags for name in given}
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "background")]
    assert {str(link["href"])[0] for link in outline.all("a")} == {"#"}
    assert "@import" not in page and "url(" not in page
    assert EVIL in outline.text


def test_tables_and_drawings_say_what_they_are(whole: Callable[..., Report]) -> None:
    outline = Outline(render_html(whole()))
    tables, captions = outline.all("table"), outline.all("caption")
    assert len(tables) == len(captions) > 8
    assert all(heading.get("scope") in ("col", "row") for heading in outline.all("th"))
    drawings = outline.all("svg")
    assert all(drawing.get("aria-hidden") == "true" or drawing.get("aria-label") for drawing in drawings)
    regions = [given for _, given in outline.tags if given.get("role") == "region"]
    assert all(region.get("tabindex") == "0" and region.get("aria-label") for region in regions)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1


def test_failed_checks_stand_open_and_passed_ones_are_folded_by_candidate(whole: Callable[..., Report]) -> None:
    report = whole()
    many = [Check(name=f"proof {number}", passed=True, detail=f"detail {number}") for number in range(14)]
    first = report.candidates[0]
    report.candidates = [first.model_copy(update={"checks": [*many, *first.checks]}), *report.candidates[1:]]
    page = render_html(report)
    part = page[page.index('<section id="checks"') :]
    part = part[: part.index("</section>")]
    folded = part.index("<details>")
    assert part.index("weight audit") < folded < part.index("proof 0")
    assert "15 of student" in part and "detail 13" in part
    assert part.count("<details") == 2  # the candidate, and the rows of its one check that has rows


def test_gates_that_pass_are_folded_behind_those_that_do_not(whole: Callable[..., Report]) -> None:
    report = whole()
    part = render_html(report).split('<section id="gates"')[1].split("</section>")[0]
    assert part.index("Fail") < part.index("Inconclusive") < part.index("<details>") < part.index("Gates that pass")
    report.gates = apply_gates(report, [Gate(metric="accuracy", max=0.99)])
    part = render_html(report).split('<section id="gates"')[1].split("</section>")[0]
    assert "<details open>" in part and "Gates that do not pass" not in part


def test_layers_show_precision_and_zeros_of_every_matrix(whole: Callable[..., Report]) -> None:
    report = whole()
    shared = {"shape": [8, 8], "pattern": False, "size_bytes": 64}
    matrices = [
        Matrix(name="layer.0.q", layer=0, kind="q", precision="int8 weights and activations", zeros=0.0, **shared),
        Matrix(name="layer.0.up", layer=0, kind="up", precision="float32", zeros=0.7, **shared),
        Matrix(name="layer.1.up", layer=1, kind="up", precision="float32", zeros=0.5, **{**shared, "pattern": True}),
        Matrix(name="embeddings", precision="int8", zeros=0.0, **shared),
    ]
    report.candidates = [report.candidates[0].model_copy(update={"matrices": matrices})]
    part = render_html(report).split('<section id="layers"')[1].split("</section>")[0]
    assert "2 layers, 192 bytes of 256 bytes of weights, 1 of 3 matrices 2:4" in part
    assert ">70%</text>" in part and ">2:4</text>" in part and part.count("<g>") == 3
    legend = part.split('class="legend"')[1].split("</ul>")[0]
    assert "int8 weights and activations" in legend and "float32" in legend and "int8 weights only" not in legend
    assert ">embeddings<" in part


def test_columns_of_layers_stand_in_the_order_in_which_a_layer_uses_them() -> None:
    assert KINDS == MATRIX_KINDS


def test_the_trade_off_says_who_is_beaten_by_whom(whole: Callable[..., Report]) -> None:
    report = whole()
    slow, quick = report.teacher, report.candidates[0]
    assert slow is not None
    worse = quick.model_copy(update={"name": "worse", "metrics": [quick.metrics[0].model_copy(update={"value": 0.89})]})
    report.candidates = [quick, worse]
    part = render_html(report).split('<section id="trade-off"')[1].split("</section>")[0]
    standing = re.findall(r"<span>(\w+)<small>([^<]*)</small>", part)
    assert standing == [
        ("teacher", "no other beats it"),
        ("student", "no other beats it"),
        ("worse", "beaten by student"),
    ]


def test_the_teachers_own_figures_stand_in_its_row(whole: Callable[..., Report]) -> None:
    report = whole()
    assert report.teacher is not None
    report.teacher = report.teacher.model_copy(update={"metrics": []})
    known = report.candidates[0].metrics[0].model_copy(update={"teacher": 0.777})
    report.candidates = [report.candidates[0].model_copy(update={"metrics": [known]})]
    row = render_html(report).split('<tr class="teacher">')[1].split("</tr>")[0]
    assert "0.777" in row
