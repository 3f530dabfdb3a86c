"""The document of a sensitivity run, the rule, the lesson, and what is drawn of them."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from limbeck.errors import InputError
from limbeck.models.lineage import DataRecord
from limbeck.validate.records.sensitivity import (
    Sensitivity,
    SensitivityRecord,
    lesson,
    load_sensitivity,
    loss_of,
    percent,
)
from limbeck.validate.rendering.sensitivity import (
    render_sensitivity_html,
    render_sensitivity_markdown,
    render_sensitivity_table,
    write_sensitivity,
)
from limbeck.validate.rendering.sensitivity_charts import extremes

EVIL = "<script>alert(1)</script>\"'&|`[x](y) [red]\x1b[31m"
LAYERS, UNCUT = 3, 0.8


def record(structure: str, layer: int, share: float, loss: float, **more: Any) -> SensitivityRecord:
    value = UNCUT * (1 - loss) if math.isfinite(loss) else math.nan
    drift = {"cosine_mean": 1 - loss / 2, "agreement_spearman": 1 - loss} if math.isfinite(loss) else {}
    units = {"heads": 12, "ffn": 1536}.get(structure, 1)
    return SensitivityRecord(
        structure=structure, layer=layer, share=share, cut=max(1, round(share * units)), units=units, value=value,
        loss=loss, low=loss - 0.005, high=loss + 0.005, drift=drift, **more,
    )  # fmt: skip


def document(word: str = "model", **changes: Any) -> Sensitivity:
    """Layer 1 matters most; heads less than channels; without layer 1 nothing is left."""
    weight = {0: 0.02, 1: 0.3, 2: 0.001}
    partial = [
        record(structure, layer, share, weight[layer] * share * size)
        for (structure, size), layer, share in itertools.product(
            (("heads", 0.2), ("ffn", 1.0)), range(LAYERS), (0.1, 0.5, 0.9)
        )
    ]
    whole = [record("layers", layer, 1.0, math.inf if layer == 1 else weight[layer]) for layer in range(LAYERS)]
    given = {
        "model": word, "model_hash": "0" * 64, "task": "sentence-similarity", "layers": LAYERS,
        "created": "2026-01-01T00:00:00+00:00", "command": word,
        "data": DataRecord(source="texts.jsonl", rows=300, fingerprint="f" * 64),
        "structures": ["heads", "ffn", "layers"], "shares": [0.1, 0.5, 0.9], "method": "taylor", "metric": "spearman",
        "higher_is_better": True, "against_references": True, "uncut": UNCUT, "drift_metric": "cosine_mean",
        "drift_higher_is_better": True, "tolerance": 0.01, "records": [*partial, *whole], "notes": ["Alone."],
    }  # fmt: skip
    return Sensitivity(**{**given, **changes})


def table(found: Sensitivity) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_sensitivity_table(found))
    return console.export_text()


def test_the_document_survives_its_file(tmp_path: Path) -> None:
    written = document()
    assert write_sensitivity(written, tmp_path / "out").name == "sensitivity.html"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sensitivity.html", "sensitivity.json", "sensitivity.md"
    ]  # fmt: skip
    read = load_sensitivity(tmp_path / "out")
    assert read.model_dump_json() == written.model_dump_json()
    assert math.isinf(read.of("layers", 1)[0].loss) and math.isnan(read.of("layers", 1)[0].value)
    path = tmp_path / "out" / "sensitivity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(InputError, match="schema version 2"):
        load_sensitivity(path)


def test_the_rule_looks_at_the_smallest_cut() -> None:
    found = document()
    assert [item.layer for item in found.untouchable("ffn")] == [1]  # 0.3 * 0.1 = 3 %; layer 0 loses 0.2 %
    assert found.untouchable("heads") == []  # 0.6 % in layer 1, and 27 % of it at the largest share
    assert [item.layer for item in found.untouchable("layers")] == [0, 1]
    certain = {item.layer: found.is_certain(item) for item in found.untouchable("layers")}
    assert certain == {0: True, 1: True}  # 2 % with an interval from 1.5 %, and everything
    assert not document(tolerance=0.018).is_certain(found.of("layers", 0)[0])
    assert [item.layer for item in document(tolerance=0.001).untouchable("ffn")] == [0, 1]
    assert "1 % of the uncut model's spearman on 300 rows" in found.rule
    assert "no labels" in document(metric="agreement_spearman", against_references=False).rule


def test_the_lesson_names_the_extremes() -> None:
    told = lesson(document())
    assert told.startswith(
        "With half of one part cut, 4 of 6 cuts cost no more than 1 %; the feed-forward channels of "
    )
    assert "channels of layer 1 are missed most" in told
    assert "spearman 0.800 → 0.680, 15 % lost" in told
    assert "the attention heads of layer 2 least" in told
    assert "layer 1 is missed most (spearman 0.800 → nothing, everything lost) and layer 2 least" in told
    assert told.count(".") - told.count("0.") <= 2  # one sentence
    only = document(structures=["layers"], records=[record("layers", layer, 1.0, 0.1 * layer) for layer in range(3)])
    assert lesson(only).startswith("Of the whole layers, layer 2 is missed most")


def test_html_draws_every_part_and_says_no_nan() -> None:
    page = render_sensitivity_html(document())
    for part in ("map", "curves", "untouchable", "records", "method"):
        assert f'<section id="{part}"' in page and f'href="#{part}"' in page
    assert page.count("<svg") == page.count("</svg>") == 2 + 3
    body = page.split("</style>")[1]
    assert "nan" not in body.lower().replace("nantes", "") and "inf" not in body.lower().split("<dl>")[0]
    assert lesson(document()).replace("'", "&#39;") in page
    assert body.count('class="untouchable"') == 3
    assert body.count('class="heat"') == 2 * 3 * LAYERS - 1  # of what has no answers left there is no drift
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_curves_are_a_line_a_layer_and_name_the_extremes() -> None:
    found = document()
    assert extremes(found, "ffn") == {1: "s5", 2: "s3"}
    page = render_sensitivity_html(found)
    assert page.count("<polyline") == 2 * LAYERS
    assert page.count(">layer 1</text>") == page.count(">layer 2</text>") == 2
    assert page.count('class="curve other"') == 2


def test_text_stays_text() -> None:
    evil = document(EVIL)
    page, shown = render_sensitivity_html(evil), render_sensitivity_markdown(evil)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in table(evil)
    assert "[x](y)" in shown.split("`")[1] and shown.count("`") % 2 == 0


def test_tables_mark_what_must_not_be_touched() -> None:
    text, shown = render_sensitivity_markdown(document()), table(document())
    assert "| 1 | 3.0 % | **15 %** | **everything** |" in text
    assert "- attention heads (10 % of it): no layer" in text
    assert "- whole layer (the whole layer): layers 0, 1" in text
    assert "15 % !" in shown and "everything !" in shown and lesson(document())[:60] in " ".join(shown.split())


@pytest.mark.parametrize("deep", [1, 40])
def test_any_depth_is_drawn(deep: int) -> None:
    records = [record("layers", layer, 1.0, 0.01 * layer) for layer in range(deep)]
    found = document(layers=deep, structures=["layers"], records=records)
    page = render_sensitivity_html(found)
    assert page.count('class="heat"') == 2 * deep
    assert f"| {deep - 1} |" in render_sensitivity_markdown(found)


def test_a_perplexity_that_explodes_is_drawn_by_its_logarithm() -> None:
    values = {0: 21.0, 1: 5e4, 2: math.inf}
    records = [
        record("layers", layer, 1.0, 0.0).model_copy(update={"value": v, "loss": loss_of(v, 20.0, False)})
        for layer, v in values.items()
    ]
    found = document(
        structures=["layers"], records=records, metric="perplexity", higher_is_better=False, uncut=20.0,
        task="text-generation", drift_metric="token_agreement",
    )  # fmt: skip
    page = render_sensitivity_html(found)
    assert ">100</text>" in page and ">lost</text>" in page and "inf" not in page.split("<main>")[1].split("<dl>")[0]
    assert "perplexity 20.0 → 21.0, 5.0 % worse" in lesson(found)


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.booleans())
def test_a_loss_is_the_change_for_the_worse(value: float, uncut: float, higher: bool) -> None:
    loss = loss_of(value, uncut, higher)
    assert (loss > 0) == ((value < uncut) if higher else (value > uncut))
    assert loss_of(uncut, uncut, higher) == 0
    assert np.isclose(abs(loss) * uncut, abs(value - uncut))


def test_a_loss_of_what_is_not_there() -> None:
    assert loss_of(math.nan, 0.8, True) == loss_of(math.inf, 20.0, False) == math.inf
    assert loss_of(0.1, 0.0, False) == 0.1  # a share of answers that flipped: the uncut model's is 0
    assert loss_of(-0.1, -0.05, True) == 1.0


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0 %"), (0.004, "0.4 %"), (-0.004, "−0.4 %"), (0.1234, "12 %"), (51.0, "5,100 %"), (0.0996, "10 %"),
     (1e-6, "0 %"), (-1e-6, "0 %"), (math.inf, "everything")],
)  # fmt: skip
def test_percent(share: float, shown: str) -> None:
    assert percent(share) == shown
