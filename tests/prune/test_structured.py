"""Cutting feed-forward channels: what is removed is what was masked, and the result is an ordinary model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from limbeck.models.gates import Gates, gated
from limbeck.models.importance import IMPORTANCES, Scores, get_importance
from limbeck.models.shapes import KEY, shapes_of
from limbeck.models.surgery import Selection, select
from limbeck.models.tasks.base import tokenize
from limbeck.prune.choice import WIDTH_MULTIPLE, kept_width
from limbeck.prune.one_shot import SPARSIFIERS
from limbeck.prune.pruning import prune
from limbeck.prune.settings import STRUCTURE_METHODS, ZERO_METHODS, PruneSettings
from limbeck.prune.structured import choose

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))


def batch_of(checkpoint: Checkpoint, texts: list[str]) -> Batch:
    return checkpoint.model_inputs(pad(tokenize(texts, checkpoint.tokenizer, 64), checkpoint.tokenizer))


@torch.inference_mode()
def hidden_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model.eval()(**batch).last_hidden_state


def gates_of(model: PreTrainedModel, selection: Selection) -> Gates:
    """1 on what stays, 0 on what goes."""
    shapes = shapes_of(model)
    ones = {index: torch.zeros(shape.ffn) for index, shape in enumerate(shapes.layers)}
    heads = {index: torch.zeros(shape.heads) for index, shape in enumerate(shapes.layers)}
    for index in range(len(shapes.layers)):
        if selection.ffn is not None:
            ones[index][selection.ffn[index]] = 1
        if selection.heads is not None:
            heads[index][selection.heads[index].query] = 1
    layers = None
    if selection.layers is not None:
        layers = {index: torch.tensor(float(index in selection.layers)) for index in range(len(shapes.layers))}
    return Gates(
        ffn=ones if selection.ffn is not None else {},
        heads=heads if selection.heads is not None else {},
        layers=layers or {},
    )


@every_family
@pytest.mark.parametrize("structure", ["heads", "ffn", "layers"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_removed_computes_what_was_masked(
    family: str, structure: str, data: st.DataObject, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    batch = batch_of(checkpoint, texts[:4])
    share = st.floats(0.25, 1)
    keep: Any = data.draw(share)
    if structure != "layers" and not (structure == "heads" and family == "mpnet"):
        keep = data.draw(st.one_of(share, st.lists(share, min_size=2, max_size=2)))
    wanted = PruneSettings(structure=structure, keep=keep, method="magnitude")  # type: ignore[arg-type]
    scores = get_importance("magnitude").scores(checkpoint, [structure])
    selection = choose(checkpoint.model, wanted, scores)
    with gated(checkpoint.model, gates_of(checkpoint.model, selection)):
        expected = hidden_of(checkpoint.model, batch)
    pruned = prune(checkpoint, wanted)
    assert torch.allclose(hidden_of(pruned.model, batch), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
@pytest.mark.parametrize("structure", ["heads", "ffn"])
def test_layers_keep_what_reaches_the_common_threshold(
    family: str, structure: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    units = shapes_of(checkpoint.model).layers[0].ffn if structure == "ffn" else 4
    high, low = torch.full((units,), 2.0, dtype=torch.float64), torch.full((units,), 1.0, dtype=torch.float64)
    scores = Scores(**{structure: [low, high]})  # type: ignore[arg-type]
    wanted = PruneSettings(structure=structure, keep=0.5, allocation="global")  # type: ignore[arg-type]
    selection = choose(checkpoint.model, wanted, scores)
    shapes = shapes_of(select(checkpoint.model, selection)).layers
    assert getattr(shapes[1], structure) == units
    assert getattr(shapes[0], structure) < units
    protected = choose(checkpoint.model, wanted.model_copy(update={"protect": [0]}), scores)
    assert getattr(shapes_of(select(checkpoint.model, protected)).layers[0], structure) == units


@every_family
def test_half_the_width_runs_with_every_head(family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> None:
    """Where a configuration ties heads to the width, sizes of its own say it (electra: 16 is its embeddings' width)."""
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    pruned = prune(checkpoint, PruneSettings(structure="width", keep=0.75 if family == "electra" else 0.5))
    assert pruned.model.config.hidden_size == (24 if family == "electra" else 16)
    assert shapes_of(pruned.model).layers == shapes_of(checkpoint.model).layers
    assert shapes_of(pruned.model).head_size == 8
    assert hidden_of(pruned.model, batch_of(checkpoint, texts[:4])).shape[-1] == pruned.model.config.hidden_size


def test_heads_and_width_cut_together_load_with_plain_transformers(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    narrow = prune(checkpoint, PruneSettings(structure="width", keep=0.5))
    assert hasattr(narrow.model.config, KEY)
    both = prune(narrow, PruneSettings(structure="heads", keep=0.5))
    assert not hasattr(both.model.config, KEY)
    both.save(tmp_path / "both")
    batch = batch_of(both, texts[:4])
    assert torch.equal(hidden_of(AutoModel.from_pretrained(tmp_path / "both"), batch), hidden_of(both.model, batch))


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
    result = prune(checkpoint, PruneSettings(structure="ffn", keep=1.0))
    assert result.model is not checkpoint.model
    assert result.hash == checkpoint.hash


def test_the_checkpoint_that_came_in_is_left_as_it_was(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    for structure in ("heads", "ffn", "width"):
        prune(checkpoint, PruneSettings(structure=structure, keep=0.5))  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("family", "protect", "kept"), [("bert", [0], [0]), ("bert", [1], [1]), ("modernbert", [], [0])]
)
def test_layers_that_must_stay_do(
    family: str, protect: list[int], kept: list[int], tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    wanted = PruneSettings(structure="layers", keep=0.5, method="magnitude", protect=protect)
    for scores in ([1.0, 2.0], [2.0, 1.0]):
        chosen = choose(checkpoint.model, wanted, Scores(layers=torch.tensor(scores, dtype=torch.float64)))
        assert chosen.layers == kept


def test_no_more_windows_of_a_long_text_are_looked_at_than_samples(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    data = checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": " ".join(texts)}]))
    seen: list[tuple[int, int]] = []
    chosen = PruneSettings(structure="ffn", keep=0.5, method="fisher", samples=3, batch_size=1)
    prune(checkpoint, chosen, data, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def test_long_texts_are_looked_at_in_windows_of_the_length_that_is_asked_for(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    data = checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": " ".join(texts)}]))
    windows = []
    for length in (None, 16, 10 * checkpoint.max_length):
        chosen = PruneSettings(
            structure="ffn", keep=0.5, method="fisher", samples=None, max_length=length, batch_size=1
        )
        seen: list[int] = []
        prune(checkpoint, chosen, data, progress=lambda done, total, seen=seen: seen.append(total))
        windows.append(seen[-1])
    whole, short, longest = windows
    assert short > 3 * whole and longest == whole


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(keep: float) -> None:
    with pytest.raises(UsageError, match="more than 0 and at most 1"):
        PruneSettings(structure="ffn", keep=keep)
    with pytest.raises(UsageError, match="more than 0 and at most 1"):
        PruneSettings(structure="heads", keep=[1.0, keep])


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"structure": "ffn", "pattern": "2:4", "keep": 0.5},
        {"structure": "ffn"},
        {"pattern": "2:4", "keep": 0.5},
        {"pattern": "2:4", "method": "taylor"},
        {"pattern": "2:4", "repair": True},
        {"pattern": "two"},
        {"sparsity": 1.0},
        {"sparsity": 0.5, "permute": True},
        {"sparsity": 0.5, "method": "movement"},
        {"sparsity": 0.5, "block": [0, 4]},
        {"structure": "ffn", "keep": 0.5, "method": "magnitud"},
        {"structure": "heads", "keep": 0.5, "method": "block-influence"},
        {"structure": "layers", "keep": [0.5, 0.5]},
        {"structure": "layers", "keep": 0.5, "repair": True},
        {"structure": "width", "keep": 0.5, "protect": [0]},
        {"structure": "ffn", "keep": [0.5, 0.5], "allocation": "global"},
        {"budget": {"size_mb": 40}, "method": "magnitude"},
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


@pytest.mark.parametrize("chosen", [{"structure": "ffn", "keep": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5}])
def test_a_weight_that_holds_nan_is_named(chosen: dict[str, Any], tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with torch.no_grad():
        checkpoint.model.get_parameter("encoder.layer.1.output.dense.weight")[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        prune(checkpoint, PruneSettings(**chosen))


def test_channels_are_not_cut_out_of_a_sparse_model(tiny_checkpoint: TinyCheckpoint) -> None:
    sparse = prune(load_checkpoint(tiny_checkpoint("gpt2")), PruneSettings(pattern="2:4"))
    with pytest.raises(UsageError, match="break the pattern"):
        prune(sparse, PruneSettings(structure="ffn", keep=0.5))


@pytest.mark.parametrize(
    ("family", "chosen", "said"),
    [
        ("bert", {"structure": "heads", "keep": 0.1}, "leaves none of 4 heads"),
        ("llama", {"structure": "heads", "keep": 0.1}, "in 2 groups that share keys and values"),
        ("bert", {"structure": "layers", "keep": 0.1, "method": "magnitude"}, "leaves none of 2 layers"),
        ("bert", {"structure": "ffn", "keep": 0.5, "protect": [2]}, r"protect names the layers \[2\]"),
        ("bert", {"structure": "ffn", "keep": [0.5]}, "keep has 1 shares, and the model has 2 layers"),
        ("bert", {"structure": "layers", "keep": 0.5, "method": "magnitude", "protect": [0, 1]}, "left whole"),
        ("mpnet", {"structure": "heads", "keep": [1, 0.5]}, "must keep as many"),
        ("mpnet", {"structure": "heads", "keep": 0.5, "allocation": "global"}, "allocation must be uniform"),
        ("electra", {"structure": "width", "keep": 0.5}, "no projection after them"),
    ],
)
def test_what_a_model_cannot_have_is_said(
    family: str, chosen: dict[str, Any], said: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    with pytest.raises(UsageError, match=said):
        prune(load_checkpoint(tiny_checkpoint(family)), PruneSettings(**chosen))


def test_methods_are_known_without_loading_them() -> None:
    assert set(STRUCTURE_METHODS) == set(IMPORTANCES)
    assert set(ZERO_METHODS) == set(SPARSIFIERS)
