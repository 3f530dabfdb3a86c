"""Checkpoint -> artifact: exported, checked against torch, held to its floor and against its float32 twin's speed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..backends.base import ExportJob, Runner
from ..backends.registry import backend_for, get_backend
from ..backends.trust import seal_here
from ..errors import ExportMismatch, InputError, UsageError
from ..exporters.artifact import CheckRecord, Manifest
from ..exporters.fitting import fitted, padded_to
from ..exporters.inputs import longest, probe_batch, probe_batches, token_stream
from ..exporters.kv_cache import keeps_cache, require_growing_sizes
from ..exporters.model_card import write_model_card
from ..exporters.program import Floor
from ..exporters.settings import QUANTISED, ExportSettings
from ..exporters.tokenizer_graph import TextTokens
from ..files import check_output_folder, files_below, staged_folder, write_json
from ..models.batching import Batch, Examples, Run, pad
from ..models.checkpoint import Checkpoint
from ..models.data import TEXT_FIELDS, Data
from ..models.lineage import TRAINING_ROWS_FILE
from ..validate.measurement import score_run, scores_of
from ..validate.metrics.quality import headline_metric, higher_is_better
from ..validate.performance.speed import medians_in_turn
from ..validate.proofs.cache import check_cache, readings_of
from ..validate.proofs.parity import check_parity
from ..validate.proofs.tokenizer_check import TOKENIZER_CHECK, check_tokenizer_graph, read_otherwise
from ..validate.proofs.tolerances import tolerance_of
from ..validate.proofs.weight_audit import audit_weights
from ..validate.standard import set_standard
from .progress import SILENT, Progress

_NOT_AUDITED = "its weights were not compared with the checkpoint's, for the backend cannot read them back"
_FEW_ROWS = 16
_SLOWER = 1.02
"""Times as long as float32: what is said to be slower is so by more than a clock's noise."""


def calibration_batches(checkpoint: Checkpoint, data: Data | None, settings: ExportSettings) -> list[Batch]:
    """Real inputs, one row a batch (so that no padding distorts what an int8 range is set by) unless the program's
    sizes want more."""
    if data is None:
        return []
    samples, shapes = settings.calibration_samples, settings.shapes.within(checkpoint.max_length)
    examples: Examples = checkpoint.task.examples(
        data.head(samples), checkpoint.tokenizer, shapes.max_sequence, checkpoint.model.config
    )
    batches = (pad([feature], checkpoint.tokenizer) for feature in examples.features[:samples])
    return [padded_to(checkpoint.model_inputs(batch), shapes) for batch in batches]


def export(
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
    """Export a checkpoint to an artifact folder, checked before it appears: outputs at several shapes against torch,
    every weight against the checkpoint's, and its quality against `settings.floor`. A quantised program that is slower
    than its float32 twin says so in its manifest.

    Args:
        calibration: real inputs, for int8, fp8 and the check of float16's range.
        validation: what quality is measured on; a floor needs it.
        beside_float: whether a quantised program is timed beside its float32 twin.

    Raises:
        ExportMismatch: the program does not compute what the checkpoint computes, or falls below the floor; nothing is
            left at `out`.
        UsageError: a precision, sparsity or option that the backend does not have, a floor without `validation`, or an
            `out` that holds something.
        InputError: a weight that is not a number, or an operator that the backend's compiler does not have.
        BackendUnavailable: a package that the export needs is missing.
    """
    backend_for(settings)
    require_numbers(checkpoint)
    settings = fit_to_model(settings, checkpoint)
    check_output_folder(out, overwrite)
    refuse_unlike_tokenizer(checkpoint, settings, calibration, progress)
    floor = measure_floor(checkpoint, validation, settings, progress)
    return export_checked(
        checkpoint, settings, out, floor, calibration=calibration, beside_float=beside_float, overwrite=overwrite,
        progress=progress,
    )  # fmt: skip


def export_checked(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    out: Path,
    floor: Floor | None,
    *,
    calibration: Data | None,
    beside_float: bool,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """`export` with its floor measured beforehand."""
    backend = backend_for(settings)
    batches = calibration_batches(checkpoint, calibration, settings)
    with staged_folder(out, overwrite) as folder:
        program = backend.export(ExportJob(checkpoint, settings, batches, floor, progress.say), folder)
        # transformers' exporters write the configuration too; it goes with the model, not with the program.
        program_files = [path.as_posix() for path in files_below(folder) if path.as_posix() != "config.json"]
        _write_companions(checkpoint, folder)
        tokenizer_checks = _tokenizer_graph(checkpoint, settings, calibration, folder)
        manifest = program.manifest(checkpoint, settings)
        with closing(backend.load(folder, manifest)) as runner:
            checks = _check(checkpoint, manifest, runner, batches, progress)
            if (audit := _audit(checkpoint, manifest, folder, progress)) is not None:
                checks.append(audit)
            checks += tokenizer_checks
            checks += [_held(floor, runner, progress)] if floor is not None else []
            _refuse_failed(checks, settings)
            timed = beside_float and settings.precision in QUANTISED and "fp32" in backend.precisions
            caveats = _compiled_otherwise(manifest, runner) + _few_rows(settings, len(batches))
            caveats += _read_otherwise(tokenizer_checks)
            if timed and not manifest.is_kit and not manifest.stand_in:
                caveats += _slower_than_float(checkpoint, settings, runner, progress)
        unverified = manifest.unverified or (_NOT_AUDITED if audit is None else None)
        changes = {"checks": checks, "program_files": program_files, "caveats": caveats, "unverified": unverified}
        manifest = manifest.model_copy(update=changes)
        write_model_card(manifest, folder, checkpoint.terms)
        return seal_here(manifest, folder, backend)


def require_numbers(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that a training gone wrong has left: nothing that is exported of it could be right.

    Raises:
        InputError: a weight holds NaN.
    """
    for name, weight in checkpoint.module.named_parameters():
        if weight.isnan().any():
            raise InputError(
                f"The weight {name} of {checkpoint.source} holds {int(weight.isnan().sum()):,} NaN.",
                "It was written by a training that diverged: go back to an earlier checkpoint.",
            )


def fit_to_model(settings: ExportSettings, checkpoint: Checkpoint) -> ExportSettings:
    """The settings with sizes that the model has positions for, and with a cache where model and backend write text.

    Raises:
        UsageError: the smallest sequence is longer than the model's longest, or a program with a cache of fixed size.
    """
    writes = get_backend(settings.backend).writes_text and keeps_cache(checkpoint, settings)
    if writes:
        require_growing_sizes(settings)
    try:
        fitted_shapes = settings.shapes.within(checkpoint.max_length)
        return settings.model_copy(update={"shapes": fitted_shapes, "kv_cache": writes})
    except ValueError as error:
        raise UsageError(
            f"The smallest sequence {settings.shapes.min_sequence} is longer than the {checkpoint.max_length} tokens "
            f"that {checkpoint.source} has positions for."
        ) from error


def refuse_unlike_tokenizer(
    checkpoint: Checkpoint, settings: ExportSettings, calibration: Data | None, progress: Progress = SILENT
) -> None:
    """Where a graph of the tokenizer is asked for, refuse one that is not the tokenizer before any longer work.

    Raises:
        ExportMismatch: its tokens are not the tokenizer's.
        InputError: a tokenizer that cannot be made a graph of.
    """
    if settings.tokenizer_graph:
        progress.say("comparing the tokenizer's graph with the tokenizer")
        with TemporaryDirectory(prefix="limbeck-") as folder:
            _refuse_failed(_tokenizer_graph(checkpoint, settings, calibration, Path(folder)), settings)


def _tokenizer_graph(
    checkpoint: Checkpoint, settings: ExportSettings, calibration: Data | None, folder: Path
) -> list[CheckRecord]:
    """Write the tokenizer as a graph into the folder, where it is asked for, and compare it with the tokenizer."""
    if not settings.tokenizer_graph:
        return []
    tokens = TextTokens.of(checkpoint, settings.shapes)
    graph = get_backend(settings.backend).export_tokenizer(tokens, folder)
    rows = calibration.head(settings.calibration_samples).rows if calibration is not None else []
    texts = [row[name] for row in rows for name in TEXT_FIELDS if isinstance(row.get(name), str)]
    masked = checkpoint.task.name == "fill-mask"
    return [check_tokenizer_graph(graph, tokens, checkpoint.input_names, texts, special_matter=masked)]


def _read_otherwise(checks: Sequence[CheckRecord]) -> list[str]:
    """What to say of a graph of a tokenizer that differs from it on kinds of text that a program may never see."""
    kinds = [kind for check in checks for kind in read_otherwise(check)]
    return [f"the tokenizer's graph makes other tokens than the tokenizer of: {', '.join(kinds)}"] if kinds else []


def measure_floor(
    checkpoint: Checkpoint, data: Data | None, settings: ExportSettings, progress: Progress = SILENT
) -> Floor | None:
    """The share of the checkpoint's own quality on the data as a figure of its headline metric; `None` where the
    settings have no floor. Texts are cut at what the program takes."""
    if settings.floor is None:
        return None
    if data is None:
        raise UsageError("A floor of quality has to be measured on something.", "Add --validation FILE.")
    progress.say("measuring the checkpoint")
    shapes = settings.shapes
    standard = set_standard(checkpoint, data, max_length=shapes.max_sequence, progress=progress.advance)
    own = scores_of(standard.predictions, standard)
    metric = headline_metric(checkpoint.task.name, own)
    better = higher_is_better(metric)

    def measure(run: Run) -> float:
        found = score_run(fitted(run, shapes), standard)[metric]
        return found if better else -found

    return Floor(metric, own[metric] * settings.floor if better else -own[metric] / settings.floor, measure)


def _write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """What goes with a program whatever the backend: configurations, tokenizer, pooling, hashes of training rows."""
    checkpoint.model.config.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    checkpoint.save_generation_config(folder)
    if checkpoint.task.name == "sentence-similarity":
        checkpoint.save_pooling(folder)
    if checkpoint.training_rows:
        write_json(folder / TRAINING_ROWS_FILE, dict(checkpoint.training_rows))


def _check(
    checkpoint: Checkpoint, manifest: Manifest, runner: Runner, batches: Sequence[Batch], progress: Progress
) -> list[CheckRecord]:
    progress.say("comparing outputs with torch")
    probes = probe_batches(checkpoint, manifest.settings.shapes, token_stream(batches))
    checks = [check_parity(runner, checkpoint.run, probes, manifest.settings.precision, manifest.cache)]
    return [*checks, *_check_cache(checkpoint, manifest, runner, batches, progress)]


def _check_cache(
    checkpoint: Checkpoint, manifest: Manifest, runner: Runner, batches: Sequence[Batch], progress: Progress
) -> list[CheckRecord]:
    """Nothing of a program that keeps nothing."""
    if manifest.cache is None:
        return []
    progress.say("comparing what is read in pieces with what is read in one")
    shapes, stream = manifest.settings.shapes, token_stream(batches)

    def draw(texts: int, tokens: int) -> Any:
        return probe_batch(checkpoint, texts, tokens, stream=stream)["input_ids"]

    readings = readings_of(draw, shapes, longest(checkpoint, shapes))
    tolerance = tolerance_of(manifest.settings.precision, manifest.cache)
    return [check_cache(runner, readings, tolerance.itself)]


def _audit(checkpoint: Checkpoint, manifest: Manifest, folder: Path, progress: Progress) -> CheckRecord | None:
    """`None` where the backend cannot read the weights back."""
    weights = get_backend(manifest.settings.backend).weights(folder, manifest, checkpoint.module)
    if weights is None:
        return None
    progress.say("auditing the weights")
    return audit_weights(checkpoint.module, weights, corrected=manifest.biases_corrected)


def _held(floor: Floor, run: Run, progress: Progress) -> CheckRecord:
    progress.say("measuring the program")
    found = floor.measure(run)
    said = f"{floor.metric} {abs(found):.4g} where the floor is {abs(floor.least):.4g}"
    return CheckRecord(name="floor", passed=found >= floor.least, detail=said)


def _refuse_failed(checks: Sequence[CheckRecord], settings: ExportSettings) -> None:
    for check in checks:
        if check.passed:
            continue
        if check.name == "floor":
            raise ExportMismatch(
                f"The exported {settings.backend} {settings.precision} program does not hold the floor: "
                f"{check.detail}.",
                "Nothing was written. Try another --precision, more or other --calibration text, or --precision auto.",
            )
        if check.name == TOKENIZER_CHECK:
            raise ExportMismatch(
                f"The graph of the tokenizer for {settings.backend} is not the tokenizer: {check.detail}.",
                "Nothing was written. Leave --tokenizer-graph out: the artifact carries the tokenizer all the same.",
            )
        raise ExportMismatch(
            f"The exported {settings.backend} {settings.precision} program is not the model: "
            f"{check.name}: {check.detail}.",
            "Nothing was written. Try another --precision; if float32 fails too, please report it.",
        )


def _compiled_otherwise(manifest: Manifest, runner: Runner) -> list[str]:
    """What to say of properties that the runtime here does not heed, as a CPU without float16 does not."""
    found = {name: runner.properties.get(name, wanted) for name, wanted in manifest.compile_properties.items()}
    return [
        f"this machine's runtime compiles {name}={found[name]} where {wanted} was asked for"
        for name, wanted in manifest.compile_properties.items()
        if found[name] != wanted
    ]


def _few_rows(settings: ExportSettings, rows: int) -> list[str]:
    """What to say of ranges that were measured on next to nothing."""
    if rows >= _FEW_ROWS or not get_backend(settings.backend).measures_ranges(settings):
        return []
    return [f"{settings.precision} was calibrated on {rows} rows; a few hundred are usual"]


def _slower_than_float(
    checkpoint: Checkpoint, settings: ExportSettings, runner: Runner, progress: Progress
) -> list[str]:
    """What to say of a program that takes longer than float32 on this machine; nothing of another."""
    progress.say("timing it beside float32")
    twin_settings = settings.model_copy(update={"precision": "fp32"})
    backend = get_backend(settings.backend)
    shape = settings.shapes.opt_batch, settings.shapes.opt_sequence
    batch = probe_batch(checkpoint, *shape)
    with TemporaryDirectory(prefix="limbeck-") as folder:
        program = backend.export(ExportJob(checkpoint, twin_settings), Path(folder))
        checkpoint.model.config.save_pretrained(folder)
        with closing(backend.load(Path(folder), program.manifest(checkpoint, twin_settings))) as twin:
            ours, theirs = medians_in_turn([runner.prepare(batch), twin.prepare(batch)])
    if ours <= _SLOWER * theirs:
        return []
    return [
        f"{settings.precision} takes {ours / theirs:.2g} times as long as fp32 on this machine "
        f"({ours:.3g} ms for {theirs:.3g} ms at {shape[0]} x {shape[1]} tokens)"
    ]
