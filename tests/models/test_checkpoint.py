"""Checkpoints: what is saved is what was loaded, and what cannot be loaded is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from limbeck.errors import InputError, LimbeckError, UsageError
from limbeck.models.batching import pad
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint, max_positions
from limbeck.models.data import read_data
from limbeck.models.embedding import Pooling, pool, read_pooling
from limbeck.models.lineage import DataRecord, Lineage, Step

TinyCheckpoint = Callable[..., Path]

FAMILIES_AND_TASKS = [
    ("bert", "sentence-similarity"),
    ("roberta", "text-classification"),
    ("distilbert", "fill-mask"),
    ("electra", "token-classification"),
    ("modernbert", "sentence-similarity"),
    ("gpt2", "text-generation"),
    ("llama", "text-generation"),
]


def outputs_of(checkpoint: Checkpoint, texts: list[str]) -> np.ndarray:
    encoded = checkpoint.tokenizer(texts, padding=True, return_tensors="pt")
    values: np.ndarray = checkpoint.run(encoded)[checkpoint.task.output]
    return values


@pytest.fixture
def copy_of(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """A folder of its own, to be broken."""

    def make(family: str = "bert", task: str = "sentence-similarity") -> Path:
        return Path(shutil.copytree(tiny_checkpoint(family, task=task), tmp_path / "copy"))

    return make


@pytest.mark.parametrize(("family", "task"), FAMILIES_AND_TASKS)
def test_a_saved_checkpoint_is_the_one_that_was_loaded(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, texts: list[str], family: str, task: str
) -> None:
    first = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
    first.save(tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")  # the task is in the lineage
    assert again.task.name == task
    assert again.hash == first.hash
    assert again.lineage == first.lineage
    assert again.input_names == first.input_names
    assert again.max_length == first.max_length
    assert again.parameters == first.parameters
    assert not again.model.training
    np.testing.assert_array_equal(outputs_of(first, texts[:3]), outputs_of(again, texts[:3]))


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "text-classification"), ("roberta", "fill-mask"), ("gpt2", "text-generation")]
)
def test_the_task_is_read_from_the_architecture(tiny_checkpoint: TinyCheckpoint, family: str, task: str) -> None:
    assert load_checkpoint(tiny_checkpoint(family, task=task)).task.name == task


def test_the_hash_is_that_of_weights_and_shape(tiny_checkpoint: TinyCheckpoint, copy_of: Callable[..., Path]) -> None:
    original = load_checkpoint(tiny_checkpoint("bert"))
    folder = copy_of()
    assert load_checkpoint(folder).hash == original.hash  # wherever it lies
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_checkpoint(folder).hash != original.hash


def test_the_hash_does_not_depend_on_shards_or_on_first_use(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    checkpoint.model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    checkpoint.tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert load_checkpoint(tmp_path / "sharded").hash == checkpoint.hash
    assert checkpoint.module is not None  # making it drops the pooler
    assert hash_of_model(checkpoint.model) == checkpoint.hash


def test_history_and_training_rows_are_kept(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    data = checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": "Go."}, {"text": "Rain fell."}]))
    step = Step(
        verb="distill",
        method="logits-kl",
        settings={"layers": [0, 1]},
        rationale="it was too slow",
        parent=checkpoint.hash,
        data=DataRecord.of(data),
    )
    with torch.no_grad():
        checkpoint.model.get_input_embeddings().weight[7] += 1
    after = checkpoint.after(checkpoint.model, step, data)
    assert after.hash != checkpoint.hash
    assert checkpoint.lineage.steps == []  # the one it came from is as it was
    after.save(tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert again.lineage.steps == [step]
    assert again.lineage.steps[0].rationale == "it was too slow"
    assert again.training_rows == {data.fingerprint: data.row_hashes}
    assert again.hash == after.hash
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["steps"][0]["data"]["source"] == "rows.jsonl"


def test_saving_onto_something_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        checkpoint.save(tmp_path / "out")
    checkpoint.save(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


# What cannot be loaded.


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **changes}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def wider(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"] = torch.zeros(33)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, r"holds its weights as a pickle \(pytorch_model\.bin\)"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "half a weights file": (truncated, "could not be loaded"),
    "a weight is missing": (without_layer, r"no weights for encoder\.layer\.0\.output\.dense\.weight"),
    "a weight of another shape": (wider, r"copy"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "configuration is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "unknown architecture": (
        lambda folder: edit_json(folder / "config.json", model_type="nonesuch"),
        "could not be loaded",
    ),
    "newer history": (
        lambda folder: edit_json(folder / "lineage.json", schema_version=99, origin="x", task="fill-mask"),
        r"lineage\.json has schema version 99; this limbeck reads up to 1",
    ),
    "history of something else": (
        lambda folder: edit_json(folder / "lineage.json", steps="none"),
        "is not a valid lineage: origin",
    ),
    "history is a list": (lambda folder: (folder / "lineage.json").write_text("[]"), "is not a valid lineage"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("token*")],
        "no tokenizer that loads",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_checkpoint_is_refused_in_one_sentence(case: str, copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    damage, said = BREAKS[case]
    damage(folder)
    with pytest.raises(InputError, match=said) as caught:
        load_checkpoint(folder, task="sentence-similarity")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 4


def test_a_model_without_the_head_of_the_task_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(InputError, match=r"\(BertModel\) has no weights for .*cannot serve text-classification"):
        load_checkpoint(tiny_checkpoint("bert"), task="text-classification")
    with pytest.raises(UsageError, match="Did you mean 'fill-mask'"):
        load_checkpoint(tiny_checkpoint("bert"), task="fill-masc")


def test_a_folder_that_does_not_exist_is_not_looked_up(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a model folder"):
        load_checkpoint(tmp_path / "file")


def test_a_task_that_cannot_be_told_is_asked_for(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    edit_json(folder / "config.json", architectures=None)
    with pytest.raises(InputError, match="does not say what it is for") as caught:
        load_checkpoint(folder)
    assert "--task" in str(caught.value.hint)


# Lengths and inputs.


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 65), ("mpnet", 64), ("gpt2", 64)])
def test_the_longest_text_fits_the_positions(tiny_checkpoint: TinyCheckpoint, family: str, positions: int) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family), task="sentence-similarity")
    assert max_positions(checkpoint.model) == positions
    ids = torch.full((1, positions), 9)
    batch = {name: ids if name == "input_ids" else torch.ones_like(ids) for name in checkpoint.input_names}
    assert np.isfinite(checkpoint.run(batch)["sentence_embedding"]).all()
    longer = {name: torch.cat([value, value[:, :1]], dim=1) for name, value in batch.items()}
    with pytest.raises((IndexError, RuntimeError)):
        checkpoint.run(longer)


def test_only_inputs_that_the_model_takes_are_given(tiny_checkpoint: TinyCheckpoint) -> None:
    bert, roberta = (load_checkpoint(tiny_checkpoint(family)) for family in ("bert", "roberta"))
    assert bert.input_names == ["input_ids", "token_type_ids", "attention_mask"]
    assert roberta.input_names == ["input_ids", "attention_mask"]
    batch = {name: torch.ones(1, 2, dtype=torch.int64) for name in (*bert.input_names, "labels")}
    assert list(roberta.model_inputs(batch)) == roberta.input_names


# Pooling.

HIDDEN = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [100.0, 100.0]], [[5.0, 6.0], [7.0, 1.0], [-1.0, 0.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("mode", "by_hand"),
    [
        ("mean", [[2.0, -1.0], [11 / 3, 7 / 3]]),
        ("cls", [[1.0, -4.0], [5.0, 6.0]]),
        ("max", [[3.0, 2.0], [7.0, 6.0]]),
    ],
)
def test_pooling_by_hand(mode: str, by_hand: list[list[float]]) -> None:
    torch.testing.assert_close(pool(HIDDEN, MASK, mode), torch.tensor(by_hand))


def test_a_long_texts_mean_does_not_overflow_float16() -> None:
    pooled = pool(torch.full((1, 1000, 2), 200.0, dtype=torch.float16), torch.ones(1, 1000), "mean")
    assert pooled.dtype == torch.float16
    assert pooled.tolist() == [[200.0, 200.0]]


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_pooling_is_saved_and_read_back(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, texts: list[str], mode: str, normalize: bool
) -> None:
    plain = load_checkpoint(tiny_checkpoint("mpnet"))
    checkpoint = dataclasses.replace(plain, pooling=Pooling(mode, normalize, max_length=12))
    checkpoint.save(tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert again.pooling == checkpoint.pooling
    assert again.max_length == 12
    batch = pad([{"input_ids": [2, 9, 8, 3]}, {"input_ids": [2, 9, 3]}], again.tokenizer)
    batch["attention_mask"] = (batch["input_ids"] != again.tokenizer.pad_token_id).long()
    with torch.no_grad():
        hidden = again.model(**batch).last_hidden_state
    expected = pool(hidden, batch["attention_mask"], mode).numpy()
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(again.run(batch)["sentence_embedding"], expected, rtol=1e-5, atol=1e-6)


def test_poolings_that_limbeck_does_not_have_are_named(tmp_path: Path) -> None:
    def write(kind: str, config: dict[str, Any]) -> Path:
        modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "p", "type": kind}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / "config.json").write_text(json.dumps(config))
        return tmp_path

    assert read_pooling(write("x.Pooling", {"pooling_mode": "cls"})) == Pooling("cls", normalize=False)
    with pytest.raises(InputError, match="pools by lasttoken"):
        read_pooling(write("x.Pooling", {"pooling_mode": "lasttoken"}))
    with pytest.raises(InputError, match="pools by mean, cls"):
        read_pooling(write("x.Pooling", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}))
    with pytest.raises(InputError, match="has a Dense module"):
        read_pooling(write("x.Dense", {}))
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "../..", "type": "x.Pooling"}]))
    with pytest.raises(LimbeckError, match="points outside"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_sentence_transformers_gives_the_same_embedding(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, texts: list[str], mode: str
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")  # comes with the extra `demo`
    plain = load_checkpoint(tiny_checkpoint("bert"))
    checkpoint = dataclasses.replace(plain, pooling=Pooling(mode))
    checkpoint.save(tmp_path / "out")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts[:4])
    np.testing.assert_allclose(theirs, outputs_of(checkpoint, texts[:4]), atol=1e-5)


def test_reading_uses_the_fields_of_the_task(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="token-classification"))
    (tmp_path / "rows.jsonl").write_text('{"words": ["a"], "ner_tags": [0]}\n')
    data = checkpoint.read(tmp_path / "rows.jsonl")
    by_hand = read_data(tmp_path / "rows.jsonl", checkpoint.task.fields, optional=checkpoint.task.optional_fields)
    assert data.columns == by_hand.columns == {"tokens": "words", "tags": "ner_tags"}


def test_a_history_goes_through_its_file(tmp_path: Path) -> None:
    assert Lineage.load(tmp_path) is None
    step = Step(verb="prune", method="taylor", rationale='"quoted" ž')
    history = Lineage(origin="x", task="fill-mask").followed_by(step).followed_by(step)
    history.save(tmp_path)
    assert Lineage.load(tmp_path) == history
    assert len(history.steps) == 2
