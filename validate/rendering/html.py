"""The report as one HTML file: no script, no network, light and dark, phone and paper.

Text from a report is untrusted. Jinja escapes it, the drawings escape it, and a content security policy in the page
allows nothing but its own style sheet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from jinja2 import Template
from markupsafe import Markup

from ..report import Candidate, Latency, Report, exact_number, short_number
from . import charts
from .attribution import attribution
from .figures import (
    VERDICT_WORDS,
    Panel,
    columns,
    figure_of,
    latency_figure,
    plain,
    quality_metric,
    summary,
    title_of,
)
from .pages import page_environment
from .performance import SCENARIO_HEADINGS, remarks, scenario_rows
from .slices import changed_examples, slice_map
from .training import trainings

_WIDTHS_A_CHART = 12


def render_html(report: Report) -> str:
    """The whole page; everything it needs is inside it."""
    return _template().render(
        report=report,
        verdict=report.verdict,
        summary=summary(report),
        columns=columns(report),
        latency_panels=list(_latency_panels(report)),
        scenario_headings=SCENARIO_HEADINGS,
        scenarios=scenario_rows(report),
        remarks=remarks(report),
        scatter=_scatter(report),
        reliability_panels=list(_reliability_panels(report)),
        trainings=list(trainings(report)),
        attribution=attribution(report),
        cut_panels=list(_cut_panels(report)),
        slices=slice_map(report),
        changed=changed_examples(report),
        checks=list(report.checks()),
        gate_drawings=[charts.gate_interval(result) for result in report.gates],
    )


@functools.cache
def _template() -> Template:
    environment = page_environment()
    environment.filters |= {"number": short_number, "exact": exact_number, "plain": plain, "title_of": title_of}
    environment.filters["cell"] = _cell
    environment.globals |= {"words": VERDICT_WORDS, "swatch": charts.swatch}
    return environment.get_template("report.html.j2")


def _cell(value: Any) -> str:
    """A value from a check's row: yes or no, a figure, or text as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return short_number(value) if isinstance(value, float) else str(value)


def _latency_panels(report: Report) -> Iterator[Panel]:
    domain = charts.latency_domain([latency for item in report.measured for latency in item.latencies])
    for series, candidate in _numbered(report):
        for latency in candidate.latencies:
            title = candidate.name if len(candidate.latencies) == 1 else f"{candidate.name}, {_shape(latency)}"
            yield Panel(title, _latency_note(latency), charts.latency_histogram(latency, domain, title, series))


def _shape(latency: Latency) -> str:
    return f"{latency.batch_size} × {latency.sequence_length}"


def _latency_note(latency: Latency) -> str:
    p50, p90, p99 = (short_number(value, 3) for value in (latency.p50_ms, latency.p90_ms, latency.p99_ms))
    speed = f" · {short_number(latency.speedup, 3)}× the teacher's speed" if latency.speedup is not None else ""
    threads = f", {latency.threads} thread{'' if latency.threads == 1 else 's'}" if latency.threads else ""
    shape = f"batch {latency.batch_size} × {latency.sequence_length} tokens"
    return f"p50 {p50} · p90 {p90} · p99 {p99} ms{speed} · {shape}{threads}, {latency.samples:,} calls"


def _numbered(report: Report) -> Iterator[tuple[int, Candidate]]:
    """Candidates with the number of their colour: the teacher is 0, whether there is one or not."""
    return ((index if report.teacher else index + 1, item) for index, item in enumerate(report.measured))


def _scatter(report: Report) -> Markup | None:
    quality = quality_metric(report)
    if quality is None:
        return None
    points = []
    for series, candidate in _numbered(report):
        latency, figure = latency_figure(candidate, "p50"), figure_of(candidate.metric(quality.name))
        if latency and figure:
            points.append(charts.Point(candidate.name, series, latency, figure))
    title = title_of(quality.name) + (f", {quality.unit}" if quality.unit else "")
    return charts.quality_against_latency(points, title, quality.higher_is_better) if len(points) > 1 else None


def _reliability_panels(report: Report) -> Iterator[Panel]:
    for series, candidate in _numbered(report):
        if candidate.reliability:
            ece = candidate.metric("ece")
            note = f"expected calibration error {short_number(ece.value, 3)}" if ece else ""
            yield Panel(candidate.name, note, charts.reliability(candidate.reliability, candidate.name, series))


def _cut_panels(report: Report) -> Iterator[Panel]:
    for number, step in enumerate(report.steps, 1):
        for unit in dict.fromkeys(item.unit for item in step.widths):
            widths = [item for item in step.widths if item.unit == unit]
            for start in range(0, len(widths), _WIDTHS_A_CHART):
                part = widths[start : start + _WIDTHS_A_CHART]
                more = f", layers {start + 1} to {start + len(part)}" if len(widths) > _WIDTHS_A_CHART else ""
                what = "heads" if unit == "heads" else "feed-forward channels"
                title = f"Step {number}, {step.verb}: {what}{more}"
                yield Panel(title, step.method, charts.cut_widths(part))
