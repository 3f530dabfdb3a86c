"""CKA of layers: the laws it obeys, the formula on whole matrices, and what it says of real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.distill.similarity import StreamingCKA, layer_similarity
from limbeck.distill.teacher import TEACHER_PREFIX
from limbeck.errors import InputError
from limbeck.models.batching import Batch, pad
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.features import recording

SEEDS = st.integers(0, 2**31)


def states(seed: int, layers: int, samples: int, width: int) -> torch.Tensor:
    """Correlated channels, far from the origin."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(layers, samples, width)) @ generator.normal(size=(layers, width, width))
    return torch.tensor(mixed + 5 * generator.normal(size=(layers, 1, width)))


def cka(student: torch.Tensor, teacher: torch.Tensor) -> np.ndarray:
    measured = StreamingCKA()
    measured.add(student, teacher)
    return measured.matrix()


def by_grams(x: torch.Tensor, y: torch.Tensor) -> float:
    """The same figure in the other form: tr(KHLH) / sqrt(tr(KHKH) tr(LHLH)), from samples x samples matrices."""
    n = len(x)
    centring = np.eye(n) - 1 / n
    k, m = (centring @ (side @ side.T).numpy() @ centring for side in (x, y))
    return float(np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m)))


@settings(max_examples=25)
@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(5, 40))
def test_it_is_the_formula_of_the_paper(seed: int, ours: int, theirs: int, samples: int) -> None:
    x, y = states(seed, ours, samples, 4), states(seed + 1, theirs, samples, 6)
    found = cka(x, y)
    assert found.shape == (ours, theirs) and found.dtype == np.float64
    expected = [[by_grams(one, other) for other in y] for one in x]
    assert found == pytest.approx(np.array(expected), abs=1e-9)
    assert np.all(found >= 0) and np.all(found <= 1)
    assert cka(y, x) == pytest.approx(found.T, abs=1e-12)  # symmetric


@settings(max_examples=25)
@given(SEEDS, st.floats(1e-3, 1e3))
def test_rotation_scale_and_place_change_nothing(seed: int, scale: float) -> None:
    x, y = states(seed, 2, 30, 5), states(seed + 1, 1, 30, 7)
    turn = torch.linalg.qr(states(seed + 2, 1, 5, 5)[0]).Q
    moved = scale * x @ turn + 3.0
    assert cka(moved, y) == pytest.approx(cka(x, y), abs=1e-9)
    assert np.diagonal(cka(x, moved)) == pytest.approx(1)


@settings(max_examples=25)
@given(SEEDS, st.lists(st.integers(0, 9), min_size=2, max_size=8))
def test_batches_say_what_all_samples_at_once_say(seed: int, sizes: list[int]) -> None:
    samples = sum(sizes) + 4
    x, y = states(seed, 2, samples, 4), states(seed + 1, 3, samples, 5)
    x, y = (side + 100 * torch.arange(samples)[None, :, None] / samples for side in (x, y))  # the mean drifts
    measured = StreamingCKA()
    for one, other in zip(x.split([*sizes, 4], dim=1), y.split([*sizes, 4], dim=1), strict=True):
        measured.add(one, other)
    assert measured.samples == samples
    assert measured.matrix() == pytest.approx(cka(x, y), abs=1e-9)


def test_a_layer_that_says_the_same_of_everything_is_like_nothing() -> None:
    x = torch.cat([torch.ones(1, 20, 3), states(0, 1, 20, 3)])
    found = cka(x, states(1, 1, 20, 3))
    assert found[0, 0] == 0 and found[1, 0] > 0


def test_no_text_is_an_error() -> None:
    with pytest.raises(InputError, match="no text"):
        StreamingCKA().matrix()


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"))


def batches_of(checkpoint: Checkpoint, texts: list[str], size: int = 16) -> list[Batch]:
    encoded = [dict(checkpoint.tokenizer(text)) for text in texts]
    return [pad(encoded[start : start + size], checkpoint.tokenizer) for start in range(0, len(encoded), size)]


def test_layers_of_a_model_against_its_own(teacher: Checkpoint, texts: list[str]) -> None:
    batches = batches_of(teacher, texts)
    found = layer_similarity(teacher, teacher, batches)
    assert np.diagonal(found) == pytest.approx(1, abs=1e-9)
    assert found == pytest.approx(found.T, abs=1e-9)
    assert 0 < found[0, 1] < 0.999
    assert not any(parameter.grad is not None for parameter in teacher.module.parameters())


def test_padding_is_no_sample(teacher: Checkpoint, texts: list[str]) -> None:
    whole = layer_similarity(teacher, teacher, batches_of(teacher, texts, size=64))
    alone = layer_similarity(teacher, teacher, batches_of(teacher, texts, size=1))  # nothing is padded
    assert alone == pytest.approx(whole, abs=1e-4)
    batch = batches_of(teacher, texts, size=64)[0]
    with recording(teacher.model, ["hidden.0", "hidden.1"]) as seen, torch.no_grad():
        teacher.module(**teacher.model_inputs(batch))
    kept = [seen[f"hidden.{layer}"][batch["attention_mask"].bool()].double() for layer in (0, 1)]
    assert whole[0, 1] == pytest.approx(by_grams(*kept), abs=1e-6)


def test_sides_that_split_text_otherwise_are_compared_by_text(
    teacher: Checkpoint, tiny_checkpoint: Callable[..., Path], texts: list[str]
) -> None:
    student = load_checkpoint(tiny_checkpoint("roberta"), "sentence-similarity")
    own = batches_of(student, texts)
    asked = batches_of(teacher, texts)
    both = [
        {**one, **{TEACHER_PREFIX + name: value for name, value in other.items()}}
        for one, other in zip(own, asked, strict=True)
    ]
    assert any(one["input_ids"].shape != other["input_ids"].shape for one, other in zip(own, asked, strict=True))
    found = layer_similarity(student, teacher, both)
    assert found.shape == (2, 2) and np.all((found > 0) & (found < 1))
    same = [{**one, **{TEACHER_PREFIX + name: value for name, value in one.items()}} for one in asked]
    assert np.diagonal(layer_similarity(teacher, teacher, same)) == pytest.approx(1, abs=1e-6)


def test_a_changed_layer_shows_from_there_on(tiny_checkpoint: Callable[..., Path], texts: list[str]) -> None:
    folder = tiny_checkpoint("llama", "text-generation")
    teacher, student = (load_checkpoint(folder, "text-generation") for _ in range(2))
    with torch.no_grad():
        for parameter in student.model.base_model.layers[1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = layer_similarity(student, teacher, batches_of(teacher, texts))
    assert found[0, 0] == pytest.approx(1, abs=1e-9)
    assert found[1, 1] < 0.9
