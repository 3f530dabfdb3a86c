"""What every rendering shows first: the columns of the candidate table, the verdict in words, the counts behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..records.report import Candidate, GateResult, Metric, Report, Verdict, short_number

VERDICT_WORDS: dict[Verdict | None, str] = {
    "pass": "Pass",
    "fail": "Fail",
    "inconclusive": "Inconclusive",
    None: "No verdict",
}
_WORST_FIRST: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
_QUALITY = ("spearman", "accuracy", "f1", "pearson", "perplexity")
_AGREEMENT = ("cosine_mean", "flip_rate", "next_token_kl")
_TITLES = {
    "ece": "ECE",
    "peak_memory_mb": "Peak memory",
    "energy_mj": "Energy",
    "next_token_kl": "KL of next tokens",
    "ttft_p50_ms": "First token",
    "tpot_p50_ms": "Per token",
    "tpot_speedup_p50": "Speed-up per token",
    "tokens_per_second": "Tokens",
}
_OF_TOKENS = ("ttft_p50_ms", "tpot_p50_ms", "tpot_speedup_p50", "tokens_per_second")
"""Metrics of text that was written under a stopwatch which have a column, at the first shape."""
_DIGITS = 3
_BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class Panel:
    """One of several small drawings, with the words over it."""

    title: str
    note: str
    drawing: Markup


@dataclass(frozen=True)
class Figure:
    """One cell: a value, the ends of its 95% interval where known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        return short_number(self.value, _DIGITS)

    @property
    def interval(self) -> str:
        """`0.97 to 0.99`, or nothing when no end is known."""
        if self.low is None and self.high is None:
            return ""
        return f"{short_number(self.low, _DIGITS)} to {short_number(self.high, _DIGITS)}"


@dataclass(frozen=True)
class Column:
    """One column of the candidate table: `figures` has one entry a row, `None` where nothing was measured."""

    title: str
    unit: str
    figures: list[Figure | None]
    higher_is_better: bool

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


def title_of(metric_name: str) -> str:
    """`spearman_kept` -> `Spearman kept`."""
    words = metric_name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _first_present(candidates: Sequence[Candidate], wanted: Callable[[str], bool]) -> Metric | None:
    metrics = (metric for candidate in candidates for metric in candidate.metrics)
    return next((metric for metric in metrics if wanted(metric.name)), None)


def quality_metric(report: Report) -> Metric | None:
    """The metric that stands for quality where only one can be shown: the candidates' quality, which a teacher has as
    well, else what they keep of the teacher's, else their agreement with it."""
    for wanted in (_is_quality(report), _is_kept, _is_agreement):
        found = _first_present(report.candidates or report.measured, wanted)
        if found:
            return found
    return None


def _is_quality(report: Report) -> Callable[[str], bool]:
    names = {metric.name for candidate in report.measured for metric in candidate.metrics}
    return {*_QUALITY, *(name.removesuffix("_kept") for name in names if _is_kept(name))}.__contains__


def _is_kept(name: str) -> bool:
    return name.endswith("_kept")


def _is_agreement(name: str) -> bool:
    return name.startswith("agreement") or name in _AGREEMENT


def columns(report: Report) -> list[Column]:
    """The figures that decide, one column each: quality, what was kept of it, agreement, time, tokens, size, memory,
    energy.
    A column that nobody has a figure for is left out. Rows are `report.measured`."""
    rows = report.measured
    decisive = (_is_quality(report), _is_kept, _is_agreement, "generation_agreement".__eq__, "ece".__eq__)
    found = [
        *_metric_columns(rows, decisive),
        _latency_column(rows, "p50"),
        _latency_column(rows, "p99"),
        _speedup_column(rows),
        *_metric_columns(rows, [name.__eq__ for name in _OF_TOKENS]),
        _size_column(rows),
        *_metric_columns(rows, ("peak_memory_mb".__eq__, "energy_mj".__eq__)),
    ]
    return [column for column in found if any(column.figures)]


def _metric_columns(rows: Sequence[Candidate], wanted: Iterable[Callable[[str], bool]]) -> list[Column]:
    """For each of `wanted` a column of the first metric that it accepts."""
    firsts = (_first_present(rows, accepts) for accepts in wanted)
    return [_metric_column(rows, metric) for metric in firsts if metric]


def _metric_column(rows: Sequence[Candidate], metric: Metric) -> Column:
    figures = [figure_among(rows, row, metric.name) for row in rows]
    return Column(_TITLES.get(metric.name) or title_of(metric.name), metric.unit, figures, metric.higher_is_better)


def figure_of(metric: Metric | None) -> Figure | None:
    """The cell of a metric; nothing of nothing."""
    return Figure(metric.value, metric.low, metric.high) if metric else None


def figure_among(rows: Sequence[Candidate], row: Candidate, name: str) -> Figure | None:
    """The cell of a metric in a row; a teacher's is kept beside those of its candidates, on the same examples."""
    own = figure_of(row.metric(name))
    if own or row.kind != "teacher":
        return own
    beside = (metric.teacher for other in rows if (metric := other.metric(name)) and metric.teacher is not None)
    value = next(beside, None)
    return None if value is None else Figure(value)


def numbered(report: Report) -> Iterator[tuple[int, Candidate]]:
    """Candidates with the number of their colour: the teacher is 0, whether there is one or not."""
    return ((index if report.teacher else index + 1, item) for index, item in enumerate(report.measured))


def latency_figure(candidate: Candidate, percentile: str) -> Figure | None:
    """`p50`, `p90` or `p99` in milliseconds: the metric if there is one, else the first latency that was measured."""
    named = figure_of(candidate.metric(f"latency_{percentile}_ms"))
    if named or not candidate.latencies:
        return named
    return Figure(float(getattr(candidate.latencies[0], f"{percentile}_ms")))


def _latency_column(rows: Sequence[Candidate], percentile: str) -> Column:
    return Column(percentile, "ms", [latency_figure(row, percentile) for row in rows], higher_is_better=False)


def speedup_figure(candidate: Candidate) -> Figure | None:
    """How many times as fast as the teacher at the median, from the metric or the first latency."""
    named = figure_of(candidate.metric("speedup_p50"))
    first = candidate.latencies[0] if candidate.latencies else None
    if named or first is None or first.speedup is None:
        return named
    return Figure(first.speedup, first.speedup_low, first.speedup_high)


def _speedup_column(rows: Sequence[Candidate]) -> Column:
    return Column("Speed-up", "×", [speedup_figure(row) for row in rows], higher_is_better=True)


def _size_column(rows: Sequence[Candidate]) -> Column:
    def size(row: Candidate) -> Figure | None:
        named = figure_of(row.metric("size_mb"))
        if named or row.size_bytes is None:
            return named
        return Figure(row.size_bytes / _BYTES_PER_MB)

    return Column("Size", "MB", [size(row) for row in rows], higher_is_better=False)


def summary(report: Report) -> str:
    """The counts behind the verdict: `5 of 7 gates pass, 1 fails, 1 is inconclusive; 3 of 4 checks pass.`"""
    parts = []
    if report.gates:
        verdicts = [result.verdict for result in report.gates]
        failing, undecided = verdicts.count("fail"), verdicts.count("inconclusive")
        text = _passing(verdicts.count("pass"), len(verdicts), "gate")
        text += f", {failing} {'fails' if failing == 1 else 'fail'}" if failing else ""
        text += f", {undecided} {'is' if undecided == 1 else 'are'} inconclusive" if undecided else ""
        parts.append(text)
    checks = [check.passed for _, check in report.checks()]
    if checks:
        parts.append(_passing(sum(checks), len(checks), "check"))
    return "; ".join(parts) + "." if parts else "No gate was asked and no check was made."


def _passing(passed: int, total: int, noun: str) -> str:
    return f"{passed} of {total} {noun}{' passes' if total == 1 else 's pass'}"


def worst_first(gates: Iterable[GateResult]) -> list[GateResult]:
    """Gates that failed, then those that stay open, then the rest, each in the order in which they were asked."""
    return sorted(gates, key=lambda result: _WORST_FIRST.index(result.verdict))


def plain(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """A nested value as flat rows: `{"cpu": {"cpus": 8}}` -> `[("cpu.cpus", "8")]`."""
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in plain(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [row for index, item in enumerate(value, 1) for row in plain(item, f"{prefix} {index}")]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)) or "none")]
    return [(prefix, "none" if value is None or value == {} else str(value))]
