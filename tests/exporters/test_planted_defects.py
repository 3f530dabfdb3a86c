"""What exporters are known to get wrong, planted between the model and its program: the export step refuses the
program, and nothing of it is left. The compilers are the real ones; only the model that they are shown is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import masking_utils
from transformers.exporters.base import HfExporter
from transformers.models.gpt2 import modeling_gpt2

from limbeck.errors import ExportMismatch
from limbeck.exporters import precision as half
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.steps import export

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=48, opt_sequence=16)


@contextmanager
def fixed(axis: int, config: Any) -> Iterator[None]:
    config.dynamic_shapes = {
        name: {position: size for position, size in axes.items() if position != axis}
        for name, axes in config.dynamic_shapes.items()
    }
    yield


def fixed_batch(module: Any, config: Any) -> Any:
    return fixed(0, config)


def fixed_sequence(module: Any, config: Any) -> Any:
    """The product of attention's scores and values has the traced length for an inner axis."""
    return fixed(1, config)


@contextmanager
def ignored_mask(module: Any, config: Any) -> Iterator[None]:
    def everything(_: Any, args: Any, inputs: dict[str, Any]) -> Any:
        return args, {**inputs, "attention_mask": inputs["attention_mask"].clamp(min=1)}

    handle = module.register_forward_pre_hook(everything, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def no_causal_mask(module: Any, config: Any) -> Iterator[None]:
    causal = [part for part in module.modules() if getattr(part, "is_causal", False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gpt2, "create_causal_mask", masking_utils.create_bidirectional_mask)
        for part in causal:
            patch.setattr(part, "is_causal", False)
        yield


DEFECTS: dict[str, tuple[Any, str, str]] = {
    "the batch is baked in": (fixed_batch, "bert", r"parity: sentence_embedding"),
    "the sequence is baked in": (fixed_sequence, "bert", r"parity: sentence_embedding"),
    "padding is not masked": (ignored_mask, "bert", r"parity: sentence_embedding at 5 x 24, padded differs"),
    "the causal mask is dropped": (no_causal_mask, "gpt2", r"parity: logits at .* differs"),
}
TASKS = {"bert": "sentence-similarity", "gpt2": "text-generation"}
BACKENDS = ("onnx", "openvino", "tensorrt")
QUICK = [
    ("the batch is baked in", "onnx"),
    ("the sequence is baked in", "onnx"),
    ("the sequence is baked in", "openvino"),
    ("padding is not masked", "onnx"),
    ("the causal mask is dropped", "tensorrt"),
]
"""Each defect, and each backend, for `make test`; the others are thorough."""
THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    ("defect", "backend"),
    [
        pytest.param(*pair, marks=[THOROUGH] * (pair not in QUICK))
        for pair in ((defect, backend) for backend in BACKENDS for defect in DEFECTS)
    ],
)
def test_a_planted_defect_is_refused(
    defect: str, backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, family, said = DEFECTS[defect]
    exporter = HfExporter.export

    def defective(self: Any, model: Any, inputs: Any, config: Any) -> Any:
        with plant(model, config):
            return exporter(self, model, inputs, config)

    monkeypatch.setattr(HfExporter, "export", defective)
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=TASKS[family]), task=TASKS[family])
    settings = ExportSettings(backend=backend, precision="fp32", shapes=SMALL)
    with pytest.raises(ExportMismatch, match=said) as refused:
        export(checkpoint, settings, tmp_path / "out")
    assert refused.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def large_activations(checkpoint: Any) -> None:
    """Past float16's end inside the feed-forward block, as some trained models have it."""
    block = checkpoint.module.get_submodule("encoder.encoder.layer.1")
    with torch.no_grad():
        block.intermediate.dense.weight.mul_(2_000)
        block.output.dense.weight.mul_(2_000)


def large_residual(checkpoint: Any) -> None:
    """Within float16, whose end the squares inside the next LayerNorm pass."""
    with torch.no_grad():
        checkpoint.module.get_submodule("encoder.encoder.layer.1.output.dense").bias.add_(torch.linspace(-900, 900, 32))


@pytest.mark.parametrize("backend", ["onnx", pytest.param("tensorrt", marks=THOROUGH)])
def test_activations_that_leave_float16_are_refused(
    backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    large_activations(checkpoint)
    settings = ExportSettings(backend=backend, precision="fp16", shapes=SMALL)
    with pytest.raises(ExportMismatch, match=r"encoder\.encoder\.layer\.1\.\S+ overflows float16") as refused:
        export(checkpoint, settings, tmp_path / "out")
    assert "bf16" in str(refused.value.hint) and list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_a_layer_norm_in_float16_that_overflows_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    large_residual(checkpoint)
    settings = ExportSettings(backend="tensorrt", precision="fp16", shapes=SMALL)
    manifest = export(checkpoint, settings, tmp_path / "island")  # as it is: the norm is a float32 island
    assert all(check.passed for check in manifest.checks)
    monkeypatch.setattr(half, "is_normalisation", lambda part: False)  # the defect: the islands are forgotten
    with pytest.raises(ExportMismatch, match=r"layer\.1\.output\.LayerNorm overflows float16: the square") as refused:
        export(checkpoint, settings, tmp_path / "out")
    assert refused.value.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["island"]
