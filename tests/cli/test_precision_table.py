"""The table of `--precision auto`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from limbeck.cli.console import show
from limbeck.cli.summary import precision_table
from limbeck.exporters.artifact import Manifest
from limbeck.exporters.settings import ShapeRange
from limbeck.recipes.precision_choice import _outcome
from limbeck.validate.performance.latency import Speedup

TIMED = {"beside": "fp32", "size_mb": 9.0}
ATTEMPTS = [
    {"precision": "bf16", "outcome": "not what runs here: its float32 twin does"},
    {"precision": "fp32", "quality": "accuracy 0.8865 where the floor is 0.8687", "p50_ms": 1234.5, "speedup": 1.0,
     "speedup_low": 1.0, "outcome": "slower than int8", **TIMED},
    {"precision": "int8", "quality": "accuracy 0.883 where the floor is 0.8687", "p50_ms": 0.4321, "speedup": 1.63,
     "speedup_low": 1.24, "outcome": "chosen", **TIMED},
]  # fmt: skip


def test_the_table_says_what_was_timed_at_which_size(capsys: pytest.CaptureFixture[str]) -> None:
    settings = SimpleNamespace(shapes=ShapeRange(opt_batch=4, opt_sequence=96))
    manifest = SimpleNamespace(settings=settings, evidence={"precision auto": ATTEMPTS})
    show(precision_table(cast(Manifest, manifest)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Timed at 4 x 96 tokens; speed-up over fp32. Floor of quality: 0.8687." in printed
    assert "1234 ms" in printed and "0.432 ms" in printed and "1.63x (at least 1.24x)" in printed
    assert "1.00x" not in printed and "accuracy 0.8865 │" in printed


@pytest.mark.parametrize(
    ("name", "bounds", "said"),
    [
        ("int8", (1.2, 1.4), "chosen"),
        ("fp32", (1.0, 1.0), "slower than int8"),
        ("bf16", (1.1, 1.3), "slower than int8"),
        ("fp16", (0.9, 1.1), "not faster than fp32 beyond the noise"),
        ("int4-weight-only", (0.5, 0.9), "slower than fp32"),
        ("fp16", (None, None), "not faster than fp32 beyond the noise"),
    ],
)
def test_what_became_of_a_precision(name: str, bounds: tuple[Any, Any], said: str) -> None:
    assert _outcome(name, "fp32", "int8", Speedup(1.0, *bounds, ())) == said
