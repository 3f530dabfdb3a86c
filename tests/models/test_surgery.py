"""Taking parts of a model: what goes is what contributed nothing, and what stays is an ordinary model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.checkpoint import hash_of_model, load_checkpoint
from limbeck.models.shapes import KEY, shapes_of
from limbeck.models.surgery import HeadSelection, Selection, select, strongest

TinyCheckpoint = Callable[..., Path]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
ROTARY = ("modernbert", "llama", "mistral", "qwen2", "qwen3")
LOADED: dict[tuple[str, str], PreTrainedModel] = {}  # no test changes a model
WIDTH, HEADS, SIZE, FFN = 32, 4, 8, 64  # of the tiny models

IDS = torch.tensor([[5, 9, 17, 33, 41, 60, 22], [8, 5, 77, 12, 90, 31, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def tiny(tiny_checkpoint: TinyCheckpoint, family: str, task: str = "sentence-similarity") -> PreTrainedModel:
    if (family, task) not in LOADED:
        LOADED[family, task] = load_checkpoint(tiny_checkpoint(family, task), task).model
    return LOADED[family, task]


@torch.inference_mode()
def answer(model: PreTrainedModel) -> torch.Tensor:
    """Hidden states or logits at the real tokens."""
    first = model.eval()(input_ids=IDS, attention_mask=MASK)[0]
    return first[MASK.bool()] if first.dim() == 3 and first.shape[1] == MASK.shape[1] else first


def heads_of(model: PreTrainedModel, query: list[int], **channels: torch.Tensor) -> HeadSelection:
    first = shapes_of(model).layers[0]
    shared = first.heads // first.key_value_heads
    key_value = sorted({head // shared for head in query})
    return HeadSelection(torch.tensor(query), torch.tensor(key_value), **channels)


# The reference: nothing is removed, but what is to go is zeroed, and norms count kept channels only.


class KeptNorm(nn.Module):
    """A norm that sees only the kept channels, and gives 0 for the others."""

    def __init__(self, norm: Any, kept: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        seen, gain = values[..., self.kept], self.norm.weight[self.kept]
        if isinstance(self.norm, nn.LayerNorm):
            bias = self.norm.bias[self.kept] if self.norm.bias is not None else None
            inside = nn.functional.layer_norm(seen, (len(self.kept),), gain, bias, self.norm.eps)
        else:
            inside = gain * seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + self.norm.variance_epsilon)
        return torch.zeros_like(values).index_copy(-1, self.kept, inside)


def linear(layer: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix as a view [out, in], and its bias."""
    module: Any = layer.get_submodule(name)
    return (module.weight if isinstance(module, nn.Linear) else module.weight.T), module.bias


def rows_outside(heads: list[int], channels: torch.Tensor | None) -> list[int]:
    """Channels of the concatenated heads that go."""
    within = [range(SIZE)] * len(heads) if channels is None else channels.tolist()
    kept = {head * SIZE + channel for head, some in zip(heads, within, strict=True) for channel in some}
    return [row for row in range(HEADS * SIZE) if row not in kept]


@torch.no_grad()
def reference(model: PreTrainedModel, selection: Selection) -> PreTrainedModel:
    model = copy.deepcopy(model)
    anatomy = anatomy_of(model)
    assert selection.heads is not None and selection.ffn is not None and selection.channels is not None
    gone = [channel for channel in range(WIDTH) if channel not in selection.channels.tolist()]
    for index, layer in enumerate(anatomy.layers(model)):
        heads = selection.heads[index]
        output, down = linear(layer, anatomy.output), linear(layer, anatomy.down)
        output[0][:, rows_outside(heads.query.tolist(), heads.value_channels)] = 0
        if heads.score_channels is not None:
            weight, bias = linear(layer, anatomy.qkv or str(anatomy.query))
            for tensor in (weight, bias):
                assert tensor is not None
                tensor[rows_outside(heads.query.tolist(), heads.score_channels)] = 0
        down[0][:, [channel for channel in range(FFN) if channel not in selection.ffn[index].tolist()]] = 0
        for weight, bias in (output, down):
            weight[gone] = 0
            if bias is not None:
                bias[gone] = 0
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) and module.embedding_dim == WIDTH:
            module.weight[:, gone] = 0
        elif name == "embeddings_project":
            module.weight[gone], module.bias[gone] = 0, 0
        elif weight is not None and weight.shape == (WIDTH,):
            model.set_submodule(name, KeptNorm(module, selection.channels))
    return model


def some_of(count: int, least: int, most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, count - 1), min_size=least, max_size=most, unique=True).map(sorted)


@every_family
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_removed_is_what_was_zeroed(family: str, data: st.DataObject, tiny_checkpoint: TinyCheckpoint) -> None:
    """Heads, feed-forward and residual channels at once, other sizes in every layer; heads get fewer, or narrower where
    positions allow it."""
    model = tiny(tiny_checkpoint, family)
    anatomy = anatomy_of(model)
    narrow = family not in ROTARY and data.draw(st.booleans())
    channels = torch.tensor(
        data.draw(some_of(WIDTH, 8, WIDTH - 1).filter(lambda kept: family != "electra" or len(kept) != 16))
    )
    shape = shapes_of(model).layers[0]
    grouped = shape.heads != shape.key_value_heads
    whole_groups = st.sampled_from([[0, 1], [2, 3], [0, 2], [1, 2], [1, 3], [0], [3], [0, 1, 2, 3]])
    choices = whole_groups if grouped else some_of(HEADS, 1, HEADS)
    shared = list(range(HEADS)) if narrow else data.draw(choices)
    size = data.draw(st.integers(2, SIZE))
    all_heads, all_ffn = [], []
    for _ in range(2):
        if narrow:
            some = st.lists(some_of(SIZE, size, size), min_size=HEADS, max_size=HEADS).map(torch.tensor)
            channels_of_heads = {"score_channels": data.draw(some), "value_channels": data.draw(some)}
            all_heads.append(heads_of(model, shared, **channels_of_heads))
        else:  # the layers of an MPNet share a bias for each head
            all_heads.append(heads_of(model, shared if anatomy.relative_bias else data.draw(choices)))
        all_ffn.append(torch.tensor(data.draw(some_of(FFN, 1, FFN))))
    selection = Selection(channels=channels, heads=all_heads, ffn=all_ffn)
    # What narrower heads scale their scores by belongs to the removal; the reference still divides by the full size.
    expected = answer(reference(model, selection))[..., channels]
    assert torch.allclose(answer(select(model, selection)), expected, atol=2e-5)


@every_family
def test_selecting_everything_is_the_model_itself(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny(tiny_checkpoint, family)
    everything = Selection(
        layers=[0, 1],
        channels=torch.arange(WIDTH),
        heads=[heads_of(model, [0, 1, 2, 3])] * 2,
        ffn=[torch.arange(FFN)] * 2,
    )
    same = select(model, everything)
    assert same is not model
    assert torch.equal(answer(same), answer(model))
    assert hash_of_model(select(model, Selection())) == hash_of_model(model)


@every_family
@pytest.mark.parametrize("task", ["language", "text-classification"])
def test_what_stays_saves_and_loads_with_plain_transformers(
    family: str, task: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Also through the heads of tasks, whose matrices follow the width; tied weights stay tied."""
    task = task if task != "language" else "text-generation" if family in DECODERS else "fill-mask"
    model = tiny(tiny_checkpoint, family, task)
    before = hash_of_model(model)
    half = Selection(
        layers=[0],
        channels=torch.arange(0, WIDTH, 2) if family != "electra" else torch.arange(8, WIDTH),
        heads=[heads_of(model, [0, 2] if family != "electra" else [0, 1, 3])],
        ffn=[torch.arange(24)],
    )
    smaller = select(model, half)
    smaller.save_pretrained(tmp_path)
    loaded, report = type(smaller).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(answer(loaded), answer(smaller))
    anatomy = anatomy_of(loaded)
    assert (len(anatomy.layers(loaded)), anatomy.ffn(loaded)[0].width) == (1, 24)
    assert loaded.config.hidden_size == len(half.channels)
    assert anatomy.head_size_of(loaded) == SIZE
    ends, theirs = smaller.get_output_embeddings(), model.get_output_embeddings()
    if theirs is not None:
        tied = theirs.weight is model.get_input_embeddings().weight
        assert (ends.weight is smaller.get_input_embeddings().weight) == tied
        assert tied == (family not in DECODERS[1:])
    assert hash_of_model(model) == before


@every_family
@pytest.mark.parametrize("task", ["language", "text-classification"])
def test_sizes_that_a_configuration_cannot_say_load_with_one_call(
    family: str, task: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    task = task if task != "language" else "text-generation" if family in DECODERS else "fill-mask"
    checkpoint = load_checkpoint(tiny_checkpoint(family, task), task)
    heads = [[0], [0]] if family == "mpnet" else [[0], [0, 2, 3] if family not in DECODERS[1:] else [0, 3]]
    selection = Selection(
        heads=[heads_of(checkpoint.model, kept) for kept in heads], ffn=[torch.arange(24), torch.arange(3, 40)]
    )
    uneven = replace(checkpoint, model=select(checkpoint.model, selection))
    uneven.save(tmp_path / "uneven")
    loaded = load_checkpoint(tmp_path / "uneven")
    assert torch.equal(answer(loaded.model), answer(uneven.model))
    assert loaded.hash == hash_of_model(uneven.model)
    assert [layer.ffn for layer in shapes_of(loaded.model).layers] == [24, 37]
    assert [layer.heads for layer in shapes_of(loaded.model).layers] == [len(kept) for kept in heads]
    assert type(loaded.model).__name__ == type(checkpoint.model).__name__
    assert torch.equal(answer(copy.deepcopy(loaded.model)), answer(loaded.model))
    again = select(loaded.model, Selection(layers=[0]))
    assert torch.equal(answer(select(uneven.model, Selection(layers=[0]))), answer(again))
    with pytest.raises(RuntimeError, match="mismatch"):
        type(checkpoint.model).from_pretrained(tmp_path / "uneven")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"head_size": 8, "layers": []}, "limbeck.layers"),
        ({"head_size": 8, "layers": [{"heads": 2, "key_value_heads": 2, "ffn": 8}]}, "sizes for 1 layers"),
        ({"head_size": 8, "layers": [{"heads": 10**9, "key_value_heads": 2, "ffn": 8}] * 2}, "layers.0.heads"),
        ({"head_size": 8, "layers": [{"heads": 3, "key_value_heads": 2, "ffn": 8}] * 2}, "cannot share evenly"),
        (["import os"], "did not write"),
    ],
)
def test_sizes_from_elsewhere_are_checked(
    shapes: Any, said: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, KEY: shapes}))
    with pytest.raises(InputError, match=said):
        load_checkpoint(folder)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.data())
def test_the_strongest_channels_stay(values: list[float], data: st.DataObject) -> None:
    scores, count = torch.tensor(values), data.draw(st.integers(1, len(values)))
    kept = strongest(scores, count).tolist()
    assert kept == sorted(set(kept)) and len(kept) == count
    dropped = [value for index, value in enumerate(values) if index not in kept]
    assert not dropped or max(dropped) <= min(values[index] for index in kept)


def test_an_electra_without_projection_gets_none(tiny_checkpoint: TinyCheckpoint) -> None:
    sizes = {"vocab_size": 100, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    config = transformers.ElectraConfig(hidden_size=32, embedding_size=32, **sizes)
    smaller = select(
        transformers.ElectraModel(config).eval(),
        Selection(channels=torch.arange(16), heads=[HeadSelection(torch.arange(2), torch.arange(2))]),
    )
    assert smaller.config.embedding_size == smaller.get_input_embeddings().weight.shape[1] == 16
    assert not hasattr(smaller, "embeddings_project")


def test_a_layer_that_divides_its_scores_by_its_place_scores_as_before() -> None:
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=16, n_layer=3, n_head=2, n_positions=16, scale_attn_by_inverse_layer_idx=True
    )
    model = transformers.GPT2Model(config).eval()
    smaller = select(model, Selection(layers=[0, 2]))
    with torch.no_grad():
        for name in ("attn.c_proj", "mlp.c_proj"):  # layer 1 adds nothing
            for parameter in model.h[1].get_submodule(name).parameters():
                parameter.zero_()
    assert torch.allclose(answer(smaller), answer(model), atol=1e-6)


# What goes wrong.


@pytest.mark.parametrize("layers", [[2], [-1], [0, 0], [1, 0], []])
def test_layers_that_are_not_there_cannot_be_taken(tiny_checkpoint: TinyCheckpoint, layers: list[int]) -> None:
    with pytest.raises(UsageError, match="name layers between 0 and 1, each once, in order"):
        select(tiny(tiny_checkpoint, "bert"), Selection(layers=layers))


def test_parts_that_cannot_be_without_each_other_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    mpnet, llama, electra = (tiny(tiny_checkpoint, name) for name in ("mpnet", "llama", "electra"))
    with pytest.raises(UsageError, match="must keep the same heads"):
        select(mpnet, Selection(channels=torch.arange(16), heads=[heads_of(mpnet, [0, 1]), heads_of(mpnet, [0, 2])]))
    with pytest.raises(UsageError, match="must keep as many heads as the others"):
        select(llama, Selection(heads=[HeadSelection(torch.arange(2), torch.arange(2))] * 2))
    with pytest.raises(UsageError, match="has no projection after them"):
        select(electra, Selection(channels=torch.arange(16), heads=[heads_of(electra, [0, 1])] * 2))
