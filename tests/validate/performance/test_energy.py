"""Energy by RAPL on a folder that looks like Linux's, and by what is really here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from limbeck.environment import gpu_facts
from limbeck.validate.performance.energy import Meter, NoMeter, find_meter, millijoules_a_call
from limbeck.validate.performance.worker import LatencyWorker

RANGE = 262_143_328_850
Zone = Callable[[str, str, int], Path]


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    folder = tmp_path / "powercap"
    folder.mkdir()
    return folder


@pytest.fixture
def zone(powercap: Path) -> Zone:
    """`zone(folder, name, energy)` adds a counter, and returns the file that it counts in (microjoules)."""

    def add(folder: str, name: str, energy: int) -> Path:
        (powercap / folder).mkdir()
        for file, value in (("name", name), ("max_energy_range_uj", RANGE), ("energy_uj", energy)):
            (powercap / folder / file).write_text(f"{value}\n")
        return powercap / folder / "energy_uj"

    return add


def meter_of(powercap: Path) -> Meter:
    meter = find_meter("cpu", powercap)
    assert isinstance(meter, Meter)
    return meter


def reason(powercap: Path) -> str:
    meter = find_meter("cpu", powercap)
    assert isinstance(meter, NoMeter)
    return meter.reason


def test_packages_and_memory_are_added_and_nothing_is_counted_twice(powercap: Path, zone: Zone) -> None:
    counted = [
        zone("intel-rapl:0", "package-0", 1_000),
        zone("intel-rapl:1", "package-1", 2_000),
        zone("intel-rapl:0:1", "dram", 3_000),
    ]
    inside = [
        zone("intel-rapl:0:0", "core", 4_000),
        zone("intel-rapl:2", "psys", 5_000),
        zone("intel-rapl-mmio:0", "package-0", 6_000),
    ]
    meter = meter_of(powercap)
    assert meter.name == "RAPL, package-0, dram, package-1"
    for file in (*counted, *inside):
        file.write_text(str(int(file.read_text()) + 2_000_000))
    assert meter.joules_since_last() == pytest.approx(6.0)
    assert meter.joules_since_last() == 0.0


def test_a_counter_that_starts_again_goes_on(powercap: Path, zone: Zone) -> None:
    counter = zone("intel-rapl:0", "package-0", RANGE - 1_500_000)
    meter = meter_of(powercap)
    counter.write_text("500000")
    assert meter.joules_since_last() == pytest.approx(2.0)
    counter.write_text("750000")
    assert meter.joules_since_last() == pytest.approx(0.25)


def test_without_a_counter_the_reason_is_told(powercap: Path, tmp_path: Path, zone: Zone) -> None:
    assert "does not exist" in reason(tmp_path / "nowhere")
    assert reason(powercap) == f"{powercap} has no RAPL counter of a CPU package"
    zone("intel-rapl:0", "psys", 1)
    assert "no RAPL counter of a CPU package" in reason(powercap)
    zone("intel-rapl:1", "package-1", 1).write_text("soon")
    assert "cannot be read" in reason(powercap)


def test_a_counter_for_root_only_is_named(powercap: Path, zone: Zone) -> None:
    counter = zone("intel-rapl:0", "package-0", 1)
    counter.chmod(0)
    try:
        counter.read_text()
    except PermissionError:
        assert f"{counter} may be read by root only" in reason(powercap)
    else:
        pytest.skip("root reads every file")


@pytest.mark.skipif(bool(gpu_facts()), reason="there is a GPU")
def test_without_a_gpu_its_meter_is_missed_in_words() -> None:
    meter = find_meter("gpu")
    assert isinstance(meter, NoMeter)
    assert "NVML" in meter.reason


def test_what_a_call_costs() -> None:
    assert millijoules_a_call([1.0, 2.0], 6) == pytest.approx(500.0)
    assert millijoules_a_call([1.0, None], 6) is None


@contextmanager
def counting(counter: Path) -> Iterator[None]:
    """Five watts: the counter goes on while the block runs."""
    done = threading.Event()

    def count() -> None:
        start, first = time.perf_counter(), int(counter.read_text())
        staged = counter.with_suffix(".new")
        while not done.wait(0.001):
            staged.write_text(str(first + round((time.perf_counter() - start) * 5e6)))
            staged.replace(counter)

    thread = threading.Thread(target=count)
    thread.start()
    yield
    done.set()
    thread.join()


def test_a_round_is_metered(powercap: Path, zone: Zone, artifact: Path) -> None:
    """The worker of a real artifact, in this process: what it read is what the counter advanced by."""
    counter = zone("intel-rapl:0", "package-0", 0)
    worker = LatencyWorker(powercap)
    vocabulary = worker.load(str(artifact), "artifact", None, threads=1, cpus=[])["vocabulary"]
    worker.prepare(vocabulary, [1, 8], seed=0, warm_up_seconds=0.0, tolerance=1.0)
    with counting(counter):
        answer = worker.round(calls=300)
    assert len(answer["samples_ms"]) == 300
    assert 0 < answer["joules"] < int(counter.read_text()) / 1e6
    assert worker.end()["meter"] == "RAPL, package-0"
    worker.close()
