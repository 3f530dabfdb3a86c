"""Cutting one part at a time: passes from any layer on answer as whole ones, cuts are what pruning would do, and the
model is afterwards what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import anatomy_of
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.data import read_data
from limbeck.models.importance import Scores
from limbeck.prune.sensitivity import (
    STRUCTURES,
    Cut,
    ResumablePass,
    SensitivitySettings,
    cutting,
    measure_cuts,
    rank_parts,
    structures_of,
)
from limbeck.recipes.sensitivity import sensitivity
from limbeck.validate.records.sensitivity import Sensitivity

Make = Callable[..., Path]
FAMILIES = ("bert", "roberta", "camembert", "xlm-roberta", "distilbert", "electra", "mpnet", "modernbert", "gpt2",
            "llama", "mistral", "qwen2", "qwen3")  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Any) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in texts[:12]])  # type: ignore[no-any-return]


def loaded(folder: Path, file: Path, task: str = "sentence-similarity") -> tuple[Checkpoint, Examples]:
    checkpoint = load_checkpoint(folder, task)
    data = checkpoint.read(file)
    return checkpoint, checkpoint.task.examples(
        data, checkpoint.tokenizer, checkpoint.max_length, checkpoint.model.config
    )


def settings(structures: Sequence[str] = STRUCTURES, shares: Sequence[float] = (0.25, 0.5), **more: Any) -> Any:
    return SensitivitySettings(structures=tuple(structures), shares=tuple(shares), **more)


def embeddings(answers: dict[str, np.ndarray]) -> np.ndarray:
    return answers["embedding"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_from_any_layer_on_answers_as_a_whole_one(family: str, tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, examples = loaded(tiny_checkpoint(family), file)
    passes = ResumablePass(checkpoint, examples, batch_size=5)
    whole = embeddings(passes.answers())
    passes.advance()
    for _ in range(2):  # what was kept is not used up
        np.testing.assert_array_equal(embeddings(passes.answers()), whole)
    np.testing.assert_array_equal(embeddings(ResumablePass(checkpoint, examples, 5).answers()), whole)


def test_the_layers_before_the_start_are_not_computed(tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, examples = loaded(tiny_checkpoint("bert"), file)
    passes = ResumablePass(checkpoint, examples, batch_size=5)
    whole = embeddings(passes.answers())
    passes.advance()
    first = anatomy_of(checkpoint.model).ffn(checkpoint.model)[0].down
    first.weight.data.zero_()
    np.testing.assert_array_equal(embeddings(passes.answers()), whole)


@pytest.mark.parametrize("structure", ["heads", "ffn", "layers", "unstructured"])
def test_nothing_cut_is_the_uncut_model(structure: str, tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, examples = loaded(tiny_checkpoint("bert"), file)
    passes = ResumablePass(checkpoint, examples, batch_size=5)
    whole = embeddings(passes.answers())
    scores = rank_parts(checkpoint, examples, settings())
    units = {"heads": 4, "ffn": 64}.get(structure, 1)
    with cutting(checkpoint, Cut(structure, 0, 0.0, 0, units), scores):
        np.testing.assert_array_equal(embeddings(passes.answers()), whole)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_every_cut_moves_the_answers_and_leaves_no_trace(family: str, tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, examples = loaded(tiny_checkpoint(family), file)
    before, whole = hash_of_model(checkpoint.model), None
    passes = ResumablePass(checkpoint, examples, batch_size=5)
    whole = embeddings(passes.answers())
    ticks: list[tuple[int, int]] = []
    found = measure_cuts(
        passes, settings(), rank_parts(checkpoint, examples, settings()), embeddings, lambda *at: ticks.append(at)
    )
    assert {(cut.structure, cut.layer) for cut, _ in found} == {
        (name, layer) for name in STRUCTURES for layer in (0, 1)
    }
    assert len(found) == 2 * (3 * 2 + 2)
    assert all(not np.array_equal(answers, whole) for _, answers in found)
    assert hash_of_model(checkpoint.model) == before
    np.testing.assert_array_equal(embeddings(ResumablePass(checkpoint, examples, 5).answers()), whole)
    assert ticks[-1][0] == ticks[-1][1] == len(ticks)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_model_is_whole_again_after_an_interruption(structure: str, tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, examples = loaded(tiny_checkpoint("bert"), file)
    passes = ResumablePass(checkpoint, examples, batch_size=5)
    before, whole = hash_of_model(checkpoint.model), embeddings(passes.answers())
    chosen = settings([structure])
    scores = rank_parts(checkpoint, examples, chosen)

    def interrupted(done: int, total: int) -> None:
        if done == total - 1:  # in the last layer, in the middle of a pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_cuts(passes, chosen, scores, embeddings, interrupted)
    assert hash_of_model(checkpoint.model) == before
    np.testing.assert_array_equal(embeddings(ResumablePass(checkpoint, examples, 5).answers()), whole)


def test_weights_go_by_magnitude_and_by_the_share(tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, _ = loaded(tiny_checkpoint("bert"), file)
    down = anatomy_of(checkpoint.model).ffn(checkpoint.model)[1].down
    size, count = down.weight.detach().abs().clone(), down.weight.numel()
    with cutting(checkpoint, Cut("unstructured", 1, 0.25, 25, 100), None):
        zeros = down.weight == 0
    assert int(zeros.sum()) == count // 4
    assert size[zeros].max() <= size[~zeros].min()
    with cutting(checkpoint, Cut("2:4", 1, 0.5, 1, 2), None):
        assert ((down.weight.view(-1, 4) == 0).sum(dim=1) == 2).all()
    assert torch.equal(down.weight.abs(), size)


def test_the_least_important_go_first(tiny_checkpoint: Make, file: Path) -> None:
    """Channels without any weight are the least important, and the first to go: nothing changes."""
    checkpoint, examples = loaded(tiny_checkpoint("bert"), file)
    block = anatomy_of(checkpoint.model).ffn(checkpoint.model)[0]
    with torch.no_grad():
        block.down.weight[:, 10:26] = 0
    passes = ResumablePass(checkpoint, examples, batch_size=5)
    whole = embeddings(passes.answers())
    for method in ("taylor", "fisher", "magnitude"):
        chosen = settings(["ffn"], [0.25], method=method)
        scores = rank_parts(checkpoint, examples, chosen)
        assert scores is not None and scores.ffn is not None
        if method == "magnitude":  # of all weights of a channel: the others still count
            continue
        assert set(torch.argsort(scores.ffn[0])[:16].tolist()) == set(range(10, 26))
        with cutting(checkpoint, Cut("ffn", 0, 0.25, 16, 64), scores):
            np.testing.assert_allclose(embeddings(passes.answers()), whole, atol=1e-6)


def found_in(checkpoint: Checkpoint, file: Path, **more: Any) -> Sensitivity:
    return sensitivity(checkpoint, checkpoint.read(file), settings(**more))


@pytest.mark.parametrize("important", [0, 1])
def test_a_layer_that_is_built_to_matter_is_found(important: int, tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, _ = loaded(tiny_checkpoint("llama"), file)
    layers = anatomy_of(checkpoint.model).layers(checkpoint.model)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            anatomy = anatomy_of(checkpoint.model)
            for name in (anatomy.output, anatomy.down):  # what the layer adds
                layer.get_submodule(name).weight.mul_(3.0 if index == important else 1e-4)
    found = found_in(checkpoint, file)
    for structure in STRUCTURES:
        shown = found.shown(structure)
        assert shown[important].loss > 10 * abs(shown[1 - important].loss)
        assert found.drift_of(shown[important]) > found.drift_of(shown[1 - important])
        assert [item.layer for item in found.untouchable(structure)] == [important]


def test_a_structure_that_a_model_lacks(tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, _ = loaded(tiny_checkpoint("bert"), file)
    checkpoint.model.base_model.encoder.layer = checkpoint.model.base_model.encoder.layer[:1]
    checkpoint.model.config.num_hidden_layers = 1
    assert structures_of(checkpoint, SensitivitySettings()) == ("heads", "ffn", "2:4", "unstructured")
    with pytest.raises(InputError, match="no layers to cut: it is a single layer"):
        structures_of(checkpoint, settings(["layers"]))
    narrow = torch.nn.Linear(30, 32)
    for layer in checkpoint.model.base_model.encoder.layer:
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                layer.set_submodule(name, narrow)
    with pytest.raises(InputError, match=r"no 2:4 to cut: no sparse kernel takes its matrices"):
        structures_of(checkpoint, settings(["2:4"]))


def test_a_few_heads_are_cut_whole_and_never_all(tiny_checkpoint: Make, file: Path) -> None:
    """Of four heads one at least and three at most; shares that mean as many heads are measured once."""
    checkpoint, examples = loaded(tiny_checkpoint("bert"), file)
    chosen = settings(["heads"], [0.05, 0.25, 0.5, 0.95])
    calls = []
    found = measure_cuts(
        ResumablePass(checkpoint, examples, 12), chosen, rank_parts(checkpoint, examples, chosen), calls.append
    )
    assert [(cut.share, cut.cut, cut.units) for cut, _ in found if cut.layer == 1] == [
        (0.05, 1, 4), (0.25, 1, 4), (0.5, 2, 4), (0.95, 3, 4)
    ]  # fmt: skip
    assert len(calls) == 2 * 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"structures": ("head",)}, r"no structure 'head'; valid are heads, ffn, layers, 2:4, unstructured"),
        ({"structures": ()}, "No structure is named"),
        ({"shares": (0.5, 1.0)}, "share of 1 cannot be cut"),
        ({"shares": (0.0,)}, "share of 0 cannot be cut"),
        ({"shares": (-0.5,)}, "share of -0.5"),
        ({"shares": (float("nan"),)}, "share of nan"),
        ({"shares": ()}, "no share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SensitivitySettings(**bad)


def test_bad_input_is_refused(tiny_checkpoint: Make, file: Path, tmp_path: Path, write_jsonl: Any) -> None:
    checkpoint, examples = loaded(tiny_checkpoint("bert"), file)
    with pytest.raises(UsageError, match="no importance 'tailor'"):
        rank_parts(checkpoint, examples, settings(method="tailor"))
    with pytest.raises(UsageError, match="'block-influence'"):
        rank_parts(checkpoint, examples, settings(method="block-influence"))
    with pytest.raises(UsageError, match="tolerance of 2"):
        sensitivity(checkpoint, checkpoint.read(file), tolerance=2.0)
    with pytest.raises(InputError, match="at least 4"):
        found_in(checkpoint, write_jsonl(tmp_path / "few.jsonl", [{"text": "one"}, {"text": "two"}]))
    same = write_jsonl(
        tmp_path / "same.jsonl", [{"sentence1": "a cat", "sentence2": "a dog", "score": 1.0} for _ in range(8)]
    )
    with pytest.raises(InputError, match=r"spearman .* is not a finite number"):
        found_in(checkpoint, same)
    with torch.no_grad():
        next(checkpoint.model.parameters())[0, 0] = float("nan")
    with pytest.raises(InputError, match="holds NaN"):
        sensitivity(checkpoint, read_data(file, checkpoint.task.fields, optional=checkpoint.task.optional_fields))


def test_ranked_parts_need_scores(tiny_checkpoint: Make, file: Path) -> None:
    checkpoint, examples = loaded(tiny_checkpoint("bert"), file)
    assert rank_parts(checkpoint, examples, settings(["layers", "2:4"])) is None
    with (
        pytest.raises(UsageError, match="needs their importance"),
        cutting(checkpoint, Cut("heads", 0, 0.5, 2, 4), Scores()),
    ):
        pass
