"""Renderings of a sensitivity report: one HTML page, Markdown, and a table for a terminal."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Template
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...files import write_text
from ..records.report import short_number
from ..records.sensitivity import (
    TITLES,
    Sensitivity,
    SensitivityRecord,
    lesson,
    percent,
    save_sensitivity,
)
from .figures import Panel, plain, title_of
from .pages import page_environment
from .sensitivity_charts import LEAST, MOST, by_layer, curves, extremes, loss_map

_PAGE, _MARKDOWN = "sensitivity.html", "sensitivity.md"
_DISTANCE = {"cosine_mean": "1 − cosine", "kl_mean": "KL", "token_agreement": "1 − agreement of top tokens"}


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one structure."""

    title: str
    smallest: str
    """The cut that it looks at."""
    untouchable: list[SensitivityRecord]
    free: list[int]


def write_sensitivity(found: Sensitivity, folder: Path) -> Path:
    """Write `sensitivity.json`, `sensitivity.html` and `sensitivity.md` into `folder`, each whole or not at all;
    returns the path of the page.

    Raises:
        DiskFull: no room was left.
    """
    texts = {_PAGE: render_sensitivity_html(found), _MARKDOWN: render_sensitivity_markdown(found)}
    save_sensitivity(found, folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / _PAGE


def render_sensitivity_html(found: Sensitivity) -> str:
    """The whole page: no script, no network, light and dark."""
    return _template().render(
        found=found,
        lesson=lesson(found),
        verdicts=list(verdicts(found)),
        maps=list(_maps(found)),
        curve_panels=list(_curve_panels(found)),
        drift_names=sorted({name for record in found.records for name in record.drift}),
        titles=TITLES,
    )


@functools.cache
def _template() -> Template:
    environment = page_environment()
    environment.filters |= {"number": _number, "percent": percent, "plain": plain, "title_of": title_of,
                            "layers": _layers, "between": _between}  # fmt: skip
    return environment.get_template("sensitivity.html.j2")


def _number(value: float | None, digits: int = 4) -> str:
    """A figure for people; nothing is said of one that is none."""
    return "–" if value is None or math.isnan(value) else short_number(value, digits)


def _between(record: SensitivityRecord) -> str:
    """The ends of the loss's interval."""
    return "–" if record.low is None or record.high is None else f"{percent(record.low)} to {percent(record.high)}"


def _layers(numbers: Sequence[int]) -> str:
    """`0, 2 to 4, 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in parts
    ) or "none"  # fmt: skip


def verdicts(found: Sensitivity) -> Iterator[Verdict]:
    """What the rule says, structure by structure."""
    for structure in found.structures:
        first = found.first_cuts(structure)
        named = sorted(found.untouchable(structure), key=lambda item: -item.loss)
        taken = {item.layer for item in named}
        shares = {item.share for item in first}
        smallest = "the whole layer" if shares == {1.0} else f"{percent(min(shares))} of it"
        free = [item.layer for item in first if item.layer not in taken]
        yield Verdict(TITLES[structure], smallest, named, free)


def _maps(found: Sensitivity) -> Iterator[Panel]:
    framed = frozenset((name, item.layer) for name in found.structures for item in found.untouchable(name))
    shown = [item for name in found.structures for item in found.shown(name).values()]
    losses = {(item.structure, item.layer): item.loss for item in shown}
    of = "the uncut model's" if found.uncut else "all answers"
    note = f"Per cent of {of} {_words(found.metric)}; a frame marks what must not be touched."
    yield Panel(f"Loss of {_words(found.metric)}", note, loss_map(found, losses, "What is lost", framed))
    moved = {(item.structure, item.layer): found.drift_of(item) for item in shown if item.drift}
    if moved and found.drift_metric != found.metric:
        distance = _DISTANCE.get(found.drift_metric, found.drift_metric)
        note = f"{distance} to the uncut model's own answers, times 100; it needs no labels."
        yield Panel("Drift of the answers", note, loss_map(found, moved, "How far the answers move"))


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _curve_panels(found: Sensitivity) -> Iterator[Panel]:
    for structure in found.structures:
        partial = any(0 < item.share < 1 for item in found.of(structure)) and structure != "2:4"
        draw = curves if partial else by_layer
        places = {class_: layer for layer, class_ in extremes(found, structure).items()}
        least = f", layer {places[LEAST]} least" if LEAST in places else ""
        note = f"layer {places[MOST]} is missed most{least}"
        yield Panel(_heading(structure), note, draw(found, structure))


def _heading(structure: str) -> str:
    words = TITLES[structure]
    return words[:1].upper() + words[1:]


def _cells(found: Sensitivity) -> Iterator[tuple[list[str], list[bool]]]:
    """The rows of the short table: the layer, its losses at the shown share, and which of them must not be touched."""
    columns = [(found.shown(name), {item.layer for item in found.untouchable(name)}) for name in found.structures]
    for layer in range(found.layers):
        losses = [percent(shown[layer].loss) if layer in shown else "–" for shown, _ in columns]
        yield [str(layer), *losses], [False, *(layer in marked for _, marked in columns)]


def _headings(found: Sensitivity) -> list[str]:
    names = []
    for structure in found.structures:
        shares = sorted({item.share for item in found.shown(structure).values()})
        names.append(f"{TITLES[structure]}, {percent(shares[0])}" if shares[0] < 1 else TITLES[structure])
    return ["Layer", *names]


def _caption(found: Sensitivity) -> str:
    better = "higher" if found.higher_is_better else "lower"
    return (
        f"{found.metric} {short_number(found.uncut)} uncut ({better} is better), {found.data.rows:,} rows of "
        f"{found.data.source}; each part cut alone, without training"
    )


def render_sensitivity_markdown(found: Sensitivity) -> str:
    """The lesson, the table of losses and what must not be touched, as GitHub-flavoured Markdown."""
    rules = ["---", *["---:"] * len(found.structures)]
    rows = [
        [f"**{cell}**" if marked else cell for cell, marked in zip(cells, marks, strict=True)]
        for cells, marks in _cells(found)
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (_headings(found), rules, *rows))
    named = [f"- {item.title} ({item.smallest}): {_named(item)}" for item in verdicts(found)]
    blocks = [
        f"## Sensitivity of {_code(found.model)}",
        lesson(found),
        f"Loss by layer and structure ({_code(_caption(found))}); bold must not be touched:",
        table,
        "### Must not be touched",
        found.rule,
        "\n".join(named),
        *(f"> **Note:** {note}" for note in found.notes),
    ]
    return "\n\n".join(blocks) + "\n"


def _code(text: str) -> str:
    """Text as it is, that can draw no markup."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def _named(verdict: Verdict) -> str:
    numbers = [item.layer for item in verdict.untouchable]
    return f"layer{'s' if len(numbers) > 1 else ''} {_layers(numbers)}" if numbers else "no layer"


def render_sensitivity_table(found: Sensitivity) -> RenderableType:
    """What `limbeck sensitivity` prints: losses by layer and structure, what must not be touched, and the lesson."""
    table = Table(title=Text(_caption(found)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(_headings(found)):
        table.add_column(Text(heading), justify="right" if index else "left")
    for cells, marks in _cells(found):
        pairs = zip(cells, marks, strict=True)
        table.add_row(*(Text(f"{cell} !" if marked else cell, "bold red" if marked else "") for cell, marked in pairs))
    named = [f"  {item.title} ({item.smallest}): {_named(item)}" for item in verdicts(found)]
    told = "\n".join([f"! {found.rule}", *named, "", lesson(found)])
    return Group(table, Text(told))
