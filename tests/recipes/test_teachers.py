"""A compiled teacher answers as the eager one does, or is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.backends.base import Availability
from limbeck.backends.onnx import OnnxBackend, OnnxRunner
from limbeck.distill.teacher import eager_teacher
from limbeck.errors import BackendUnavailable, ExportMismatch, UsageError
from limbeck.exporters.inputs import probe_batch
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.recipes.progress import Progress
from limbeck.recipes.teachers import teacher_runtime

TinyCheckpoint = Callable[..., Path]
FEATURES = ["embeddings", "hidden.0", "hidden.1", "query.1"]
ROUNDING = {"eager": 0.0, "onnx": 1e-4, "torch-compile": 1e-4, "openvino": 8e-2}  # the last picks bfloat16 where it can


def teacher_of(tiny_checkpoint: TinyCheckpoint, family: str, task: str) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint(family, task=task), task=task).recording(FEATURES)


def enter(teacher: Checkpoint, runtime: str) -> None:
    with teacher_runtime(teacher, runtime):
        pass


def needs_compiler(runtime: str) -> None:
    if runtime == "torch-compile" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize(
    ("runtime", "family", "task"),
    [
        ("eager", "bert", "sentence-similarity"),
        ("onnx", "bert", "sentence-similarity"),
        pytest.param("openvino", "bert", "sentence-similarity", marks=pytest.mark.thorough),
        pytest.param("torch-compile", "bert", "sentence-similarity", marks=pytest.mark.thorough),
        pytest.param("onnx", "llama", "text-generation", marks=pytest.mark.thorough),
        pytest.param("openvino", "llama", "text-generation", marks=pytest.mark.thorough),
        pytest.param("torch-compile", "llama", "text-generation", marks=pytest.mark.thorough),
    ],
)
def test_every_runtime_answers_as_eager_torch(
    tiny_checkpoint: TinyCheckpoint, runtime: str, family: str, task: str
) -> None:
    needs_compiler(runtime)
    teacher = teacher_of(tiny_checkpoint, family, task)
    batches = [probe_batch(teacher, 80, 12, padded=True), probe_batch(teacher, 2, teacher.max_length)]
    expected = [eager_teacher(teacher)(batch) for batch in batches]
    with teacher_runtime(teacher, runtime) as call:
        found = [call(batch) for batch in batches]
    for batch, ours, theirs in zip(batches, found, expected, strict=True):
        real = batch["attention_mask"].bool()
        assert {teacher.task.output, *FEATURES} <= set(ours)
        for name in (teacher.task.output, *FEATURES):
            value, reference = ours[name], theirs[name]
            assert value.shape == reference.shape and value.dtype == torch.float32 and not value.requires_grad
            if value.ndim == 3:
                value, reference = value[real], reference[real]
            assert (value - reference).abs().max() <= ROUNDING[runtime] * reference.abs().max()
    hooks = [(*module._forward_hooks, *module._forward_pre_hooks) for module in teacher.model.modules()]
    assert not any(hooks)  # it records nothing once the block has ended


class Heard(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def advance(self, done: int, total: int) -> None:
        return


@pytest.mark.thorough
def test_answers_outlive_the_next_call_and_compiling_is_said(tiny_checkpoint: TinyCheckpoint) -> None:
    teacher = teacher_of(tiny_checkpoint, "bert", "sentence-similarity")
    heard = Heard()
    with teacher_runtime(teacher, "openvino", heard) as call:
        assert heard.said == ["compiling the teacher", "distilling"]
        first = call(probe_batch(teacher, 3, 9))["hidden.1"]
        copy = first.clone()
        call(probe_batch(teacher, 3, 9, padded=True))
        assert torch.equal(first, copy)


@pytest.mark.parametrize("runtime", ["onnx", "torch-compile"])
def test_a_program_that_answers_otherwise_teaches_nothing(
    tiny_checkpoint: TinyCheckpoint, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(tiny_checkpoint, "bert", "sentence-similarity")
    if runtime == "onnx":
        whole = OnnxRunner.__call__

        def wrong(self: OnnxRunner, batch: Any) -> Any:
            return {name: value + (name == "hidden.1") * 0.1 for name, value in whole(self, batch).items()}

        monkeypatch.setattr(OnnxRunner, "__call__", wrong)
    else:
        monkeypatch.setattr(
            torch, "compile", lambda function, **_: lambda inputs: {n: v + 0.1 for n, v in function(inputs).items()}
        )
    with pytest.raises(ExportMismatch, match=r"is not the teacher: .*differs by") as caught:
        enter(teacher, runtime)
    assert caught.value.hint == "Use the eager teacher."


def test_an_unknown_runtime_is_a_usage_error(tiny_checkpoint: TinyCheckpoint) -> None:
    teacher = teacher_of(tiny_checkpoint, "bert", "sentence-similarity")
    with pytest.raises(UsageError, match=r"'openvno'; there are eager, .* Did you mean 'openvino'"):
        enter(teacher, "openvno")


def test_a_runtime_that_is_not_installed_is_said_before_anything_is_traced(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(tiny_checkpoint, "bert", "sentence-similarity")
    monkeypatch.setattr(OnnxBackend, "probe", lambda self: Availability(False, False, "not installed: onnx", "pip it"))
    with pytest.raises(BackendUnavailable, match="not installed: onnx"), teacher_runtime(teacher, "onnx"):
        pass


@pytest.mark.thorough
def test_a_compiler_that_is_not_there_is_said(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config, cpp_builder

    if hasattr(cpp_builder.get_cpp_compiler, "cache_clear"):
        cpp_builder.get_cpp_compiler.cache_clear()
    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    teacher = teacher_of(tiny_checkpoint, "bert", "sentence-similarity")
    with pytest.raises(BackendUnavailable, match=r"torch\.compile cannot compile the teacher here") as caught:
        enter(teacher, "torch-compile")
    assert "\n" not in caught.value.message
    assert caught.value.hint is not None and "eager" in caught.value.hint


@pytest.mark.thorough
def test_onnx_runtime_rests_between_the_calls_of_a_teacher(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[OnnxRunner] = []
    original = OnnxRunner.__init__

    def remember(runner: OnnxRunner, *args: Any, **settings: Any) -> None:
        original(runner, *args, **settings)
        loaded.append(runner)

    monkeypatch.setattr(OnnxRunner, "__init__", remember)
    enter(teacher_of(tiny_checkpoint, "bert", "sentence-similarity"), "onnx")
    assert [runner.properties.get("session.force_spinning_stop") for runner in loaded] == ["1"]
