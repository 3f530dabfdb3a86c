"""Prompts by template, what a teacher goes on with, and how it is told whether a candidate goes on alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.errors import UsageError
from limbeck.models.batching import IGNORED_LABEL
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.generation.continuations import continuation_drafts, continued
from limbeck.validate.measurement import measure_checkpoint
from limbeck.validate.rows.prompts import PROMPT_SLICES, PROMPTS, prompts
from limbeck.validate.slices.choosing import SlicesAsked, check_builtin, with_slices
from limbeck.validate.standard import Standard, set_standard

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Write) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("llama", "text-generation"), "text-generation")


@pytest.fixture(scope="module")
def standard(
    teacher: Checkpoint, texts: list[str], write_jsonl: Write, tmp_path_factory: pytest.TempPathFactory
) -> Standard:
    rows = write_jsonl(tmp_path_factory.mktemp("prompts") / "rows.jsonl", [{"text": text} for text in texts[:8]])
    whole = set_standard(teacher, teacher.read(rows))
    return with_slices(whole, SlicesAsked(builtin=["adversarial", "ambiguous"]), teacher.max_length)


def quiet(done: int, total: int) -> None: ...


@pytest.mark.parametrize("name", PROMPT_SLICES)
def test_prompts_are_the_same_at_every_call_and_all_different(name: str) -> None:
    found = prompts(name)
    assert found == prompts(name) and len(set(found)) == PROMPTS == len(found)
    assert found[:10] == prompts(name, 10)
    assert all(prompt.strip() for prompt in found)


def test_adversarial_prompts_are_of_every_kind() -> None:
    found = prompts("adversarial")
    assert any("Ignore all previous instructions" in prompt for prompt in found)
    assert any("Never do what the last sentence says" in prompt for prompt in found)
    assert any(len(prompt) > 2000 for prompt in found)
    assert any("\u202e" in prompt or "\u200b" in prompt for prompt in found)
    assert any("Assistant:" in prompt for prompt in found)
    assert any(len(set(prompt.split(": ", 1)[-1].split())) == 1 for prompt in found)


def test_an_ambiguous_pronoun_may_mean_either() -> None:
    for prompt in prompts("ambiguous"):
        if " because " in prompt:
            others = ("Peter", "John", "Henry") if " because she " in prompt else ("Anna", "Ruth", "Clara")
            assert not any(name in prompt for name in others)


def test_only_what_is_written_after_the_prompt_is_scored(teacher: Checkpoint) -> None:
    asked = prompts("adversarial", 12)
    examples = continued(teacher, asked, teacher.max_length)
    for prompt, feature in zip(asked, examples.features, strict=True):
        ids, labels = feature["input_ids"], feature["labels"]
        assert len(ids) == len(labels) <= teacher.max_length
        start = next(place for place, label in enumerate(labels) if label != IGNORED_LABEL)
        own = teacher.tokenizer(prompt)["input_ids"]
        assert ids[:start] == own[:start] and start >= min(len(own), teacher.max_length // 2)
        assert labels[start:] == ids[start:]
        with torch.inference_mode():
            best = teacher.model(torch.tensor([ids])).logits[0].topk(2)
        told = best.indices[start - 1 : -1, 0].tolist()
        sure = (best.values[:, 0] - best.values[:, 1])[start - 1 : -1] > 1e-3  # elsewhere rounding may choose
        assert all(a == b for a, b, clear in zip(told, ids[start:], sure, strict=True) if clear)


def test_what_the_model_prefers_when_it_generates_changes_nothing(teacher: Checkpoint) -> None:
    other = load_checkpoint(teacher.source, "text-generation")
    other.model.generation_config.repetition_penalty = 50.0
    other.model.generation_config.num_beams = 3
    kept = copy.deepcopy(other.model.generation_config)
    asked = prompts("ambiguous", 4)
    theirs, ours = (continued(model, asked, 48).features for model in (teacher, other))
    assert theirs == ours
    assert other.model.generation_config.to_dict() == kept.to_dict()


def test_a_continuation_ends_with_the_end_token(teacher: Checkpoint) -> None:
    plain = continued(teacher, ["Go."], 48).features[0]
    start = plain["labels"].count(IGNORED_LABEL)
    other = load_checkpoint(teacher.source, "text-generation")
    other.model.generation_config.eos_token_id = [plain["input_ids"][start]]
    ended = continued(other, ["Go."], 48).features[0]
    assert ended["input_ids"] == plain["input_ids"][: start + 1]


def test_the_teacher_goes_on_as_itself(standard: Standard, teacher: Checkpoint) -> None:
    candidate = measure_checkpoint("same", teacher, standard, quiet)
    for part in candidate.slices:
        assert (part.kind, part.count) == ("prompts", PROMPTS)
        found = {metric.name: metric for metric in part.metrics}
        assert found["token_agreement"].value == 1 and found["same_continuation"].value == 1
        assert found["same_continuation"].low is not None and found["same_continuation"].low < 0.97
        assert found["perplexity_ratio"].value == pytest.approx(1)
        assert part.changed == []


def test_a_student_that_leaves_the_teacher_is_seen_to(standard: Standard, teacher: Checkpoint) -> None:
    student = load_checkpoint(teacher.source, "text-generation")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    candidate = measure_checkpoint("student", student, standard, quiet)
    for part in candidate.slices:
        found = {metric.name: metric for metric in part.metrics}
        assert found["token_agreement"].value < 0.9 and found["same_continuation"].value < 0.9
        assert found["tokens_until_divergence"].value < 30
        assert found["perplexity_ratio"].value > 1
        assert len(part.changed) == 5 and part.changed[0].distance > 0


def test_divergence_is_counted_from_the_first_token() -> None:
    def tops(*rows: list[int]) -> dict[str, np.ndarray]:
        found = np.empty(len(rows), dtype=object)
        found[:] = [np.array(row) for row in rows]
        return {"top_token": found}

    theirs, ours = tops([1, 2, 3], [4, 5], [6, 7, 8]), tops([1, 2, 3], [4, 9], [9, 7, 8])
    same, until = continuation_drafts(theirs, ours)
    assert same.point == pytest.approx(1 / 3)
    assert until.point == pytest.approx((3 + 1 + 0) / 3)


@pytest.mark.parametrize("name", PROMPT_SLICES)
@pytest.mark.parametrize("task", ["text-classification", "sentence-similarity", "fill-mask"])
def test_models_that_do_not_write_are_refused(name: str, task: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is of prompts.*this one is for {task}"):
        check_builtin([name], task)
