"""What a training left behind, and what each layer learnt, in the renderings."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from limbeck.validate.records.report import Curve, LayerSimilarity, Report, Step
from limbeck.validate.rendering import render_html, render_markdown
from limbeck.validate.rendering.heatmap import layer_similarity
from limbeck.validate.rendering.training import ends, likeness, title_of_curve, trainings


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
