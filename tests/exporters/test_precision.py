"""Half precision for a trace: what is cast, what stays float32, and that nothing of it remains afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from limbeck.errors import ExportMismatch
from limbeck.exporters.precision import (
    attention_with_float32_softmax,
    boolean_mask,
    half_precision,
    is_normalisation,
)
from limbeck.models.checkpoint import Checkpoint, load_checkpoint


@pytest.fixture(params=["bert", "gpt2", "llama", "qwen3", "modernbert", "mpnet"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    task = "text-generation" if request.param in ("gpt2", "llama", "qwen3") else "sentence-similarity"
    return load_checkpoint(tiny_checkpoint(request.param, task=task), task)


def batch_for(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 29).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    named = {"input_ids": ids, "attention_mask": mask}
    return {name: named.get(name, torch.zeros_like(ids)) for name in checkpoint.input_names}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inside_and_as_before_outside(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    module, batch = checkpoint.module, batch_for(checkpoint)
    before = {name: (parameter, parameter.clone()) for name, parameter in every_parameter(module)}
    expected = checkpoint.run(batch)
    with half_precision(module, dtype):
        norms = {id(p) for part in module.modules() if is_normalisation(part) for p in part.parameters()}
        assert norms
        for name, parameter in every_parameter(module):
            assert parameter.dtype == (torch.float32 if id(parameter) in norms else dtype), name
        with torch.inference_mode():
            outputs = module(**batch, **checkpoint.task.forward_flags())
        assert outputs[checkpoint.task.output].dtype == torch.float32
        found = checkpoint.run(batch)
    for name, parameter in every_parameter(module):
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    for name, values in checkpoint.run(batch).items():
        mask = batch["attention_mask"].numpy().astype(bool) if values.ndim == 3 else slice(None)
        assert (values == expected[name]).all()
        assert abs(found[name] - values)[mask].max() < (0.01 if dtype == torch.float16 else 0.08) * abs(values).max()
    assert checkpoint.model.config._attn_implementation in ("sdpa", "eager")
    assert nn.functional.softmax.__module__ == "torch.nn.functional"


def test_an_additive_mask_has_room_for_scores_in_float16(tiny_checkpoint: Callable[..., Path]) -> None:
    module = load_checkpoint(tiny_checkpoint("mpnet")).module
    before = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    asked = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": causal_mask_function}
    with half_precision(module, torch.float16):
        masks = {
            kind: ALL_MASK_ATTENTION_FUNCTIONS["eager"](**asked, dtype=kind) for kind in (torch.float16, torch.float32)
        }
    assert masks[torch.float16].dtype == torch.float16 and masks[torch.float16].unique().tolist() == [-10_000, 0]
    assert masks[torch.float32].min() == torch.finfo(torch.float32).min
    assert ALL_MASK_ATTENTION_FUNCTIONS["eager"] is before
    assert (before(**asked, dtype=torch.float16) + torch.tensor(-40.0, dtype=torch.float16)).isinf().any()


def every_parameter(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(remove_duplicate=False))


def test_tied_weights_stay_tied_inside(tiny_checkpoint: Callable[..., Path]) -> None:
    module = load_checkpoint(tiny_checkpoint("gpt2", task="text-generation"), "text-generation").module
    with half_precision(module, torch.float16):
        assert module.get_submodule("lm_head").weight is module.get_submodule("transformer.wte").weight


def test_an_error_inside_restores_too(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"), "sentence-similarity")
    with pytest.raises(KeyError), half_precision(checkpoint.module, torch.float16):
        raise KeyError
    assert {parameter.dtype for parameter in checkpoint.module.parameters()} == {torch.float32}
    assert checkpoint.model.config._attn_implementation == "sdpa"


def test_a_weight_that_float16_cannot_hold_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        module[1].weight[2, 2] = -70_000.0
    with pytest.raises(ExportMismatch, match=r"1\.weight reaches 70,000"), half_precision(module, torch.float16):
        pass
    assert module[0].weight.dtype == torch.float32
    with half_precision(module, torch.bfloat16):
        assert module[1].weight.dtype == torch.bfloat16


def test_a_norm_survives_what_overflows_float16() -> None:
    norm = nn.Sequential(nn.LayerNorm(64))
    values = torch.linspace(-60_000, 60_000, 64).half()  # the variance alone is 1.2e9
    with half_precision(norm, torch.float16):
        found = norm(values)
    torch.testing.assert_close(found, norm(values.float()), atol=2e-3, rtol=2e-3)


sizes = st.integers(1, 6)


@given(batch=sizes, keys=sizes, groups=st.integers(1, 3), causal=st.booleans(), padded=st.booleans(), seed=sizes)
@settings(max_examples=40, deadline=None)
def test_the_attention_is_scaled_dot_product_attention(
    batch: int, keys: int, groups: int, causal: bool, padded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, causal
    query = torch.randn(batch, 2 * groups, keys, 8, generator=generator)
    key, value = torch.randn(2, batch, 2, keys, 8, generator=generator)
    mask = torch.ones(batch, 1, keys, keys, dtype=torch.bool).tril() if padded else None
    found, _ = attention_with_float32_softmax(module, query, key, value, mask)
    expected = nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, 1),
        value.repeat_interleave(groups, 1),
        attn_mask=mask,
        is_causal=causal and mask is None,
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


@given(batch=sizes, queries=sizes, earlier=st.integers(0, 4), causal=st.booleans(), seed=sizes)
@settings(max_examples=40, deadline=None)
def test_the_mask_is_transformers_mask(batch: int, queries: int, earlier: int, causal: bool, seed: int) -> None:
    keys = queries + earlier
    padding = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.7
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": earlier,
        "kv_offset": 0,
        "mask_function": causal_mask_function if causal else bidirectional_mask_function,
        "attention_mask": padding,
    }
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(boolean_mask(**arguments), expected)
