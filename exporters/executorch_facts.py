"""What a `.pte` tells of itself: who runs its operators, its layers, their FLOPs, and the ranges of its activations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .activation_ranges import ActivationRange
from .executorch_program import Constant, Product, PteProgram, read_program
from .executorch_weights import WeightNames, parameter_of
from .layer_facts import ProgramFacts
from .sparsity import WeightUse

_PRODUCTS = ("addmm", "baddbmm", "bmm", "linear", "matmul", "mm")
_NO_KERNELS = "XNNPACK is asked for no kernels for sparse weights"


def delegation(program: PteProgram) -> dict[str, Any]:
    """Who runs what, for the manifest: the share of operators and of matrix products that XNNPACK takes, and the
    kernels that are left to ExecuTorch's own."""
    taken = Counter(name for graph in program.graphs for name in graph.operators)
    left = Counter(program.kernels)
    products = taken["FullyConnected"] + taken["BatchMatrixMultiply"]
    others = sum(left[name] for name in _PRODUCTS)
    share = taken.total() / max(taken.total() + left.total(), 1)
    return {
        "delegated": f"{share:.0%} of {taken.total() + left.total()} operators, {products} of {products + others} "
        f"matrix products, in {len(program.graphs)} graphs",
        "by XNNPACK": dict(taken.most_common()),
        "by ExecuTorch's own kernels": dict(left.most_common()),
        "planned bytes": program.planned_bytes,
    }


def executorch_facts(
    path: Path, names: WeightNames, largest: tuple[int, int], batch: int, sequence: int
) -> ProgramFacts:
    """The facts of a written program, which may be anybody's.

    Args:
        names: of its weights.
        largest: batch and sequence that its memory is planned for, which are the sizes that its graphs tell.
        batch: with `sequence`, the shape whose FLOPs are counted.

    Raises:
        InputError: a file that does not parse.
    """
    program = read_program(path)
    products = {product.weight.place: product for graph in program.graphs for product in graph.products}
    tables = {table.place: table for table in program.tables}
    return ProgramFacts.of(
        (
            _use(product.weight, _layer(place, names), product.axis, product.computed)
            for place, product in _in_order(products, names)
        ),
        (_use(table, _layer(place, names)) for place, table in _in_order(tables, names)),
        _flops(program, list(products.values()), largest, batch, sequence),
        _NO_KERNELS,
    )


def executorch_ranges(path: Path, names: WeightNames) -> Iterator[ActivationRange]:
    """Those that were fixed when the program was made: none where they are found as it runs."""
    for graph in read_program(path).graphs:
        for product in graph.products:
            if product.given is not None:
                yield ActivationRange(_layer(product.weight.place, names), *product.given)


def _in_order(found: dict[str, Any], names: WeightNames) -> Iterator[tuple[str, Any]]:
    """In the order of the model; what has no name comes last."""
    places = [
        *(place for place in names.names if place in found),
        *(place for place in found if place not in names.names),
    ]
    return ((place, found[place]) for place in places)


def _layer(place: str, names: WeightNames) -> str:
    return parameter_of(names.names[place]).removesuffix(".weight") if place in names.names else place


def _use(constant: Constant, layer: str, axis: int = 0, computed: str = "") -> WeightUse:
    return WeightUse(layer, constant.raw, axis, "", constant.stored, computed, constant.raw.nbytes)


def _flops(
    program: PteProgram, products: list[Product], largest: tuple[int, int], batch: int, sequence: int
) -> int | None:
    """Two for each multiplication. The graphs have the sizes of the largest call, so those of another are found by
    what they grow with: tokens or texts, in attention the square of the tokens."""
    texts, tokens = largest
    total = 0
    for product in products:
        rows = math.prod(product.sizes[:-1])
        if rows % texts or (per_text := rows // texts) not in (1, tokens):
            return None
        total += 2 * product.weight.raw.size * batch * (sequence if per_text == tokens else 1)
    for first, second in (sizes for graph in program.graphs for sizes in graph.attention):
        multiplied = math.prod(first) * second[-1]
        if multiplied % (texts * tokens**2):
            return None
        total += 2 * multiplied // (texts * tokens**2) * batch * sequence**2
    return total
