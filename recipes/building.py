"""Kit -> what its compiler builds of it on the device at hand, compared with the kit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..backends.base import BuildJob, Runner
from ..backends.registry import backend_of_format, backend_to_run, get_backend
from ..backends.trust import seal_here
from ..errors import ExportMismatch
from ..exporters.artifact import CheckRecord, Manifest, open_artifact
from ..exporters.inputs import random_batch, vocabulary_of
from ..exporters.model_card import write_model_card
from ..exporters.settings import ExportSettings
from ..files import check_output_folder, read_json, staged_folder
from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.terms import read_terms
from ..validate.proofs.parity import check_parity
from .exporting import export
from .progress import SILENT, Progress


def build(
    kit: Path,
    out: Path,
    *,
    timing_cache: Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """Turn a kit into the program for this machine's device.

    Args:
        timing_cache: where the compiler keeps the times of its kernels; read where it is there, written afterwards.

    Raises:
        BackendUnavailable: the compiler or the device is not here.
        IntegrityError: the kit is not as it was exported.
        ExportMismatch: what was built does not compute what the kit computes; nothing is left at `out`.
    """
    manifest = open_artifact(kit)
    check_output_folder(out, overwrite)
    backend = backend_to_run(kit, manifest)
    with staged_folder(out, overwrite) as folder:
        for name in set(manifest.files) - set(manifest.program_files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kit / name, folder / name)
        job = BuildJob(kit, manifest, timing_cache, progress.say, progress.advance)
        evidence = backend.build(job, folder)
        built = _built(manifest, backend.built_format, evidence)
        progress.say("comparing outputs with the kit's")
        with closing(backend.load(folder, built)) as program, closing(backend.load(kit, manifest)) as graph:
            check = check_built(program, graph, built, folder)
        built = built.model_copy(update={"checks": [*built.checks, check]})
        write_model_card(built, folder, read_terms(kit))
        return seal_here(built, folder, backend)


def _built(kit: Manifest, artifact_format: str, evidence: Mapping[str, Any]) -> Manifest:
    """The kit's manifest as that of what was built of it here and now; checks that the kit has passed are named so."""
    checks = [check.model_copy(update={"name": f"{check.name} of the kit"}) for check in kit.checks]
    fields = kit.model_dump(exclude={"created", "limbeck", "versions", "cpu", "gpus", "artifact_id", "files", "checks"})
    changes = {"format": artifact_format, "is_kit": False, "unverified": None, "stand_in": None, "program_files": []}
    return Manifest.model_validate({**fields, **changes, "evidence": {**kit.evidence, **evidence}, "checks": checks})


def check_built(program: Runner, kit: Runner, built: Manifest, folder: Path) -> CheckRecord:
    """Compare what was built with the graph it was built of, which was compared with the checkpoint at its export.

    Args:
        folder: of the built program; its tokenizer's and model's files are there, its manifest need not be.

    Raises:
        ExportMismatch: outputs differ by more than the precision explains.
    """
    vocabulary = vocabulary_of(read_json(folder / "config.json"), folder)
    names, shapes = [spec.name for spec in built.inputs], built.settings.shapes
    sizes = backend_of_format(built.format).built_shapes(folder) or [
        (shapes.min_batch, shapes.opt_sequence),
        (shapes.opt_batch, shapes.opt_sequence),
    ]
    probes = (
        (f"{batch} x {sequence}, padded", _padded(random_batch(names, vocabulary, (batch, sequence), seed=0)))
        for batch, sequence in sizes
    )
    check = check_parity(program, kit, probes, built.settings.precision)
    check = check.model_copy(update={"name": "parity with the kit"})
    if not check.passed:
        raise ExportMismatch(
            f"The built {built.format} does not compute what its kit computes: {check.detail}.",
            "Nothing was written. Build it with another version of the compiler, or export at another --precision.",
        )
    return check


def _padded(batch: Batch) -> Batch:
    """The batch with its second row, and every other after it, cut to half its length, so that a mask that is not
    heeded shows."""
    mask = batch["attention_mask"].clone()
    mask[1::2, max(1, mask.shape[1] // 2) :] = 0
    return {**batch, "attention_mask": mask}


def export_for_device(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    out: Path,
    *,
    calibration: Data | None = None,
    validation: Data | None = None,
    beside_float: bool = True,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """Export, and build at once where that makes a kit whose compiler and device are on this machine.

    Args:
        beside_float: see `export`.

    Raises:
        LimbeckError: what `export` and `build` raise.
    """
    backend = get_backend(settings.backend)
    work = partial(
        export,
        checkpoint,
        settings,
        calibration=calibration,
        validation=validation,
        beside_float=beside_float,
        progress=progress,
    )
    if not backend.built_format or not backend.probe().can_run:
        return work(out, overwrite=overwrite)
    check_output_folder(out, overwrite)
    with TemporaryDirectory(prefix="limbeck-") as place:
        kit = Path(place) / "kit"
        work(kit)
        return build(kit, out, overwrite=overwrite, progress=progress)
