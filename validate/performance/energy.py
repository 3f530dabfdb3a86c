"""What a call costs in energy, where the machine has a meter that may be read; where not, the reason in a sentence.

Two meters: RAPL, the counters of Intel's and AMD's CPUs (Linux shows both under `/sys/class/powercap/intel-rapl:*`;
https://docs.kernel.org/power/powercap/powercap.html), and NVML, the counter of an NVIDIA GPU
(`nvmlDeviceGetTotalEnergyConsumption`, Volta and newer). Both count the whole package or board: what else runs on the
machine meanwhile, and what it draws when idle, is in the figure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...environment import is_importable

POWERCAP = Path("/sys/class/powercap")

Device = Literal["cpu", "gpu"]


class Meter(ABC):
    """A counter of energy."""

    name: str
    """What it counts, in words."""

    @abstractmethod
    def joules_since_last(self) -> float:
        """Joules since this was last asked, or since the meter was made."""


@dataclass(frozen=True)
class NoMeter:
    """Why energy cannot be measured here, as the end of a sentence."""

    reason: str


@dataclass
class _Zone:
    """One RAPL counter, in microjoules; it starts again at 0 after `range_uj`."""

    path: Path
    name: str
    range_uj: int
    last_uj: int

    @classmethod
    def opened(cls, folder: Path) -> _Zone:
        return cls(
            folder / "energy_uj",
            (folder / "name").read_text(encoding="ascii").strip(),
            _number(folder / "max_energy_range_uj"),
            _number(folder / "energy_uj"),
        )

    def advance(self) -> int:
        """Microjoules since it was last read; it may have started again once meanwhile (at 200 W, that takes some 20
        minutes)."""
        now = _number(self.path)
        passed = now - self.last_uj
        self.last_uj = now
        return passed if passed >= 0 else passed + self.range_uj


class RaplMeter(Meter):
    """CPU packages, and their memory where it is counted apart.

    Of the zones that a machine may have, `core` and `uncore` are parts of `package-N`, `psys` holds it, and
    `intel-rapl-mmio` counts it a second time: those are left out.
    """

    def __init__(self, zones: list[_Zone]) -> None:
        self._zones = zones
        self.name = f"RAPL, {', '.join(zone.name for zone in zones)}"

    def joules_since_last(self) -> float:
        return sum(zone.advance() for zone in self._zones) / 1e6


class NvmlMeter(Meter):
    """The first NVIDIA GPU, whole board."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption  # millijoules since the driver was loaded
        self._last_mj = int(self._read(self._handle))
        self.name = f"NVML, {pynvml.nvmlDeviceGetName(self._handle)}"

    def joules_since_last(self) -> float:
        now = int(self._read(self._handle))
        passed, self._last_mj = now - self._last_mj, now
        return passed / 1e3


def millijoules_a_call(joules: Sequence[float | None], calls: int) -> float | None:
    """What a call cost on average, by the joules of some rounds that had `calls` of them together; `None` where there
    was no meter."""
    metered = [each for each in joules if each is not None]
    return sum(metered) * 1e3 / calls if len(metered) == len(joules) else None


def find_meter(device: Device = "cpu", powercap: Path = POWERCAP) -> Meter | NoMeter:
    """The meter of what computes: the CPU's RAPL (under `powercap`), or the GPU's NVML."""
    return _nvml() if device == "gpu" else _rapl(powercap)


def _rapl(powercap: Path) -> Meter | NoMeter:
    if not powercap.is_dir():
        where = (
            "a virtual machine, whose host keeps its meter to itself"
            if _is_virtual()
            else "a kernel or a container without it"
        )
        return NoMeter(f"the system shows no RAPL counters ({powercap} does not exist: {where})")
    folders = sorted(powercap.glob("intel-rapl:*"))
    try:
        zones = [_Zone.opened(folder) for folder in folders if _counts(folder)]
    except PermissionError as error:
        return NoMeter(
            f"the RAPL counter {error.filename} may be read by root only (run as root, or let a group read it)"
        )
    except (OSError, ValueError) as error:
        return NoMeter(f"a RAPL counter under {powercap} cannot be read ({error})")
    if not zones:
        return NoMeter(f"{powercap} has no RAPL counter of a CPU package")
    return RaplMeter(zones)


def _counts(folder: Path) -> bool:
    name = (folder / "name").read_text(encoding="ascii").strip()
    return name.startswith("package-") or name == "dram"


def _nvml() -> Meter | NoMeter:
    if not is_importable("pynvml"):
        return NoMeter("NVML is read by nvidia-ml-py, which is not installed (pip install nvidia-ml-py)")
    import pynvml

    try:
        return NvmlMeter()
    except pynvml.NVMLError as error:
        return NoMeter(f"NVML gives no energy counter ({error})")


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _is_virtual() -> bool:
    """Whether the CPU says that a hypervisor is above it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and " hypervisor" in line for line in lines)
