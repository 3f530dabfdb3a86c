"""How sparsity grows while a model trains: schedules by name.

A schedule gives the share of zeros at a point of the way from its first mask to its last. All of them start where
nothing is cut and end at the target, `one-shot` apart, which is there at once. The paper of each stands with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Schedule:
    """One way to a target."""

    formula: str
    paper: str
    at: Callable[[float, float], float]
    """(target, share of the way that is done, 0 to 1) -> share of zeros, 0 to target; it never falls."""


SCHEDULES: dict[str, Schedule] = {
    "cubic": Schedule(
        "target * (1 - (1 - done) ** 3)",
        "Zhu & Gupta 2017, To prune, or not to prune: fast while there is much to spare, slow towards the end",
        lambda target, done: target * (1 - (1 - done) ** 3),
    ),
    "linear": Schedule(
        "target * done",
        "the same number of weights at every mask; the usual yardstick for the others",
        lambda target, done: target * done,
    ),
    "exponential": Schedule(
        "1 - (1 - target) ** done",
        "Frankle & Carbin 2019, The Lottery Ticket Hypothesis: every mask cuts the same share of what is left",
        lambda target, done: 1 - (1 - target) ** done,
    ),
    "one-shot": Schedule(
        "target",
        "Han et al. 2015, Learning both Weights and Connections: all at once, then the rest learns to do without",
        lambda target, done: target,
    ),
}


def get_schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        UsageError: there is none; the message lists those that there are.
    """
    if name not in SCHEDULES:
        known = f"there are {', '.join(SCHEDULES)}"
        raise UsageError(f"There is no schedule of sparsity {name!r}; {known}.{did_you_mean(name, SCHEDULES)}")
    return SCHEDULES[name]


def masks_at(schedule: str, target: float, first: int, last: int, every: int) -> dict[int, float]:
    """When masks are made, and how many zeros each has: optimiser step (from 0; a mask is made before its step is
    trained) to share of zeros. The last one, at `last`, has the target, whether `every` divides the way or not."""
    at = get_schedule(schedule).at
    way = max(last - first, 1)
    return {step: at(target, (step - first) / way) for step in range(first, last, every)} | {last: target}
