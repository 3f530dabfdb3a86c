"""lm-evaluation-harness: what its tasks say of a model, against arithmetic of our own, and what is refused."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from limbeck.errors import BackendUnavailable, InputError, UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.generation.greedy import LanguageModel
from limbeck.validate.generation.harness import Figure, Harness, HarnessAsked, matching, open_harness
from limbeck.validate.generation.harness_model import LimbeckLM
from limbeck.validate.standard import Answering

Write = Callable[..., Path]
DOCUMENTS = 12


class Request:
    """What the harness hands to a model."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Write) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("llama", "text-generation"))


@pytest.fixture(scope="module")
def student(tiny_checkpoint: Write) -> Checkpoint:
    student = load_checkpoint(tiny_checkpoint("llama", "text-generation"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return student


def quiet(done: int, total: int) -> None: ...


def model_of(checkpoint: Checkpoint) -> LanguageModel:
    return LanguageModel(checkpoint.run, checkpoint.tokenizer, checkpoint.max_length)


def answering(checkpoint: Checkpoint) -> Answering:
    return Answering("student", checkpoint.run, checkpoint.tokenizer, checkpoint.max_length, {})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, write_jsonl: Write, texts: list[str], teacher: Checkpoint) -> Path:
    """Five tasks on a local file: a choice among endings, a single right answer to all, a text's perplexity, text to be
    written, which is right where it is the teacher's own, and a text after another that is drawn for an example."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for i, text in enumerate(texts[:DOCUMENTS]):
        words = text.split()
        start, end = " ".join(words[:3]), " ".join(words[3:])
        prompt = teacher.tokenizer(start)["input_ids"]
        written = model_of(teacher).write([prompt], 4)[0]
        rows.append({
            "start": start, "endings": [end, texts[-1 - i], "the"], "label": i % 3, "text": text,
            "written": teacher.tokenizer.decode(written, skip_special_tokens=True),
        })  # fmt: skip
    data = write_jsonl(folder / "rows.jsonl", rows)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 2},
    }
    endings = {**common, "task": "tiny_endings", "output_type": "multiple_choice", "doc_to_text": "{{start}}",
               "doc_to_choice": "endings", "doc_to_target": "label"}  # fmt: skip
    always = {**endings, "task": "tiny_always", "doc_to_choice": "{{['the', 'the']}}", "doc_to_target": 0}
    perplexity = {**common, "task": "tiny_perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "",
                  "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}  # fmt: skip
    written_by = {
        **common,
        "task": "tiny_writing",
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{written}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    shots = {**common, "task": "tiny_shots", "output_type": "loglikelihood", "doc_to_text": "{{start}}",
             "doc_to_target": "{{text}}", "num_fewshot": 1, "fewshot_split": "test",
             "metric_list": [{"metric": "perplexity"}]}  # fmt: skip
    for task in (endings, always, perplexity, written_by, shots):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def harness(tasks: Path, teacher: Checkpoint) -> Harness:
    return Harness(HarnessAsked(["tiny_*"], tasks), model_of(teacher))


@pytest.fixture(scope="module")
def figures(harness: Harness, student: Checkpoint) -> dict[str, Figure]:
    return harness.figures(model_of(student))


def log_likelihood(checkpoint: Checkpoint, context: list[int], continuation: list[int]) -> float:
    """One text at a time, by torch alone."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        values = torch.log_softmax(checkpoint.model(input_ids=ids).logits[0].double(), dim=-1)
    return sum(float(values[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def test_the_model_scores_continuations_as_torch_does(student: Checkpoint, texts: list[str]) -> None:
    lm, encode = LimbeckLM(model_of(student), batch_size=4), student.tokenizer
    asked = [Request("The kettle", " whistled"), Request("The kettle", " sold"), Request("", "Rain fell"),
             Request("The kettle ", "whistled"), *(Request(text[:3], text[3:]) for text in texts[:9])]  # fmt: skip
    found = lm.loglikelihood(asked)
    for request, (value, greedy) in zip(asked, found, strict=True):
        context = encode(request.args[0].rstrip())["input_ids"] or [encode.bos_token_id]
        whole = encode(request.args[0] + request.args[1])["input_ids"]
        rest = whole[len(context) :] if request.args[0] else whole
        assert value == pytest.approx(log_likelihood(student, context, rest), abs=1e-4)
        assert greedy == (lm._model.write([context], len(rest))[0] == rest)
    written = lm._model.write([encode("The kettle")["input_ids"]], 1)[0]
    likeliest = lm._loglikelihood_tokens([(None, encode("The kettle")["input_ids"], written)])
    assert likeliest[0][1]


def test_a_long_text_is_scored_once_a_token_in_windows(student: Checkpoint, texts: list[str]) -> None:
    lm, bos = LimbeckLM(model_of(student), max_length=16), student.tokenizer.bos_token_id
    text = " ".join(texts[:4])
    ids = student.tokenizer(text)["input_ids"]
    expected, seen = log_likelihood(student, [bos], ids[:16]), 16
    while seen < len(ids):
        window = ids[seen : seen + 16]
        context = ids[max(0, seen + len(window) - 17) : seen]
        expected, seen = expected + log_likelihood(student, context, window), seen + 16
    assert len(ids) % 16 and lm.loglikelihood_rolling([Request(text)]) == [pytest.approx(expected, abs=1e-3)]


def test_text_is_written_up_to_its_stop_and_within_the_model(student: Checkpoint) -> None:
    lm = LimbeckLM(model_of(student))
    wish = {"until": [], "max_gen_toks": 12}
    whole = lm.generate_until([Request("The kettle whistled", wish)])[0]
    stop = whole[len(whole) // 2 :][:3]
    short, again = lm.generate_until(
        [Request("The kettle whistled", {**wish, "until": [stop]}), Request("The kettle whistled", wish)]
    )
    assert short == whole[: whole.index(stop)] and again == whole
    long = "The kettle whistled long before anyone came. " * 20
    assert lm.generate_until([Request(long, wish)])  # cut on the left, or torch would have no positions
    with pytest.raises(InputError, match="256 new tokens, and the model has room for 64"):
        lm.generate_until([Request("Go.", {"until": []})])
    with pytest.raises(InputError, match="samples"):
        lm.generate_until([Request("Go.", {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0})])


def test_the_harness_own_command_line_gets_the_model_by_name(tiny_checkpoint: Write) -> None:
    from lm_eval.api.registry import get_model

    made = get_model("limbeck").create_from_arg_string(
        f"pretrained={tiny_checkpoint('llama', 'text-generation')},max_length=32", {"batch_size": 2, "device": None}
    )
    assert isinstance(made, LimbeckLM) and made.max_length == 32
    with pytest.raises(InputError, match="is for sentence-similarity"):
        LimbeckLM(str(tiny_checkpoint("bert")))
    with pytest.raises(UsageError, match="cuda"):
        LimbeckLM(made._model, device="cuda")


def test_figures_are_those_of_the_documents(
    figures: dict[str, Figure], student: Checkpoint, tasks: Path, teacher: Checkpoint
) -> None:
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens, right, total, words = student.tokenizer, [], 0.0, 0
    for row in rows:
        start = tokens(row["start"])["input_ids"]
        scores = [
            log_likelihood(student, start, tokens(f"{row['start']} {ending}")["input_ids"][len(start) :])
            for ending in row["endings"]
        ]
        right.append(int(np.argmax(scores)) == row["label"])
        total += log_likelihood(student, [tokens.bos_token_id], tokens(row["text"])["input_ids"])
        words += len(row["text"].split())
    assert figures["lm_eval/tiny_endings/acc"].value == pytest.approx(np.mean(right))
    assert figures["lm_eval/tiny_endings/acc"].documents.tolist() == right
    assert figures["lm_eval/tiny_perplexity/word_perplexity"].value == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert not figures["lm_eval/tiny_perplexity/word_perplexity"].higher_is_better
    writes = [
        tokens.decode(model_of(student).write([tokens(row["start"])["input_ids"]], 4)[0], skip_special_tokens=True)
        for row in rows
    ]
    same = np.mean([ours == row["written"] for ours, row in zip(writes, rows, strict=True)])
    assert figures["lm_eval/tiny_writing/exact_match"].value == same < 1


def test_candidates_are_held_against_the_teacher(harness: Harness, student: Checkpoint, teacher: Checkpoint) -> None:
    found = {metric.name: metric for metric in harness(answering(student))}
    accuracy = found["lm_eval/tiny_endings/acc"]
    assert accuracy.low < accuracy.value < accuracy.high and accuracy.count == DOCUMENTS
    assert accuracy.teacher == harness.figures(model_of(teacher))["lm_eval/tiny_endings/acc"].value
    difference = found["lm_eval/tiny_endings/acc_difference"]
    assert difference.value == pytest.approx(accuracy.value - accuracy.teacher)
    assert difference.low < difference.value < difference.high
    assert found["lm_eval/tiny_writing/exact_match"].teacher == 1
    assert found["lm_eval/tiny_writing/exact_match_difference"].high < 0
    perplexity = found["lm_eval/tiny_perplexity/word_perplexity"]
    assert perplexity.low < perplexity.value < perplexity.high
    assert found["lm_eval/tiny_perplexity/word_perplexity_difference"].value == pytest.approx(
        perplexity.value - perplexity.teacher
    )
    assert "task version 2" in accuracy.description and "0-shot" in accuracy.description
    certain = found["lm_eval/tiny_always/acc"]  # the harness's own standard error is 0
    assert certain.value == 1 and certain.low < 0.8
    same = {metric.name: metric for metric in harness(answering(teacher))}
    assert same["lm_eval/tiny_writing/exact_match_difference"].value == 0


def test_all_models_are_shown_the_same_examples(
    harness: Harness, figures: dict[str, Figure], student: Checkpoint
) -> None:
    name = "lm_eval/tiny_shots/perplexity"
    again = harness.figures(model_of(student))[name]
    assert again.documents.tolist() == figures[name].documents.tolist() and "1-shot" in again.about


def test_fewer_documents_where_asked(tasks: Path, student: Checkpoint) -> None:
    few = Harness(HarnessAsked(["tiny_endings"], tasks, documents=5), model_of(student)).figures(model_of(student))
    assert few["lm_eval/tiny_endings/acc"].count == 5


def test_what_the_harness_cannot_do_is_said(
    tasks: Path, teacher: Checkpoint, tiny_checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = model_of(teacher)
    own = TaskManager(include_path=str(tasks), include_defaults=False)  # the 14,000 others take 15 seconds
    with pytest.raises(InputError, match=r"no task 'tiny_ending'\. Near it are tiny_endings"):
        matching("tiny_ending", own)
    assert matching("tiny_e*", own) == ["tiny_endings"]
    with pytest.raises(InputError, match="not a folder of task files"):
        Harness(HarnessAsked(["x"], tmp_path / "none"), model)
    broken = {**yaml.safe_load((tasks / "tiny_endings.yaml").read_text()), "task": "broken"}
    lost = {**broken, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lost.jsonl")}}}
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(lost))
    with pytest.raises(InputError, match="broken could not be loaded"):
        Harness(HarnessAsked(["broken"], tmp_path), model)
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump({**broken, "doc_to_target": "{{no_such | nothing}}"}))
    with pytest.raises(InputError, match="broken"):
        Harness(HarnessAsked(["broken"], tmp_path), model)
    with pytest.raises(UsageError, match=r"asks models for text-generation; .* is for sentence-similarity"):
        open_harness(HarnessAsked(["tiny_endings"], tasks), load_checkpoint(tiny_checkpoint("bert")), quiet)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("limbeck.validate.generation.harness.is_importable", lambda name: False)
    with pytest.raises(BackendUnavailable) as missing:
        Harness(HarnessAsked(["tiny_endings"], tasks), model)
    assert missing.value.hint == 'pip install "limbeck[harness]"'


def test_texts_that_lose_their_beginning_are_counted(student: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    lm = LimbeckLM(replace(model_of(student), max_length=8))
    context = "The kettle whistled long before anyone came"
    with caplog.at_level(logging.WARNING, "limbeck"):  # whatever level another library has left at the root
        ((value, _), _) = lm.loglikelihood([Request(context, " here"), Request("Go", ".")])
    kept = student.tokenizer(context)["input_ids"]
    rest = student.tokenizer(f"{context} here")["input_ids"][len(kept) :]
    assert value == pytest.approx(log_likelihood(student, kept[len(rest) - 9 :], rest), abs=1e-4)
    assert "1 of 2 texts lost their beginning: over 8 tokens" in caplog.text
