"""What is recorded inside a model is what the model computed, in every family; and a recorder leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.errors import InputError
from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.batching import Batch, pad
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.features import EMBEDDINGS, attention, hidden, recording, showing_attention

TinyCheckpoint = Callable[..., Path]
Load = Callable[[str], Checkpoint]

LAYERS, WIDTH, HEADS = 2, 32, 4
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
GROUPED = ("llama", "mistral", "qwen2", "qwen3")  # half as many heads for keys and values
WITHOUT_MAPS = ("mpnet",)
PROJECTIONS = [f"{kind}.{layer}" for kind in ("query", "key", "value") for layer in range(LAYERS)]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))
with_maps = pytest.mark.parametrize("family", sorted(set(ANATOMIES) - set(WITHOUT_MAPS)))


@pytest.fixture
def load(tiny_checkpoint: TinyCheckpoint) -> Load:
    return lambda family: load_checkpoint(tiny_checkpoint(family), task="sentence-similarity")


def batch_of(checkpoint: Checkpoint, texts: list[str]) -> Batch:
    encoded = checkpoint.tokenizer(texts)["input_ids"]
    batch = pad([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in encoded], checkpoint.tokenizer)
    zeros = torch.zeros_like(batch["input_ids"])
    return {name: batch.get(name, zeros) for name in checkpoint.input_names}


def outputs(checkpoint: Checkpoint, batch: Batch, *names: str) -> dict[str, torch.Tensor]:
    return checkpoint.recording(names).module(**batch, **checkpoint.task.forward_flags())  # type: ignore[no-any-return]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@every_family
def test_hidden_states_are_the_models_own(family: str, load: Load, texts: list[str]) -> None:
    checkpoint = load(family)
    batch = batch_of(checkpoint, texts[:4])
    names = [EMBEDDINGS, *(hidden(layer) for layer in range(LAYERS))]
    found = outputs(checkpoint, batch, *names)
    own = checkpoint.model(**batch, output_hidden_states=True).hidden_states
    assert len(own) == LAYERS + 1
    real = batch["attention_mask"].bool()
    for name, expected in zip(names[:-1], own[:-1], strict=True):
        assert torch.allclose(found[name][real], expected[real], atol=1e-5), name
    last = found[names[-1]]
    if not torch.allclose(last[real], own[-1][real], atol=1e-5):  # the model lists it after its last norm
        norms = [module for name, module in checkpoint.model.named_modules() if name in ("norm", "ln_f", "final_norm")]
        assert family in (*DECODERS, "modernbert") and len(norms) == 1
        assert torch.allclose(norms[0](last)[real], own[-1][real], atol=1e-5)


@every_family
def test_outputs_are_those_without_a_recorder(family: str, load: Load, texts: list[str]) -> None:
    checkpoint = load(family)
    batch = batch_of(checkpoint, texts[:3])
    plain, recorded = outputs(checkpoint, batch), outputs(checkpoint, batch, hidden(0), *PROJECTIONS)
    assert set(recorded) - set(plain) == {hidden(0), *PROJECTIONS}
    assert torch.equal(plain["sentence_embedding"], recorded["sentence_embedding"])


@with_maps
def test_attention_maps_are_distributions_over_real_tokens(family: str, load: Load, texts: list[str]) -> None:
    checkpoint = load(family)
    batch = batch_of(checkpoint, texts[:4])
    names = [attention(layer) for layer in range(LAYERS)]
    with showing_attention(checkpoint.model):
        found = outputs(checkpoint, batch, *names)
    rows, sequence = batch["input_ids"].shape
    real = batch["attention_mask"].bool()
    assert not bool(real.all())
    for name in names:
        assert found[name].shape == (rows, HEADS, sequence, sequence)
        over_keys = found[name].transpose(1, 2)[real]  # [real queries, heads, keys]
        assert torch.allclose(over_keys.sum(-1), torch.ones(()), atol=1e-5)
        assert not bool((found[name] * ~real[:, None, None, :]).transpose(1, 2)[real].any())
        if family in DECODERS:
            assert not bool(found[name].triu(diagonal=1).transpose(1, 2)[real].any())
    assert not torch.allclose(found[names[0]], found[names[1]])


@with_maps
def test_showing_attention_puts_the_kernel_back(family: str, load: Load) -> None:
    checkpoint = load(family)
    before = checkpoint.model.config._attn_implementation
    with showing_attention(checkpoint.model):
        assert checkpoint.model.config._attn_implementation == "eager"
    assert checkpoint.model.config._attn_implementation == before != "eager"


@pytest.mark.parametrize("family", WITHOUT_MAPS)
def test_a_family_without_maps_says_what_to_take_instead(family: str, load: Load, texts: list[str]) -> None:
    checkpoint = load(family)
    batch, refused = (
        batch_of(checkpoint, texts[:2]),
        pytest.raises(InputError, match="does not give its attention maps"),
    )
    with refused as error, showing_attention(checkpoint.model):
        outputs(checkpoint, batch, attention(0))
    assert error.value.hint and "attention relations" in error.value.hint
    assert hooks_of(checkpoint.model) == 0


def test_fused_attention_is_told_apart_from_a_map(load: Load, texts: list[str]) -> None:
    checkpoint = load("bert")  # as it is loaded: with a kernel that forms no maps
    with pytest.raises(InputError, match="does not give its attention maps"):
        outputs(checkpoint, batch_of(checkpoint, texts[:2]), attention(0))


@every_family
def test_queries_keys_and_values_are_what_the_projections_make(family: str, load: Load, texts: list[str]) -> None:
    checkpoint = load(family)
    batch = batch_of(checkpoint, texts[:3])
    anatomy = anatomy_of(checkpoint.model)
    found = outputs(checkpoint, batch, *PROJECTIONS)
    for layer, module in enumerate(anatomy.layers(checkpoint.model)):
        projections = {"query": anatomy.query, "key": anatomy.key, "value": anatomy.value}
        for third, (kind, name) in enumerate(projections.items()):
            projection = module.get_submodule(name or anatomy.qkv or "")
            inputs: list[torch.Tensor] = []
            hook = projection.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
            checkpoint.model(**batch)
            hook.remove()
            width = WIDTH // 2 if family in GROUPED and kind != "query" else WIDTH
            made = projection(inputs[0])
            expected = made if name else made[..., third * WIDTH : (third + 1) * WIDTH]
            assert found[f"{kind}.{layer}"].shape == (*batch["input_ids"].shape, width)
            assert torch.allclose(found[f"{kind}.{layer}"], expected, atol=1e-6)


@pytest.mark.parametrize("family", sorted(set(ANATOMIES) - {*GROUPED, *WITHOUT_MAPS, "modernbert"}))
def test_the_recorded_map_follows_from_the_recorded_queries_and_keys(family: str, load: Load, texts: list[str]) -> None:
    """Where nothing rotates or normalises them in between."""
    checkpoint = load(family)
    batch = batch_of(checkpoint, texts[:3])
    with showing_attention(checkpoint.model):
        found = outputs(checkpoint, batch, "query.1", "key.1", attention(1))
    queries, keys = (found[name].unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("query.1", "key.1"))
    scores = queries @ keys.mT / (WIDTH // HEADS) ** 0.5
    seen = batch["attention_mask"].bool()[:, None, None, :].expand_as(scores)
    if family in DECODERS:
        seen = seen & torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    expected = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1)
    real = batch["attention_mask"].bool()
    assert torch.allclose(found[attention(1)].transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-5)


@every_family
def test_gradients_flow_through_what_is_recorded(family: str, load: Load, texts: list[str]) -> None:
    """And are the same where activations are computed twice instead of being kept."""
    batch = batch_of(load(family), texts[:3])
    names = [EMBEDDINGS, hidden(0), hidden(1), "query.1", "key.1", "value.0"]

    def gradients(computed_twice: bool) -> dict[str, torch.Tensor]:
        checkpoint = load(family)
        if computed_twice:  # the reentrant kind runs layers without a graph, so nothing inside them could be matched
            checkpoint.model.gradient_checkpointing_enable({"use_reentrant": False})
        hooks, recorded = hooks_of(checkpoint.model), checkpoint.recording(names)
        recorded.module.train()
        for module in recorded.module.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        found = recorded.module(**batch, **checkpoint.task.forward_flags())
        sum(found[name].square().mean() for name in names).backward()
        assert hooks_of(checkpoint.model) == hooks
        return {name: values.grad for name, values in checkpoint.model.named_parameters() if values.grad is not None}

    expected = gradients(computed_twice=False)
    assert any("embed" in name or "wte" in name for name in expected)
    assert sum("layer" in name or name.startswith("h.") for name in expected) >= 2 * LAYERS
    if load(family).model.supports_gradient_checkpointing:  # not mpnet's
        found = gradients(computed_twice=True)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@every_family
def test_a_recorder_leaves_no_hooks_behind(family: str, load: Load, texts: list[str]) -> None:
    checkpoint = load(family)
    outputs(checkpoint, batch_of(checkpoint, texts[:2]), EMBEDDINGS, hidden(1), *PROJECTIONS)
    assert hooks_of(checkpoint.model) == 0
    with pytest.raises(ZeroDivisionError), recording(checkpoint.model, [EMBEDDINGS, hidden(0)]):
        1 // (hooks_of(checkpoint.model) - 2)  # there are two
    assert hooks_of(checkpoint.model) == 0
