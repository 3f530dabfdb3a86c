"""Half precision for a trace: weights and arithmetic in float16 or bfloat16, with float32 islands where it would hurt.

A strongly typed compiler computes in the types that the graph says, so the precision is set before the trace and not
by a flag of the builder. Normalisation and softmax stay in float32: their sums of squares and exponentials are what
overflows first (float16 ends at 65,504), and they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ExportMismatch
from .kv_cache import PAST

ATTENTION = "limbeck_float32_softmax"
"""Our attention function's name in transformers' `AttentionInterface`."""

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions that `half_precision` makes, by their names on the command line."""

_CUBING_ACTIVATIONS = ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation")
"""Written out as tanh(x + c x^3): the cube passes float16's end at x = 40."""

_ROOM = 10_000.0
"""Far below any score, and as far from float16's end."""


@contextmanager
def half_precision(module: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Turn a module into half precision inside the block; afterwards it is what it was, bit for bit.

    Linear and embedding weights, biases and the residual stream are `dtype`. Normalisation layers compute in float32
    with float32 weights and hand back `dtype`; so does every softmax. The module's own outputs are float32.

    Args:
        dtype: `torch.float16` or `torch.bfloat16`; with `torch.float32` only the attention's graph is another.

    Raises:
        ExportMismatch: a weight that is finite in float32 is not in `dtype`.
    """
    norms = [part for part in module.modules() if is_normalisation(part)]
    cubes = [part for part in module.modules() if type(part).__name__ in _CUBING_ACTIVATIONS]
    with ExitStack() as stack:
        stack.enter_context(_cast_parameters(module, norms, dtype))
        for part in (*norms, *cubes):
            stack.enter_context(_float32_inside(part, dtype))
        stack.enter_context(_float32_outputs(module))
        stack.enter_context(_float32_softmax(dtype))
        stack.enter_context(_masks_with_room())
        for model in models_with_attention(module):
            stack.enter_context(_float32_attention(model))
        yield module


def is_normalisation(module: nn.Module) -> bool:
    """Whether the module is a LayerNorm or RMSNorm: torch's own, or a family's class (`LlamaRMSNorm`, ...). Families
    write their own class each, without a common base, so the name is what they share."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


@contextmanager
def _cast_parameters(module: nn.Module, norms: list[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Put cast copies in the parameters' places, one copy for all places of a tied weight. Copies and not casts in
    place, since an exported graph refers to the tensors that it was traced with until it is written. Buffers stay as
    they are (rotary frequencies are computed in float32 on purpose)."""
    float32 = {id(parameter) for norm in norms for parameter in norm.parameters()}
    places = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.is_floating_point()
    ]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    cast: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in cast:
            wanted = torch.float32 if id(parameter) in float32 else dtype
            cast[id(parameter)] = cast_parameter(parameter, wanted, names[id(parameter)])
    try:
        for part, name, parameter in places:
            setattr(part, name, cast[id(parameter)])
        yield
    finally:
        for part, name, parameter in places:
            setattr(part, name, parameter)


def cast_parameter(parameter: nn.Parameter, dtype: torch.dtype, name: str) -> nn.Parameter:
    """A copy of a parameter in another floating type; `name` is for the message.

    Raises:
        ExportMismatch: a weight that is finite in its own type is not in `dtype`.
    """
    values = parameter.detach().to(dtype)
    if not torch.isfinite(values).all() and torch.isfinite(parameter).all():
        raise ExportMismatch(
            f"The weight {name} reaches {float(parameter.detach().abs().max()):,.0f}, more than {_text(dtype)} holds.",
            "Use --precision bf16, which has the range of float32.",
        )
    return nn.Parameter(values, requires_grad=False)


@contextmanager
def _float32_inside(norm: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_float32(inputs[0]), *inputs[1:])

    def narrow(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    handles = (norm.register_forward_pre_hook(widen), norm.register_forward_hook(narrow))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _float32_outputs(module: nn.Module) -> Iterator[None]:
    def widen(_: nn.Module, __: tuple[Any, ...], outputs: Any) -> Any:
        """What is kept of a text stays as it is, for the next call takes it in."""
        if not isinstance(outputs, Mapping):
            return _all_float32(outputs)
        named = {name: kept if name.startswith(PAST) else _all_float32(kept) for name, kept in outputs.items()}
        return type(outputs)(**named)

    handle = module.register_forward_hook(widen)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _float32_softmax(dtype: torch.dtype) -> Iterator[None]:
    """`F.softmax` of a half tensor in float32, for families whose attention is written out in their own module."""
    functional: Any = nn.functional
    original: Callable[..., torch.Tensor] = functional.softmax

    def softmax(values: torch.Tensor, dim: int | None = None, *args: Any, **settings: Any) -> torch.Tensor:
        if values.dtype != dtype or args or settings.get("dtype") is not None:
            return original(values, dim, *args, **settings)
        return original(values.float(), dim).to(dtype)

    functional.softmax = softmax
    try:
        yield
    finally:
        functional.softmax = original


@contextmanager
def _masks_with_room() -> Iterator[None]:
    """Additive masks, of families whose attention function cannot be chosen, hold -10,000 in float16 and not its lowest
    number, which overflows when a score is added to it. The softmax, in float32, makes a zero of either."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    additive = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def mask_with_room(**settings: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = additive(**settings)
        return mask if mask is None or mask.dtype != torch.float16 else mask.clamp(min=-_ROOM)

    AttentionMaskInterface.register("eager", mask_with_room)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", additive)


def models_with_attention(module: nn.Module) -> list[Any]:
    """The outermost transformers models whose attention function can be chosen by name."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        return [module] if module._can_set_attn_implementation() else []
    return [model for child in module.children() for model in models_with_attention(child)]


@contextmanager
def _float32_attention(model: Any) -> Iterator[None]:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention_with_float32_softmax)
    AttentionMaskInterface.register(ATTENTION, boolean_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_with_float32_softmax(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling + bias) v: products in the inputs' type, everything between them in float32.

    The query is scaled before the product, so that the scores stay as small as can be in float16. Masks are boolean
    (`boolean_mask`): an additive one would hold -65,504 in float16, which overflows when a score is added to it.

    Args:
        query: [batch, heads, queries, head size]; `key` and `value` [batch, key heads, keys, head size].
        attention_mask: bool [batch, 1, queries, keys], true where a query may look; or additive; or `None`.
        settings: `position_bias` (added to the scores) and `softcap` are heeded, dropout is not: this is inference.

    Returns:
        [batch, queries, heads, head size] and no attention weights, as transformers expects.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.matmul(query, key.transpose(2, 3)).float()
    if (softcap := settings.get("softcap")) is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if (position_bias := settings.get("position_bias")) is not None:
        scores = scores + position_bias.float()
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        positions = torch.arange(scores.shape[-1], device=scores.device)
        attention_mask = positions <= positions[-scores.shape[-2] :, None]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask.float()
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def boolean_mask(*, attention_mask: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
    """The mask that `attention_with_float32_softmax` is called with: bool [batch, 1, queries, keys], always there.

    transformers' `sdpa_mask` looks padding up position by position, a GatherND over a full-size index tensor in the
    graph; here it is one broadcast And.
    """
    from transformers.masking_utils import prepare_padding_mask, sdpa_mask

    settings |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "attention_mask": None}
    mask: torch.Tensor | None = sdpa_mask(**settings)
    assert mask is not None  # it is only left out where that is allowed
    offset, keys = settings.get("kv_offset", 0), mask.shape[-1]
    padding = prepare_padding_mask(attention_mask, keys, offset)
    return mask if padding is None else mask & padding[:, None, None, offset : offset + keys].bool()


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _all_float32(values: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, _float32, values)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
