"""Renderings of a bisection: a table for a terminal, and one HTML page with a picture of the error over depth."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Template
from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...files import write_text
from ..records.bisection import Bisection, ModuleDifference, StepDifferences, save_bisection
from ..records.report import short_number
from .figures import Panel, plain
from .pages import page_environment
from .svg import Scale, drawing, line, log_span, marker, plot_box, polyline, text, x_axis, y_axis

_PAGE = "bisection.html"
_WIDTH, _HEIGHT = 380.0, 240.0
_SMALLEST = 1e-9
"""No smaller error is drawn."""
_HIDDEN_SHOWN = 6
WORDS = {"student": "student (torch)", "graph": "exported graph (float32)", "program": "compiled program"}


def write_bisection(found: Bisection, folder: Path) -> Path:
    """Write `bisection.json` and `bisection.html` into `folder`, each whole or not at all; returns the page's path.

    Raises:
        DiskFull: no room was left.
    """
    page = render_bisection_html(found)
    save_bisection(found, folder)
    write_text(folder / _PAGE, page)
    return folder / _PAGE


def render_bisection_html(found: Bisection) -> str:
    """The whole page: no script, no network, light and dark."""
    return _template().render(
        found=found,
        lesson=[lesson(step) for step in found.steps],
        panels=depth_panels(found.steps),
        steps=[(_title(step), step) for step in found.steps],
    )


@functools.cache
def _template() -> Template:
    environment = page_environment()
    environment.filters |= {"number": short_number, "plain": plain}
    return environment.get_template("bisection.html.j2")


def depth_panels(steps: Sequence[StepDifferences], whose: str = "") -> list[Panel]:
    """A drawing a step; `whose` stands before its title."""
    return [Panel(f"{whose}{_title(step)}", _note(step), error_over_depth(step, i + 1)) for i, step in enumerate(steps)]


def _title(step: StepDifferences) -> str:
    return f"{WORDS[step.before]} → {WORDS[step.after]}"


def _note(step: StepDifferences) -> str:
    return f"relative error of what each module hands on; {step.precision} explains {step.explained:g} in one module"


def lesson(step: StepDifferences) -> str:
    """What the step comes to, in a sentence."""
    last = step.modules[-1] if step.modules else None
    if last is None:
        return f"{_title(step)}: no module is visible in both."
    ends = f"the output's error is {short_number(last.error, 2)}"
    if step.first is None:
        worst = _most_added(step.modules)
        return f"{_title(step)}: every module is within what {step.precision} explains; {ends}" + (
            f", and {worst.module} adds most ({_from_to(worst)})." if worst.error > worst.error_in else "."
        )
    return (
        f"{_title(step)}: they part first at {step.first.module}, whose error is {short_number(step.first.error, 2)} "
        f"after {short_number(step.first.error_in, 2)} in what went into it; {ends}."
    )


def _most_added(modules: Sequence[ModuleDifference]) -> ModuleDifference:
    return max(modules, key=lambda module: module.error - module.error_in)


def _from_to(module: ModuleDifference) -> str:
    return f"{short_number(module.error_in, 2)} to {short_number(module.error, 2)}"


def error_over_depth(step: StepDifferences, series: int) -> Markup:
    """The error of each module, first to last, on a logarithmic scale; a large marker is the first beyond what the
    precision explains, the dashed line what it explains in one module. A logarithm has no zero: half of the smallest is
    drawn in its place."""
    left, right, top, bottom = plot_box(_WIDTH, _HEIGHT, left=52)
    smallest = min((module.error for module in step.modules if module.error > 0), default=_SMALLEST)
    errors = [max(module.error, smallest / 2, _SMALLEST) for module in step.modules]
    y = Scale(*log_span([*errors, step.explained]), bottom, top, log=True)
    x = Scale(0, max(len(errors) - 1, 1), left, right)
    points = [(x(place), y(error)) for place, error in enumerate(errors)]
    parts = [x_axis(x, bottom, "module, in the order in which they run"), y_axis(y, left, right)]
    parts.append(line(left, y(step.explained), right, y(step.explained), "diagonal"))
    parts.append(polyline(points, f"curve s{series}"))
    parts += [marker(*point, series, size=2.5) for point in points]
    parts.append(text(right, y(step.explained) - 5, "explained", "tick halo", "end"))
    if step.first is not None:
        place = step.modules.index(step.first)
        parts.append(marker(*points[place], 5, size=7))
        anchor = "start" if place < len(points) / 2 else "end"
        parts.append(text(points[place][0], points[place][1] - 11, _short(step.first.module), "label halo", anchor))
    return drawing(_WIDTH, _HEIGHT, lesson(step), *parts)


def _short(name: str) -> str:
    return name if len(name) <= 40 else "…" + name[-39:]


def render_bisection_table(found: Bisection) -> RenderableType:
    """What `limbeck bisect` prints: a table a step, and what each step comes to."""
    parts: list[RenderableType] = []
    for step in found.steps:
        table = Table(title=Text(_title(step)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("Module", overflow="fold")
        for heading in ("Error", "Of its input", "Times", "Largest", "Cosine"):
            table.add_column(heading, justify="right")
        for module in step.modules:
            style = "bold red" if module is step.first else "red" if module.beyond else ""
            table.add_row(Text(f"{'✘ ' if module.beyond else ''}{module.module}", style), *map(Text, _cells(module)))
        parts.append(table)
        if step.not_visible:
            parts.append(Text(f"Not visible: {_listed(step.not_visible)}\n", "dim"))
        seen = (
            f"Looking inside moved the output of the {step.after} by {short_number(step.moved, 2)} of its magnitude.\n"
        )
        parts.append(Text(seen, "dim"))
    parts += [Text(lesson(step)) for step in found.steps]
    parts += [Text(f"! {note}", "dim") for note in found.notes]
    return Group(*parts)


def _cells(module: ModuleDifference) -> list[str]:
    figures = (module.error, module.error_in, module.growth, module.largest)
    return [*(short_number(figure, 2) for figure in figures), f"{module.cosine:.6f}"]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _HIDDEN_SHOWN} more" if len(names) > _HIDDEN_SHOWN else ""
    return ", ".join(names[:_HIDDEN_SHOWN]) + more
