"""Slices in the renderings: what is kept on each, and the examples that changed most."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from limbeck.validate.records.report import Candidate, Metric, Report, Slice
from limbeck.validate.rendering import render_html, render_markdown
from limbeck.validate.rendering.slices import slice_map, worst_slice


def kept_report(metric: str, *parts: Slice) -> Report:
    whole = Metric(name=metric, value=0.9, higher_is_better=True, description="")
    student = Candidate(name="student", kind="artifact", backend="onnx", precision="fp32", path="", metrics=[whole])
    student.slices = list(parts)
    return Report(kind="validation", title="t", created="", command="", candidates=[student])


def test_slices_are_drawn_as_what_is_kept_with_the_most_lost_in_full_colour(full_report: Callable[..., Report]) -> None:
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


def test_the_terminal_names_the_worst_slice_that_can_be_judged(full_report: Callable[..., Report]) -> None:
    kept = "student keeps 0.700 (0.690 to 0.700) of the teacher's accuracy"
    assert worst_slice(full_report()) == f"Worst slice: student (60 examples), where {kept}."
    few = full_report().candidates[0].slices[0].model_copy(update={"count": 29})
    assert worst_slice(kept_report("accuracy", few)) is None
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


def test_examples_that_changed_are_folded_away_in_markdown(full_report: Callable[..., Report]) -> None:
    text = render_markdown(full_report())
    assert "<summary>Examples that changed most</summary>" in text
    assert "| student | 7 | student | student | student | student | 2.50 (student) |" in text
    assert "| student | 60 | 0.700 (0.690 to 0.700, invariance 0.800, teacher 0.900) | student |" in text
