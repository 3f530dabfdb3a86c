"""The picture of the error over depth."""

from __future__ import annotations

import re

from limbeck.validate.records.bisection import ModuleDifference, StepDifferences
from limbeck.validate.rendering.bisection import error_over_depth


def heights(*errors: float) -> list[float]:
    """Where the curve lies at each module, in pixels from the top."""
    modules = [ModuleDifference(module=f"m{i}", error=e, largest=e, cosine=1.0) for i, e in enumerate(errors)]
    step = StepDifferences(before="graph", after="program", precision="int8", explained=0.1, modules=modules)
    (points,) = re.findall(r'<polyline[^>]* points="([^"]+)"', str(error_over_depth(step, 1)))
    return [float(point.split(",")[1]) for point in points.split()]


def test_modules_without_an_error_do_not_flatten_the_others() -> None:
    none, small, large = heights(0.0, 0.02, 0.2)
    assert none > small > large
    assert small - large > 2 * (none - small)


def test_a_program_that_is_exact_is_drawn_at_the_bottom() -> None:
    assert len(set(heights(0.0, 0.0))) == 1
