"""How far rounding alone takes a program: from the module it was made from, and from itself where a text is read in
pieces and in one."""

from __future__ import annotations

from typing import NamedTuple

from ...exporters.artifact import CacheFacts
from ...exporters.settings import Precision


class Tolerance(NamedTuple):
    """Largest differences that are explained, as a share of the output's largest magnitude over all probes.

    Attributes:
        module: from the outputs of the module.
        itself: of a text read in pieces from the same text read in one. Both are the program's own, with the same
            rounded weights, so it is less: several times what was measured on gutenberg-llama.
    """

    module: float
    itself: float


PRECISIONS: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-4, 1e-4),
    "tf32": Tolerance(1e-2, 1e-2),
    "fp16": Tolerance(2e-2, 2e-2),
    "bf16": Tolerance(8e-2, 3e-2),
    "fp8": Tolerance(5e-1, 1e-1),
    "int8": Tolerance(5e-1, 1e-1),
    "int8-weight-only": Tolerance(1e-1, 2e-2),
    "int4-weight-only": Tolerance(5e-1, 2e-2),
    "native": Tolerance(8e-2, 3e-2),
}
"""fp32 differs by the order of summation alone (1e-6 is usual), tf32, float16 and bfloat16 by 11, 11 and 8 bits of
every product; int8 and fp8 by a rounding of every activation and int4 by a coarse one of every weight, so their parity
only rules out a broken program: what it costs in quality is for validation to say."""

KEPT_IN: dict[str, Tolerance] = {
    "f16": Tolerance(2e-2, 2e-3),
    "bf16": Tolerance(8e-2, 3e-2),
    "u8": Tolerance(8e-2, 2e-2),
    "what the runtime chooses": Tolerance(0.0, 3e-2),
}
"""Of what keys and values are rounded to while they are kept; float32 rounds nothing."""


def tolerance_of(precision: Precision, cache: CacheFacts | None = None) -> Tolerance:
    """What a program's arithmetic explains, or what its cache is kept in where that is coarser."""
    arithmetic = PRECISIONS[precision]
    kept = arithmetic if cache is None else KEPT_IN.get(cache.precision, arithmetic)
    return Tolerance(max(arithmetic.module, kept.module), max(arithmetic.itself, kept.itself))
