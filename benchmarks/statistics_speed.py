"""How long the figures of one candidate take, points and intervals, on made answers to 10,000 examples of every task.

    python benchmarks/statistics_speed.py [--examples 10000]

The answers are random numbers of the right shapes and a plausible likeness of candidate and teacher; nothing is run.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from limbeck.validate.metrics.quality import measure_quality

TAGS = ["O", *(f"{head}-{kind}" for kind in ("PER", "LOC", "ORG") for head in "BI")]
TOKENS = 128
PAIRED_WIDTH = 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000)
    n = parser.parse_args().examples
    random = np.random.default_rng(0)
    for what, arguments in cases(n, random).items():
        started = time.perf_counter()
        quality = measure_quality(*arguments.pop("positional"), data="made", **arguments)
        spent = time.perf_counter() - started
        print(f"{what:<36} {n:>7,} examples  {len(quality.metrics):>2} metrics  {spent:6.1f} s", flush=True)


def cases(n: int, random: np.random.Generator) -> dict[str, dict]:
    """The arguments of `measure_quality` by what they are."""
    return {
        "text-classification, 2 classes": _classes(n, 2, random),
        "text-classification, 20 classes": _classes(n, 20, random),
        "token-classification, 20 words": _tagged(n, random),
        "sentence-similarity, gold scores": _embedded(n, random, scored=True),
        "sentence-similarity, pairs": _embedded(n, random, scored=False),
        f"text-generation, {TOKENS} tokens": _generated(n, random),
    }


def _classes(n: int, classes: int, random: np.random.Generator) -> dict:
    labels = random.integers(0, classes, n)
    teacher = random.normal(0, 1, (n, classes)) + 3 * np.eye(classes)[labels]
    candidate = teacher + random.normal(0, 0.3, teacher.shape)
    return {"positional": ("text-classification", {"logits": teacher}, {"logits": candidate}, labels)}


def _tagged(n: int, random: np.random.Generator) -> dict:
    words = 20
    flat = _classes(n * words, len(TAGS), random)["positional"]
    sides = []
    for side in flat[1:3]:
        rows = np.empty(n, dtype=object)
        rows[:] = list(side["logits"].reshape(n, words, -1))
        sides.append({"logits": rows})
    return {"positional": ("token-classification", *sides, flat[3]), "label_names": TAGS}


def _embedded(n: int, random: np.random.Generator, scored: bool) -> dict:
    first = random.normal(0, 1, (n, PAIRED_WIDTH)).astype(np.float32)
    likeness = random.random(n).astype(np.float32)
    second = likeness[:, None] * first + (1 - likeness)[:, None] * random.normal(0, 1, first.shape).astype(np.float32)
    teacher = np.concatenate([first, second])
    candidate = teacher + random.normal(0, 0.2, teacher.shape).astype(np.float32)
    scores = np.round(5 * np.clip(likeness + random.normal(0, 0.2, n), 0, 1), 1) if scored else None
    return {
        "positional": ("sentence-similarity", {"embedding": teacher}, {"embedding": candidate}, scores),
        "pairs": True,
    }


def _generated(n: int, random: np.random.Generator) -> dict:
    sides = []
    nll = random.exponential(3.0, (n, TOKENS)).astype(np.float32)
    for noise in (0.0, 0.2):
        kept = {"nll": nll + noise * random.random(nll.shape), "top_token": random.integers(0, 3, nll.shape)}
        rows = {name: np.empty(n, dtype=object) for name in kept}
        for name, values in kept.items():
            rows[name][:] = list(values)
        sides.append(rows)
    return {"positional": ("text-generation", *sides, None)}


if __name__ == "__main__":
    main()
