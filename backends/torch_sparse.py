"""2:4 on a GPU by torch's semi-structured kernels (cuSPARSELt, or CUTLASS where torch was built without it).

torch does not choose between sparse and dense kernels, and sparse ones pay for large matrices and many tokens only. So
each layer is timed both ways on the GPU that is to run it, and keeps its dense weight where that is faster.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import first_line

_GAINS = 1.02
"""Sparse has to be so many times faster: what is nearer is a clock's noise, and dense weights are simpler."""
ROUNDS, CALLS = 10, 10
"""Turns that dense and sparse have each, and calls in a turn; one before each is not timed."""


@dataclass(frozen=True)
class LayerChoice:
    """What became of one 2:4 layer."""

    layer: str
    shape: tuple[int, int]
    """[out, in] of its weight."""
    kernel: str
    """`sparse` or `dense`."""
    dense_ms: float | None = None
    sparse_ms: float | None = None
    reason: str = ""
    """Why it was not timed."""

    @property
    def gain(self) -> float | None:
        """How many times faster sparse is; `None` where it was not timed."""
        return self.dense_ms / self.sparse_ms if self.dense_ms is not None and self.sparse_ms else None

    def row(self) -> dict[str, Any]:
        """As a line of the manifest's evidence."""
        return {**asdict(self), "gain": self.gain}


Timing = tuple[float, float]
"""Milliseconds, dense and sparse."""
Timer = Callable[[nn.Linear, torch.Tensor], Timing]
"""Times a layer with its dense weight and with a sparse one."""


def choose_kernels(module: nn.Module, names: Sequence[str], rows: int, time: Timer | None = None) -> list[LayerChoice]:
    """Give the layers of these names sparse weights where those are faster, in place.

    Args:
        module: on the GPU, in float16 or bfloat16.
        names: of layers whose weights are to be 2:4 (qualified names). A layer that is not keeps its dense weight, for
            the sparse format would drop what breaks the pattern.
        rows: tokens of a call, batch x sequence: what the layers are timed at.
        time: how a layer is timed; on the GPU, by its own clock, if not given.
    """
    timed: dict[tuple[Any, ...], Timing | str] = {}
    parts = dict(module.named_modules())
    found = []
    for name in names:
        part = parts.get(name)
        reason = why_dense(part)
        if reason or not isinstance(part, nn.Linear):
            shape = tuple(part.weight.shape) if isinstance(part, nn.Linear) else (0, 0)
            found.append(LayerChoice(name, (shape[0], shape[1]), "dense", reason=reason))
            continue
        found.append(_choice(name, part, rows, time or time_on_gpu, timed))
        if found[-1].kernel == "sparse":
            part.weight = nn.Parameter(sparse_weight(part.weight), requires_grad=False)
    return found


def _choice(
    name: str, part: nn.Linear, rows: int, time: Timer, timed: dict[tuple[Any, ...], Timing | str]
) -> LayerChoice:
    """Layers of one shape take the same time, so one of them is timed."""
    shape = (part.out_features, part.in_features)
    key = (*shape, part.bias is None)
    if key not in timed:
        batch = torch.randn(rows, part.in_features, dtype=part.weight.dtype, device=part.weight.device)
        try:
            timed[key] = time(part, batch)
        except RuntimeError as error:  # a size that torch's kernels do not take
            timed[key] = first_line(error)
    known = timed[key]
    if isinstance(known, str):
        return LayerChoice(name, shape, "dense", reason=known)
    dense, sparse = known
    return LayerChoice(name, shape, "sparse" if dense >= _GAINS * sparse else "dense", dense, sparse)


def why_dense(part: nn.Module | None) -> str:
    """Why a layer cannot have a sparse weight; empty where it can."""
    if part is None:
        return "the program has no such layer"
    if not isinstance(part, nn.Linear):
        return f"it is a {type(part).__name__}, whose weight lies the other way round: torch's kernels take nn.Linear"
    if not is_two_of_four(part.weight):
        return "its weight is not 2:4"
    return ""


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of a weight [out, in] are not zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    counts = (weight.detach() != 0).reshape(weight.shape[0], -1, 4).sum(dim=-1)
    return bool((counts <= 2).all())


def sparse_weight(weight: torch.Tensor) -> torch.Tensor:
    """A 2:4 weight [out, in] on the GPU, compressed.

    Raises:
        RuntimeError: a size or type that torch's kernels do not take; its message says which they do.
    """
    torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = not torch.backends.cusparselt.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())


def kernels() -> str:
    """The library whose kernels `sparse_weight` is multiplied by, with its version."""
    if not torch.backends.cusparselt.is_available():
        return "CUTLASS"
    return f"cuSPARSELt {torch.backends.cusparselt.version()}"


@torch.inference_mode()
def time_on_gpu(part: nn.Linear, batch: torch.Tensor) -> Timing:
    """Medians of a layer's time by CUDA events, dense and sparse in turn."""
    sparse = sparse_weight(part.weight)
    bias, dense = part.bias, part.weight
    return in_turn(lambda: nn.functional.linear(batch, dense, bias), lambda: nn.functional.linear(batch, sparse, bias))


def in_turn(dense: Callable[[], object], sparse: Callable[[], object]) -> Timing:
    """Medians of two calls on the GPU, whose turns alternate."""
    times: Mapping[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(ROUNDS):
        for name, call in (("dense", dense), ("sparse", sparse)):
            call()  # the other's turn emptied the caches
            times[name].extend(_milliseconds(call))
    return statistics.median(times["dense"]), statistics.median(times["sparse"])


def _milliseconds(call: Callable[[], object]) -> Iterator[float]:
    for _ in range(CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        yield float(start.elapsed_time(end))


def told(choices: Sequence[LayerChoice]) -> str:
    """The choices in a few words, for what a runner says of itself."""
    sparse = sum(choice.kernel == "sparse" for choice in choices)
    return f"{sparse} of {len(choices)} 2:4 layers by {kernels()}" if sparse else f"none of {len(choices)} 2:4 layers"
