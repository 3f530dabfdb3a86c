"""Sizes that programs take, and the inputs that they are traced and probed with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from limbeck.errors import InputError, UsageError
from limbeck.exporters.artifact import read_manifest
from limbeck.exporters.inputs import dynamic_shapes, probe_batches, sample_inputs
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.steps import export, load_runner

TinyCheckpoint = Callable[..., Path]
STATIC = ShapeRange(min_batch=2, max_batch=2, min_sequence=24, max_sequence=24)


@given(st.data())
def test_what_is_traced_and_probed_lies_within_the_range(tiny_checkpoint: TinyCheckpoint, data: st.DataObject) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    low, short = data.draw(st.integers(1, 20)), data.draw(st.integers(1, checkpoint.max_length))
    high, long = data.draw(st.integers(low, 40)), data.draw(st.integers(short, 2 * checkpoint.max_length))
    shapes = ShapeRange(min_batch=low, max_batch=high, min_sequence=short, max_sequence=long)
    within = shapes.within(checkpoint.max_length)
    assert low <= within.opt_batch <= high and short <= within.opt_sequence <= min(long, checkpoint.max_length)
    batches = [sample_inputs(checkpoint, shapes), *(batch for _, batch in probe_batches(checkpoint, shapes))]
    for batch in batches:
        rows, tokens = batch["input_ids"].shape
        assert low <= rows <= high and short <= tokens <= within.max_sequence
        assert batch["attention_mask"].shape == (rows, tokens)
    assert len({name for name, _ in probe_batches(checkpoint, shapes)}) == len(batches) - 1
    varying = set(dynamic_shapes(checkpoint, shapes)["input_ids"])
    assert varying == {axis for axis, differs in ((0, low < high), (1, short < within.max_sequence)) if differs}


def test_an_empty_range_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="the smallest sequence 9 is above the largest, 8"):
        ShapeRange(min_sequence=9, max_sequence=8)
    settings = ExportSettings(backend="onnx", shapes=ShapeRange(min_sequence=100, max_sequence=512))
    with pytest.raises(UsageError, match="smallest sequence 100 is longer than the 64 tokens"):
        export(load_checkpoint(tiny_checkpoint("bert")), settings, tmp_path / "out")


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_static_program_takes_its_size_and_says_so_of_others(
    backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    manifest = export(checkpoint, ExportSettings(backend=backend, shapes=STATIC), tmp_path / "out")
    assert {tuple(spec.shape) for spec in manifest.inputs} == {(2, 24)}
    assert [row["shape"] for row in manifest.checks[0].rows] == ["2 x 24", "2 x 24, padded"]
    assert read_manifest(tmp_path / "out").settings.shapes.max_sequence == 24
    runner, _ = load_runner(tmp_path / "out", threads=1)
    other = dict(sample_inputs(checkpoint, ShapeRange()))
    with pytest.raises(InputError, match=r"does not take inputs of shape \(2, 16\)"):
        runner(other)
