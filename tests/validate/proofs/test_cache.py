"""Reading in pieces against reading in one: what is read, that a sound cache passes, and that each defect is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.backends.decoder import Decoder
from limbeck.backends.torch_eager import EagerRunner
from limbeck.errors import InputError
from limbeck.exporters.artifact import CacheFacts
from limbeck.exporters.inputs import random_ids
from limbeck.exporters.settings import ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.checks import cache as defects
from limbeck.validate.proofs.cache import Reading, check_cache, readings_of
from limbeck.validate.proofs.tolerances import tolerance_of

VOCABULARY = 100
KEPT_WHOLE, KEPT_COARSELY = (CacheFacts(precision=kept, values_per_token=64) for kept in ("f32", "u8"))
SHAPES = ShapeRange(max_batch=8, opt_batch=2, max_sequence=40, opt_sequence=16)


def draw(texts: int, tokens: int) -> torch.Tensor:
    return random_ids(VOCABULARY, texts, tokens)


def readings(longest: int = 40, shapes: ShapeRange = SHAPES) -> list[Reading]:
    return readings_of(draw, shapes, longest)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("gpt2", task="text-generation"))


class Faulty(EagerRunner):
    """Right in one piece, and with a defect in pieces."""

    def __init__(self, checkpoint: Checkpoint, defect: defects._Defect) -> None:
        super().__init__(checkpoint, 1)
        self._defect = defect

    def decoder(self) -> Decoder:
        return defects._Defective(super().decoder(), self._defect)


@given(st.integers(1, 90), st.integers(1, 9))
def test_every_text_is_read_to_its_end_and_from_the_first_piece_on(longest: int, most: int) -> None:
    shapes = ShapeRange(max_batch=most, opt_batch=1, max_sequence=max(longest, 2), opt_sequence=1)
    for reading in readings(longest, shapes):
        assert len(reading.ids) <= most and reading.ids.shape[1] <= longest
        assert reading.mask[:, reading.ends[0] - 1].all() and reading.ends[-1] == reading.ids.shape[1]
        read = [step[0] for step in reading.steps()]
        assert np.array_equal(np.concatenate(read, axis=1), reading.ids)
        assert all((row[row.argmax() :] == 1).all() for row in reading.mask)  # padding is on the left alone
        last = [int(step[2][0, -1]) for step in reading.steps()]
        assert last == [end - 1 for end in reading.ends]  # of the first text, which has no padding


def test_what_is_read_is_one_text_several_and_padded_ones() -> None:
    found = {reading.name: reading for reading in readings()}
    assert list(found) == [
        "one text", "3 texts of one length", "3 texts, padded on the left", "the longest text",
    ]  # fmt: skip
    assert found["one text"].ends == (12, 18, 21, 22, 23, 24)
    padded = found["3 texts, padded on the left"]
    assert padded.mask.sum(axis=1).tolist() == [24, 19, 14] and padded.positions[2, 9:12].tolist() == [0, 0, 1]
    assert found["the longest text"].ids.shape == (1, 40)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sound_cache_passes(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family, task="text-generation"))
    found = check_cache(EagerRunner(checkpoint, 1), readings(), tolerance_of("fp32", KEPT_WHOLE).itself)
    assert found.passed and found.name == "cache", found.detail
    assert len(found.rows) == 4 and all(row["share of the output"] < 1e-5 for row in found.rows)
    assert found.rows[0]["pieces"] == "12, 6, 3, 1, 1, 1"


@pytest.mark.parametrize("defect", defects._DEFECTS, ids=lambda defect: defect.cause)
def test_a_defect_is_found_and_named(defect: defects._Defect, checkpoint: Checkpoint) -> None:
    faulty = Faulty(checkpoint, defect)
    found = check_cache(faulty, readings(), tolerance_of("int8", KEPT_COARSELY).itself)  # even where much is allowed
    assert not found.passed
    assert defects._cause(faulty.decoder(), checkpoint, readings()) == defect.cause


def test_what_no_known_defect_explains_has_no_name(checkpoint: Checkpoint) -> None:
    odd = defects._Defect("", lambda step, ends: (step[0][:, ::-1].copy() if ends else step[0], *step[1:]))
    assert defects._cause(Faulty(checkpoint, odd).decoder(), checkpoint, readings()) is None


def test_padding_that_is_read_is_seen_with_padding_alone(checkpoint: Checkpoint) -> None:
    ignoring = next(each for each in defects._DEFECTS if "padding on the left" in each.cause)
    found = check_cache(Faulty(checkpoint, ignoring), readings(), 1e-4)
    assert [row["passed"] for row in found.rows] == [True, True, False, True]
    assert "3 texts, padded on the left: 12 tokens that are read onto an empty cache" in found.detail


def test_a_program_that_cannot_go_on_fails(checkpoint: Checkpoint) -> None:
    def refusing(step: defects.Step, ends: object) -> defects.Step:
        if ends:
            raise InputError("The program does not take inputs of shape (1, 6).")
        return step

    found = check_cache(Faulty(checkpoint, defects._Defect("", refusing)), readings(), 1e-4)
    assert not found.passed and found.detail == (
        "one text cannot be read in pieces: The program does not take inputs of shape (1, 6)"
    )


@pytest.mark.parametrize("when", ["in pieces", "in one", "always"])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_answers_that_are_no_numbers_fail(odd: float, when: str, checkpoint: Checkpoint) -> None:
    class Broken(EagerRunner):
        def __call__(self, batch: Any) -> dict[str, np.ndarray]:
            found = super().__call__(batch)
            return {name: value if when == "in pieces" else np.full_like(value, odd) for name, value in found.items()}

        def decoder(self) -> Decoder:
            decoder = super().decoder()
            step = decoder.step
            if when != "in one":
                decoder.step = lambda *given: np.full_like(step(*given), odd)  # type: ignore[method-assign]
            return decoder

    found = check_cache(Broken(checkpoint, 1), readings()[:1], 0.5)
    assert not found.passed and "by inf of the largest logit" in found.detail
