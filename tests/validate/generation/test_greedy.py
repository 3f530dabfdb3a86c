"""Greedy text: that it is what transformers writes, and where texts are said to part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from limbeck.errors import UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.generation.greedy import (
    LanguageModel,
    check_prompts,
    divergence_metrics,
    median_interval,
    set_generation,
)
from limbeck.validate.standard import Answering, Standard, set_standard

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Write) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("llama", "text-generation"))


@pytest.fixture(scope="module")
def standard(teacher: Checkpoint, write_jsonl: Write, texts: list[str], tmp_path_factory: Any) -> Standard:
    path = write_jsonl(tmp_path_factory.mktemp("generation") / "rows.jsonl", [{"text": text} for text in [*texts, ""]])
    return set_standard(teacher, teacher.read(path))


def model_of(checkpoint: Checkpoint) -> LanguageModel:
    return LanguageModel(checkpoint.run, checkpoint.tokenizer, checkpoint.max_length)


def answering(checkpoint: Checkpoint, run: Any = None) -> Answering:
    return Answering("student", run or checkpoint.run, checkpoint.tokenizer, checkpoint.max_length, {})


def test_text_is_what_transformers_writes(teacher: Checkpoint, texts: list[str]) -> None:
    prompts = [teacher.tokenizer(text)["input_ids"] for text in texts[:11]]
    written = model_of(teacher).write(prompts, 10)
    for prompt, row in zip(prompts, written, strict=True):
        ids = torch.tensor([prompt])
        found = teacher.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert row == found[0, len(prompt) :].tolist()


def test_it_ends_at_the_end_token_or_where_told(teacher: Checkpoint, texts: list[str]) -> None:
    prompts = [teacher.tokenizer(text)["input_ids"] for text in texts[:3]]
    end = teacher.tokenizer.eos_token_id

    def ending(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """After a text of so many tokens comes the end, before that a five."""
        lengths = batch["attention_mask"].sum(dim=1)
        logits = np.zeros((*batch["input_ids"].shape, len(teacher.tokenizer)), dtype=np.float32)
        for row, length in enumerate(lengths):
            logits[row, int(length) - 1, end if int(length) == len(prompts[row]) + 2 else 5] = 1
        return {"logits": logits}

    ends = LanguageModel(ending, teacher.tokenizer, 64)
    assert ends.write(prompts[:1], 10) == [[5, 5, end]]
    told = model_of(teacher).write(prompts, 10, lambda place, written: len(written) == place + 1)
    assert [len(row) for row in told] == [1, 2, 3]


def test_the_teacher_writes_greedily_whatever_its_own_settings_are(standard: Standard, teacher: Checkpoint) -> None:
    before = set_generation(standard, 5, 64)
    own = teacher.model.generation_config
    wild = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=2.0, max_new_tokens=1, min_new_tokens=9)
    teacher.model.generation_config = wild
    try:
        assert set_generation(standard, 5, 64) == before
        assert teacher.model.generation_config is wild
    finally:
        teacher.model.generation_config = own
    assert before is not None and len(before.texts) == 5 and all(1 <= len(row) <= 32 for row in before.written)


def test_a_candidate_of_the_same_weights_agrees_and_another_does_not(
    standard: Standard, tiny_checkpoint: Write
) -> None:
    generation = set_generation(standard, None, 64)
    assert generation is not None and len(generation.texts) == 20
    same = {metric.name: metric for metric in generation(answering(standard.teacher))}
    assert same["generation_agreement"].value == same["generation_identical"].value == 1
    assert same["generation_agreement"].low < 0.9  # 20 prompts prove no more
    assert same["first_divergence"].value == np.median([len(row) for row in generation.written])
    student = load_checkpoint(tiny_checkpoint("llama", "text-generation"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    other = {metric.name: metric for metric in generation(answering(student))}
    assert 0 < other["generation_agreement"].value < 1 and other["generation_agreement"].count == 20
    assert all(metric.low <= metric.value <= metric.high for metric in other.values())


def test_a_book_gives_more_than_one_prompt(
    teacher: Checkpoint, write_jsonl: Write, texts: list[str], tmp_path: Path
) -> None:
    book = teacher.read(write_jsonl(tmp_path / "book.jsonl", [{"text": " ".join(texts * 4)}]))
    found = set_generation(Standard(teacher, book, None, {}), 4, 64)
    assert found is not None and len(set(found.texts)) == 4


def test_a_model_that_sees_ahead_is_found_out(standard: Standard) -> None:
    """Told the teacher's text, it would repeat it; here it has to write."""
    generation = set_generation(standard, 4, 64)
    assert generation is not None

    def ahead(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        ids = batch["input_ids"].numpy()
        logits = np.zeros((*ids.shape, len(standard.teacher.tokenizer)), dtype=np.float32)
        rows, columns = np.indices(ids[:, 1:].shape)
        logits[rows, columns, ids[:, 1:]] = 1
        return {"logits": logits}

    found = {metric.name: metric.value for metric in generation(answering(standard.teacher, ahead))}
    assert found["generation_agreement"] < 0.1


def test_divergence_is_counted_by_hand() -> None:
    kept, lengths = np.array([8, 8, 4, 0, 8, 2, 6, 8]), np.full(8, 8)
    found = {metric.name: metric for metric in divergence_metrics(kept, lengths, "rows")}
    assert found["generation_agreement"].value == pytest.approx(44 / 64)
    assert found["generation_identical"].value == 0.5
    first = found["first_divergence"]
    assert (first.value, first.low, first.high, first.unit) == (7, 0, 8, "tokens")
    assert found["generation_agreement"].low < 44 / 64 < found["generation_agreement"].high
    few = {metric.name: metric for metric in divergence_metrics(kept[:3], lengths[:3], "rows")}
    assert (few["first_divergence"].low, few["first_divergence"].high) == (0, 8)


def test_the_median_lies_in_its_interval_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        kept = np.minimum(random.geometric(0.1, size=20), 32)
        first = median_interval(kept, 32)
        inside.append(first.low <= 7 <= first.high)  # the median of a geometric variable with success 0.1
    assert np.mean(inside) >= 0.95


def test_what_cannot_be_compared_is_refused(standard: Standard) -> None:
    assert set_generation(standard, 0, 64) is None
    check_prompts(None, "fill-mask")
    check_prompts(0, "fill-mask")
    with pytest.raises(UsageError, match="1 prompts cannot be compared; generation takes at least 2, or 0"):
        check_prompts(1, "text-generation")
    with pytest.raises(UsageError, match="this model is for fill-mask"):
        check_prompts(20, "fill-mask")
