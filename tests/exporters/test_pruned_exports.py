"""Pruned models leave the house as any other: sizes that differ by layer, and channels in another order, in every
architecture, on the two runtimes in turn. An export is compared with torch and audited before it appears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.anatomy import ANATOMIES
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.shapes import KEY
from limbeck.models.surgery import HeadSelection, Selection, select
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.steps import export, prune

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=32, opt_sequence=16)
SAME_CODE = ("camembert", "xlm-roberta", "mistral", "qwen2")
"""Families whose graph is that of RoBERTa or Llama; how they are cut is tested with the surgery."""
FAMILIES = sorted(ANATOMIES.keys() - set(SAME_CODE))
EXPORTS = [(family, ("onnx", "openvino")[place % 2]) for place, family in enumerate(FAMILIES)]
QUICK = ("bert", "mpnet", "llama")
"""Those that are cut in ways of their own: plain, a bias that layers share, grouped heads."""
DECODERS = ("gpt2", "llama", "qwen3")


def loaded(family: str, tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    task = "text-generation" if family in DECODERS else "text-classification"
    return load_checkpoint(tiny_checkpoint(family, task=task), task)


def uneven(checkpoint: Checkpoint, family: str) -> Checkpoint:
    """One head of the first layer and, where the family lets layers differ, three quarters of the second's."""
    model = checkpoint.model
    groups = getattr(model.config, "num_key_value_heads", 4)
    shared = 4 // groups  # four query heads in all
    first, second = [0], ([0] if family == "mpnet" else list(range(groups))[: max(1, groups - 1)])
    heads = [
        HeadSelection(torch.tensor([key * shared + each for key in keys for each in range(shared)]), torch.tensor(keys))
        for keys in (first, second)
    ]
    selection = Selection(heads=heads, ffn=[torch.arange(24), torch.arange(3, 35)])
    smaller = select(model, selection)
    return replace(checkpoint, model=smaller, hash=hash_of_model(smaller))


@pytest.mark.parametrize(
    ("family", "backend"),
    [pytest.param(*each, marks=[pytest.mark.thorough] * (each[0] not in QUICK)) for each in EXPORTS],
)
def test_a_model_whose_layers_differ_and_whose_channels_moved_is_exported_as_it_is(
    family: str, backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = uneven(loaded(family, tiny_checkpoint), family)
    checkpoint = prune(checkpoint, PruneSettings(pattern="2:4", permute=True))
    checkpoint.save(tmp_path / "pruned")
    again = load_checkpoint(tmp_path / "pruned")
    assert again.hash == checkpoint.hash and hasattr(again.model.config, KEY)
    manifest = export(again, ExportSettings(backend=backend, shapes=SMALL), tmp_path / "artifact")
    assert {"parity", "weight audit"} <= {check.name for check in manifest.checks if check.passed}
    assert manifest.parameters == sum(parameter.numel() for parameter in checkpoint.module.parameters())
    assert manifest.parent_hash == checkpoint.hash
