"""Every objective alone makes a random student better on texts that it was not trained on; without it nothing does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoConfig

from limbeck.distill.module import Distillation, TeacherViews, bind, shape_of, teacher_features
from limbeck.distill.objectives import OBJECTIVES, build_objectives
from limbeck.distill.objectives.base import Sides
from limbeck.distill.similarity import StreamingCKA
from limbeck.distill.teacher import eager_teacher
from limbeck.models.batching import Batch, pad
from limbeck.models.checkpoint import Checkpoint, load_checkpoint

TinyCheckpoint = Callable[..., Path]
Measure = Callable[[Checkpoint, Checkpoint, Batch], float]

STEPS, BATCH, RATE = 80, 16, 5e-3
MARGIN = 0.1  # all measures go from 0 (or by chance) to 1
HELD_OUT = 10_000  # the seed of texts that no step draws
FAMILIES = {"text-generation": "llama"}  # bert for all other tasks


def student_of(teacher: Checkpoint) -> Checkpoint:
    """One layer, random weights: whatever it knows later it has learnt."""
    config = AutoConfig.from_pretrained(teacher.source, num_hidden_layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return dataclasses.replace(teacher, model=type(teacher.model)(config))


def showing_maps(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.model.set_attn_implementation("eager")  # fused kernels form none
    return checkpoint


def drawn(texts: list[str], seed: int, count: int) -> list[str]:
    """New texts of the words of a few: every word is met in training, no text of the held-out ones is."""
    generator = np.random.default_rng(seed)
    words = sorted({word for text in texts[:8] for word in text.split()})
    return [" ".join(generator.choice(words, size=generator.integers(3, 10))) for _ in range(count)]


def with_labels(checkpoint: Checkpoint, texts: list[str]) -> Batch:
    """Labels that can be read off the text: whether it says "the", which token it is (in part)."""
    encoded = checkpoint.tokenizer(texts)["input_ids"]
    features = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in encoded]
    batch = pad(features, checkpoint.tokenizer)
    batch |= {name: torch.zeros_like(batch["input_ids"]) for name in checkpoint.input_names if name not in batch}
    real = batch["attention_mask"].bool()
    if checkpoint.task.name == "text-classification":
        the = checkpoint.tokenizer.convert_tokens_to_ids("the")
        return {**batch, "labels": (batch["input_ids"] == the).any(dim=1).long()}
    labels = batch["input_ids"] % 3 if checkpoint.task.name == "token-classification" else batch["input_ids"]
    return {**batch, "labels": labels.where(real, -100)}


@torch.no_grad()
def outputs(checkpoint: Checkpoint, batch: Batch, *features: str) -> Mapping[str, torch.Tensor]:
    recorded = checkpoint.recording(features)
    return recorded.module(**recorded.model_inputs(batch), **recorded.task.forward_flags())  # type: ignore[no-any-return]


# What is measured on held-out texts: none of it is the loss itself.


def same_answers(student: Checkpoint, teacher: Checkpoint, batch: Batch) -> float:
    """How often both sides' likeliest answers are the same."""
    ours, theirs = (outputs(side, batch)["logits"].argmax(dim=-1) for side in (student, teacher))
    alike = (ours == theirs)[batch["attention_mask"].bool()] if ours.ndim == 2 else ours == theirs
    return float(alike.float().mean())


def accuracy(student: Checkpoint, teacher: Checkpoint, batch: Batch) -> float:
    """How often the likeliest answer is the label."""
    logits, labels = outputs(student, batch)["logits"], batch["labels"]
    return float((logits.argmax(dim=-1) == labels)[labels >= 0].float().mean())


def alike(ours: str, theirs: str) -> Measure:
    """Linear CKA of two features at real tokens."""

    def measure(student: Checkpoint, teacher: Checkpoint, batch: Batch) -> float:
        real, measured = batch["attention_mask"].bool(), StreamingCKA()
        found = outputs(student, batch, ours)[ours], outputs(teacher, batch, theirs)[theirs]
        measured.add(found[0][real][None], found[1][real][None])
        return float(measured.matrix()[0, 0])

    return measure


def same_attention(student: Checkpoint, teacher: Checkpoint, batch: Batch) -> float:
    """How often a head's most attended token is the same."""
    layers = ((student, "attention.0"), (teacher, "attention.1"))
    ours, theirs = (outputs(side, batch, name)[name].argmax(dim=-1) for side, name in layers)
    same = (ours == theirs).float()  # [batch, heads, queries]
    return float(same.transpose(1, 2)[batch["attention_mask"].bool()].mean())


def same_ranks(student: Checkpoint, teacher: Checkpoint, batch: Batch) -> float:
    """Spearman's correlation of the cosines of all pairs of texts."""
    cosines = []
    for side in (student, teacher):
        vectors = torch.nn.functional.normalize(outputs(side, batch)["sentence_embedding"], dim=-1)
        cosines.append((vectors @ vectors.T)[tuple(np.triu_indices(len(vectors), 1))].numpy())
    return float(spearmanr(*cosines).statistic)


def found_again(student: Checkpoint, teacher: Checkpoint, batch: Batch) -> float:
    """How often the teacher's vector that is nearest to the student's is that of the same text."""
    ours, theirs = (
        torch.nn.functional.normalize(outputs(side, batch)["sentence_embedding"], dim=-1) for side in (student, teacher)
    )
    return float(((ours @ theirs.T).argmax(dim=1) == torch.arange(len(ours))).float().mean())


SIMILARITY, CLASSIFICATION = "sentence-similarity", "text-classification"
TOKENS, GENERATION, FILLING = "token-classification", "text-generation", "fill-mask"
CASES: list[tuple[str, dict[str, Any], str, Measure]] = [
    ("logits-kl", {}, TOKENS, same_answers),
    ("logits-kl", {"divergence": "reverse"}, TOKENS, same_answers),
    ("logits-kl", {"divergence": "jensen-shannon"}, TOKENS, same_answers),
    ("logits-kl", {"temperature": {"start": 4, "end": 1}}, FILLING, same_answers),
    ("logits-kl", {"top_k": 64}, GENERATION, same_answers),
    ("labels", {}, TOKENS, accuracy),
    ("labels", {}, CLASSIFICATION, accuracy),
    ("hidden-states", {}, SIMILARITY, alike("hidden.0", "hidden.1")),
    ("hidden-states", {"distance": "cosine"}, GENERATION, alike("hidden.0", "hidden.1")),
    ("embedding-layer", {}, CLASSIFICATION, alike("embeddings", "embeddings")),
    ("attention-maps", {"layers": "last"}, CLASSIFICATION, same_attention),
    ("attention-relations", {}, GENERATION, alike("key.0", "key.1")),
    ("embedding-cosine", {}, SIMILARITY, same_ranks),
    ("pairwise-similarity", {}, SIMILARITY, same_ranks),
    ("relational", {}, SIMILARITY, same_ranks),
    ("contrastive", {}, SIMILARITY, found_again),
    ("queue-similarity", {}, SIMILARITY, same_ranks),
]


def trained(
    name: str, settings: dict[str, Any], teacher: Checkpoint, texts: list[str], weight: float = 1
) -> Checkpoint:
    """A random student after its steps with this objective alone; a few are enough without it (weight 0)."""
    student = showing_maps(student_of(teacher))
    objectives = build_objectives({name: {**settings, "weight": weight}}, teacher.task, has_labels=True)
    terms = bind(objectives, Sides(shape_of(student), shape_of(teacher), lambda: np.eye(1, 2)), seed=0)
    views = TeacherViews(eager_teacher(teacher.recording(teacher_features(terms))), terms, teacher)
    module = Distillation(student, terms)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    for step in range(STEPS if weight else 3):
        batch = with_labels(student, drawn(texts, step, BATCH))
        optimizer.zero_grad()
        module(batch, views(batch), step / STEPS)["loss"].backward()
        optimizer.step()
    return student


def test_every_objective_is_here() -> None:
    assert {name for name, *_ in CASES} == set(OBJECTIVES)


@pytest.mark.parametrize(("name", "settings", "task", "measure"), CASES)
def test_an_objective_alone_teaches_what_is_measured_on_other_texts(
    name: str, settings: dict[str, Any], task: str, measure: Measure,
    tiny_checkpoint: TinyCheckpoint, texts: list[str],
) -> None:  # fmt: skip
    teacher = showing_maps(load_checkpoint(tiny_checkpoint(FAMILIES.get(task, "bert"), task), task=task))
    held_out = with_labels(teacher, drawn(texts, HELD_OUT, 48))
    untrained, without, with_it = (
        measure(student, teacher, held_out)
        for student in (
            showing_maps(student_of(teacher)),
            trained(name, settings, teacher, texts, weight=0),
            trained(name, settings, teacher, texts),
        )
    )
    assert without == untrained
    assert with_it > without + MARGIN
