"""The public reference code of SparseGPT and Wanda, made to run on a CPU with the installed transformers.

    python benchmarks/pruning_reference.py --reference DIR --model FOLDER --tokens FILE --method sparsegpt --out FOLDER

`DIR` holds checkouts of https://github.com/IST-DASLab/sparsegpt and https://github.com/locuslab/wanda as `sparsegpt`
and `wanda`; nothing of them is part of this project. Their files are run as they are but for what is written here: no
CUDA, calibration tokens from a file (int64 [samples, length], `.npy`), as many rows of hidden states as there are
samples (Wanda's code has 128 written down), and rotary tables, which Llama layers are given by their model now.
`pruning_one_shot.py` calls this in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from process_memory import Peak
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--method", choices=["magnitude", "wanda", "sparsegpt"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="the pruned model")
    options = parser.parse_args()
    peak = Peak()
    tokens = torch.from_numpy(np.load(options.tokens))
    model = transformers.LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    _adapt(model, tokens.shape[1])
    run = _sparsegpt if options.method == "sparsegpt" else _wanda
    begun = time.perf_counter()
    with torch.no_grad():
        run(options.reference, options.method, model, tokens)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "peak": peak.stop(), "libraries": peak.before}), flush=True)
    model.save_pretrained(options.out)


def _adapt(model: transformers.LlamaForCausalLM, length: int) -> None:
    torch.cuda.synchronize = lambda *_: None
    transformers.Conv1D = transformers.pytorch_utils.Conv1D
    model.seqlen, model.hf_device_map = length, {}
    forward = LlamaDecoderLayer.forward
    positions = torch.arange(length)[None]
    tables = model.model.rotary_emb(torch.zeros(1, length, 1), positions)

    def with_tables(self: LlamaDecoderLayer, hidden_states: torch.Tensor, **named: object) -> torch.Tensor:
        return forward(self, hidden_states, **{"position_ids": positions, "position_embeddings": tables, **named})

    LlamaDecoderLayer.forward = with_tables


def _sparsegpt(folder: Path, method: str, model: transformers.LlamaForCausalLM, tokens: torch.Tensor) -> None:
    sys.path.insert(0, str(folder / "sparsegpt"))
    llama = _run_file(folder / "sparsegpt" / "llama.py", "reference_llama")
    llama.args = argparse.Namespace(
        nsamples=len(tokens), true_sequential=False, minlayer=-1, maxlayer=1000, prune_only="", invert=False, wbits=16,
        sparsity=0.5, prunen=2, prunem=4, percdamp=0.01, blocksize=128,
    )  # fmt: skip
    llama.llama_sequential(model, [(row[None], None) for row in tokens], torch.device("cpu"))


def _wanda(folder: Path, method: str, model: transformers.LlamaForCausalLM, tokens: torch.Tensor) -> None:
    sys.path.insert(0, str(folder / "wanda"))
    prune = _run_file(folder / "wanda" / "lib" / "prune.py", "lib.prune")
    prune.get_loaders = lambda *_, **__: ([(row[None], None) for row in tokens], None)
    arguments = argparse.Namespace(nsamples=len(tokens), seed=0, sparsity_ratio=0.5, use_variant=False)
    pruned = {"magnitude": prune.prune_magnitude, "wanda": prune.prune_wanda}[method]
    pruned(arguments, model, None, torch.device("cpu"), prune_n=2, prune_m=4)


def _run_file(path: Path, name: str) -> types.ModuleType:
    """A module from a file of the checkouts, with the few changes that it needs."""
    text = path.read_text(encoding="utf-8").replace("torch.zeros((128,", "torch.zeros((args.nsamples,")
    text = text.replace(
        "def prepare_calibration_input(model, dataloader, device):",
        "def prepare_calibration_input(model, dataloader, device):\n"
        "    import argparse; args = argparse.Namespace(nsamples=len(dataloader))",
    )
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0] or None
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    main()
