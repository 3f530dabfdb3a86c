"""An ablation leaves out each objective in turn, trains all students alike, and compares them on the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.cli.main import _run
from limbeck.distill.settings import DistillSettings
from limbeck.errors import UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes.ablation import Ablation, AblationPlan, ablate
from limbeck.recipes.progress import Progress
from limbeck.validate.metrics.comparison import metric_interval, paired_difference
from limbeck.validate.standard import set_standard

OBJECTIVES = {"embedding-cosine": 1, "pairwise-similarity": 1, "hidden-states": {"layers": {-1: -1}}}
SETTINGS = {"student": {"layers": 1}, "objectives": OBJECTIVES, "max_steps": 3, "batch_size": 8, "learning_rate": 1e-3}
NAMES = ["all objectives", *(f"without {name}" for name in OBJECTIVES), "untrained"]


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


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"))


@pytest.fixture(scope="module")
def files(
    texts: list[str],
    write_jsonl: Callable[[Path, Iterable[dict[str, Any]]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ablation-data")
    parts = {"train": texts[:32], "held-out": texts[32:]}
    return {
        name: write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in part]) for name, part in parts.items()
    }


@pytest.fixture(scope="module")
def rows(teacher: Checkpoint, files: dict[str, Path]) -> dict[str, Data]:
    return {name: teacher.read(path) for name, path in files.items()}


def plan(
    teacher: Checkpoint, rows: dict[str, Data], settings: dict[str, Any] | None = None, **more: Any
) -> AblationPlan:
    wanted = DistillSettings.model_validate({**SETTINGS, **(settings or {})})
    return AblationPlan(teacher, wanted, rows["train"], rows["held-out"], **more)


@pytest.fixture(scope="module")
def finished(
    teacher: Checkpoint, rows: dict[str, Data], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ablation]:
    """An ablation that was stopped at its second student, and called again."""
    out = tmp_path_factory.mktemp("ablation")
    with pytest.raises(KeyboardInterrupt):
        ablate(plan(teacher, rows), out, Told(stop="without embedding-cosine, seed 0"))
    again = Told()
    ablation = ablate(plan(teacher, rows), out, again)
    assert "all objectives, seed 0: done already" in again.said
    assert again.said.count("distilling") == len(OBJECTIVES)
    return out, ablation


def test_the_table_has_every_objective_left_out_once(finished: tuple[Path, Ablation]) -> None:
    out, ablation = finished
    assert [row.name for row in ablation.rows] == NAMES
    assert [row.left_out for row in ablation.rows] == [None, *OBJECTIVES, None]
    assert ablation.metric == "agreement_spearman"
    assert all(row.low <= row.value <= row.high for row in ablation.rows)
    assert Ablation.model_validate(json.loads((out / "ablation.json").read_text())) == ablation
    table = (out / "ablation.md").read_text()
    assert all(f"| {name} |" in table for name in NAMES)


def test_students_are_trained_without_what_was_left_out_and_alike_otherwise(finished: tuple[Path, Ablation]) -> None:
    out, _ = finished
    steps = {
        path.name.rpartition("-seed")[0]: load_checkpoint(path).lineage.steps[-1] for path in out.glob("*-seed0-*")
    }
    assert set(steps) == {name.replace(" ", "-") for name in NAMES[:-1]}
    for name, step in steps.items():
        trained_on = set(step.settings["objectives"])
        assert set(OBJECTIVES) - trained_on == (
            {name.removeprefix("without-")} if name.startswith("without-") else set()
        )
    same = [{k: v for k, v in step.settings.items() if k != "objectives"} for step in steps.values()]
    assert all(settings == same[0] for settings in same)
    assert len({step.parent for step in steps.values()}) == 1


def test_differences_are_to_the_full_set_on_the_same_examples(finished: tuple[Path, Ablation]) -> None:
    _, ablation = finished
    full, *others = ablation.rows
    assert full.difference is None
    for row in others:
        assert row.difference == pytest.approx(row.value - full.value)
        assert row.difference_low <= row.difference <= row.difference_high
    untrained = others[-1]
    assert abs(untrained.difference) > 0
    # paired: narrower than two independent intervals would allow
    widths = [(row.high - row.low, row.difference_high - row.difference_low) for row in others[:-1]]
    assert any(paired < (own**2 + (full.high - full.low) ** 2) ** 0.5 for own, paired in widths)


@pytest.mark.thorough
def test_seeds_are_averaged_and_share_the_teachers_outputs(
    finished: tuple[Path, Ablation], teacher: Checkpoint, rows: dict[str, Data], tmp_path: Path
) -> None:
    two = {"objectives": {"embedding-cosine": 1, "pairwise-similarity": 1}}
    told = plan(teacher, rows, two, seeds=2, teacher_cache=tmp_path / "outputs")
    ablation = ablate(told, tmp_path / "ablation")
    assert ablation.seeds == [0, 1]
    for row in ablation.rows[:-1]:
        assert len(row.by_seed) == 2
        assert row.value == pytest.approx(np.mean(row.by_seed))
    assert len({value for row in ablation.rows[:-1] for value in row.by_seed}) > 3
    # both objectives read the teacher's embedding: whichever is left out, its outputs are the same
    assert len(list((tmp_path / "outputs").glob("*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objectives": {"embedding-cosine": 1}}, "one objective, embedding-cosine: it cannot be left out"),
        ({"objectives": {"embedding-cosine": 1, "logits": 1}}, "no objective 'logits'"),
        ({"patience": 2}, "patience would stop"),
        ({"student": None}, "has to be drawn"),
        ({"metric": "agreement_spearmn"}, "Did you mean 'agreement_spearman'"),
    ],
)
def test_what_says_nothing_is_refused_before_training(
    settings: dict[str, Any], said: str, teacher: Checkpoint, rows: dict[str, Data], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        ablate(plan(teacher, rows, settings), tmp_path / "ablation")
    assert not (tmp_path / "ablation").exists()


def test_rows_that_were_trained_on_are_told(teacher: Checkpoint, rows: dict[str, Data], tmp_path: Path) -> None:
    two = {"objectives": {"embedding-cosine": 1, "pairwise-similarity": 1}, "max_steps": 1}
    ablation = ablate(plan(teacher, {**rows, "held-out": rows["train"]}, two), tmp_path / "ablation")
    assert "32 of 32" in ablation.notes[0]
    assert "32 of 32" in (tmp_path / "ablation" / "ablation.md").read_text()


def test_one_command_makes_the_table(
    teacher: Checkpoint, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ablate", teacher.source, "--data", files["train"], "--eval-data", files["held-out"], "--layers", 1]
    words += ["--max-steps", 1, "--objective", "embedding-cosine=1", "--objective", "hidden-states={weight: 2}"]
    code = _run([str(word) for word in [*words, "--out", tmp_path / "out"]])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert all(name in shown.out for name in ("all objectives", "without hidden-states", "untrained"))
    assert (tmp_path / "out" / "ablation.md").exists()


class TestIntervals:
    """On labels that were set by hand."""

    @pytest.fixture(scope="class")
    def standard(
        self, tiny_checkpoint: Callable[..., Path], texts: list[str], write_jsonl: Callable[..., Path],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Any:  # fmt: skip
        teacher = load_checkpoint(tiny_checkpoint("bert", "text-classification"), "text-classification")
        path = tmp_path_factory.mktemp("labels") / "rows.jsonl"
        labels = ["negative", "neutral", "positive", "neutral"] * 10
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]
        return set_standard(teacher, teacher.read(write_jsonl(path, rows)))

    @staticmethod
    def answers(standard: Any, wrong: int) -> dict[str, np.ndarray]:
        """Logits that are right but for the first `wrong` examples."""
        chosen = np.asarray(standard.references).copy()
        chosen[:wrong] = (chosen[:wrong] + 1) % 3
        return {"logits": np.eye(3)[chosen] * 4.0}

    def test_a_share_has_wilsons_interval_and_newcombes_difference(self, standard: Any) -> None:
        good, bad = (self.answers(standard, wrong) for wrong in (4, 12))
        assert metric_interval("accuracy", [good], standard).method == "Wilson"
        difference = paired_difference("accuracy", [bad], [good], standard)
        assert difference.method == "Newcombe 10"
        assert difference.point == pytest.approx(-8 / 40)
        assert difference.high < 0

    def test_equal_answers_have_a_width(self, standard: Any) -> None:
        same = [self.answers(standard, 4), self.answers(standard, 6)]
        assert paired_difference("accuracy", same, same, standard).width > 0

    def test_several_seeds_are_averaged(self, standard: Any) -> None:
        many = [self.answers(standard, wrong) for wrong in (4, 8)]
        found = paired_difference("accuracy", many, [self.answers(standard, 2)] * 2, standard)
        assert found.point == pytest.approx(-4 / 40)
        assert found.low <= found.point <= found.high
