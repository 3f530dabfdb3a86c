"""Text written under a stopwatch, with real workers on a tiny model. What is asserted is behaviour, never speed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from limbeck import export, load_checkpoint
from limbeck.errors import BackendUnavailable, InputError, UsageError
from limbeck.exporters.artifact import read_manifest, seal
from limbeck.exporters.settings import ExportSettings
from limbeck.validate.gates.applying import apply_gates
from limbeck.validate.performance.latency import BenchSettings, BenchSubject
from limbeck.validate.performance.metrics import with_generation
from limbeck.validate.performance.token_times import GenerationResult, GenerationSettings, bench_generation
from limbeck.validate.performance.writing import TextShape, TimedWriter
from limbeck.validate.records.report import Candidate, Gate, Report

Children = Callable[[], set[int]]
TinyCheckpoint = Callable[..., Path]

QUICK = BenchSettings(threads=1, rounds=4, seconds_per_round=0.01, warm_up_seconds=0.3, measure_noise=True)
ASKED = GenerationSettings(batch_size=(1, 2), prompt_length=(6,), new_tokens=5)


@pytest.fixture(autouse=True)
def no_process_is_left_behind(children: Children) -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", "text-generation")


@pytest.fixture(scope="module")
def writer(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as an ONNX artifact with its cache."""
    folder = tmp_path_factory.mktemp("writer") / "onnx"
    export(load_checkpoint(llama), ExportSettings(backend="onnx"), folder)
    return folder


@pytest.fixture(scope="module")
def measured(llama: Path, writer: Path) -> tuple[list[GenerationResult], list[str]]:
    """A checkpoint and its artifact, timed once; and what was said meanwhile."""
    said: list[str] = []
    subjects = [
        BenchSubject(name="teacher", path=llama, kind="checkpoint", task="text-generation"),
        BenchSubject(name="compiled", path=writer, kind="artifact"),
    ]
    return bench_generation(subjects, ASKED, QUICK, said.append), said


@pytest.fixture(scope="module")
def results(measured: tuple[list[GenerationResult], list[str]]) -> list[GenerationResult]:
    return measured[0]


def test_every_shape_of_every_subject_is_timed_in_every_round(results: list[GenerationResult]) -> None:
    assert [result.subject.name for result in results] == ["teacher", "compiled"]
    for result in results:
        assert [(each.shape.batch_size, each.shape.prompt_tokens) for each in result.times] == [(1, 6), (2, 6)]
        for each in result.times:
            rounds, batches = each.first_ms.shape
            assert rounds == 4 and batches >= 1
            assert each.steps_ms.shape == (4, batches * 4), "a first token, and four after it"
            assert (each.first_ms > 0).all() and (each.steps_ms > 0).all()
            assert each.tokens_per_second == pytest.approx(each.shape.batch_size * 1e3 / each.steps_ms.mean())
        assert result.properties["threads"] == "1"
        assert result.cold_start_ms > np.median(result.times[0].first_ms)
        assert 0 < result.busy_cpus <= 1.2
    assert results[1].properties["runtime"].startswith("onnxruntime")


def test_what_is_kept_is_all_but_the_last_token(results: list[GenerationResult], writer: Path) -> None:
    facts = read_manifest(writer).cache
    assert facts is not None
    for each in (*results[0].times, *results[1].times):
        assert each.cache_bytes == each.shape.batch_size * (each.shape.length - 1) * facts.values_per_token * 4


def test_progress_and_noise_are_told(measured: tuple[list[GenerationResult], list[str]]) -> None:
    results, said = measured
    assert said[:3] == ["loading teacher", "loading compiled", "loading teacher"]  # the twin, for the noise
    assert "warming up: batch 1, 5 tokens after prompts of 6" in said
    assert said[-1] == "batch 2, 5 tokens after prompts of 6: round 4 of 4"
    assert results[0].noise is not None and results[1].noise is None
    assert (results[0].noise.subject, results[0].noise.rounds) == ("teacher", 4)


def test_the_reports_records_hold_what_was_measured(results: list[GenerationResult]) -> None:
    teacher, compiled = results
    first, second = compiled.generations(teacher)
    assert (first.batch_size, first.prompt_tokens, first.new_tokens, first.threads, first.rounds) == (1, 6, 5, 1, 4)
    assert second.batch_size == 2
    times = compiled.times[0]
    assert first.ttft.samples == times.first_ms.size and first.tpot.samples == times.steps_ms.size
    assert first.tpot.p50_ms <= first.tpot.p90_ms <= first.tpot.p99_ms <= times.steps_ms.max()
    ratio = np.median(teacher.times[0].steps_ms) / np.median(times.steps_ms)
    assert first.tpot.speedup == pytest.approx(ratio)
    assert first.tpot.speedup_low is not None and first.tpot.speedup_high is not None
    assert first.tpot.speedup_low <= first.tpot.speedup <= first.tpot.speedup_high
    assert first.ttft.speedup is not None
    assert teacher.generations()[0].tpot.speedup is None
    assert first.properties["threads"] == "1" and first.cpus == compiled.cpus


def candidate_of(result: GenerationResult, baseline: GenerationResult | None = None) -> Candidate:
    bare = Candidate(name=result.subject.name, kind="artifact", backend="onnx", precision="fp32", path="here")
    return with_generation(bare, result, baseline)


def test_gates_may_name_the_first_shape_or_any(results: list[GenerationResult]) -> None:
    candidate = candidate_of(results[1], results[0])
    names = [metric.name for metric in candidate.metrics]
    assert len(names) == len(set(names))
    assert {"ttft_p50_ms", "tpot_p99_ms", "tokens_per_second", "cache_mb", "tpot_speedup_p50", "tpot_p50_ms/2x6",
            "tokens_per_second/1x6", "cold_start_ms", "peak_memory_mb"} <= set(names)  # fmt: skip
    same = candidate.metric("tpot_p50_ms/1x6")
    assert same is not None and same.value == candidate.generations[0].tpot.p50_ms
    assert (
        "batch 2, 5 tokens after prompts of 6, 1 threads" in (candidate.metric("ttft_p50_ms/2x6") or same).description
    )
    assert [check.name for check in candidate.checks] == ["threads"]
    report = Report(kind="benchmark", title="t", created="2026-01-01", command="limbeck", candidates=[candidate])
    gates = [Gate(metric="tpot_p50_ms/2x6", max=1e6), Gate(metric="tokens_per_second", min=1e9)]
    assert [result.verdict for result in apply_gates(report, gates)] == ["pass", "fail"]


def test_one_shape_has_bare_names_alone(results: list[GenerationResult]) -> None:
    candidate = candidate_of(replace(results[1], times=results[1].times[:1]))
    assert not [metric.name for metric in candidate.metrics if "/" in metric.name]
    assert candidate.metric("tpot_speedup_p50") is None


def test_times_of_other_texts_are_not_compared(results: list[GenerationResult]) -> None:
    def report_of(index: int) -> Report:
        candidate = candidate_of(replace(results[1], times=results[1].times[index : index + 1]))
        return Report(kind="benchmark", title="t", created="2026-01-01", command="limbeck", candidates=[candidate])

    for metric in ("tpot_p50_ms", "peak_memory_mb"):
        gate = Gate(metric=metric, relative_to="previous", max=2)
        assert apply_gates(report_of(0), [gate], previous=report_of(0))[0].verdict == "pass"
        (result,) = apply_gates(report_of(1), [gate], previous=report_of(0))
        assert result.verdict == "inconclusive" and "other sizes or threads" in result.reason


# --- what cannot be timed ------------------------------------------------------------------------------------------


def refused(subject: BenchSubject, error: type[Exception], words: str, asked: GenerationSettings = ASKED) -> Exception:
    """What was raised, and before anything was timed."""
    said: list[str] = []
    with pytest.raises(error, match=words) as caught:
        bench_generation([subject], asked, QUICK, said.append)
    assert not any("warming" in each for each in said)
    return caught.value


@pytest.mark.thorough
def test_a_program_without_a_cache_is_refused(llama: Path, tmp_path: Path) -> None:
    export(load_checkpoint(llama), ExportSettings(backend="onnx", kv_cache=False), tmp_path / "scores")
    subject = BenchSubject(name="scores", path=tmp_path / "scores", kind="artifact")
    error = refused(subject, UsageError, "scores: The program keeps no keys and values of what it has read")
    assert "without --no-kv-cache" in str(error.hint)  # type: ignore[attr-defined]


@pytest.mark.thorough
def test_what_writes_no_text_is_refused(bert: Path, artifact: Path) -> None:
    for subject in (
        BenchSubject(name="it", path=bert, kind="checkpoint", task="sentence-similarity"),
        BenchSubject(name="it", path=artifact, kind="artifact"),
    ):
        refused(subject, InputError, "it: It is for .*, so it writes no text")


def test_texts_longer_than_the_program_are_refused_with_the_room_there_is(writer: Path) -> None:
    subject = BenchSubject(name="compiled", path=writer, kind="artifact")
    asked = GenerationSettings(prompt_length=(8, 60), new_tokens=5)
    error = refused(subject, InputError, "prompt of 60 tokens and 5 new ones are more than the 64 that a text", asked)
    assert "--prompt-length" in str(error.hint)  # type: ignore[attr-defined]


def test_a_stand_in_is_not_timed(writer: Path, tmp_path: Path) -> None:
    """It is the manifest that says so."""
    folder = Path(shutil.copytree(writer, tmp_path / "half"))
    seal(read_manifest(writer).model_copy(update={"stand_in": "its float32 twin"}), folder)
    subject = BenchSubject(name="half", path=tmp_path / "half", kind="artifact")
    refused(subject, BackendUnavailable, "half: What runs here is its float32 twin, whose times say nothing")


def test_shapes_are_every_batch_with_every_prompt() -> None:
    shapes = GenerationSettings(batch_size=(8, 1, 8), prompt_length=(32, 256)).shapes
    assert [(each.batch_size, each.prompt_tokens) for each in shapes] == [(8, 32), (8, 256), (1, 32), (1, 256)]


# --- one text ------------------------------------------------------------------------------------------------------


class Counting:
    """A decoder whose next token is one more than the last that it read; it notes what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.starts: list[int] = []

    def start(self, rows: int) -> None:
        self.starts.append(rows)

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.given.append((ids.copy(), mask.copy(), positions.copy()))
        return np.eye(64, dtype=np.float32)[(ids[:, -1] + 1) % 64]

    def cache_bytes(self) -> int:
        return 7


def test_a_text_is_a_prompt_and_the_likeliest_token_again_and_again() -> None:
    decoder, told = Counting(), []
    writer = TimedWriter(decoder, TextShape(batch_size=2, prompt_tokens=3, new_tokens=4), 60, seed=1)  # type: ignore[arg-type]
    times = writer.write(lambda: told.append(len(decoder.given)))
    assert decoder.starts == [2] and told == [1], "the first token is there once the prompts are read"
    assert len(times.steps_ms) == 3 and len(decoder.given) == 4
    prompt, mask, positions = decoder.given[0]
    assert prompt.shape == mask.shape == (2, 3) and mask.all() and positions.tolist() == [[0, 1, 2]] * 2
    for number, (ids, mask, positions) in enumerate(decoder.given[1:], start=1):
        assert ids.tolist() == ((prompt[:, -1:] + number) % 64).tolist()
        assert mask.shape == (2, 3 + number) and mask.all() and positions.tolist() == [[2 + number]] * 2
    assert times.total_ms == pytest.approx(times.first_ms + sum(times.steps_ms))
    assert writer.cache_bytes() == 7


def test_every_subject_reads_the_same_prompts() -> None:
    shape, decoders = TextShape(batch_size=2, prompt_tokens=5, new_tokens=2), [Counting() for _ in range(3)]
    for decoder, seed in zip(decoders, (3, 3, 4), strict=True):
        TimedWriter(decoder, shape, 60, seed).write()  # type: ignore[arg-type]
    prompts = [decoder.given[0][0].tolist() for decoder in decoders]
    assert prompts[0] == prompts[1] != prompts[2]


def test_warm_up_ends_in_time_and_says_whether_it_settled() -> None:
    writer = TimedWriter(Counting(), TextShape(batch_size=1, prompt_tokens=3, new_tokens=3), 60, seed=1)  # type: ignore[arg-type]
    settled, last = writer.warm_up(20.0, tolerance=100.0)
    assert settled and len(last.steps_ms) == 2
    settled, _ = writer.warm_up(0.0, tolerance=1e-12)
    assert not settled
