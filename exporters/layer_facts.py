"""What is known of every layer: of a program as its compiler will read it, and of a checkpoint as it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import computed_field
from torch import nn

from ..models.anatomy import Linear, place_of, reduction_axis
from ..models.checkpoint import Checkpoint
from .artifact import SparseLayer
from .sparsity import WeightUse, sparse_layer

_OUTSIDE = "it is outside the layers: poolers and heads stay dense"
_LOOKED_UP = "its rows are looked up, not multiplied"
_PRUNED = 0.2  # fewer zeros than that come of rounding alone: to int4 a tenth
_EAGER = "float32"  # what eager checkpoints are loaded in, however they are stored
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}


class LayerFacts(SparseLayer):
    """One stored matrix. `eligible` says whether sparse kernels take it, and `reason` why not; `shape` is
    [reduction, output], of a table that is looked up [rows, width]."""

    stored: str
    """The type of the weight in its file: `float32`, `int8`, `uint4`, ..."""
    computed: str
    """The type of what it is multiplied with, as the graph or the compile properties ask for it; empty for a table."""
    size_bytes: int
    """Of the weight as stored, without its scales."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def precision(self) -> str:
        """Both types in words."""
        if not self.computed:
            return self.stored
        if _bits(self.stored) is None:
            if _bits(self.computed) is not None:
                return f"{self.stored}, quantised when run"
            return self.stored if self.computed == self.stored else f"{self.stored}, computed in {self.computed}"
        weights = self.stored.removeprefix("u")
        if _bits(self.computed) is None:
            return f"{weights} weights only, computed in {self.computed}"
        same = _bits(self.computed) == _bits(self.stored)
        return f"{weights} weights and {'' if same else self.computed.removeprefix('u') + ' '}activations"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> str:
        """The zeros in words."""
        if self.pattern and self.zeros:
            return "2:4"
        if self.zeros >= _PRUNED:
            return f"unstructured, {self.zeros:.1%}"
        return f"dense, {self.zeros:.1%} zeros" if self.zeros >= 0.0005 else "dense"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def number(self) -> int | None:
        """The layer that it belongs to, counted from 0; `None` outside the layers."""
        place = place_of(self.layer)
        return place.layer if place else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kind(self) -> str | None:
        """What it is for: `q`, `k`, `v`, `o`, `up`, `down`, ..."""
        place = place_of(self.layer)
        return place.kind if place else None

    @classmethod
    def of_product(cls, use: WeightUse, no_kernels: str = "") -> Self:
        """The facts of a weight that is multiplied.

        Args:
            no_kernels: why the compiler makes no use of zeros, where it has no sparse kernels at all.
        """
        row = sparse_layer(use, None)
        reason = no_kernels or (row.reason if not row.eligible else _OUTSIDE if place_of(use.layer) is None else "")
        told = {"eligible": not reason, "reason": reason or row.reason}
        return cls(**{**row.model_dump(), **told}, **_storage(use))

    @classmethod
    def of_table(cls, use: WeightUse) -> Self:
        """The facts of a table that is looked up."""
        zeros = float((use.weight == 0).mean()) if use.weight.size else 0.0
        return cls(layer=use.layer, shape=list(use.weight.shape), eligible=False, pattern=False, zeros=zeros,
                   reason=_LOOKED_UP, **_storage(use))  # fmt: skip


@dataclass(frozen=True)
class ProgramFacts:
    """What is known of a program's inside."""

    layers: list[LayerFacts]
    """Every product with a stored weight, in the program's order."""
    tables: list[LayerFacts]
    """Every table of embeddings."""
    flops: int | None
    """Of one call: two for each multiplication in a matrix product, attention's own included, zeros counted as any
    other number, and nothing for all else. `None` where the graph does not tell its sizes."""

    @classmethod
    def of(
        cls, products: Iterable[WeightUse], tables: Iterable[WeightUse], flops: int | None, no_kernels: str = ""
    ) -> Self:
        """The facts of these weights, looked at one at a time; `no_kernels` as for `LayerFacts.of_product`."""
        layers = [LayerFacts.of_product(use, no_kernels) for use in products]
        return cls(layers, [LayerFacts.of_table(use) for use in tables], flops)


def checkpoint_facts(checkpoint: Checkpoint, folder: Path, flops: int | None = None) -> ProgramFacts:
    """The same of a checkpoint, with the types that its files have; names are the model's.

    Args:
        folder: where its files lie.
    """
    types = _stored_types(folder)
    used = {id(part) for part in checkpoint.module.modules()}  # without an embedder's pooler
    named = [(name, part) for name, part in checkpoint.model.named_modules() if id(part) in used]
    products = [(name, part, reduction_axis(part)) for name, part in named if isinstance(part, Linear)]
    tables = [(name, part, 0) for name, part in named if isinstance(part, nn.Embedding)]
    return ProgramFacts.of(_uses(products, types), _uses(tables, types), flops)


def _uses(parts: Iterable[tuple[str, Any, int]], types: dict[str, str]) -> Iterator[WeightUse]:
    for name, part, axis in parts:
        weight = part.weight.detach()
        stored = _type_of(f"{name}.weight", types)
        size = weight.numel() * (_bits(stored) or {"float64": 64, "float32": 32}.get(stored, 16)) // 8
        computed = "" if isinstance(part, nn.Embedding) else _EAGER
        yield WeightUse(name, weight.float().cpu().numpy(), axis, "", stored, computed, size)


def _type_of(parameter: str, types: dict[str, str]) -> str:
    """Files of others name a model's weights with or without the head's prefix; tied weights are stored once, under the
    other name, in the type of their kind."""
    exact = types.get(parameter)
    near = (kind for name, kind in types.items() if name.endswith(f".{parameter}") or parameter.endswith(f".{name}"))
    return exact or next(near, None) or next(iter(types.values()), _EAGER)


def _stored_types(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    types = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                kind = weights.get_slice(name).get_dtype()
                types[name] = _STORED.get(kind, kind.lower())
    return types


def _storage(use: WeightUse) -> dict[str, Any]:
    return {"stored": use.stored, "computed": use.computed, "size_bytes": use.size_bytes}


def _bits(kind: str) -> int | None:
    """Bits of an integer type; `None` for any other."""
    digits = kind.removeprefix("u").removeprefix("int")
    return int(digits) if "int" in kind and digits.isdecimal() else None
