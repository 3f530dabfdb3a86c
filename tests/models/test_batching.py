"""Batches: every example once, padding that nothing heeds, and the way back to the order of the examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.models.batching import (
    IGNORED_LABEL,
    Examples,
    batches_by_length,
    concatenate_in_order,
    pad,
    padding_id,
)


class Padding:
    """As much of a tokenizer as padding asks for."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 7


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), batch_size=st.integers(1, 5))
def test_every_example_is_in_one_batch_and_goes_back_to_its_place(lengths: list[int], batch_size: int) -> None:
    features = [{"input_ids": [i + 1] * length, "attention_mask": [1] * length} for i, length in enumerate(lengths)]
    batches = list(batches_by_length(Examples(features), Padding(), batch_size))  # type: ignore[arg-type]
    assert sorted(i for positions, _ in batches for i in positions) == list(range(len(lengths)))
    parts = [(positions, {"first": batch["input_ids"][:, 0].numpy()}) for positions, batch in batches]
    assert concatenate_in_order(parts)["first"].tolist() == [i + 1 for i in range(len(lengths))]
    for _, batch in batches:
        assert (batch["input_ids"] == Padding.pad_token_id).eq(batch["attention_mask"] == 0).all()


def test_labels_are_padded_with_what_no_loss_heeds() -> None:
    features = [{"input_ids": [5, 6], "labels": [1, 2]}, {"input_ids": [5], "labels": [1]}]
    batch = pad(features, Padding())  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[5, 6], [5, 0]]
    assert batch["labels"].tolist() == [[1, 2], [1, IGNORED_LABEL]]


def test_the_end_token_stands_in_for_a_missing_padding_token() -> None:
    tokenizer = Padding()
    tokenizer.pad_token_id = None
    assert padding_id(tokenizer) == 7  # type: ignore[arg-type]
    tokenizer.eos_token_id = None
    with pytest.raises(InputError, match="neither a padding token nor an end token"):
        padding_id(tokenizer)  # type: ignore[arg-type]
