"""Sizes that programs take, and the inputs that they are traced and probed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from limbeck.backends.base import Runner
from limbeck.backends.fitted import FittedRunner
from limbeck.backends.registry import get_backend, load_runner
from limbeck.errors import InputError, UsageError
from limbeck.exporters.artifact import read_manifest
from limbeck.exporters.inputs import dynamic_shapes, probe_batch, probe_batches, sample_inputs
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.steps import export

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
    other = probe_batch(checkpoint, 5, 16, padded=True)
    bare = get_backend(backend).load(tmp_path / "out", manifest, threads=1)
    with pytest.raises(InputError, match=r"does not take inputs of shape \(5, 16\)"):
        bare(other)
    fitted, _ = load_runner(tmp_path / "out", threads=1)
    np.testing.assert_allclose(fitted(other)["logits"], checkpoint.run(other)["logits"], atol=1e-4)


def test_a_batch_of_any_size_is_fitted(tiny_checkpoint: TinyCheckpoint) -> None:
    """The model itself behind it: what is padded or split away must not show, of outputs per token either."""
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    taken: list[tuple[int, int]] = []

    class Bare(Runner):
        properties: ClassVar[dict[str, str]] = {}

        def __call__(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, np.ndarray]:  # type: ignore[override]
            taken.append(tuple(batch["input_ids"].shape))
            return checkpoint.run(batch)

        def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
            raise NotImplementedError

    shapes = ShapeRange(min_batch=2, max_batch=3, min_sequence=20, max_sequence=64)
    for rows, tokens in ((7, 9), (1, 30), (3, 20)):
        batch = probe_batch(checkpoint, rows, tokens, padded=True)
        found, expected = FittedRunner(Bare(), shapes)(batch)["logits"], checkpoint.run(batch)["logits"]
        assert found.shape == expected.shape
        real = batch["attention_mask"].numpy().astype(bool)
        np.testing.assert_allclose(found[real], expected[real], atol=1e-4)
    assert taken == [(3, 20), (3, 20), (2, 20), (2, 30), (3, 20)]
