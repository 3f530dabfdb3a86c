"""Programs that compute something else with the right weights: parity names what, and other checks see it directly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes import exporting
from limbeck.recipes.steps import export

Bench = Any
Edit = Callable[[Path, Callable[[onnx.ModelProto], None]], None]
Change = Callable[[onnx.ModelProto], None]
BACKENDS = pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=pytest.mark.thorough)])


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def producer(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def insert_before(model: onnx.ModelProto, node: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    """Put nodes in front of one, so that the graph stays sorted."""
    place = next(i for i, known in enumerate(model.graph.node) if known.output == node.output)
    rest = [*new, *model.graph.node[place:]]
    del model.graph.node[place:]
    model.graph.node.extend(rest)


def planted_in_text(old: str, new: str) -> Callable[[Path], None]:
    """In an OpenVINO IR."""

    def plant(folder: Path) -> None:
        graph = folder / "openvino_model.xml"
        text = graph.read_text()
        assert old in text
        graph.write_text(text.replace(old, new))

    return plant


@pytest.fixture
def planted_in_graph(bench: Bench, edit_onnx: Edit) -> Callable[[Change], Path]:
    return lambda change: bench.planted("onnx", "fp32", lambda folder: edit_onnx(folder, change))


@BACKENDS
def test_another_epsilon(backend: str, bench: Bench, planted_in_graph: Callable[[Change], Path]) -> None:
    def change(model: onnx.ModelProto) -> None:
        for node in nodes(model, "LayerNormalization"):
            next(each for each in node.attribute if each.name == "epsilon").f = 1e-3

    text = planted_in_text('eps="9.999999960041972e-13"', 'eps="0.001"')
    folder = planted_in_graph(change) if backend == "onnx" else bench.planted(backend, "fp32", text)
    bench.assert_caught(folder, "parity", "the student would with LayerNorm epsilon 0.001 instead of 1e-12")


@BACKENDS
def test_another_activation(backend: str, bench: Bench, planted_in_graph: Callable[[Change], Path]) -> None:
    """Named whether or not it costs enough to fail: the verdict follows the measured difference."""

    def change(model: onnx.ModelProto) -> None:
        for node in nodes(model, "Gelu"):
            next(each for each in node.attribute if each.name == "approximate").s = b"tanh"

    text = planted_in_text('approximation_mode="ERF"', 'approximation_mode="TANH"')
    folder = planted_in_graph(change) if backend == "onnx" else bench.planted(backend, "fp32", text)
    report = bench.assert_named(folder, "parity", "the student would with GELU by tanh")
    parity = next(check for check in report.candidates[0].checks if check.name == "parity")
    worst = max(row["share of the output"] for row in parity.rows)
    assert parity.passed == (worst <= 1e-4)


def test_padding_that_is_not_masked(bench: Bench, planted_in_graph: Callable[[Change], Path]) -> None:
    def change(model: onnx.ModelProto) -> None:
        mask = producer(model, nodes(model, "GatherND")[0].output[0])
        for node in nodes(model, "And"):
            if mask.output[0] in node.input:
                other = next(name for name in node.input if name != mask.output[0])
                node.input[:] = [other, other]

    report = bench.assert_caught(planted_in_graph(change), "padding mask", "the padding mask is ignored")
    assert "attention mask ignored" in next(c.detail for c in report.candidates[0].checks if c.name == "parity")


def test_positions_off_by_one(bench: Bench, planted_in_graph: Callable[[Change], Path]) -> None:
    def change(model: onnx.ModelProto) -> None:
        gather = next(node for node in nodes(model, "Gather") if node.input[0].endswith("position_embeddings.weight"))
        model.graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.INT64, [], [1]))
        insert_before(model, gather, [helper.make_node("Add", [gather.input[1], "one"], ["shifted"])])
        place = next(node for node in model.graph.node if node.output == gather.output)
        place.input[1] = "shifted"

    bench.assert_caught(planted_in_graph(change), "parity", "the student would with position ids off by one (+1)")


def test_a_skipped_layer(bench: Bench, planted_in_graph: Callable[[Change], Path]) -> None:
    def change(model: onnx.ModelProto) -> None:
        norms = {node.input[1].removesuffix(".weight"): node.output[0] for node in nodes(model, "LayerNormalization")}
        before, after = (norms[f"bert.encoder.layer.{layer}.output.LayerNorm"] for layer in (0, 1))
        for node in model.graph.node:
            node.input[:] = [before if name == after else name for name in node.input]

    bench.assert_caught(planted_in_graph(change), "parity", "the student would with layer 1 left out")


def test_a_layer_whose_weights_are_gone(bench: Bench, planted_in_graph: Callable[[Change], Path]) -> None:
    """As a compiler leaves them out that skips the layer."""

    def change(model: onnx.ModelProto) -> None:
        gone = "bert.encoder.layer.1."
        norms = {node.input[1].removesuffix(".weight"): node.output[0] for node in nodes(model, "LayerNormalization")}
        before, after = (norms[f"bert.encoder.layer.{layer}.output.LayerNorm"] for layer in (0, 1))
        needed = {before}
        for node in model.graph.node:
            node.input[:] = [before if name == after else name for name in node.input]
        for _ in range(40):  # nodes that read a weight of the layer, or one another
            dead = {name for node in model.graph.node for name in node.output
                    if any(given.startswith(gone) or given in needed - {before} for given in node.input)}  # fmt: skip
            needed |= dead
        kept = [node for node in model.graph.node if not needed - {before} & {*node.output, *node.input}]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        weights = [tensor for tensor in model.graph.initializer if not tensor.name.startswith(gone)]
        del model.graph.initializer[:]
        model.graph.initializer.extend(weights)

    bench.assert_caught(planted_in_graph(change), "weight audit", "layer 1 is missing")


def test_outputs_that_change_from_call_to_call(bench: Bench, planted_in_graph: Callable[[Change], Path]) -> None:
    def change(model: onnx.ModelProto) -> None:
        last = producer(model, "logits")
        last.output[0] = "quiet"
        noise = helper.make_node("RandomNormalLike", ["quiet"], ["noise"], scale=0.05)
        model.graph.node.extend([noise, helper.make_node("Add", ["quiet", "noise"], ["logits"])])

    bench.assert_caught(planted_in_graph(change), "determinism", "it is not deterministic", "drawn at random")


@pytest.mark.parametrize(("axis", "size", "name"), [(0, 2, "batch"), (1, 16, "sequence")])
def test_an_axis_baked_in(
    axis: int, size: int, name: str, bench: Bench, planted_in_graph: Callable[[Change], Path]
) -> None:
    def change(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[axis].dim_value = size

    bench.assert_caught(planted_in_graph(change), "shapes", f"the {name} axis is baked in at {size}")


def test_a_dropped_causal_mask(
    tiny_checkpoint: Any, write_jsonl: Any, texts: list[str], tmp_path: Path, bench: Bench
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    causal = [part for part in checkpoint.module.modules() if getattr(part, "is_causal", False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "create_causal_mask", masking_utils.create_bidirectional_mask)
        for part in causal:
            patch.setattr(part, "is_causal", False)
        patch.setattr(exporting, "_check", lambda *_: [])  # the export would refuse it
        shapes = ShapeRange(max_batch=8, opt_batch=2, max_sequence=48, opt_sequence=16)
        export(checkpoint, ExportSettings(backend="onnx", shapes=shapes, kv_cache=False), tmp_path / "llama")
    rows = checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts]))
    teacher = load_checkpoint(tiny_checkpoint("llama", "text-generation"))
    said = "the causal mask is dropped"
    report = bench.assert_caught(tmp_path / "llama", "causal mask", said, teacher=teacher, data=rows)
    parity = next(check for check in report.candidates[0].checks if check.name == "parity")
    assert "the student would with the causal mask dropped" in parity.detail
