"""2:4 by torch: which layers, what is refused, how a kernel is chosen; and on a GPU, that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from limbeck import load_checkpoint
from limbeck.backends.base import ExportJob
from limbeck.backends.registry import backend_for, load_runner
from limbeck.backends.torch import TorchBackend
from limbeck.backends.torch_sparse import Timing, choose_kernels, is_two_of_four
from limbeck.errors import BackendUnavailable, UsageError
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.exporters.torch import in_precision, sparse_layers
from limbeck.models.checkpoint import Checkpoint
from limbeck.models.sparsity import is_semi_structured
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.steps import export, prune

TinyCheckpoint = Callable[..., Path]
SHAPES = ShapeRange(max_batch=8, opt_batch=8, max_sequence=64, opt_sequence=64)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch sees")


def wanted(compiler: str = "inductor", precision: str = "bf16", device: str = "cuda") -> ExportSettings:
    options = {"compiler": compiler, "device": device}
    values = {"backend": "torch", "precision": precision, "sparsity": "2:4", "shapes": SHAPES, "options": options}
    return ExportSettings.model_validate(values)


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    dense = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    return prune(dense, PruneSettings(pattern="2:4"))


# What goes together


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        (wanted(device="cpu"), "kernels for sparse weights on CUDA alone, and device is cpu", "device=cuda"),
        (wanted(compiler="aot"), "called from Python", "compiler=inductor"),
        (wanted(precision="fp32"), "half precision, not fp32", "bf16"),
    ],
)
def test_settings_without_sparse_kernels_are_refused(settings: ExportSettings, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        backend_for(settings)
    assert hint in str(refused.value.hint)


@without_cuda
def test_sparse_kernels_need_the_gpu_already_when_exported(pruned: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="CUDA was asked for where there is none"):
        export(pruned, wanted(), tmp_path / "out")
    with pytest.raises(BackendUnavailable, match="CUDA was asked for where there is none"):
        TorchBackend().export(ExportJob(pruned, wanted()), tmp_path)
    assert not list(tmp_path.iterdir())


# Which layers


def test_layers_that_kernels_could_take_are_listed(pruned: Checkpoint, tiny_checkpoint: TinyCheckpoint) -> None:
    found = {layer.layer: layer for layer in sparse_layers(pruned)}
    inside = [name for name, layer in found.items() if "encoder.layer" in name]
    assert len(inside) == 12
    assert all(found[name].eligible and found[name].pattern and found[name].zeros == 0.5 for name in inside)
    assert not found["classifier"].eligible and "not a multiple of 32" in found["classifier"].reason
    assert not found["bert.pooler.dense"].eligible and "outside the layers" in found["bert.pooler.dense"].reason
    half = {layer.layer: layer for layer in sparse_layers(in_precision(pruned, "bf16", "cpu"))}
    assert half == found, "rounding keeps zeros"
    dense = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    assert not any(layer.pattern for layer in sparse_layers(dense))


def test_weights_that_lie_the_other_way_round_are_not_for_torchs_kernels(tiny_checkpoint: TinyCheckpoint) -> None:
    gpt2 = prune(load_checkpoint(tiny_checkpoint("gpt2", task="text-generation")), PruneSettings(pattern="2:4"))
    turned = [layer for layer in sparse_layers(gpt2) if "attn" in layer.layer or "mlp" in layer.layer]
    assert turned and all(layer.pattern and not layer.eligible for layer in turned)
    assert all("Conv1D" in layer.reason for layer in turned)


rows_of_four = hnp.arrays(
    np.float32, st.tuples(st.just(32), st.sampled_from([64, 128])), elements=st.sampled_from([0, 0, 0, 1.5, -2])
)


@given(weight=rows_of_four, zeros=st.sets(st.integers(0, 3), max_size=3))
def test_the_pattern_is_what_the_format_of_the_kernels_holds(weight: np.ndarray, zeros: set[int]) -> None:
    """torch's own conversion, plain torch on the CPU: what is 2:4 comes back whole, other weights lose some."""
    for place in zeros:
        weight[:, place::4] = 0
    tensor = torch.from_numpy(weight).to(torch.float16)
    assert is_two_of_four(tensor) == is_semi_structured(weight, 1)
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(tensor))
    if is_two_of_four(tensor):
        assert torch.equal(back, tensor)
    else:
        assert not torch.equal(back, tensor)


# Which kernel


class Layers(nn.Module):
    """Two layers of one shape, one of another, and one that is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)
        self.wide = nn.Linear(8, 32, bias=False)
        self.norm = nn.LayerNorm(8)
        for part in (self.first, self.second, self.wide):
            part.weight.data[:, ::2] = 0


def test_a_layer_stays_dense_unless_sparse_is_faster_beyond_the_noise() -> None:
    seen = []

    def slower(part: nn.Linear, batch: torch.Tensor) -> Timing:
        seen.append((tuple(part.weight.shape), tuple(batch.shape), batch.dtype))
        return 1.0, {16: 1.4, 32: 0.99}[part.out_features]

    module = Layers()
    before = {name: value.clone() for name, value in module.named_parameters()}
    found = choose_kernels(module, ["first", "second", "wide"], rows=24, time=slower)
    assert [choice.kernel for choice in found] == ["dense", "dense", "dense"]
    assert [choice.gain for choice in found] == pytest.approx([1 / 1.4, 1 / 1.4, 1 / 0.99])
    assert seen == [((16, 8), (24, 8), torch.float32), ((32, 8), (24, 8), torch.float32)], "a shape is timed once"
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    assert found[0].row()["dense_ms"] == 1.0 and found[0].row()["gain"] == found[0].gain


def test_a_layer_that_cannot_be_sparse_says_why() -> None:
    def never(part: nn.Linear, batch: torch.Tensor) -> Timing:
        raise RuntimeError("Both dimensions must be larger\nthan that")

    module = Layers()
    module.second.weight.data[3, :4] = 1.0
    names = ["first", "second", "norm", "gone"]
    found = {choice.layer: choice for choice in choose_kernels(module, names, rows=4, time=never)}
    assert {choice.kernel for choice in found.values()} == {"dense"}
    assert found["first"].reason == "Both dimensions must be larger"
    assert found["second"].reason == "its weight is not 2:4", "the sparse format would drop what breaks the pattern"
    assert "LayerNorm" in found["norm"].reason and "no such layer" in found["gone"].reason
    assert all(choice.gain is None for choice in found.values())


# On a GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_sparse_program_computes_what_its_model_computes(compiler: str, pruned: Checkpoint, tmp_path: Path) -> None:
    manifest = export(pruned, wanted(compiler), tmp_path / "out")
    assert [check.passed for check in manifest.checks] == [True, True]
    evidence: dict[str, Any] = manifest.evidence["2:4"]
    assert len(evidence["layers"]) == 12 and evidence["dense twin"]["ratio"] > 0
    assert {row["kernel"] for row in evidence["layers"]} <= {"sparse", "dense"}
    runner, _ = load_runner(tmp_path / "out")
    assert "2:4 layers" in runner.properties["sparse"] and runner.properties["device"] == torch.cuda.get_device_name()


@pytest.mark.gpu
@needs_cuda
def test_sparse_weights_multiply_as_dense_ones_do() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).to("cuda", torch.bfloat16)
    for part in (module[0], module[2]):
        part.weight.data.view(-1, 4)[:, 2:] = 0
    batch = torch.randn(512, 1024, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        expected = module(batch)
        found = choose_kernels(module, ["0", "2"], rows=512, time=lambda part, batch: (2.0, 1.0))
        assert [choice.kernel for choice in found] == ["sparse", "sparse"]
        torch.testing.assert_close(module(batch), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@needs_cuda
def test_a_package_for_cuda_computes_what_its_model_computes(pruned: Checkpoint, tmp_path: Path) -> None:
    options = {"compiler": "aot", "device": "cuda"}
    settings = ExportSettings.model_validate({"backend": "torch", "precision": "bf16", "options": options})
    manifest = export(pruned, settings, tmp_path / "out")
    assert [check.passed for check in manifest.checks] == [True, True]
