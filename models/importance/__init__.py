"""How much each part of a model matters: one small class a method, registered by name."""

from __future__ import annotations

from ...errors import UsageError, did_you_mean
from .activations import Activation, BlockInfluence
from .base import STRUCTURES, Calibration, Importance, Progress, Scores
from .gradients import Fisher, Taylor
from .magnitude import Magnitude

IMPORTANCES: dict[str, type[Importance]] = {
    importance.name: importance for importance in (Magnitude, Taylor, Fisher, Activation, BlockInfluence)
}

__all__ = ["IMPORTANCES", "STRUCTURES", "Calibration", "Importance", "Progress", "Scores", "get_importance"]


def get_importance(name: str) -> Importance:
    """The importance of that name.

    Raises:
        UsageError: there is no such importance; the message lists them.
    """
    if name not in IMPORTANCES:
        known = ", ".join(IMPORTANCES)
        raise UsageError(f"There is no importance {name!r}; valid are {known}.{did_you_mean(name, IMPORTANCES)}")
    return IMPORTANCES[name]()
