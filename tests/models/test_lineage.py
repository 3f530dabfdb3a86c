"""History of a checkpoint: saved, read back, and laid out as a trace."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from limbeck.models.lineage import Curve, LayerSimilarity, Lineage, Step, trace_lines

ALIKE = LayerSimilarity(before=[[0.25, 0.5, 0.125]], after=[[0.5, 0.75, 1.0]])


def test_a_step_with_everything_comes_back(tmp_path: Path) -> None:
    step = Step(
        verb="distill", method="logits-kl", curves=[Curve(name="loss", steps=[1], values=[math.inf])], similarity=ALIKE
    )
    lineage = Lineage(origin="m", task="fill-mask").followed_by(step)
    lineage.save(tmp_path)
    assert Lineage.load(tmp_path) == lineage


def test_a_history_from_before_similarities_is_read(tmp_path: Path) -> None:
    Lineage(origin="m", task="fill-mask", steps=[Step(verb="prune", method="taylor")]).save(tmp_path)
    path = tmp_path / "lineage.json"
    document = json.loads(path.read_text())
    del document["steps"][0]["similarity"]
    path.write_text(json.dumps(document))
    loaded = Lineage.load(tmp_path)
    assert loaded is not None and loaded.schema_version == 1 and loaded.steps[0].similarity is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], []),
        ([[]], [[]]),
        ([[0.5, 0.5], [0.5]], [[0.5, 0.5], [0.5, 0.5]]),
        ([[0.5]], [[0.5], [0.5]]),
        ([[0.5]], [[0.5, 0.5]]),
    ],
)
def test_similarities_are_of_the_same_layers(before: list[list[float]], after: list[list[float]]) -> None:
    with pytest.raises(ValidationError):
        LayerSimilarity(before=before, after=after)


def test_the_trace_has_a_line_for_every_training_step() -> None:
    curves = [
        Curve(name="loss", steps=[10, 20, 30], values=[3.0, 2.0, math.nan]),
        Curve(name="eval/spearman", steps=[0, 20], values=[0.5, 0.75]),
        Curve(name="grad_norm", steps=[20], values=[-math.inf]),
    ]
    steps = [
        Step(verb="prune", method="taylor"),
        Step(verb="distill", method="embedding", curves=curves),
        Step(verb="distill", method="logits-kl", curves=[Curve(name="loss", steps=[0.5], values=[1.0])]),
    ]
    lines = list(trace_lines(Lineage(origin="m", task="sentence-similarity", steps=steps)))
    assert lines == [
        {"step": 1, "method": "embedding", "training_step": 0, "eval/spearman": 0.5},
        {"step": 1, "method": "embedding", "training_step": 10, "loss": 3.0},
        {"step": 1, "method": "embedding", "training_step": 20, "loss": 2.0, "eval/spearman": 0.75,
         "grad_norm": "-Infinity"},
        {"step": 1, "method": "embedding", "training_step": 30, "loss": "NaN"},
        {"step": 2, "method": "logits-kl", "training_step": 0.5, "loss": 1.0},
    ]  # fmt: skip
    assert [json.loads(json.dumps(line, allow_nan=False)) for line in lines] == lines
