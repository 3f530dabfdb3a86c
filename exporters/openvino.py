"""OpenVINO: trace a checkpoint's module into an IR with stable names, quantise it, and read its weights back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..models.batching import Run
from ..models.checkpoint import Checkpoint
from .artifact import TensorSpec
from .inputs import dynamic_shapes, longest, sample_inputs
from .kv_cache import CachedTrace
from .onnx import quiet_exporters
from .openvino_attention import repeat_heads_in_two_ways
from .openvino_scopes import name_module_outputs, recorded_scopes
from .parameter_names import TRANSPOSED, ParameterNames, rows_of
from .program import Floor, ProgramWeight, rounding_of
from .settings import ExportSettings, Precision, ShapeRange
from .unsupported import failures_named

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel

    from .options import OpenVINOOptions

GRAPH_FILE = "openvino_model.xml"
_SMOOTHED = "nncf_smooth_quant"
_RANKED_ON = 32
"""Calibration batches by which accuracy control ranks operators; the floor is measured on all validation data."""

COMPILE_PROPERTIES: dict[Precision, dict[str, str]] = {
    # The CPU plugin takes bf16 on its own where the CPU has it, and ignores the hint written in the IR: what a
    # precision means has to be said at compile time.
    "fp32": {"INFERENCE_PRECISION_HINT": "f32"},
    "fp16": {"INFERENCE_PRECISION_HINT": "f16"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    # What is not quantised (softmax, norms): bf16 where the CPU has it; elsewhere the plug-in takes f32.
    "int8": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8-weight-only": {"INFERENCE_PRECISION_HINT": "f32"},
    "int4-weight-only": {"INFERENCE_PRECISION_HINT": "f32"},
    "native": {},
}

CACHE_PRECISION = "KV_CACHE_PRECISION"


def cache_properties(precision: Precision, options: OpenVINOOptions) -> dict[str, str]:
    """What keys and values are stored in: what the program computes in, unless the options say otherwise. Left to
    itself, as `native` leaves it, the plug-in takes u8."""
    kept = options.kv_cache_precision or COMPILE_PROPERTIES[precision].get("INFERENCE_PRECISION_HINT")
    return {CACHE_PRECISION: kept} if kept else {}


def export_graph(checkpoint: Checkpoint, settings: ExportSettings, trace: CachedTrace | None = None) -> ExportedModel:
    """Trace the checkpoint's module into an `openvino.Model` whose weights carry their parameters' names; the cache of
    a `trace` is state of the program."""
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    shapes = trace.varying if trace else dynamic_shapes(checkpoint, settings.shapes)
    inputs = dict(trace.inputs) if trace else sample_inputs(checkpoint, settings.shapes)
    config = OpenVINOConfig(dynamic_shapes=shapes, stateful=trace is not None)
    with quiet_exporters(), failures_named(checkpoint.module), recorded_scopes() as scopes:
        exported = OpenVINOExporter().export(checkpoint.module, inputs, config)
    if trace is None:
        _bound_shapes(exported.program, checkpoint, settings.shapes)
    else:
        repeat_heads_in_two_ways(exported.program)
    name_weights(exported.program, checkpoint.module)
    name_module_outputs(exported.program, scopes)
    if settings.precision == "fp16":
        from openvino._offline_transformations import compress_model_transformation

        compress_model_transformation(exported.program)
    return exported


def _bound_shapes(model: Any, checkpoint: Checkpoint, shapes: ShapeRange) -> None:
    """The IR forgets the trace's ranges: without them it would take any size, and a static one gain nothing."""
    import openvino

    top = longest(checkpoint, shapes)
    sizes = [(shapes.min_batch, shapes.max_batch), (shapes.min_sequence, top)]
    bounds = openvino.PartialShape([openvino.Dimension(*size) for size in sizes])
    model.reshape(dict.fromkeys(model.inputs, bounds))


def name_weights(model: Any, module: nn.Module) -> None:
    """Name every constant after the parameter it holds, and the operation that multiplies or looks it up after the
    parameter's module, so that the weight can still be found once a quantiser has rewritten the constant."""
    names = ParameterNames(module)
    taken: set[str] = set()
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "Constant" or not operation.get_element_type().is_real():
            continue
        if operation.get_output_size() != 1 or operation.output(0).get_partial_shape().rank.get_length() == 0:
            continue
        name = names.find(_bits(operation.data))
        if name is None or name in taken:
            continue
        taken.add(name)
        operation.set_friendly_name(name)
        for port in operation.output(0).get_target_inputs():
            user = port.get_node()
            owner = name.removesuffix(TRANSPOSED).rpartition(".")[0]
            if user.get_type_name() in ("MatMul", "Gather") and owner not in taken:
                taken.add(owner)
                user.set_friendly_name(owner)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.int16) if values.dtype.itemsize == 2 else values


def quantize_weights_only(exported: ExportedModel, precision: Precision, options: OpenVINOOptions) -> None:
    """A weight-only precision by NNCF, rounded to nearest: int8 with a scale a channel, or int4 in groups (with
    embeddings and the last layer in int8). Nothing is calibrated."""
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

    if precision == "int4-weight-only":
        advanced = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        mode, group_size = nncf.CompressWeightsMode.INT4_SYM, options.group_size
        config = NNCFWeightCompressionConfig(mode=mode, group_size=group_size, advanced_parameters=advanced)
    else:
        config = NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT8_SYM)
    component = exported.components["model"]
    with quiet_exporters(), _nncf_silent():
        component.program = NNCFOpenVINOQuantizer(config).quantize(component.program, {}, "openvino")


def quantize_to_floor(
    exported: ExportedModel, calibration: Sequence[Mapping[str, torch.Tensor]], floor: Floor
) -> dict[str, Any]:
    """int8 by NNCF with accuracy control: what costs most is put back to float until the floor is held.

    Operators are ranked by how far the outputs of the first calibration batches move when one is put back.

    Returns:
        For the manifest: the metric, its floor, and the products that are float again.
    """
    import nncf

    component = exported.components["model"]
    feeds = [{name: value.numpy() for name, value in batch.items()} for batch in calibration]
    ranked = list(calibration[:_RANKED_ON])
    before = run_of(compiled(component.program))
    expected = [before(batch) for batch in ranked]

    def validate(program: Any, items: Any) -> tuple[float, list[float]]:
        """NNCF asks for the metric with every item, and ranks with those alone that moved most: the one item beyond
        the ranked batches stands for the validation data."""
        run, indices = run_of(program), list(items)
        nearness = [_nearness(run(ranked[i]), expected[i]) if i < len(ranked) else 0.0 for i in indices]
        metric = floor.measure(run) if len(ranked) in indices else float(np.mean(nearness))
        return metric, nearness

    # Putting a product back restores its weight as it was, but not what SmoothQuant multiplied its input by (NNCF 3.4).
    unsmoothed = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    )
    with quiet_exporters(), _nncf_silent():
        component.program = nncf.quantize_with_accuracy_control(
            component.program,
            calibration_dataset=nncf.Dataset(feeds),
            validation_dataset=nncf.Dataset(list(range(len(ranked) + 1))),
            validation_fn=validate,
            max_drop=max(floor.measure(before) - floor.least, 0.0),
            drop_type=nncf.DropType.ABSOLUTE,
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_quantization_parameters=unsmoothed,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=len(ranked)
            ),
        )
    return {"metric": floor.metric, "floor": abs(floor.least), "float again": _float_products(component.program)}


def _float_products(model: Any) -> list[str]:
    """Names of the matrix products with a stored weight that is not quantised."""
    products = (operation for operation in model.get_ordered_ops() if operation.get_type_name() == "MatMul")
    weights = ((product, product.input_value(1).get_node()) for product in products)
    return [product.get_friendly_name() for product, weight in weights if _is_float_constant(weight)]


def _is_float_constant(node: Any) -> bool:
    while node.get_type_name() in ("Reshape", "Convert", "Transpose"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and bool(node.get_element_type().is_real())


def compiled(model: Any) -> Any:
    """An `openvino.Model` compiled for the CPU in float32."""
    import openvino

    return openvino.Core().compile_model(model, "CPU", COMPILE_PROPERTIES["fp32"])


def run_of(program: Any) -> Run:
    """A compiled model as whatever else computes a batch's outputs."""
    inputs, outputs = ([port.get_any_name() for port in ports] for ports in (program.inputs, program.outputs))
    request = program.create_infer_request()

    def run(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        request.reset_state()
        values = request.infer({name: batch[name].numpy() for name in inputs})
        return {name: values[name].astype("float32") for name in outputs}

    return run


def _nearness(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Minus the mean squared difference: more is nearer."""
    return -float(np.mean([np.mean((found[name] - expected[name]) ** 2) for name in expected]))


def quantize_int8(exported: ExportedModel, calibration: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Post-training int8 by NNCF, calibrated on real batches."""
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig

    config = NNCFQuantizationConfig(model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration))
    quantizer = NNCFOpenVINOQuantizer(config, calibration_dataset=[dict(batch) for batch in calibration])
    component = exported.components["model"]
    with quiet_exporters(), _nncf_silent():
        component.program = quantizer.quantize(component.program, dict(calibration[0]), "openvino")


@contextmanager
def _nncf_silent() -> Iterator[None]:
    """NNCF draws its own progress bars and logs each step; limbeck reports the export as one step of its own."""
    import nncf
    from nncf.common.logging.track_progress import track

    nncf.set_log_level(logging.ERROR)
    original = track.__init__

    def without_bar(bar: Any, *args: Any, **settings: Any) -> None:
        original(bar, *args, **settings)
        bar.disable = True
        if getattr(bar, "progress", None) is not None:
            bar.progress.disable = True

    track.__init__ = without_bar
    try:
        yield
    finally:
        track.__init__ = original


def read_weights(path: Path, module: nn.Module) -> Iterator[ProgramWeight]:
    """Every named weight of a written IR, as float32 in its parameter's layout, one at a time.

    A quantised weight is `integer constant -> Convert -> Multiply(scale)`, in groups with a Reshape after it; where
    NNCF smoothed the activations (SmoothQuant, Xiao et al. 2023), the scale moved into the weight is taken out again.
    """
    import openvino

    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    owners = {name.rpartition(".")[0]: name for name in parameters if name.endswith(".weight")}
    input_first = {name for name, part in module.named_modules() if type(part).__name__ == "Conv1D"}  # GPT-2's
    model = openvino.Core().read_model(str(path))
    for operation in model.get_ordered_ops():
        name = operation.get_friendly_name()
        kind = operation.get_type_name()
        if kind in ("Constant", "Convert") and rows_of(name.removesuffix(TRANSPOSED))[0] in parameters:
            if kind == "Convert" or operation.get_element_type().is_real():
                values, step = _evaluate(operation)
                yield from ProgramWeight.of_constant(name, values, step)
        elif kind in ("MatMul", "Gather") and name in owners:
            weight = operation.input_value(1 if kind == "MatMul" else 0).get_node()
            if _is_dequantised(weight):
                values, step = _quantised_weight(operation, weight)
                turned = kind == "MatMul" and name in input_first
                yield ProgramWeight(owners[name], values.T if turned else values, step.T if turned else step)


def _is_dequantised(node: Any) -> bool:
    while node.get_type_name() in ("Reshape", "Convert"):
        node = node.input_value(0).get_node()
    return str(node.get_type_name()) == "Multiply"


def _quantised_weight(operation: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and steps, of a product as [outputs, inputs]."""
    values, step = _evaluate(weight)
    step = np.broadcast_to(step, values.shape)
    if operation.get_type_name() == "MatMul":
        smoothing = smoothing_of(operation.input_value(0).get_node())
        if not operation.get_attributes()["transpose_b"]:
            values, step = values.T, step.T
        if smoothing is not None:
            values, step = values * smoothing, step * smoothing
    return values, step


def smoothing_of(node: Any) -> np.ndarray | None:
    """The factor per input channel by which the activation is multiplied before the product, if it is."""
    if node.get_type_name() == "FakeQuantize":
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Multiply" and _SMOOTHED in node.get_friendly_name():
        return np.asarray(_evaluate(node.input_value(1).get_node())[0]).reshape(1, -1)
    return None


def _evaluate(node: Any) -> tuple[np.ndarray, np.ndarray | float]:
    """A constant sub-graph's value as float32, and the rounding that its storage explains."""
    kind = node.get_type_name()
    if kind == "Constant":
        return _stored(node)
    inputs = [_evaluate(port.get_source_output().get_node()) for port in node.inputs()]
    if kind == "Convert":
        return inputs[0]
    if kind == "Multiply":
        (values, step), (scale, scale_step) = inputs
        return values * scale, np.abs(step * scale) + np.abs(values * scale_step)
    if kind == "Subtract":
        return inputs[0][0] - inputs[1][0], inputs[0][1]
    if kind == "Reshape":
        values, step = inputs[0]
        shape = [int(size) for size in inputs[1][0]]
        return values.reshape(shape), np.broadcast_to(step, values.shape).reshape(shape)
    raise InputError(f"The weight {node.get_friendly_name()} is stored in a way that cannot be audited ({kind}).")


def _stored(constant: Any) -> tuple[np.ndarray, np.ndarray | float]:
    values, kind = np.asarray(constant.data), constant.get_element_type().get_type_name()
    if kind in ("i4", "u4"):
        packed = values.view(np.uint8).reshape(-1)
        halves = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)  # the lower half of a byte comes first
        shape = list(constant.get_output_shape(0))
        integers = halves[: int(np.prod(shape))].reshape(shape).astype(np.float32)
        integers = np.where(integers > 7, integers - 16, integers) if kind == "i4" else integers
        return integers, rounding_of(integers, 7 if kind == "i4" else 15)
    real = values.astype(np.float32)
    if values.dtype == np.float16:
        return real, np.abs(real) * 2.0**-11 + 2.0**-24
    if values.dtype in (np.int8, np.uint8):
        return real, rounding_of(real, np.iinfo(values.dtype).max)
    return real, 0.0


def tensor_specs(ports: Sequence[Any]) -> list[TensorSpec]:
    """Inputs or outputs of an `openvino.Model` as the manifest lists them."""
    specs = []
    for port in ports:
        shape = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
        specs.append(TensorSpec(name=port.get_any_name(), dtype=port.get_element_type().get_type_name(), shape=shape))
    return specs
