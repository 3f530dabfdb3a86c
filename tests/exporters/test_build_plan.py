"""What TensorRT's builder is told: options and shapes become a plan beside the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.backends.base import ExportJob
from limbeck.backends.registry import backend_for
from limbeck.backends.tensorrt import TensorRTBackend
from limbeck.errors import InputError, UsageError
from limbeck.exporters.build_plan import BuildPlan
from limbeck.exporters.options import TensorRTOptions
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint

SHAPES = ShapeRange(max_batch=8, max_sequence=48)


def test_options_become_the_plan(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    options = {
        "profiles": [{"max_batch": 1}, {"min_batch": 2, "opt_batch": 4, "max_sequence": 32}],
        "optimization_level": 5,
        "workspace_mb": 256,
        "version_compatible": True,
        "hardware_compatibility": "same-compute-capability",
        "cuda_graphs": True,
    }
    settings = ExportSettings(backend="tensorrt", precision="fp16", shapes=SHAPES, options=options)
    TensorRTBackend().export(ExportJob(load_checkpoint(tiny_checkpoint("bert")), settings), tmp_path)
    plan = BuildPlan.load(tmp_path)
    assert [profile["attention_mask"].model_dump() for profile in plan.profiles] == [
        {"min": [1, 1], "opt": [1, 48], "max": [1, 48]},
        {"min": [2, 1], "opt": [4, 32], "max": [8, 32]},
    ]
    assert (plan.builder_optimization_level, plan.workspace_bytes, plan.cuda_graphs) == (5, 256 * 2**20, True)
    assert plan.version_compatible and plan.hardware_compatibility == "SAME_COMPUTE_CAPABILITY"


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"max_batch": 9}, r"max_batch 9; the graph takes a batch of 1 to 8"),
        ({"max_sequence": 64}, r"max_sequence 64; the graph takes a sequence of 1 to 48"),
        ({"min_batch": 4, "max_batch": 2}, r"smallest batch 4 is above the largest, 2"),
    ],
)
def test_a_profile_outside_the_graphs_shapes_is_refused_before_the_trace(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, profile: dict[str, int], message: str
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    settings = ExportSettings(backend="tensorrt", precision="fp16", shapes=SHAPES, options={"profiles": [profile]})
    told: list[str] = []
    with pytest.raises(UsageError, match=message):
        TensorRTBackend().export(ExportJob(checkpoint, settings, progress=told.append), tmp_path)
    assert told == []


@pytest.mark.parametrize(
    "options",
    [
        {"profiles": [{"max_batsh": 1}]},
        {"profiles": 3},
        {"optimization_level": 6},
        {"workspace_mb": 0},
        {"hardware_compatibility": "all"},
        {"rest": "bf16"},
        {"cuda_graph": True},
    ],
)
def test_an_option_that_tensorrt_does_not_have_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="tensorrt"):
        backend_for(ExportSettings(backend="tensorrt", precision="fp16", options=options))


def test_a_plan_tells_the_builder_of_tf32_only_where_it_was_asked_for() -> None:
    for precision, flags in (("fp32", []), ("tf32", ["TF32"]), ("fp16", [])):
        settings = ExportSettings.model_validate({"backend": "tensorrt", "precision": precision})
        assert BuildPlan.of(settings, TensorRTOptions(), ["input_ids"], opset=20).flags == flags


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version": 9}',
        '{"schema_version": 2, "precision": "fp16", "opset": 20, "profiles": []}',
        '{"precision": "fp16"}',
        "[]",
        "{",
    ],
)
def test_a_broken_plan_is_bad_input(tmp_path: Path, text: str) -> None:
    (tmp_path / "build.json").write_text(text)
    with pytest.raises(InputError):
        BuildPlan.load(tmp_path)
