"""Weights on demand: copies that share memory, weights on disk, and a model pruned without being in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from limbeck.errors import DiskFull, InputError
from limbeck.models import mapped
from limbeck.models.checkpoint import hash_of_model, load_checkpoint
from limbeck.models.mapped import copy_of, settle
from limbeck.prune.semi_structured import prune_semi_structured

TinyCheckpoint = Callable[..., Path]


def test_a_copy_may_share_its_weights_and_keeps_ties(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_checkpoint(tiny_checkpoint("gpt2", task="text-generation")).model
    shared = copy_of(model, lambda weight: weight.detach())
    for mine, theirs in zip(shared.parameters(), model.parameters(), strict=True):
        assert mine is not theirs and mine.data_ptr() == theirs.data_ptr()
    assert shared.lm_head.weight is shared.get_input_embeddings().weight
    inputs = {"input_ids": torch.arange(8)[None]}
    assert torch.equal(shared(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("on_disk", [False, True])
def test_settled_weights_have_memory_of_their_own(on_disk: bool) -> None:
    source = torch.randn(6, 4)
    first, second = torch.nn.Parameter(source), torch.nn.Parameter(source.bfloat16())
    settle({first: source.T, second: source}, on_disk)
    assert torch.equal(first.data, source.T) and first.is_contiguous()
    assert second.dtype == torch.bfloat16 and torch.equal(second.data, source.bfloat16())
    with torch.no_grad():
        first.add_(1)  # a mapped tensor can be written to
    assert torch.equal(first.data, source.T + 1)


def test_a_pruned_model_is_the_same_in_memory_and_on_disk(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("gpt2", task="text-generation"))
    in_memory = prune_semi_structured(checkpoint).model
    monkeypatch.setattr(mapped, "MAPPED_FROM", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    on_disk = prune_semi_structured(checkpoint).model
    assert not list(tmp_path.iterdir())  # files go with the tensors that use them
    assert hash_of_model(on_disk) == hash_of_model(in_memory) != checkpoint.hash
    assert on_disk.lm_head.weight is on_disk.get_input_embeddings().weight
    on_disk.save_pretrained(tmp_path / "saved")
    assert hash_of_model(type(on_disk).from_pretrained(tmp_path / "saved")) == hash_of_model(in_memory)
    with torch.no_grad():
        for parameter in on_disk.parameters():
            parameter.add_(1)
    assert hash_of_model(checkpoint.model) == checkpoint.hash


def test_no_room_on_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "save_file", full)
    with pytest.raises(DiskFull, match="No room"):
        settle({torch.nn.Parameter(torch.ones(2)): torch.ones(2)}, on_disk=True)


def test_half_precision_loads_as_it_would_without_a_file_between(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama", task="text-generation")
    half = load_checkpoint(folder)
    half.model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    half.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    plain = load_checkpoint(tmp_path, "text-generation")
    monkeypatch.setattr(mapped, "MAPPED_FROM", 50_000)
    monkeypatch.setattr(tempfile, "tempdir", str(between := tmp_path / "between"))
    between.mkdir()
    with mapped.in_float32(tmp_path) as place:
        assert place.parent == between  # large together, though none of the files is
    converted = load_checkpoint(tmp_path, "text-generation")
    assert converted.hash == plain.hash
    assert {weight.dtype for weight in converted.model.parameters()} == {torch.float32}
    assert converted.model.name_or_path == str(tmp_path)
    assert not list(between.iterdir())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"weight": "../elsewhere.safetensors"}}, "no file beside it"),
        ({"weight_map": {"weight": 3}}, "no file beside it"),
        ({"weight_map": {"weight": "missing.safetensors"}}, "could not be loaded"),
        ({"weight_map": ["weight"]}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_of_weights_that_is_wrong_is_refused(
    index: object, message: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("bert"), folder)
    shutil.copyfile(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load_checkpoint(folder, "sentence-similarity")


_PRUNE = """
import json, sys, threading
from pathlib import Path
import torch
from limbeck.models import mapped
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.prune.semi_structured import prune_semi_structured

def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) * 1024

mapped.MAPPED_FROM = 2**22
torch.set_num_threads(1)
calibration = Calibration(Examples([{"input_ids": [5] * 8, "attention_mask": [1] * 8}] * 4), 4)
tiny = load_checkpoint(sys.argv[2], "text-generation")
prune_semi_structured(tiny, "2:4", sys.argv[3], calibration)  # whatever is imported on the way, is now
peak, ended = 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.02):
        peak = max(peak, private())
before = private()
watcher = threading.Thread(target=watch); watcher.start()
checkpoint = load_checkpoint(sys.argv[1], "text-generation")
result = prune_semi_structured(checkpoint, "2:4", sys.argv[3], calibration)
ended.set(); watcher.join()
zeros = float((result.model.model.layers[3].mlp.up_proj.weight == 0).float().mean())
size = sum(parameter.numel() * parameter.element_size() for parameter in checkpoint.model.parameters())
print(json.dumps({"peak": peak - before, "size": size, "zeros": zeros}))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says what is private")
@pytest.mark.thorough
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_is_pruned_in_a_fraction_of_its_size(
    stored: torch.dtype, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=32, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    tiny = tiny_checkpoint("llama", task="text-generation")
    transformers.AutoModelForCausalLM.from_config(config).to(stored).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", _PRUNE, str(tmp_path / "model"), str(tiny), "wanda"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert found["zeros"] == 0.5
    assert found["size"] > 8e7
    assert found["peak"] < found["size"] / 4
