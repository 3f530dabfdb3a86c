"""The recipes in examples/: they parse, what they name is there, and each shows what it is there to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.backends.registry import get_backend
from limbeck.distill.objectives import build_objectives
from limbeck.models.data import Field, read_data
from limbeck.models.tasks import get_task
from limbeck.recipes.schema import Recipe, load_recipe
from limbeck.recipes.sources import Sources

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_names_only_what_there_is(name: str) -> None:
    found, sources = recipe(name), Sources(FOLDER)
    assert found.name == name
    task = get_task(found.task)
    for stage in found.stages:
        if stage.training is not None and stage.training.objectives is not None:
            build_objectives(stage.training.objectives, task, has_labels=False)
    for export in found.exports:
        assert export.precision in get_backend(export.backend).precisions
    data = found.data
    for source in (data.train, data.validation, data.development, *(stage.data for stage in found.stages)):
        # what does not lie in the repository is named by a variable
        assert source is None or source.startswith("${LIMBECK_DATA}/") or Path(sources.data(source)).is_file()
    assert f"`{name}.yaml`" in (FOLDER.parent / "README.md").read_text()


def test_each_shows_what_it_is_there_for() -> None:
    assert NAMES == ["cycle", "decoder", "gradual", "gradual-sparsity", "layer-by-layer", "teacher-assistant"]
    layers = [stage.distill.train_layers for stage in recipe("layer-by-layer").stages if stage.distill]
    assert layers == [[0], [1], [2], None]
    assert any(stage.teacher == "assistant" for stage in recipe("teacher-assistant").stages)
    assert recipe("cycle").stages[-1].cycle is not None
    cut = [stage.prune for stage in recipe("decoder").stages if stage.prune]
    assert [prune.structure or prune.pattern for prune in cut] == ["layers", "ffn", "2:4"]
    assert all(stage.rationale for stage in recipe("decoder").stages)
    sparse = [stage.sparsify.method for stage in recipe("gradual-sparsity").stages if stage.sparsify]
    assert sparse == ["movement", "sr-ste"]


def test_the_sentences_are_in_no_other_text() -> None:
    sources, text = Sources(FOLDER), [Field("text", ())]
    development = read_data(FOLDER / "sentences.jsonl", text)
    assert len(set(development.row_hashes)) == len(development)
    for other in ("builtin:train", "builtin:validation"):
        assert not set(development.row_hashes) & set(read_data(sources.data(other), text).row_hashes)
