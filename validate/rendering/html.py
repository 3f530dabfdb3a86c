"""The report as one HTML file: no script, no network, light and dark, phone and paper.

Text from a report is untrusted. Jinja escapes it, the drawings escape it, and a content security policy in the page
allows nothing but its own style sheet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from jinja2 import Template

from ..records.report import Latency, Report, exact_number, short_number
from . import charts
from .attribution import attribution
from .bisection import depth_panels, lesson
from .checks import sorted_checks
from .figures import (
    VERDICT_WORDS,
    Panel,
    columns,
    numbered,
    plain,
    summary,
    title_of,
    worst_first,
)
from .pages import page_environment
from .performance import (
    GENERATION_HEADINGS,
    SCENARIO_HEADINGS,
    TOKEN_HEADINGS,
    generation_note,
    generation_rows,
    remarks,
    scenario_rows,
    token_rows,
)
from .program_layers import legend, programs
from .slices import changed_examples, slice_map
from .stages import stages
from .trade_off import trade_off
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
        generation_headings=GENERATION_HEADINGS,
        generation_note=generation_note(report),
        generations=generation_rows(report),
        scenario_headings=SCENARIO_HEADINGS,
        scenarios=scenario_rows(report),
        token_headings=TOKEN_HEADINGS,
        tokens=token_rows(report),
        remarks=remarks(report),
        trade_off=trade_off(report),
        reliability_panels=list(_reliability_panels(report)),
        trainings=list(trainings(report)),
        attribution=attribution(report),
        stages=stages(report),
        cut_panels=list(_cut_panels(report)),
        slices=slice_map(report),
        changed=changed_examples(report),
        programs=programs(report),
        depth_panels=list(_depth_panels(report)),
        depth_lessons=[f"{item.name}, {lesson(step)}" for item in report.candidates for step in item.modules],
        legend=legend(report),
        checks=sorted_checks(report),
        gates=worst_first(report.gates),
        created=_when(report.created),
    )


@functools.cache
def _template() -> Template:
    environment = page_environment()
    environment.filters |= {"number": short_number, "exact": exact_number, "plain": plain, "title_of": title_of}
    environment.filters |= {"cell": _cell, "drawn": charts.gate_interval}
    environment.globals |= {"words": VERDICT_WORDS, "swatch": charts.swatch}
    return environment.get_template("report.html.j2")


def _when(created: str) -> str:
    """A moment for people; what is none is left as it is."""
    try:
        return f"{datetime.fromisoformat(created).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return created


def _cell(value: Any) -> str:
    """A value from a check's row: yes or no, a figure, or text as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return short_number(value) if isinstance(value, float) else str(value)


def _latency_panels(report: Report) -> Iterator[Panel]:
    domain = charts.latency_domain([latency for item in report.measured for latency in item.latencies])
    for series, candidate in numbered(report):
        for latency in candidate.latencies:
            title = candidate.name if len(candidate.latencies) == 1 else f"{candidate.name}, {_shape(latency)}"
            yield Panel(
                title,
                _latency_note(latency, report.measured[0].name),
                charts.latency_histogram(latency, domain, title, series),
            )


def _shape(latency: Latency) -> str:
    return f"{latency.batch_size} × {latency.sequence_length}"


def _latency_note(latency: Latency, base: str) -> str:
    p50, p90, p99 = (short_number(value, 3) for value in (latency.p50_ms, latency.p90_ms, latency.p99_ms))
    speed = f" · {short_number(latency.speedup, 3)}× as fast as {base}" if latency.speedup is not None else ""
    threads = f", {latency.threads} thread{'' if latency.threads == 1 else 's'}" if latency.threads else ""
    shape = f"batch {latency.batch_size} × {latency.sequence_length} tokens"
    return f"p50 {p50} · p90 {p90} · p99 {p99} ms{speed} · {shape}{threads}, {latency.samples:,} calls"


def _reliability_panels(report: Report) -> Iterator[Panel]:
    for series, candidate in numbered(report):
        if candidate.reliability:
            ece = candidate.metric("ece")
            note = f"expected calibration error {short_number(ece.value, 3)}" if ece else ""
            yield Panel(candidate.name, note, charts.reliability(candidate.reliability, candidate.name, series))


def _depth_panels(report: Report) -> Iterator[Panel]:
    for item in report.candidates:
        yield from depth_panels(item.modules, f"{item.name}: ")


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
