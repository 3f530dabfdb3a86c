"""Attention of programs with a cache: one operator that repeats no key heads, in each runtime's own way."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import openvino
import pytest

from limbeck import export, load_checkpoint
from limbeck.exporters.onnx import GRAPH_FILE, grouped_heads
from limbeck.exporters.openvino import GRAPH_FILE as IR_FILE
from limbeck.exporters.settings import ExportSettings

TinyCheckpoint = Callable[..., Path]
LAYERS = 2
THOROUGH = pytest.mark.thorough


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported(backend, family, OPTION=VALUE)`: an artifact, made once; llama has two query heads to a key head, GPT-2
    one."""

    @functools.cache
    def make(backend: str, family: str = "llama", **options: Any) -> Path:
        checkpoint = load_checkpoint(tiny_checkpoint(family, task="text-generation"))
        folder = tmp_path_factory.mktemp("attention") / "artifact"
        export(checkpoint, ExportSettings(backend=backend, options=options), folder)
        return folder

    return make


def operators(folder: Path) -> tuple[int, Counter[str]]:
    """The opset of an ONNX graph, and how often it has each operator."""
    model = onnx.load(str(folder / GRAPH_FILE), load_external_data=False)
    (opset,) = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return opset, Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=THOROUGH)])
def test_onnx_has_an_operator_for_it(family: str, exported: Callable[..., Path]) -> None:
    opset, found = operators(exported("onnx", family=family))
    assert opset == 23 and found["Attention"] == LAYERS
    assert found["Softmax"] == 0


def test_its_key_heads_are_not_repeated(exported: Callable[..., Path]) -> None:
    model = onnx.load(str(exported("onnx", family="llama") / GRAPH_FILE), load_external_data=False)
    cached = {value.name for value in model.graph.output}
    for node in (node for node in model.graph.node if node.op_type == "Attention"):
        assert {*node.input[1:3]} <= cached, "what it reads is what is kept, and no copy of it"


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{"opset": 20}, {"fusions": True}], ids=str)
def test_an_opset_without_it_and_fusions_have_its_parts(options: dict[str, Any], exported: Callable[..., Path]) -> None:
    opset, found = operators(exported("onnx", **options))
    assert opset == 20 and found["Attention"] == 0 and found["Softmax"] == LAYERS


@pytest.mark.thorough
def test_a_program_without_a_cache_keeps_the_pinned_opset(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    export(checkpoint, ExportSettings(backend="onnx", kv_cache=False), tmp_path / "scores")
    assert operators(tmp_path / "scores")[0] == 20


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=THOROUGH)])
def test_openvino_fuses_it_with_its_cache(family: str, exported: Callable[..., Path]) -> None:
    """As the compiled program says of itself: without the fusion it would have a softmax for each layer."""
    properties = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    compiled = openvino.Core().compile_model(str(exported("openvino", family) / IR_FILE), "CPU", properties)
    running = compiled.get_runtime_model().get_ops()
    layers = Counter(str(node.get_rt_info()["layerType"].astype(str)) for node in running)
    assert layers["ScaledDotProductAttention"] == LAYERS
    assert layers["Softmax"] == 0


def test_transformers_switch_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    monkeypatch.delenv(name, raising=False)
    with grouped_heads():
        assert os.environ[name] == "1"
    assert name not in os.environ
    monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match="stopped"), grouped_heads():
        raise ValueError("stopped")
    assert os.environ[name] == "0"
