"""Cutting feed-forward channels: what is removed is what was masked, and the result is an ordinary model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, PreTrainedModel

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.batching import Batch, pad
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.surgery import Selection, select
from limbeck.models.tasks.base import tokenize
from limbeck.prune.pruning import prune
from limbeck.prune.settings import PruneSettings
from limbeck.prune.structured import WIDTH_MULTIPLE, kept_width, prune_ffn

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))


def batch_of(checkpoint: Checkpoint, texts: list[str]) -> Batch:
    return checkpoint.model_inputs(pad(tokenize(texts, checkpoint.tokenizer, 64), checkpoint.tokenizer))


@torch.inference_mode()
def hidden_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model.eval()(**batch).last_hidden_state


@contextmanager
def masked(model: PreTrainedModel, kept: list[torch.Tensor]) -> Iterator[None]:
    """Zero the activations of every channel that is not kept."""
    handles = []
    for block, channels in zip(anatomy_of(model).ffn(model), kept, strict=True):
        mask = torch.zeros(block.width).index_fill(0, channels, 1.0)
        handles.append(block.down.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@every_family
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_removed_channels_compute_what_masked_channels_compute(
    family: str, data: st.DataObject, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    batch = batch_of(checkpoint, texts[:4])
    width = data.draw(st.integers(1, 64))
    choose = st.lists(st.integers(0, 63), min_size=width, max_size=width, unique=True).map(sorted).map(torch.tensor)
    kept = [data.draw(choose) for _ in anatomy_of(checkpoint.model).ffn(checkpoint.model)]
    with masked(checkpoint.model, kept):
        expected = hidden_of(checkpoint.model, batch)
    assert torch.allclose(hidden_of(select(checkpoint.model, Selection(ffn=kept)), batch), expected, atol=1e-5)


@every_family
def test_a_pruned_folder_loads_with_plain_transformers(
    family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    batch = batch_of(checkpoint, texts[:4])
    pruned = prune(checkpoint, PruneSettings(structure="ffn", keep=0.5))
    expected = hidden_of(pruned.model, batch)
    pruned.save(tmp_path / "pruned")
    loaded, report = AutoModel.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    assert [block.width for block in anatomy_of(loaded).ffn(loaded)] == [32, 32]
    assert torch.allclose(hidden_of(loaded, batch), expected, atol=1e-5)
    assert not torch.allclose(expected, hidden_of(checkpoint.model, batch), atol=1e-3)


def test_keeping_everything_changes_nothing(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("modernbert"))
    result = prune_ffn(checkpoint, keep=1.0)
    assert result.model is not checkpoint.model
    assert hash_of_model(result.model) == checkpoint.hash


def test_the_checkpoint_that_came_in_is_left_as_it_was(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    prune_ffn(checkpoint, keep=0.25)
    assert hash_of_model(checkpoint.model) == checkpoint.hash


@given(width=st.integers(1, 5000), keep=st.floats(0.001, 1.0))
def test_widths_are_multiples_near_what_was_asked_for(width: int, keep: float) -> None:
    kept = kept_width(width, keep)
    assert 0 < kept <= width
    assert kept == width or kept % WIDTH_MULTIPLE == 0
    assert abs(kept - keep * width) <= max(WIDTH_MULTIPLE / 2, WIDTH_MULTIPLE - keep * width)
    assert keep < 1 or kept == width


def test_the_step_says_what_was_cut_and_survives_a_save(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    pruned = prune(checkpoint, PruneSettings(structure="ffn", keep=0.3), rationale="fits the box")
    pruned.save(tmp_path / "pruned")
    loaded = load_checkpoint(tmp_path / "pruned")
    step = loaded.lineage.steps[-1]
    assert (step.verb, step.method, step.rationale) == ("prune", "ffn by magnitude", "fits the box")
    assert step.parent == checkpoint.hash and step.data is None
    assert [(width.layer, width.before, width.after) for width in step.widths] == [
        (f"bert.encoder.layer.{index}", 64, 16) for index in range(2)
    ]
    assert step.note is not None and "19.2 asked for, rounded to a multiple of 8" in step.note
    assert step.settings["keep"] == 0.3
    assert loaded.hash == pruned.hash != checkpoint.hash


def test_the_rows_that_importance_saw_are_recorded(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    data = checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts]))
    seen: list[tuple[int, int]] = []
    chosen = PruneSettings(structure="ffn", keep=0.5, method="taylor", samples=20, batch_size=8)
    pruned = prune(checkpoint, chosen, data, progress=lambda done, total: seen.append((done, total)))
    record = pruned.lineage.steps[-1].data
    assert record is not None and (record.source, record.rows) == ("rows.jsonl", 20)
    rows = pruned.training_rows[record.fingerprint]
    assert set(rows) < set(data.row_hashes) and rows != data.row_hashes[:20]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    again = prune(checkpoint, chosen, data)
    assert again.hash == pruned.hash


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(keep: float, tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UsageError, match="more than 0 and at most 1"):
        PruneSettings(structure="ffn", keep=keep)
    with pytest.raises(UsageError, match="more than 0 and at most 1"):
        prune_ffn(load_checkpoint(tiny_checkpoint("bert")), keep)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"structure": "ffn", "pattern": "2:4", "keep": 0.5},
        {"structure": "ffn"},
        {"pattern": "2:4", "keep": 0.5},
        {"pattern": "2:4", "method": "taylor"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PruneSettings(**chosen)


def test_taylor_without_data_says_to_add_data(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with pytest.raises(UsageError) as caught:
        prune(checkpoint, PruneSettings(structure="ffn", keep=0.5, method="taylor"))
    assert caught.value.hint is not None and "--data" in caught.value.hint


def test_a_weight_that_holds_nan_is_named(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with torch.no_grad():
        checkpoint.model.get_parameter("encoder.layer.1.output.dense.weight")[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        prune(checkpoint, PruneSettings(structure="ffn", keep=0.5))


def test_channels_are_not_cut_out_of_a_sparse_model(tiny_checkpoint: TinyCheckpoint) -> None:
    sparse = prune(load_checkpoint(tiny_checkpoint("gpt2")), PruneSettings(pattern="2:4"))
    with pytest.raises(UsageError, match="break the pattern"):
        prune(sparse, PruneSettings(structure="ffn", keep=0.5))
