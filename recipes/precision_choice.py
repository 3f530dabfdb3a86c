"""`--precision auto`: every precision that the backend has here, exported, held to the floor and timed in turn: the
fastest that holds is kept, and float32 unless another is faster beyond the noise."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict

from ..backends.registry import get_backend
from ..errors import BackendUnavailable, ExportMismatch, InputError, UsageError
from ..exporters.artifact import Manifest, artifact_size, read_manifest, seal
from ..exporters.program import Floor
from ..exporters.settings import ExportSettings, Precision
from ..files import check_output_folder, staged_folder
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..validate.performance.latency import BenchSettings, BenchSubject, Speedup, bench, speedup
from .exporting import export_checked, fit_to_model, measure_floor, refuse_unlike_tokenizer, require_numbers
from .progress import SILENT, Progress

DEFAULT_FLOOR = 0.99
_NOT_TRIED: tuple[Precision, ...] = ("native", "tf32")
"""Choices that the runtime makes among the others, or that only another device's compiler knows."""
_ROUNDS = 5


class Attempt(BaseModel):
    """One precision that was tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision
    quality: str | None = None
    """What was found of the floor's metric; `None` where there is no program."""
    p50_ms: float | None = None
    beside: Precision | None = None
    """What it is compared with: float32, or where that is none of those that hold, the first that does."""
    speedup: float | None = None
    """How many times faster than `beside`; the lower end of its interval is what counts."""
    speedup_low: float | None = None
    size_mb: float | None = None
    outcome: str
    """`chosen`, or why not."""


def export_fastest(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    out: Path,
    *,
    calibration: Data | None = None,
    validation: Data | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """Export at the precision that is fastest here and keeps `settings.floor` (`DEFAULT_FLOOR` where there is none) of
    the checkpoint's quality; `settings.precision` does not count. Timed at the tuned size of `settings.shapes`.

    Returns:
        The manifest, whose evidence holds what became of each precision under `precision auto`.

    Raises:
        UsageError: no `validation`, or a backend whose programs do not run on this machine.
        ExportMismatch: no precision holds the floor.
    """
    if validation is None:
        raise UsageError("--precision auto has to measure quality on something.", "Add --validation FILE.")
    refuse_untimed(settings.backend)
    backend = get_backend(settings.backend)
    require_numbers(checkpoint)
    check_output_folder(out, overwrite)
    settings = fit_to_model(settings.model_copy(update={"floor": settings.floor or DEFAULT_FLOOR}), checkpoint)
    refuse_unlike_tokenizer(checkpoint, settings, calibration, progress)
    floor = measure_floor(checkpoint, validation, settings, progress)
    with TemporaryDirectory(prefix="limbeck-") as place:
        attempts, held = [], []
        for precision in backend.precisions:
            if precision in _NOT_TRIED:
                continue
            progress.begin(precision)
            wanted, folder = settings.model_copy(update={"precision": precision}), Path(place) / precision
            refused = _refusal(checkpoint, wanted, folder, floor, calibration, progress)
            if refused is None:
                held.append(precision)
            else:
                attempts.append(Attempt(precision=precision, outcome=refused))
        if not held:
            said = "; ".join(f"{attempt.precision}: {attempt.outcome}" for attempt in attempts)
            raise ExportMismatch(f"No precision of {backend.name} holds the floor here: {said}")
        attempts += _timed(held, Path(place), settings, progress)
        chosen = next(attempt.precision for attempt in attempts if attempt.outcome == "chosen")
        with staged_folder(out, overwrite) as folder:
            shutil.copytree(Path(place) / chosen, folder, dirs_exist_ok=True)
            manifest = read_manifest(folder)
            table = [attempt.model_dump(exclude_none=True) for attempt in attempts]
            evidence = {**manifest.evidence, "precision auto": table}
            return seal(manifest.model_copy(update={"evidence": evidence}), folder)


def refuse_untimed(backend_name: str) -> None:
    """Refuse to choose among programs that this machine cannot run, before any work.

    Raises:
        UsageError: a backend whose programs are built on another device.
    """
    backend = get_backend(backend_name)
    if backend.built_format:
        raise UsageError(
            f"The precision auto times programs, and those of {backend.name} are built elsewhere.",
            f"Name one of {', '.join(backend.precisions)}.",
        )


def _refusal(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    folder: Path,
    floor: Floor | None,
    calibration: Data | None,
    progress: Progress,
) -> str | None:
    """Export into the folder; why that is no candidate, or `None` where it is one."""
    if calibration is None and get_backend(settings.backend).measures_ranges(settings):
        return "no --calibration was given"
    try:
        manifest = export_checked(
            checkpoint, settings, folder, floor, calibration=calibration, beside_float=False, progress=progress
        )
    except (ExportMismatch, BackendUnavailable, InputError) as error:
        return error.message
    return f"not what runs here: {manifest.stand_in} does" if manifest.stand_in else None


def _timed(held: Sequence[Precision], place: Path, settings: ExportSettings, progress: Progress) -> list[Attempt]:
    """Those that hold the floor, timed in turn, with the outcome of each."""
    shapes = settings.shapes
    shape = BenchSettings(batch_size=shapes.opt_batch, sequence_length=shapes.opt_sequence, rounds=_ROUNDS)
    progress.begin("timing")
    subjects = [BenchSubject(name=name, path=place / name, kind="artifact") for name in held]
    results = dict(zip(held, bench(subjects, shape, progress.say), strict=True))
    base = "fp32" if "fp32" in held else held[0]
    ratios = {name: speedup(results[base], results[name]) for name in held}
    faster = [name for name in held if name != base and (ratios[name].low or 0.0) > 1.0]
    chosen = max(faster, key=lambda name: ratios[name].point, default=base)
    return [
        Attempt(
            precision=name,
            quality=_quality(place / name),
            beside=base,
            p50_ms=results[name].latency(None).p50_ms,
            speedup=ratios[name].point,
            speedup_low=ratios[name].low,
            size_mb=artifact_size(place / name) / 1e6,
            outcome=_outcome(name, base, chosen, ratios[name]),
        )
        for name in held
    ]


def _quality(artifact: Path) -> str | None:
    floors = (check.detail for check in read_manifest(artifact).checks if check.name == "floor")
    return next(floors, None)


def _outcome(name: str, base: str, chosen: str, ratio: Speedup) -> str:
    if name == chosen:
        return "chosen"
    if name == base or (ratio.low or 0.0) > 1.0:
        return f"slower than {chosen}"
    if ratio.high is not None and ratio.high < 1.0:
        return f"slower than {base}"
    return f"not faster than {base} beyond the noise"
