"""A cycle prunes, recovers and measures until it is cheap enough or too bad; the cheapest good one is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import InputError, UsageError
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.cycle import CycleRecord, Figures, run_cycle
from limbeck.recipes.progress import SILENT, Progress
from limbeck.recipes.runner import RecipeRun
from limbeck.recipes.schema import load_recipe
from limbeck.recipes.stages import Cycle
from limbeck.validate.records.report import Report

Recipe = dict[str, Any]


@dataclass
class Counted:
    """A model is the number of its round; each costs 100 less, and is as good as it is told to be."""

    quality: list[float]
    made: list[int] = field(default_factory=list)
    metric: str = "agreement_spearman"

    def next(self, number: int, model: int) -> int | None:
        assert number == model + 1
        if number >= len(self.quality):
            return None
        self.made.append(number)
        return number

    def figures(self, number: int, model: int) -> Figures:
        return Figures(costs={"parameters": 1000 - 100 * model}, quality={self.metric: self.quality[model]})


def cycle(rounds: int = 9, **limits: Any) -> Cycle:
    prune = {"structure": "ffn", "keep": 0.8}
    return Cycle.model_validate({"prune": prune, "distill": {}, "rounds": rounds, **limits})


def ran(quality: list[float], settings: Cycle, metric: str = "agreement_spearman") -> tuple[int, CycleRecord]:
    return run_cycle(settings, 0, Counted(quality, metric=metric), lambda text: None)


FLOOR = {"floor": {"agreement_spearman": 0.9}}


def test_it_stops_where_it_is_cheap_enough() -> None:
    kept, record = ran([1, 1, 1, 1], cycle(until={"parameters": 800}))
    assert (kept, record.stopped, record.reached) == (2, "until reached", True)
    assert len(record.rounds) == 3


def test_it_keeps_the_round_before_the_one_that_is_too_bad() -> None:
    kept, record = ran([1, 0.95, 0.89, 1], cycle(**FLOOR))
    assert (kept, record.kept, record.stopped) == (1, 1, "below the floor")
    assert [each.holds_floor for each in record.rounds] == [True, True, False]


def test_cheap_enough_but_too_bad_is_too_bad() -> None:
    kept, record = ran([1, 0.95, 0.89], cycle(until={"parameters": 800}, **FLOOR))
    assert (kept, record.stopped, record.reached) == (1, "below the floor", False)
    assert "NOT reached" in record.summary()


def test_rounds_that_are_used_up_are_no_error_but_said() -> None:
    kept, record = ran([1, 1, 1, 1], cycle(2, until={"parameters": 100}))
    assert (kept, record.stopped) == (2, "rounds used up")
    assert "NOT reached" in record.summary()


def test_a_start_that_is_cheap_enough_is_left_alone() -> None:
    kept, record = ran([1, 1], cycle(until={"parameters": 1000}))
    assert (kept, record.stopped, len(record.rounds)) == (0, "until reached", 1)


def test_a_start_below_the_floor_may_be_mended_by_its_first_round() -> None:
    kept, record = ran([0.5, 0.95, 0.92, 0.3], cycle(**FLOOR))
    assert (kept, record.stopped) == (2, "below the floor")


def test_no_round_that_holds_the_floor_is_an_error_with_its_figures() -> None:
    with pytest.raises(InputError, match=r"agreement_spearman 0\.6 instead of 0\.9"):
        ran([0.5, 0.6, 1], cycle(**FLOOR))


def test_nothing_left_to_cut_ends_it() -> None:
    kept, record = ran([1, 1], cycle(**FLOOR))
    assert (kept, record.stopped) == (1, "nothing left to cut")


def test_a_quality_that_is_not_a_number_holds_no_floor() -> None:
    kept, _ = ran([1, float("nan"), 1], cycle(**FLOOR))
    assert kept == 0


def test_a_floor_on_a_perplexity_is_the_most_it_may_be() -> None:
    kept, _ = ran([10, 15, 21], cycle(floor={"perplexity": 20}), metric="perplexity")
    assert kept == 1


def test_a_floor_on_a_metric_that_is_not_measured() -> None:
    with pytest.raises(UsageError, match=r"agrement_spearman.*Did you mean 'agreement_spearman'"):
        ran([1, 1], cycle(floor={"agrement_spearman": 0.5}))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.integers(1, 8), st.integers(200, 1000))
def test_the_cheapest_round_that_holds_the_floor_is_kept(quality: list[float], rounds: int, limit: int) -> None:
    quality[0] = 1.0
    settings = cycle(rounds, until={"parameters": limit}, floor={"agreement_spearman": 0.5})
    kept, record = ran(quality, settings)
    held = [each for each in record.rounds if each.holds_floor]
    assert record.kept == kept == held[-1].number == min(held, key=lambda each: each.costs["parameters"]).number
    assert all(each.holds_floor and not each.reaches_until for each in record.rounds[:-1])
    assert len(record.rounds) <= rounds + 1
    assert record.reached == (record.rounds[kept].costs["parameters"] <= limit)
    assert CycleRecord.model_validate_json(record.model_dump_json()) == record


@pytest.fixture(scope="module")
def recipe(
    tiny_checkpoint: Callable[..., Path],
    texts: list[str],
    write_jsonl: Callable[[Path, Iterable[dict[str, Any]]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recipe:
    folder = tmp_path_factory.mktemp("cycle-data")
    parts = {"train": texts[:32], "development": texts[32:48], "validation": texts[48:]}
    data = {
        name: str(write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in part]))
        for name, part in parts.items()
    }
    return {
        "name": "tiny",
        "teacher": str(tiny_checkpoint("bert")),
        "task": "sentence-similarity",
        "data": data,
        "stages": [
            {
                "name": "narrow",
                "rationale": "little by little",
                "cycle": {
                    "prune": {"structure": "ffn", "keep": 0.75, "method": "taylor"},
                    "distill": {"max_steps": 2, "batch_size": 8, "objectives": {"embedding-cosine": 1}},
                    "rounds": 2,
                    "floor": {"agreement_spearman": -1},
                },
            }
        ],
        "exports": [{"name": "onnx", "start": "narrow", "backend": "onnx"}],
        "bench": {"sequence_length": 16, "threads": 1, "rounds": 1},
    }


def with_cycle(recipe: Recipe, **values: Any) -> Recipe:
    (stage,) = recipe["stages"]
    return {**recipe, "stages": [{**stage, "cycle": {**stage["cycle"], **values}}]}


class Told(Progress):
    """Remembers what was said; stops where it is told to."""

    def __init__(self, stop: str | None = None) -> None:
        self.said: list[str] = []
        self.stop = stop

    def say(self, text: str) -> None:
        self.said.append(text)
        if text == self.stop:
            raise KeyboardInterrupt

    def advance(self, done: int, total: int) -> None:
        return

    def rounds(self, what: str) -> list[str]:
        return [text for text in self.said if text.startswith("round ") and text.endswith(what)]


def run(recipe: Recipe, out: Path, progress: Progress = SILENT) -> Report:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return RecipeRun(load_recipe(path), path.parent, out, progress).run()


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A run of two rounds that was killed in the second one, and run again."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, Told(stop="round 2: measuring"))
    again = Told()
    report = run(recipe, out, again)
    assert again.rounds("pruning") == []
    assert again.rounds("measuring") == ["round 2: measuring"]
    return out, report


def stage_folder(out: Path) -> Path:
    (found,) = (path for path in out.glob("narrow-*") if (path / "cycle.json").exists())
    return found


def test_a_cycle_on_a_model_records_every_round(finished: tuple[Path, Report]) -> None:
    out, report = finished
    record = CycleRecord.model_validate_json((stage_folder(out) / "cycle.json").read_text())
    assert (record.kept, record.stopped) == (2, "rounds used up")
    parameters = [each.costs["parameters"] for each in record.rounds]
    assert parameters == sorted(set(parameters), reverse=True)
    kept = load_checkpoint(stage_folder(out))
    assert kept.parameters == parameters[-1]
    assert kept.model.config.intermediate_size == 40  # 64 -> 48 -> 36, to a multiple of 8
    assert [step.verb for step in kept.lineage.steps] == ["prune", "distill"] * 2
    assert all(step.rationale == "little by little" for step in kept.lineage.steps)
    assert "Cycle narrow: round 2 of 2 was kept" in (kept.lineage.steps[-1].note or "")
    assert any("The cycle narrow: round 2 of 2 was kept" in note for note in report.notes)
    assert "was kept" in (out / "report.md").read_text()


@pytest.mark.thorough
def test_other_limits_go_on_from_the_rounds_that_are_there(finished: tuple[Path, Report], recipe: Recipe) -> None:
    out, _ = finished
    told = Told()
    width_48 = json.loads((stage_folder(out) / "cycle.json").read_text())["rounds"][1]["costs"]["parameters"]
    report = run(with_cycle(recipe, rounds=5, until={"parameters": width_48}), out, told)
    assert told.rounds("pruning") == told.rounds("recovering") == told.rounds("measuring") == []
    assert any("round 1 of 1 was kept" in note and "until reached" in note for note in report.notes)


@pytest.mark.thorough
def test_a_round_is_weighed_and_timed_in_the_format_of_an_export(recipe: Recipe, tmp_path: Path) -> None:
    until = {"export": "onnx", "size_mb": 100, "speedup_p50": 0.001}
    run(with_cycle(recipe, until=until, rounds=1), tmp_path / "run")
    record = CycleRecord.model_validate_json((stage_folder(tmp_path / "run") / "cycle.json").read_text())
    assert record.stopped == "until reached"
    assert set(record.rounds[0].costs) == {"parameters", "size_mb", "speedup_p50"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"floor": {"agrement_spearman": 0.5}}, "Did you mean 'agreement_spearman'"),
        ({"distill": {"objectives": {"embedding-cosin": 1}}}, "Did you mean 'embedding-cosine'"),
        ({"distill": {"patience": 2, "metric": "spearmn"}}, "no metric 'spearmn'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    values: dict[str, Any], said: str, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        run(with_cycle(recipe, **values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_development_rows_that_are_validation_rows_are_refused(
    recipe: Recipe, tmp_path: Path, texts: list[str], write_jsonl: Callable[..., Path]
) -> None:
    shared = write_jsonl(tmp_path / "shared.jsonl", [{"text": text} for text in texts[40:56]])
    with pytest.raises(InputError, match="8 of the 16 validation rows are development rows too"):
        run({**recipe, "data": {**recipe["data"], "development": str(shared)}}, tmp_path / "run")
