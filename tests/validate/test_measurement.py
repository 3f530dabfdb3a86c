"""What the record of a measured model says beside its figures, and that both sides are asked the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from limbeck.models.checkpoint import load_checkpoint
from limbeck.validate.measurement import describe_teacher, measure_checkpoint
from limbeck.validate.standard import set_standard


def quiet(done: int, total: int) -> None: ...


def test_a_report_says_which_weights_its_teacher_has(
    tiny_checkpoint: Callable[..., Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = load_checkpoint(tiny_checkpoint("bert", "text-classification"), "text-classification")
    rows = [{"text": word, "label": 0} for word in ("rain", "fox", "lamp", "night")]
    standard = set_standard(teacher, teacher.read(write_jsonl(tmp_path / "words.jsonl", rows)))
    measured = measure_checkpoint("same", teacher, standard, quiet)
    assert describe_teacher(teacher).checkpoint_hash == measured.checkpoint_hash == teacher.hash


def test_a_candidate_that_takes_longer_texts_is_asked_the_teachers_windows(
    tiny_checkpoint: Callable[..., Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = load_checkpoint(tiny_checkpoint("llama", "text-generation"), "text-generation")
    rows = [{"text": "rain fell on the harbour all night " * 6}, {"text": "a fox"}]
    data = teacher.read(write_jsonl(tmp_path / "texts.jsonl", rows))
    standard = set_standard(teacher, data, max_length=16)
    assert len(standard.rows) > 2 and teacher.max_length > 16
    found = {metric.name: metric for metric in measure_checkpoint("same", teacher, standard, quiet).metrics}
    assert found["perplexity_ratio"].value == found["token_agreement"].value == 1
    tokens = sum(len(ids) - 1 for ids in teacher.tokenizer([row["text"] for row in rows])["input_ids"])
    assert found["perplexity"].count == tokens  # each once, but the first of each text
