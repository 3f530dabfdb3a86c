"""LoadGen itself, on calls that take a known time; and its logs, whole and cut short."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.validate.performance.loadgen import run_loadgen
from limbeck.validate.performance.loadgen_log import Load, LoadGenInterrupted, Outcome, Texts, read_outcome

CALL_SECONDS = 0.001
SINGLE_STREAM = Load(scenario="single_stream", batch_size=1, seconds=0.4, typical_ms=1.2)
SERVER = Load(scenario="server", batch_size=1, seconds=0.4, typical_ms=1.2, target_qps=100, latency_bound_ms=1_000)


class Calls:
    """A call that takes a millisecond, and counts; from the one numbered `failing` on, it fails."""

    def __init__(self, failing: int | None = None) -> None:
        self.count = Counter[str]()
        self._failing = failing

    def __call__(self) -> None:
        self.count["made"] += 1
        if self._failing is not None and self.count["made"] >= self._failing:
            raise ValueError("the device is gone")
        time.sleep(CALL_SECONDS)


def test_single_stream_asks_for_one_sample_after_the_other(tmp_path: Path) -> None:
    calls = Calls()
    found = run_loadgen(calls, SINGLE_STREAM, tmp_path)
    assert calls.count["made"] == found.queries
    assert found.percentiles_ms["50"] >= CALL_SECONDS * 1e3
    assert found.percentiles_ms["50"] <= found.percentiles_ms["90"] <= found.percentiles_ms["99.9"]
    if found.queries >= 64:  # LoadGen's own number for the 90th percentile
        assert found.validity == "valid" and found.reason == ""
        assert found.early_stopping_ms is not None
        assert found.early_stopping_ms >= found.percentiles_ms["90"]
    assert found.loadgen.startswith("6.")


@pytest.mark.parametrize(("batch_size", "calls_a_query"), [(1, 8), (3, 3), (8, 1)])
def test_multi_stream_asks_for_eight_samples_at_once(batch_size: int, calls_a_query: int, tmp_path: Path) -> None:
    calls = Calls()
    load = Load(scenario="multi_stream", batch_size=batch_size, seconds=0.2, typical_ms=1.2)
    found = run_loadgen(calls, load, tmp_path)
    assert calls.count["made"] == calls_a_query * found.queries
    assert found.percentiles_ms["50"] >= calls_a_query * CALL_SECONDS * 1e3
    assert found.samples_per_second <= 8 / (calls_a_query * CALL_SECONDS)


def test_too_few_queries_are_undecided_and_say_how_many_are_wanted(tmp_path: Path) -> None:
    load = Load(scenario="multi_stream", batch_size=1, seconds=0.1, typical_ms=1.2)
    found = run_loadgen(Calls(), load, tmp_path)
    assert found.validity == "undecided"
    assert found.reason == f"{found.queries} queries are too few: LoadGen wants at least 662 (a longer --duration)"
    assert found.early_stopping_ms is None


def test_offline_has_all_samples_at_once_and_no_latencies(tmp_path: Path) -> None:
    calls = Calls()
    load = Load(scenario="offline", batch_size=4, seconds=0.3, typical_ms=1.2)
    found = run_loadgen(calls, load, tmp_path)
    assert found.percentiles_ms == {} and found.queries == 1
    assert 0 < found.samples_per_second <= 4 / CALL_SECONDS
    assert calls.count["made"] >= 0.3 * 4 / 1.2e-3 / 4  # what lasts for the duration


def test_queries_of_a_server_arrive_on_their_own_and_are_all_answered(tmp_path: Path) -> None:
    found = run_loadgen(Calls(), SERVER, tmp_path)
    assert 15 <= found.queries <= 80  # a Poisson process: 40 are expected
    assert found.validity == "undecided"
    assert "LoadGen wants at least" in found.reason and "more" in found.reason


def test_a_seed_draws_the_same_arrivals(tmp_path: Path) -> None:
    counts = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        load = SERVER.model_copy(update={"seed": seed, "target_qps": 400.0})
        counts.append(run_loadgen(lambda: None, load, tmp_path / str(number)).queries)
    assert counts[0] == counts[1] != counts[2]


def test_a_missed_bound_is_invalid_and_says_by_how_much(tmp_path: Path) -> None:
    load = SERVER.model_copy(update={"latency_bound_ms": 0.5})
    found = run_loadgen(Calls(), load, tmp_path)
    assert found.validity == "invalid"
    assert "over the bound of 0.5 ms" in found.reason
    assert f"({found.queries} of {found.queries} were late)" in found.reason


def test_what_waits_is_answered_together_as_far_as_the_batch_holds_it(tmp_path: Path) -> None:
    calls = Calls()
    load = SERVER.model_copy(update={"batch_size": 16, "target_qps": 4_000.0})  # four times what single calls answer
    found = run_loadgen(calls, load, tmp_path)
    assert calls.count["made"] < found.queries / 2


@pytest.mark.parametrize("load", [SINGLE_STREAM, SERVER], ids=lambda load: load.scenario)
def test_a_call_that_fails_ends_the_test_with_what_it_raised(load: Load, tmp_path: Path) -> None:
    calls = Calls(failing=5)
    with pytest.raises(ValueError, match="the device is gone"):
        run_loadgen(calls, load, tmp_path)
    assert calls.count["made"] == 5


# --- logs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A log of LoadGen's, and what was read from it."""
    folder = tmp_path_factory.mktemp("logs")
    return folder / "mlperf_log_detail.txt", run_loadgen(Calls(), SINGLE_STREAM, folder)


def test_a_whole_log_is_read_again(log: tuple[Path, Outcome]) -> None:
    path, found = log
    assert read_outcome(path, SINGLE_STREAM) == found


def test_an_interrupted_loadgen_leaves_no_result(log: tuple[Path, Outcome], tmp_path: Path) -> None:
    """Killed before its summary: lines are missing, or the last is cut in two, or there is no log at all."""
    whole = log[0].read_text(encoding="utf-8")
    cut = tmp_path / "mlperf_log_detail.txt"
    for left in (whole[: whole.index("result_validity")], "", None):
        cut.unlink(missing_ok=True)
        if left is not None:
            cut.write_text(left, encoding="utf-8")
        with pytest.raises(LoadGenInterrupted, match="LoadGen was interrupted: its log has no result of the SingleStr"):
            read_outcome(cut, SINGLE_STREAM)


def test_an_error_of_loadgen_is_told(log: tuple[Path, Outcome], tmp_path: Path) -> None:
    broken = tmp_path / "mlperf_log_detail.txt"
    line = '":::MLLOG {"key": "error_runtime", "value": "no samples", "metadata": {"is_error": true}}\n'[1:]
    broken.write_text(log[0].read_text(encoding="utf-8") + line, encoding="utf-8")
    with pytest.raises(LoadGenInterrupted, match="LoadGen reports an error: error_runtime, no samples"):
        read_outcome(broken, SINGLE_STREAM)


# --- texts ---------------------------------------------------------------------------------------------------------

TEXTS = Texts(new_tokens=5)
TEXT_SECONDS = 0.004


class Writes:
    """Writes a text of 5 tokens: the first after 2 ms, the others within 2 more; fails from the one numbered `failing`
    on, after its first token or before it."""

    def __init__(self, failing: int | None = None, early: bool = False) -> None:
        self.count = 0
        self._failing, self._early = failing, early

    def __call__(self, first_token: Callable[[], object]) -> None:
        self.count += 1
        fails = self._failing is not None and self.count >= self._failing
        if fails and self._early:
            raise ValueError("the device is gone")
        time.sleep(TEXT_SECONDS / 2)
        first_token()
        if fails:
            raise ValueError("the device is gone")
        time.sleep(TEXT_SECONDS / 2)


def of_texts(load: Load, **fields: object) -> Load:
    return load.model_copy(
        update={"typical_ms": TEXT_SECONDS * 1e3, "latency_bound_ms": None, "texts": TEXTS, **fields}
    )


def test_single_stream_times_first_tokens_and_those_after_them(tmp_path: Path) -> None:
    writes = Writes()
    found = run_loadgen(writes, of_texts(SINGLE_STREAM, seconds=0.6), tmp_path)
    tokens = found.tokens
    assert tokens is not None and tokens.new_tokens == 5 and writes.count == found.queries
    assert TEXT_SECONDS * 1e3 / 2 <= tokens.ttft_ms["50"] <= tokens.ttft_ms["99"] < found.percentiles_ms["99.9"]
    assert tokens.tpot_ms["50"] >= TEXT_SECONDS * 1e3 / 2 / 4, "four tokens in the second half"
    assert 0 < tokens.per_second <= 5 / TEXT_SECONDS
    assert found.early_stopping_ms is None, "LoadGen's estimate is of first tokens then"
    if found.queries >= 64:
        assert tokens.ttft_early_stopping_ms is not None and tokens.tpot_early_stopping_ms is not None
        assert tokens.ttft_early_stopping_ms >= tokens.ttft_ms["90"]
        assert tokens.tpot_early_stopping_ms >= tokens.tpot_ms["90"]


def test_offline_has_a_rate_of_tokens_alone(tmp_path: Path) -> None:
    load = of_texts(Load(scenario="offline", batch_size=4, seconds=0.3, typical_ms=1))
    found = run_loadgen(Writes(), load, tmp_path)
    assert found.tokens is not None and found.tokens.ttft_ms == found.tokens.tpot_ms == {}
    assert found.tokens.per_second == pytest.approx(5 * found.samples_per_second, rel=0.01)


def test_a_server_of_texts_is_held_to_bounds_on_tokens(tmp_path: Path) -> None:
    verdicts = {}
    for name, bounds in (("held", (1_000, 1_000)), ("first", (1, None)), ("later", (None, 0.1))):
        (tmp_path / name).mkdir()
        texts = Texts(new_tokens=5, ttft_bound_ms=bounds[0], tpot_bound_ms=bounds[1])
        verdicts[name] = run_loadgen(Writes(), of_texts(SERVER, target_qps=60.0, texts=texts), tmp_path / name)
    assert verdicts["held"].validity == "undecided" and "LoadGen wants at least" in verdicts["held"].reason
    assert verdicts["first"].validity == verdicts["later"].validity == "invalid"
    assert re.fullmatch(r"the first token of a text took up to \S+ ms in 99 % of texts, over the bound of 1 ms",
                        verdicts["first"].reason)  # fmt: skip
    assert verdicts["later"].reason.startswith("a token after it took up to ")
    tokens = verdicts["later"].tokens
    assert tokens is not None and (tokens.ttft_bound_ms, tokens.tpot_bound_ms) == (None, 0.1)


@pytest.mark.parametrize("load", [SINGLE_STREAM, SERVER], ids=lambda load: load.scenario)
@pytest.mark.parametrize("early", [True, False])
def test_a_text_that_fails_ends_the_test_with_what_it_raised(load: Load, early: bool, tmp_path: Path) -> None:
    writes = Writes(failing=5, early=early)
    with pytest.raises(ValueError, match="the device is gone"):
        run_loadgen(writes, of_texts(load), tmp_path)
    assert writes.count == 5
