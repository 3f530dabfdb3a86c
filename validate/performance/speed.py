"""Programs of one runtime timed in one process, in turn: enough to say which is the slower. Figures for a report come
from `latency.py`, which gives every program a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from .worker import garbage_left_alone, timed, warm_up

_ROUNDS = 7
_ROUND_SECONDS = 0.1
_WARM_UP_SECONDS = 2.0
_SETTLED = 0.05


def medians_in_turn(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The median of each call in milliseconds, over rounds in which every one has its turn."""
    samples: list[list[float]] = [[] for _ in calls]
    with garbage_left_alone():
        typical = [warm_up(call, _WARM_UP_SECONDS, _SETTLED)[2] for call in calls]
        counts = [max(2, int(_ROUND_SECONDS * 1e3 / each)) for each in typical]
        for _ in range(_ROUNDS):
            for call, count, found in zip(calls, counts, samples, strict=True):
                found += timed(call, count)
    return [statistics.median(each) for each in samples]
