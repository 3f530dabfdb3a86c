"""What each stage of a recipe cost, from the teacher over its stages to the programs that were made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..metrics.headline import headline_among, higher_is_better
from ..records.report import Candidate, Loss, Report, StageResult, short_number, size_text
from .attribution import loss_text
from .figures import figure_among, title_of
from .slices import PlainTable

TITLE = "What each stage cost"
_FEWEST_ZEROS = 0.01
_SPEED = {"ttft_p50_ms": "First token (ms)", "tokens_per_second": "Tokens/s"}


@dataclass(frozen=True)
class Row:
    """The teacher, a stage or a program: its name, what was done, and its figures."""

    name: str
    done: str
    figures: list[str]


@dataclass(frozen=True)
class Stages:
    """All rows; `headings` are those of the figures."""

    headings: list[str]
    rows: list[Row]


def stages(report: Report) -> Stages | None:
    """The way that a run took; nothing of a report that is not of a run."""
    if not report.stages:
        return None
    metric = _metric(report)
    table = _Table(report, metric, any(stage.zeros >= _FEWEST_ZEROS for stage in report.stages), _speeds(report))
    return Stages(table.headings, list(table.rows()))


def stage_table(report: Report, escape: Callable[[str], str]) -> Iterator[PlainTable]:
    """The same as a table in the markup that `escape` makes of a text."""
    found = stages(report)
    if found is not None:
        rows = [[*map(escape, (row.name, row.done, *row.figures))] for row in found.rows]
        yield PlainTable(TITLE, [*map(escape, ("Stage", "What was done", *found.headings))], rows)


def _metric(report: Report) -> str | None:
    lost = next((stage.loss.metric for stage in report.stages if stage.loss), None)
    return lost or headline_among({metric.name for stage in report.stages for metric in stage.metrics})


def _speeds(report: Report) -> list[str]:
    rows: list[StageResult | Candidate] = [*report.measured, *report.stages]
    return [name for name in _SPEED if any(row.metric(name) for row in rows)]


@dataclass(frozen=True)
class _Table:
    report: Report
    metric: str | None
    with_zeros: bool
    speeds: list[str]

    @property
    def headings(self) -> list[str]:
        zeros = ["Zeros"] if self.with_zeros else []
        quality = [title_of(self.metric), "Lost (95% interval)"] if self.metric else []
        return ["Parameters", *zeros, "Size", *quality, *(_SPEED[name] for name in self.speeds), "Time"]

    def rows(self) -> Iterator[Row]:
        report = self.report
        if report.teacher is not None:
            yield self._program(report.teacher, "as it came")
        for stage in report.stages:
            start = "" if stage.start == self._before(stage) else f"{stage.start} → "
            done = f"{start}{stage.verb}: {stage.method}" if stage.verb else f"{start}left as it was"
            found = stage.metric(self.metric or "")
            quality = self._quality(found.value if found else None, stage.loss)
            yield Row(stage.name, done, self._figures(stage, stage.zeros, quality, f"{stage.seconds:,.0f} s"))
        for candidate in report.candidates:
            yield self._program(candidate, f"{candidate.backend} {candidate.precision}")

    def _before(self, stage: StageResult) -> str:
        """What stands above it, which is where it started unless it says otherwise."""
        above = self.report.stages.index(stage) - 1
        return self.report.stages[above].name if above >= 0 else "teacher"

    def _program(self, candidate: Candidate, done: str) -> Row:
        found = figure_among(self.report.measured, candidate, self.metric or "")
        quality = self._quality(found.value if found else None, self._lost(candidate))
        return Row(candidate.name, done, self._figures(candidate, None, quality, "–"))

    def _quality(self, value: float | None, loss: Loss | None) -> list[str]:
        return [short_number(value), loss_text(loss)] if self.metric else []

    def _lost(self, candidate: Candidate) -> Loss | None:
        """To its student: what exporting and compiling did, without an interval, since it is two steps."""
        by_point = {stop.name: stop.metric(self.metric or "") for stop in candidate.waypoints}
        student, program = by_point.get("student"), by_point.get("program")
        if student is None or program is None:
            return None
        fall = student.value - program.value
        return Loss(metric=program.name, value=fall if higher_is_better(program.name) else -fall)

    def _figures(
        self, row: StageResult | Candidate, zeros: float | None, quality: list[str], seconds: str
    ) -> list[str]:
        speeds = [row.metric(name) for name in self.speeds]
        return [
            "–" if row.parameters is None else f"{short_number(row.parameters / 1e6, 3)} M",
            *(["–" if zeros is None else f"{zeros:.0%}"] if self.with_zeros else []),
            "–" if row.size_bytes is None else size_text(row.size_bytes),
            *quality,
            *(short_number(speed.value if speed else None, 3) for speed in speeds),
            seconds,
        ]
