"""What two reports differ in beside their figures, and which figures cannot be compared because of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from .records.report import Candidate, Report, Slice

_FINGERPRINT = re.compile(r"\bfingerprint ([0-9a-f]+)")
_SLICE = re.compile(r", slice (.+): \d+ rows, fingerprint")
OF_TOKENS = ("ttft_", "tpot_", "tokens_per_second", "cache_mb")
"""How metrics of text that was written under a stopwatch begin."""
_OF_THE_MACHINE = ("latency_", "speedup_", "cold_start_", "peak_memory_", "energy_", "single_stream_", "multi_stream_",
                   "offline_", "server_", *OF_TOKENS)  # fmt: skip
_OF_THE_ARTIFACT = ("size_mb", "parameters")
_TO_THE_TEACHER = re.compile(
    r"(_kept|_difference|_ratio|_difference_max|_agreement)$|^(agreement_|speedup_)|"
    r"^(flip_rate|kl_mean|js_mean|cosine_mean|cosine_min|next_token_kl|generation_identical|first_divergence)$"
)
"""Names of metrics that hold a candidate against its teacher."""
_CPU_FACTS = ("name", "cpus", "instruction_sets")


class Difference(BaseModel):
    """One thing beside the figures in which two reports differ; `effect` says what that makes of the figures."""

    model_config = ConfigDict(frozen=True)

    topic: str
    old: str
    new: str
    effect: str = ""


@dataclass(frozen=True)
class Comparability:
    """Which figures of `new` can be held against those of `old`."""

    old: Report
    new: Report

    def differences(self) -> list[Difference]:
        """What makes figures incomparable first, then what may explain a change."""
        return [*self._of_data(), *self._of_the_machine(), *self._of_the_teacher(), *self._of_versions(),
                *_told("command", self.old.command, self.new.command)]  # fmt: skip

    def hindrance(self, metric: str, old: Candidate, new: Candidate, part: Slice | None = None) -> str | None:
        """Why this metric of two candidates, or of a slice of both, cannot be compared (`other data`), or `None`."""
        if metric in _OF_THE_ARTIFACT:
            return None
        if self.other_teacher and _TO_THE_TEACHER.search(metric):
            return "another teacher"
        if metric.startswith(_OF_THE_MACHINE):
            other_call = _other_call(old, new, metric)
            other_load = "another load" if _load_of(old, metric) != _load_of(new, metric) else None
            return self.other_machine or ("other sizes or threads" if other_call else other_load)
        return "other data" if self._other_data(part.name if part and part.kind == "file" else None) else None

    @property
    def other_machine(self) -> str | None:
        """`another CPU` where times cannot be compared, or `None`."""
        if _cpu(self.old) != _cpu(self.new):
            return "another CPU"
        return "another GPU" if _gpus(self.old) != _gpus(self.new) else None

    @property
    def other_teacher(self) -> bool | None:
        """Whether the two have different teachers; `None` where a report does not say: those of an earlier limbeck
        have no hash of it."""
        hashes = [side.teacher.checkpoint_hash if side.teacher else None for side in (self.old, self.new)]
        return None if None in hashes else hashes[0] != hashes[1]

    def _other_data(self, name: str | None) -> bool:
        """Of the whole, or of the slice of that name."""
        return _fingerprints(self.old.data, name) != _fingerprints(self.new.data, name)

    def _of_data(self) -> Iterator[Difference]:
        both = _slices(self.old.data) & _slices(self.new.data)
        for name in (None, *sorted(both)):
            if self._other_data(name):
                old, new = ("; ".join(_lines(report.data, name)) or "none" for report in (self.old, self.new))
                topic = "data" if name is None else f"data of {name}"
                yield Difference(topic=topic, old=old, new=new, effect="quality cannot be compared")

    def _of_the_machine(self) -> Iterator[Difference]:
        effect = "times and memory cannot be compared"
        yield from _told("CPU", _cpu_words(_cpu(self.old)), _cpu_words(_cpu(self.new)), effect)
        yield from _told("GPU", _listed(_gpus(self.old)), _listed(_gpus(self.new)), effect)
        effect = "only times with the same threads are compared"
        yield from _told("threads", _listed(_threads(self.old)), _listed(_threads(self.new)), effect)

    def _of_the_teacher(self) -> Iterator[Difference]:
        old, new = self.old.teacher, self.new.teacher
        if old is None or new is None or self.other_teacher is False:
            return
        known = self.other_teacher is True
        effect = "agreement and what is kept " + ("cannot be compared" if known else "are to another model")
        yield from _told("teacher", _teacher_words(old, known), _teacher_words(new, known), effect)

    def _of_versions(self) -> Iterator[Difference]:
        old, new = (_mapping(report.environment, "versions") for report in (self.old, self.new))
        changed = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
        was, now = (", ".join(f"{name} {side.get(name, 'absent')}" for name in changed) for side in (old, new))
        yield from _told("versions", was, now)


def _told(topic: str, old: str, new: str, effect: str = "") -> Iterator[Difference]:
    if old != new:
        yield Difference(topic=topic, old=old or "unknown", new=new or "unknown", effect=effect)


def _slice_of(line: str) -> str | None:
    found = _SLICE.search(line)
    return found.group(1) if found else None


def _slices(data: Iterable[str]) -> set[str]:
    return {name for line in data if (name := _slice_of(line)) is not None}


def _lines(data: Iterable[str], name: str | None) -> list[str]:
    """What a report says of the data of a slice, or of the whole."""
    return [line for line in data if _slice_of(line) == name]


def _fingerprints(data: Iterable[str], name: str | None) -> set[str]:
    """A data set's fingerprint stands for it: a file that was only renamed is the same data."""
    return {found.group(1) if (found := _FINGERPRINT.search(line)) else line for line in _lines(data, name)}


def _mapping(value: Any, key: str) -> dict[str, Any]:
    """A report is anybody's: what should be a mapping may be something else."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _cpu(report: Report) -> dict[str, Any]:
    facts = _mapping(report.environment, "cpu")
    return {key: facts[key] for key in _CPU_FACTS if key in facts}


def _cpu_words(facts: dict[str, Any]) -> str:
    sets = facts.get("instruction_sets")
    words = [str(facts.get("name", "")), f"{facts['cpus']} CPUs" if "cpus" in facts else ""]
    return ", ".join(filter(None, [*words, " ".join(map(str, sets)) if isinstance(sets, list) else ""]))


def _teacher_words(teacher: Candidate, hashed: bool) -> str:
    words = f"{teacher.path}, {teacher.parameters or 0:,} parameters"
    return f"{words}, hash {(teacher.checkpoint_hash or '')[:16]}" if hashed else words


def _gpus(report: Report) -> list[str]:
    found = report.environment.get("gpus")
    return [str(gpu.get("name") if isinstance(gpu, dict) else gpu) for gpu in found] if isinstance(found, list) else []


def _threads(report: Report) -> list[int]:
    calls = {each.threads for item in report.measured for each in item.latencies}
    return sorted(calls | {each.threads for item in report.measured for each in item.generations})


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values)) or "none"


def _other_call(old: Candidate, new: Candidate, metric: str) -> bool:
    """Whether a metric of time or memory is about calls of other sizes or threads in the two; of texts where it says
    so, or where nothing else was timed."""
    if metric.startswith(OF_TOKENS) or not (old.latencies or new.latencies):
        texts = [_texts_of(side, metric.partition("/")[2]) for side in (old, new)]
        return None not in texts and texts[0] != texts[1]
    return bool(old.latencies and new.latencies) and _call_of(old) != _call_of(new)


def _call_of(candidate: Candidate) -> tuple[int, int, int]:
    """Sizes and threads of the call that the metrics of time and memory are about."""
    first = candidate.latencies[0]
    return first.batch_size, first.sequence_length, first.threads


def _texts_of(candidate: Candidate, shape: str) -> tuple[int, int, int, int] | None:
    """Sizes and threads of the texts that metrics with this ending are about: of the first where there is none."""
    for each in candidate.generations:
        if shape in ("", f"{each.batch_size}x{each.prompt_tokens}"):
            return each.batch_size, each.prompt_tokens, each.new_tokens, each.threads
    return None


def _load_of(candidate: Candidate, metric: str) -> tuple[object, ...] | None:
    """What LoadGen was asked where the metric is a scenario's."""
    for each in candidate.scenarios:
        if metric.startswith(f"{each.name}_"):
            target = None if each.searched else each.target_qps  # what a search found is a result
            load = each.batch_size, each.sequence_length, each.threads, target, each.latency_bound_ms
            if each.tokens is None:
                return load
            return *load, each.tokens.new_tokens, each.tokens.ttft_bound_ms, each.tokens.tpot_bound_ms
    return None
