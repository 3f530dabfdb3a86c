"""ExecuTorch: trace a checkpoint's module into a `.pte` program whose operators XNNPACK runs where it can."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.checkpoint import Checkpoint
from .artifact import TensorSpec
from .inputs import dynamic_shapes, longest, probe_batch
from .onnx import quiet_exporters
from .options import ExecuTorchOptions
from .precision import models_with_attention
from .settings import ExportSettings, ShapeRange
from .unsupported import failures_named

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel

PROGRAM_FILE = "model.pte"
_CHATTER = ("torchao", "torch.utils._pytree", "executorch", "coremltools")


def export_program(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    options: ExecuTorchOptions,
    calibration: Sequence[Mapping[str, torch.Tensor]] = (),
) -> ExportedModel:
    """Trace the checkpoint's module and lower it for XNNPACK, quantised where the precision is `int8`.

    Batch and sequence vary within `settings.shapes`; memory is planned for the largest of both.
    """
    int8, dynamic = settings.precision == "int8", options.activations == "dynamic"
    if dynamic:  # the graph is run once all the same
        calibration = [probe_batch(checkpoint, settings.shapes.min_batch, settings.shapes.min_sequence)]
    projections = _linear_projections if int8 else nullcontext
    with quiet_executorch(), failures_named(checkpoint.module), _plain_attention(checkpoint.module), projections():
        try:
            return _lowered(checkpoint, settings, _quantizer(dynamic, calibration) if int8 else None)
        except AssertionError as error:
            if not (int8 and dynamic) or "dependency cycles" not in str(error):
                raise
            with _products_apart():
                return _lowered(checkpoint, settings, _quantizer(dynamic, calibration))


def _lowered(checkpoint: Checkpoint, settings: ExportSettings, quantizer: Any) -> ExportedModel:
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    varying = dynamic_shapes(checkpoint, settings.shapes)
    traced = probe_batch(checkpoint, *_traced_sizes(checkpoint, settings.shapes), padded=True)
    sample = {**traced, **checkpoint.task.forward_flags()}
    with _unfixed_splits():
        config = ExecutorchConfig(dynamic_shapes=varying, quantizer=quantizer)
        return ExecutorchExporter().export(checkpoint.module, sample, config)


def _traced_sizes(checkpoint: Checkpoint, shapes: ShapeRange) -> tuple[int, int]:
    """Batch and sequence of the traced sample: near the largest, since transformers plans memory for what it cannot
    compute by four times the sample's; and numbers that divide no size of the model, since ExecuTorch takes a size that
    happens to be that of a layer for fixed.
    """
    taken = {size for parameter in checkpoint.module.parameters() for size in parameter.shape}
    taken |= {value for value in checkpoint.model.config.to_dict().values() if isinstance(value, int)}
    top = longest(checkpoint, shapes)
    batch = _near_largest(shapes.min_batch, shapes.max_batch, taken)
    return batch, _near_largest(shapes.min_sequence, top, {*taken, batch})


def _near_largest(smallest: int, most: int, taken: set[int]) -> int:
    if smallest == most:
        return most
    sizes = [size for size in range(most, max(smallest, -(-most // 2)) - 1, -1) if size not in taken]
    apart = [size for size in sizes if _is_prime(size) and all(other % size for other in taken if other)]
    return [*apart, *sizes, most][0]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@contextmanager
def quiet_executorch() -> Iterator[None]:
    """Keep what ExecuTorch and what it is built on say of themselves out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet_exporters():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Attention written out, with a mask that is added: all of it is XNNPACK's. torch's fused attention comes apart
    into comparisons and selections of whole score matrices, which are not, and take as long as all else together."""
    models = models_with_attention(module)
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation("eager")
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


@contextmanager
def _unfixed_splits() -> Iterator[None]:
    """ExecuTorch's check of types takes the first part of a split tensor for the list of all, and asks how long it is:
    that fixes the batch at the sample's. Such operators pass unchecked."""
    from executorch.exir.verification.arg_validator import EdgeOpArgValidator

    original = EdgeOpArgValidator.call_function

    def call_function(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        returns = getattr(getattr(target, "_schema", None), "returns", ())
        lists = any(each.type == torch.ListType.ofTensors() for each in returns)
        return (
            torch.fx.Interpreter.call_function(self, target, args, kwargs)
            if lists
            else original(self, target, args, kwargs)
        )

    EdgeOpArgValidator.call_function = call_function
    try:
        yield
    finally:
        EdgeOpArgValidator.call_function = original


@contextmanager
def _products_apart() -> Iterator[None]:
    """Each quantised product is a graph of its own, as ExecuTorch's recipes for language models have it: where all that
    can be is put together, the partitioner sometimes makes groups that wait for one another."""
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from transformers.exporters import exporter_executorch

    prepare = exporter_executorch._BACKEND_PREPARE["xnnpack"]

    def prepare_apart(model: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], list[Any]]:
        module, prepared, _ = prepare(model, inputs)
        products = XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)
        return module, prepared, [products, XnnpackPartitioner()]

    exporter_executorch._BACKEND_PREPARE["xnnpack"] = prepare_apart
    try:
        yield
    finally:
        exporter_executorch._BACKEND_PREPARE["xnnpack"] = prepare


@contextmanager
def _linear_projections() -> Iterator[None]:
    """GPT-2's projections, whose weights lie [in, out], as the linear layers that the quantiser knows."""
    from transformers.pytorch_utils import Conv1D

    def forward(self: Any, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(values, self.weight.T, self.bias)

    kind: Any = Conv1D
    original = kind.forward
    kind.forward = forward
    try:
        yield
    finally:
        kind.forward = original


def _quantizer(dynamic: bool, calibration: Sequence[Mapping[str, torch.Tensor]]) -> Any:
    """Linear layers alone: weights in 8 bits with a scale a channel, and what they are multiplied with in 8 bits with a
    scale a token, or one for all that was measured. The residual stream stays float: its range is the widest."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from transformers.exporters import PT2EQuantizer

    class LinearQuantizer(XNNPACKQuantizer):
        def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            """Nothing, where the original makes a float tensor of each number, those added to indices included."""
            return model

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    annotator = LinearQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    return PT2EQuantizer(annotator, calibration_dataset=[dict(batch) for batch in calibration])


def tensor_specs(exported: ExportedModel) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a program in its own order, as the manifest lists them."""
    metadata = exported.components["model"].metadata
    program = exported.program.exported_program()
    taken = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    inputs = [nodes[name].meta["val"] for name in taken if name in nodes]
    (last,) = (node for node in program.graph_module.graph.nodes if node.op == "output")
    outputs = [node.meta["val"] for node in last.args[0]]
    return _specs(list(metadata.kwargs), inputs), _specs(_output_names(metadata.out_spec), outputs)


def _output_names(dumped: str) -> list[str]:
    """The names that the model gives its outputs, those of nested ones joined by dots."""
    from torch.utils import _pytree
    from transformers.exporters.metadata import load_treespec

    spec = load_treespec(dumped)
    paths, _ = _pytree.tree_flatten_with_path(_pytree.tree_unflatten(range(spec.num_leaves), spec))
    return [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]


def _specs(names: Sequence[str], values: Sequence[torch.Tensor]) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=name,
            dtype=str(value.dtype).removeprefix("torch."),
            shape=[size if isinstance(size, int) else None for size in value.shape],
        )
        for name, value in zip(names, values, strict=True)
    ]
