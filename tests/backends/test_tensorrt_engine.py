"""Engines: built and run where TensorRT and a GPU are, and clearly refused elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limbeck.backends.base import BuildJob, ExportJob
from limbeck.backends.tensorrt import ENGINE, KIT, PLAN_NAME, TensorRTBackend, missing_for_engines
from limbeck.backends.tensorrt_build import CALLS, ROUNDS, batch_of, in_turn
from limbeck.backends.tensorrt_device import BUILT_ON, Device, require_precision, require_same_device
from limbeck.backends.tensorrt_engine import InputRange, choose_profile
from limbeck.backends.tensorrt_log import layer_evidence
from limbeck.cli.main import _run
from limbeck.environment import gpu_facts, is_importable
from limbeck.errors import BackendUnavailable, ExportMismatch, InputError
from limbeck.exporters.artifact import Manifest
from limbeck.exporters.build_plan import BuildPlan
from limbeck.exporters.inputs import probe_batches
from limbeck.exporters.options import TensorRTOptions
from limbeck.exporters.settings import ExportSettings, Precision, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.prune.semi_structured import prune_semi_structured
from limbeck.recipes.building import check_built, export_for_device
from limbeck.recipes.exporting import export
from limbeck.validate.proofs.parity import check_parity

MISSING = missing_for_engines()
SHAPES = ShapeRange(max_batch=8, max_sequence=48)
needs_engines = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING) or "-")
without_engines = pytest.mark.skipif(not MISSING, reason="TensorRT and a GPU are here")


def manifest(checkpoint: Checkpoint, settings: ExportSettings, artifact_format: str) -> Manifest:
    return Manifest(
        format=artifact_format,
        task=checkpoint.task.name,
        settings=settings,
        parent_hash=checkpoint.hash,
        parent=checkpoint.source,
        parameters=checkpoint.parameters,
        inputs=[],
        outputs=[],
        max_length=checkpoint.max_length,
        lineage=checkpoint.lineage,
    )


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"), "sentence-similarity")


@without_engines
def test_building_without_tensorrt_or_gpu_says_what_is_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known = manifest(checkpoint, ExportSettings(backend="tensorrt"), KIT)
    with pytest.raises(BackendUnavailable) as refused:
        TensorRTBackend().build(BuildJob(tmp_path, known), tmp_path / "out")
    assert refused.value.exit_code == 3
    assert all(part in refused.value.message for part in MISSING)
    assert "pip install tensorrt" in str(refused.value.hint)
    if not is_importable("tensorrt"):
        assert "not installed: tensorrt" in refused.value.message
    if not gpu_facts():
        assert "NVIDIA GPU" in refused.value.message


@without_engines
def test_loading_an_engine_without_tensorrt_or_gpu_says_what_is_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known = manifest(checkpoint, ExportSettings(backend="tensorrt"), ENGINE)
    with pytest.raises(BackendUnavailable, match="cannot run here"):
        TensorRTBackend().load(tmp_path, known)


@pytest.mark.parametrize("cache", ["missing/times", "."])
def test_a_timing_cache_must_be_a_file_in_a_folder_that_exists(
    tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", tmp_path / "kit", "--timing-cache", tmp_path / cache, "--out", tmp_path / "engine"]
    assert _run([str(word) for word in words]) == 2
    assert "--timing-cache" in capsys.readouterr().err


@without_engines
def test_the_probe_offers_the_export_and_explains_the_rest() -> None:
    available = TensorRTBackend().probe()
    assert available.can_export and not available.can_run
    assert "kits are exported" in available.reason and "pip install" in available.mend


def test_the_probe_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from limbeck.backends.tensorrt import TensorRTBackend\n"
        "TensorRTBackend().probe()\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'tensorrt', 'polygraphy', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def device(**changes: str) -> Device:
    known = {"gpu": "NVIDIA H100", "compute_capability": "9.0", "driver": "580.65", "tensorrt": "11.4.0.106"}
    return Device(**{**known, **changes})


def plan(**options: object) -> BuildPlan:
    settings = ExportSettings(backend="tensorrt", precision="fp16")
    return BuildPlan.of(settings, TensorRTOptions.model_validate(options), ["input_ids"], opset=20)


@pytest.mark.parametrize(
    ("options", "now", "runs"),
    [
        ({}, device(), True),
        ({}, device(driver="590.1"), True),
        ({}, device(gpu="NVIDIA L4", compute_capability="8.9"), False),
        ({}, device(gpu="NVIDIA H200"), False),
        ({"hardware_compatibility": "same-compute-capability"}, device(gpu="NVIDIA H200"), True),
        ({"hardware_compatibility": "same-compute-capability"}, device(compute_capability="10.0"), False),
        ({"hardware_compatibility": "ampere-plus"}, device(gpu="NVIDIA B200", compute_capability="10.0"), True),
        ({"hardware_compatibility": "ampere-plus"}, device(gpu="Tesla T4", compute_capability="7.5"), False),
        ({}, device(tensorrt="11.4.0.99"), True),
        ({}, device(tensorrt="11.5.0.1"), False),
        ({"version_compatible": True}, device(tensorrt="11.10.0.1"), True),
        ({"version_compatible": True}, device(tensorrt="11.3.2.1"), False),
    ],
)
def test_an_engine_runs_where_its_plan_allows_and_else_both_devices_are_named(
    checkpoint: Checkpoint, options: dict[str, object], now: Device, runs: bool
) -> None:
    known = manifest(checkpoint, ExportSettings(backend="tensorrt"), ENGINE)
    known = known.model_copy(update={"evidence": {BUILT_ON: device().model_dump()}})
    if runs:
        require_same_device(Path("engine"), known, plan(**options), now)
        return
    with pytest.raises(BackendUnavailable) as refused:
        require_same_device(Path("engine"), known, plan(**options), now)
    for side in (device(), now):
        assert side.gpu in refused.value.message and f"TensorRT {side.tensorrt}" in refused.value.message
    assert "limbeck build" in str(refused.value.hint)


@pytest.mark.parametrize("evidence", [{}, {BUILT_ON: "an H100"}, {BUILT_ON: {"gpu": "NVIDIA H100"}}])
def test_an_engine_that_does_not_say_where_it_was_built_is_bad_input(
    checkpoint: Checkpoint, evidence: dict[str, object]
) -> None:
    known = manifest(checkpoint, ExportSettings(backend="tensorrt"), ENGINE).model_copy(update={"evidence": evidence})
    with pytest.raises(InputError, match="does not say on which GPU"):
        require_same_device(Path("engine"), known, plan(), device())


@pytest.mark.parametrize(
    ("precision", "capability", "able"),
    [("fp8", "8.6", False), ("fp8", "8.9", True), ("fp8", "10.0", True), ("int8", "7.5", True)],
)
def test_float8_is_built_on_gpus_that_have_it(precision: Precision, capability: str, able: bool) -> None:
    wanted = plan().model_copy(update={"precision": precision})
    if able:
        require_precision(wanted, device(compute_capability=capability))
        return
    with pytest.raises(BackendUnavailable, match=r"fp8 .* 8\.9 .* NVIDIA H100"):
        require_precision(wanted, device(compute_capability=capability))


PROFILES = [
    {name: InputRange((1, 1), (1, 64), (1, 128)) for name in ("input_ids", "attention_mask")},
    {name: InputRange((8, 1), (32, 128), (64, 512)) for name in ("input_ids", "attention_mask")},
    {name: InputRange((1, 1), (8, 256), (64, 512)) for name in ("input_ids", "attention_mask")},
]


@pytest.mark.parametrize(
    ("shape", "chosen"), [((1, 64), 0), ((1, 400), 2), ((4, 128), 2), ((32, 120), 1), ((8, 256), 2), ((64, 512), 2)]
)
def test_the_profile_is_the_one_that_takes_the_batch_and_was_tuned_nearest_to_it(
    shape: tuple[int, int], chosen: int
) -> None:
    assert choose_profile(PROFILES, dict.fromkeys(PROFILES[0], shape)) == chosen


@pytest.mark.parametrize("shape", [(2, 16), (65, 16), (1, 129), (1, 16, 1)])
def test_a_shape_that_no_profile_takes_is_refused_with_the_ranges(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as refused:
        choose_profile(PROFILES[:2], dict.fromkeys(PROFILES[0], shape))
    assert str(shape) in refused.value.message
    assert "(1, 1) to (1, 128)" in refused.value.message and "(8, 1) to (64, 512)" in refused.value.message


def test_two_engines_are_timed_in_turn_and_their_medians_compared() -> None:
    called: list[str] = []

    def stopwatch(name: str, milliseconds: list[float]) -> Callable[[], float]:
        def call() -> float:
            called.append(name)
            return milliseconds[len([other for other in called if other == name]) % len(milliseconds)]

        return call

    found = in_turn({"sparse": stopwatch("sparse", [1.0, 1.0, 9.0]), "dense": stopwatch("dense", [1.5])})
    assert found == {"sparse ms": 1.0, "dense ms": 1.5, "ratio": 1.5}
    assert called[: CALLS + 2] == ["sparse"] * (CALLS + 1) + ["dense"] and len(called) == 2 * ROUNDS * (CALLS + 1)


def test_the_batch_that_is_timed_has_the_shape_that_the_profile_is_tuned_for() -> None:
    (profile,) = BuildPlan.of(
        ExportSettings(backend="tensorrt", precision="fp16"), TensorRTOptions(), ["input_ids", "attention_mask"], 20
    ).profiles
    batch = batch_of(profile)
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(profile, (8, 128))
    assert batch["attention_mask"].all() and not batch["input_ids"].any()
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_layers_are_counted_by_the_narrowest_type_that_they_read() -> None:
    def layer(name: str, reads: dict[str, str], tactic: str = "") -> dict[str, object]:
        return {"Name": name, "TacticName": tactic, "Inputs": [reads], "Outputs": [{"Datatype": "Half"}]}

    # TensorRT 11 names layout and type apart, 10 in one field.
    layers = [
        layer("query", {"Format": "Row major linear", "Datatype": "Int8"}, "sm80_xmma_sparse_gemm"),
        layer("key", {"Format/Datatype": "Row major linear FP16 format"}),
        layer("norm", {"Datatype": "Float"}),
        layer("product", {"DataType": "FP8"}),
        layer("gather", {"Datatype": "Int64"}),
        {"Name": "shape", "Inputs": [{"Datatype": "Int64"}], "Outputs": [{"Datatype": "Bool"}]},
        "a name alone",
    ]
    found = layer_evidence({"Layers": layers})
    assert found["layers"] == 7
    assert found["layers by precision"] == {"fp16": 2, "fp32": 1, "fp8": 1, "int8": 1, "other": 2}
    assert found["sparse kernels"] == ["query sm80_xmma_sparse_gemm"]
    assert layer_evidence([])["layers"] == 0


def engine_of(checkpoint: Checkpoint, folder: Path, **settings: object) -> tuple[Path, Manifest]:
    """A kit of the checkpoint, built; the engine's folder and manifest."""
    chosen = ExportSettings.model_validate({"backend": "tensorrt", "shapes": SHAPES, **settings})
    calibration = [batch for _, batch in probe_batches(checkpoint, SHAPES)]
    backend, kit, built = TensorRTBackend(), folder / "kit", folder / "engine"
    kit.mkdir()
    built.mkdir()
    backend.export(ExportJob(checkpoint, chosen, calibration), kit)
    evidence = backend.build(BuildJob(kit, manifest(checkpoint, chosen, KIT), folder / "times"), built)
    return built, manifest(checkpoint, chosen, ENGINE).model_copy(update={"evidence": evidence})


@pytest.mark.gpu
@needs_engines
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"profiles": [{"max_batch": 1}, {"min_batch": 2}]}])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_an_engine_computes_what_the_model_computes(
    checkpoint: Checkpoint, tmp_path: Path, precision: Precision, options: dict[str, object]
) -> None:
    built, known = engine_of(checkpoint, tmp_path, precision=precision, options=options)
    assert known.evidence["layers"] > 0 and (built / PLAN_NAME).stat().st_size > 0
    assert (tmp_path / "times").stat().st_size > 0
    assert known.evidence[BUILT_ON]["gpu"] == torch.cuda.get_device_name()
    runner = TensorRTBackend().load(built, known)
    try:
        for _ in range(2):  # with CUDA graphs the second pass replays what the first captured
            with torch.inference_mode():
                parity = check_parity(runner, checkpoint.run, probe_batches(checkpoint, SHAPES), precision)
            assert parity.passed, parity.rows
        for _, batch in probe_batches(checkpoint, SHAPES):
            runner.prepare(batch)()
        too_many = {name: torch.ones(9, 4, dtype=torch.int64) for name in checkpoint.input_names}
        with pytest.raises(InputError, match=r"does not take .* of shape \(9, 4\)"):
            runner(too_many)
    finally:
        runner.close()


@pytest.mark.gpu
@needs_engines
def test_a_sparse_engine_is_timed_against_its_dense_twin(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pruned = replace(checkpoint, model=prune_semi_structured(checkpoint).model)
    _, known = engine_of(pruned, tmp_path, precision="fp16", sparsity="2:4")
    (row,) = known.evidence["dense twin"]["shapes"]
    assert row["sparse ms"] > 0 and row["dense ms"] > 0 and row["ratio"] > 0
    assert known.evidence["sparsity"]["eligible"]


@pytest.mark.gpu
@needs_engines
def test_an_export_on_the_gpus_machine_is_built_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = ExportSettings(backend="tensorrt", precision="fp16", shapes=SHAPES)
    made = export_for_device(checkpoint, settings, tmp_path / "engine")
    assert made.format == ENGINE and not made.is_kit and made.unverified is None
    assert [check.name for check in made.checks] == ["parity", "weight audit", "parity with the kit"]
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


@without_engines
def test_an_export_elsewhere_is_a_kit_that_says_it_is_unverified(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = ExportSettings(backend="tensorrt", precision="fp16", shapes=SHAPES)
    made = export_for_device(checkpoint, settings, tmp_path / "kit")
    assert made.format == KIT and made.is_kit and "GPU" in str(made.unverified)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]


def test_what_was_built_is_compared_with_its_kit(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    # Two programs of real graphs stand in for an engine: the kit's own, and that of another model.
    settings = ExportSettings(backend="tensorrt", precision="fp16", shapes=SHAPES)
    own, other = (
        load_checkpoint(tiny_checkpoint(family), "sentence-similarity") for family in ("roberta", "distilbert")
    )
    kits = [tmp_path / "own", tmp_path / "other"]
    manifests = [export(model, settings, kit) for model, kit in zip((own, other), kits, strict=True)]
    same, another = (TensorRTBackend().load(kit, known) for kit, known in zip(kits, manifests, strict=True))
    check = check_built(same, same, manifests[0], kits[0])
    assert check.passed and check.name == "parity with the kit"
    assert {row["shape"] for row in check.rows} == {"1 x 1, padded", "3 x 48, padded", "1 x 48, padded"}
    with pytest.raises(ExportMismatch, match="does not compute what its kit computes"):
        check_built(another, same, manifests[0], kits[0])
