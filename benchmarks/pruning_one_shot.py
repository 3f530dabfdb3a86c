"""2:4 without training: perplexity, seconds and peak memory of each method, beside the methods' public reference code.

    LIMBECK_DATA=... LIMBECK_MODELS=... python benchmarks/pruning_one_shot.py --out DIR [--reference DIR]
    python benchmarks/pruning_one_shot.py --out DIR --random [--reference DIR]    # a random Llama of 0.5 B parameters
    python benchmarks/pruning_one_shot.py --out DIR --scaling                     # cost against layers and samples

Every run is a process of its own, and they take turns. Calibration: windows of Gutenberg training text, the same for
all. Perplexity: Gutenberg validation in windows of 256 tokens. Memory is what no file backs (`process_memory.py`), less
the libraries. `--reference` names a folder with checkouts of the reference code (`pruning_reference.py`). Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from process_memory import Peak
from transformers.models.llama import modeling_llama  # noqa: F401 - a library, so not counted

from limbeck.files import write_text
from limbeck.models.anatomy import anatomy_of
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.models.sparsity import is_semi_structured
from limbeck.prune.semi_structured import prune_semi_structured

METHODS = ("magnitude", "wanda", "sparsegpt")
WINDOW = 256
HERE = Path(__file__).parent
RANDOM = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 20, "num_attention_heads": 20}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
SCALED_LAYERS, SCALED_SAMPLES = (2, 4, 8, 16), (8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("LIMBECK_MODELS", "../shared/models")))
    parser.add_argument("--out", type=Path, required=True, help="pruned models and figures")
    parser.add_argument("--model", type=Path, help="another checkpoint than gutenberg-llama")
    parser.add_argument("--reference", type=Path, help="checkouts of the reference code")
    parser.add_argument("--random", action="store_true", help="a random Llama of 0.5 B parameters; no perplexity")
    parser.add_argument("--scaling", action="store_true", help="cost against the number of layers and of samples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens a sample")
    parser.add_argument("--batch-size", type=int, default=1, help="of ours; the reference code takes one at a time")
    parser.add_argument("--rounds", type=int, default=1, help="of which the quickest counts")
    parser.add_argument("--permute", action="store_true", help="also with channels put in a better order")
    parser.add_argument("--distill", type=int, metavar="STEPS", help="then train what SparseGPT made, its zeros held")
    parser.add_argument("--windows", type=int, help="most windows that perplexity is measured on")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_prune_here(options)), flush=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    lines = list(_scaling(options) if options.scaling else _side_by_side(options))
    name = "scaling" if options.scaling else "random" if options.random else "one_shot"
    write_text(options.out / f"{name}.md", "\n".join(lines) + "\n")


def _side_by_side(options: argparse.Namespace) -> Iterator[str]:
    trained = options.model or options.models / "gutenberg-llama"
    model = _random_llama(options, RANDOM) if options.random else trained
    tokens = _calibration_tokens(options, trained, options.samples)
    runs = [("limbeck", method) for method in options.methods]
    runs += [("limbeck", f"{method}+permute") for method in options.methods if options.permute]
    runs += [("reference", method) for method in options.methods if options.reference]
    found: dict[tuple[str, str], list[dict[str, float]]] = {run: [] for run in runs}
    for _ in range(options.rounds):
        for code, method in runs:
            found[code, method].append(_in_own_process(options, code, method, model, tokens))
    text = None if options.random else _validation_windows(options, trained)
    yield from _said(
        f"{model.name}, {options.samples} x {options.length} tokens, {torch.get_num_threads()} threads", ""
    )
    yield from _said("| code | method | seconds | peak MB | perplexity |", "|---|---|---:|---:|---:|")
    if text is not None:
        yield from _said(f"| | dense | | | {_perplexity(model, text):.4f} |")
    for (code, method), rounds in found.items():
        seconds, peak = (min(each[what] for each in rounds) for what in ("seconds", "peak"))
        quality = f"{_perplexity(_folder(options, code, method), text):.4f}" if text is not None else ""
        yield from _said(f"| {code} | {method} | {seconds:.1f} | {peak:.0f} | {quality} |")
    if options.distill and text is not None:
        quality = f"{_perplexity(_distilled(options, trained), text):.4f}"
        yield from _said(f"| limbeck | sparsegpt, distilled for {options.distill} steps | | | {quality} |")


def _distilled(options: argparse.Namespace, trained: Path) -> Path:
    """What SparseGPT made, trained on the dense model's outputs; fails if a matrix lost its pattern."""
    from limbeck.distill.settings import DistillSettings
    from limbeck.recipes.steps import distill

    teacher = load_checkpoint(trained, "text-generation")
    pruned = transformers.AutoModelForCausalLM.from_pretrained(_folder(options, "limbeck", "sparsegpt"))
    sparse = replace(teacher, model=pruned.float())
    patterned = _patterned(sparse)
    settings = DistillSettings(
        max_steps=options.distill, batch_size=4, max_length=WINDOW, learning_rate=2e-4,
        objectives={"logits-kl": {"weight": 1, "temperature": 1}},
    )  # fmt: skip
    data = teacher.read(options.data / "gutenberg" / "train.jsonl.gz")
    student = distill(teacher, settings, data, student=sparse)
    assert _patterned(student) == patterned != set()
    folder = _folder(options, "limbeck", "sparsegpt-distilled")
    student.model.save_pretrained(folder)
    return folder


def _patterned(checkpoint: Checkpoint) -> set[str]:
    """The matrices that are 2:4."""
    matrices = anatomy_of(checkpoint.model).linear_layers(checkpoint.model)
    return {name for name, module in matrices if is_semi_structured(module.weight.detach().numpy(), axis=1)}


def _scaling(options: argparse.Namespace) -> Iterator[str]:
    """Seconds and peak memory with all but one size fixed."""
    trained = options.model or options.models / "gutenberg-llama"
    yield from _said("| layers | samples | model MB | method | seconds | peak MB |", "|---:|---:|---:|---|---:|---:|")
    sizes = [(layers, options.samples) for layers in SCALED_LAYERS] + [(4, samples) for samples in SCALED_SAMPLES]
    for layers, samples in dict.fromkeys(sizes):
        model = _random_llama(options, {**SMALL, "num_hidden_layers": layers})
        tokens = _calibration_tokens(options, trained, samples)
        megabytes = (model / "model.safetensors").stat().st_size / 2**20
        for method in options.methods:
            one = _in_own_process(options, "limbeck", method, model, tokens)
            yield from _said(
                f"| {layers} | {samples} | {megabytes:.0f} | {method} | {one['seconds']:.1f} | {one['peak']:.0f} |"
            )


def _said(*lines: str) -> Iterator[str]:
    for line in lines:
        print(line, flush=True)
        yield line


def _folder(options: argparse.Namespace, code: str, method: str) -> Path:
    return options.out / f"{code}-{method}"


def _in_own_process(options: argparse.Namespace, code: str, method: str, model: Path, tokens: Path) -> dict[str, float]:
    out = _folder(options, code, method)
    if code == "reference":
        command = [str(HERE / "pruning_reference.py"), "--reference", str(options.reference), "--method", method]
        command += ["--model", str(model), "--tokens", str(tokens), "--out", str(out)]
    else:
        command = [__file__, "--one", method, "--model", str(model), "--tokens", str(tokens), "--out", str(out)]
        command += ["--batch-size", str(options.batch_size)]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"seconds": found["seconds"], "peak": found["peak"] - found["libraries"]}


def _prune_here(options: argparse.Namespace) -> dict[str, float]:
    """Load, prune, save. The weights are mapped where they are stored as float32; the time is that of pruning alone."""
    method, _, permute = options.one.partition("+")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in np.load(options.tokens).tolist()]
    calibration = Calibration(Examples(features), options.batch_size)
    peak = Peak()
    checkpoint = _checkpoint(options.model, tokenizer)
    begun = time.perf_counter()
    result = prune_semi_structured(checkpoint, "2:4", method, calibration, permute=bool(permute))
    seconds = time.perf_counter() - begun
    found = {"seconds": seconds, "peak": peak.stop(), "libraries": peak.before}
    result.model.save_pretrained(options.out)
    return found


def _checkpoint(folder: Path, tokenizer: Any) -> Checkpoint:
    """Without reading all weights to hash them, which is no part of either side's work."""
    from limbeck.models.lineage import Lineage
    from limbeck.models.tasks import get_task

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    task = get_task("text-generation")
    return Checkpoint(model, tokenizer, task, Lineage(origin=folder.name, task=task.name), str(folder), hash="")


def _calibration_tokens(options: argparse.Namespace, folder: Path, samples: int) -> Path:
    """Windows of training text drawn by chance, int64 [samples, length], as a file for both sides."""
    path = options.out / f"tokens-{samples}x{options.length}.npy"
    if not path.exists():
        features = _windows(folder, options.data / "gutenberg" / "train.jsonl.gz", options.length, packed=True)
        whole = [feature["input_ids"] for feature in features if len(feature["input_ids"]) == options.length]
        chosen = np.random.default_rng(0).permutation(len(whole))[:samples]
        np.save(path, np.array([whole[place] for place in chosen], dtype=np.int64))
    return path


def _validation_windows(options: argparse.Namespace, folder: Path) -> Examples:
    features = _windows(folder, options.data / "gutenberg" / "validation.jsonl.gz", WINDOW, packed=False)
    return Examples(features[: options.windows])


def _windows(folder: Path, file: Path, length: int, packed: bool) -> list[dict[str, Any]]:
    checkpoint = load_checkpoint(folder, "text-generation")
    cut = checkpoint.task.training_examples if packed else checkpoint.task.examples
    return cut(checkpoint.read(file), checkpoint.tokenizer, length, checkpoint.model.config).features


@torch.inference_mode()
def _perplexity(folder: Path, text: Examples) -> float:
    """Of every token but each window's first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for feature in text.features:
        tokens = torch.tensor([feature["input_ids"]])
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"))
        count += tokens.shape[1] - 1
    return math.exp(total / count)


def _random_llama(options: argparse.Namespace, sizes: dict[str, int]) -> Path:
    """A Llama with random weights and gutenberg-llama's tokenizer, stored as float32."""
    folder = options.out / "llama-{hidden_size}x{num_hidden_layers}".format(**sizes)
    if not folder.exists():
        trained = load_checkpoint(options.models / "gutenberg-llama", "text-generation")
        config = transformers.LlamaConfig(
            vocab_size=len(trained.tokenizer), num_key_value_heads=sizes["num_attention_heads"],
            max_position_embeddings=1024, tie_word_embeddings=True, **sizes,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
