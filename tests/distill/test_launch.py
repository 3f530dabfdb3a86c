"""Several processes that train together: real ones, over gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]

SETTINGS = """
objectives:
  embedding-cosine: 1
  pairwise-similarity: 1
  contrastive: 0.5
  relational: 1
  hidden-states: {layers: {-1: -1}}
  attention-relations: 1
max_steps: 9
learning_rate: 3.0e-3
"""

SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from limbeck.distill.module import Distillation, TeacherViews, bind, shape_of, teacher_features
from limbeck.distill.objectives import build_objectives
from limbeck.distill.objectives.base import Sides
from limbeck.distill.settings import StudentSettings
from limbeck.distill.student import draw_student
from limbeck.distill.teacher import eager_teacher
from limbeck.models.checkpoint import load_checkpoint

teacher = load_checkpoint(sys.argv[1], "sentence-similarity")
student = draw_student(teacher, StudentSettings(layers=1, hidden_size=16, heads=2))
sides = Sides(shape_of(student), shape_of(teacher), lambda: None)
asked = {"pairwise-similarity": 1, "hidden-states": {"layers": {-1: -1}}, "attention-relations": 1}
terms = bind(build_objectives(asked, teacher.task, False), sides, seed=0)
module = Distillation(student, terms)
views = TeacherViews(eager_teacher(teacher.recording(teacher_features(terms))), terms, teacher)
ids = torch.randint(5, 90, (8, 9), generator=torch.Generator().manual_seed(0))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
world = int(sys.argv[2])
if world > 1:
    dist.init_process_group("gloo")
    batch = {name: value.chunk(world)[dist.get_rank()] for name, value in batch.items()}
    mesh = init_device_mesh("cpu", (world,))
    for layer in student.model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
optimizer = torch.optim.SGD(module.parameters(), 0.1)
for _ in range(3):
    loss = module(batch=batch, teacher=views(batch))["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = loss.detach().clone()
    if world > 1:
        dist.all_reduce(value)
    if world == 1 or dist.get_rank() == 0:
        print(float(value) / world, flush=True)
"""


def run(*command: str, cwd: Path) -> str:
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The signal state of a background shell is not ours to pass on; everything else of the environment is.
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launched(processes: int) -> list[str]:
    """`accelerate launch` of so many processes."""
    options = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    return ["-m", "accelerate.commands.launch", "--multi_gpu", *options, "--dynamo_backend", "no"]


def curves_of(folder: Path) -> dict[str, list[float]]:
    steps = json.loads((folder / "lineage.json").read_text())["steps"]
    return {curve["name"]: curve["values"] for curve in steps[-1]["curves"]}


def test_two_processes_train_as_one_with_the_whole_batch(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    teacher = str(tiny_checkpoint("bert"))
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts[:44]])
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    given = ["-m", "limbeck", "distill", teacher, "--task", "sentence-similarity", "--data", "rows.jsonl"]
    given += ["--layers", "1", "--settings", "settings.yaml"]
    run(*given, "--batch-size", "16", "--out", "one", cwd=tmp_path)
    run(*launched(2), *given, "--batch-size", "8", "--out", "two", cwd=tmp_path)
    one, two = curves_of(tmp_path / "one"), curves_of(tmp_path / "two")
    assert one.keys() == two.keys() and len(one["loss"]) == 9
    for name in one.keys() - {"throughput"}:
        np.testing.assert_allclose(two[name], one[name], rtol=2e-4, atol=1e-7, err_msg=name)
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("one", "two")]
    for name, values in weights[0].items():
        # Of all together: where a gradient is next to nothing, Adam makes a whole step of the sign of its rounding.
        apart = np.linalg.norm(weights[1][name] - values) / max(np.linalg.norm(values), 1.0)
        assert apart < 2e-4, f"{name}: {apart}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "rows.jsonl", "settings.yaml", "two"]


@pytest.mark.thorough
def test_the_module_can_be_sharded(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """FSDP itself, on two processes: accelerate shards only where there are GPUs."""
    teacher = str(tiny_checkpoint("bert"))
    (tmp_path / "sharded.py").write_text(SHARDED)
    whole = run("sharded.py", teacher, "1", cwd=tmp_path)
    start = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    sharded = run(*start, "sharded.py", teacher, "2", cwd=tmp_path)
    losses = [[float(line) for line in text.split()] for text in (whole, sharded)]
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
