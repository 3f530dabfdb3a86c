"""The weight audit: every weight of a program, dequantised, against the checkpoint's.

Quality does not see a zeroed head or a stale layer (its loss hides in the noise of any test set); the weights do.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from ...exporters.artifact import CheckRecord
from ...exporters.program import ProgramWeight

_SLACK = 1e-5
"""Float32 arithmetic on the way back from storage, as a share of the weight's largest value."""
_LISTED = 10


def audit_weights(module: nn.Module, weights: Iterable[ProgramWeight], *, corrected: bool = False) -> CheckRecord:
    """Compare each weight with the module's own, within the rounding that its storage explains.

    A parameter that the program lacks fails the audit, unless a tied twin of it was found. With `corrected`, vectors
    (biases, norms) are not compared: the quantiser's bias correction changed them on purpose.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    twins = {name: id(parameter) for name, parameter in parameters.items()}
    found: set[int] = set()
    wrong: list[dict[str, str | float | int | bool]] = []
    compared = 0
    for weight in weights:
        parameter = parameters.get(weight.name)
        if parameter is None or (corrected and parameter.ndim < 2):
            continue
        found.add(twins[weight.name])
        compared += 1
        expected = parameter if weight.rows is None else parameter[weight.rows]
        difference = _beyond_rounding(weight, expected.detach().float().cpu().numpy())
        if difference is not None:
            wrong.append({"weight": weight.name, "problem": difference})
    wrong += [
        {"weight": name, "problem": "not in the program"}
        for name, parameter in parameters.items()
        if twins[name] not in found and not (corrected and parameter.ndim < 2)
    ]
    return CheckRecord(
        name="weight audit",
        passed=not wrong,
        detail=_detail(wrong, compared),
        rows=wrong[:_LISTED],
    )


def _detail(wrong: list[dict[str, str | float | int | bool]], compared: int) -> str:
    if not wrong:
        return f"{compared} weights equal the checkpoint's within their storage's rounding"
    first = wrong[0]
    return f"{first['weight']}: {first['problem']} ({len(wrong)} weights are wrong)"


def same_weight(weight: ProgramWeight, expected: np.ndarray) -> bool:
    """Whether a program's weight is this parameter, float32, within the rounding that its storage explains."""
    return _beyond_rounding(weight, expected) is None


def _beyond_rounding(weight: ProgramWeight, expected: np.ndarray) -> str | None:
    values = weight.values.reshape(expected.shape) if weight.values.size == expected.size else weight.values
    if values.shape != expected.shape:
        return f"has the shape {list(values.shape)} instead of {list(expected.shape)}"
    allowed = np.asarray(weight.step, dtype=np.float32)
    if allowed.size == expected.size:
        allowed = allowed.reshape(expected.shape)
    slack = _SLACK * float(np.max(np.abs(expected), initial=0.0))
    excess = np.abs(values - expected) - allowed - slack
    if np.all(excess <= 0):  # false for NaN, as it should be
        return None
    share = float(np.mean(~(excess <= 0)))
    return f"differs from the checkpoint by up to {float(np.max(np.abs(values - expected))):.3g} in {share:.1%} of it"
