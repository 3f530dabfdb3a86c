"""What an artifact tells a stranger: its card, whose programs run where there is no limbeck, and its licence."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer

import limbeck
from limbeck.backends.registry import load_runner
from limbeck.backends.writing import Writer, WritingSettings
from limbeck.errors import IntegrityError
from limbeck.exporters.artifact import Manifest, open_artifact
from limbeck.exporters.model_card import write_model_card
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.lineage import Step
from limbeck.models.shapes import KEY
from limbeck.models.surgery import Selection, select
from limbeck.models.terms import Terms
from limbeck.recipes.steps import export

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=32, opt_sequence=16)
STATIC = ShapeRange(min_batch=2, opt_batch=2, max_batch=2, min_sequence=24, opt_sequence=24, max_sequence=24)
ALONE = """
import runpy, sys
sys.modules["limbeck"] = None  # from here on it cannot be imported
for program in sys.argv[1:]:
    runpy.run_path(program)
    print("the end")
"""


@dataclass(frozen=True)
class Case:
    """One artifact; between them, every task in every runtime that opens it."""

    family: str
    task: str
    backend: str
    precision: str = "fp32"
    shapes: ShapeRange = SMALL
    tokenizer_graph: bool = False
    kv_cache: bool = False
    uneven: bool = False
    """Its layers differ in size."""
    compiler: str = ""
    """Of torch."""
    thorough: bool = False
    """What another one shows of its task and its runtime is enough for `make test`."""

    @property
    def name(self) -> str:
        backend = f"{self.backend}{self.compiler}"
        return f"{backend}-{self.precision}-{self.family}-{self.task}{'-cache' * self.kv_cache}"

    @property
    def programs(self) -> int:
        """How many its card has."""
        one = self.backend in ("tensorrt", "torch") or self.kv_cache
        return (1 if one else 2) + self.tokenizer_graph


CASES = [
    Case("bert", "text-classification", "onnx", uneven=True),
    Case("distilbert", "token-classification", "onnx", "fp16", thorough=True),
    Case("bert", "sentence-similarity", "onnx", thorough=True),
    Case("roberta", "fill-mask", "onnx", "int8", tokenizer_graph=True, thorough=True),
    Case("gpt2", "text-generation", "onnx", shapes=STATIC, tokenizer_graph=True, thorough=True),
    Case("electra", "text-classification", "onnx", tokenizer_graph=True, thorough=True),
    Case("electra", "text-classification", "openvino", "bf16", tokenizer_graph=True, thorough=True),
    Case("bert", "token-classification", "openvino", shapes=STATIC, tokenizer_graph=True, thorough=True),
    Case("mpnet", "sentence-similarity", "openvino", "int8", tokenizer_graph=True),
    Case("bert", "fill-mask", "openvino", "fp16", uneven=True, tokenizer_graph=True, thorough=True),
    Case("llama", "text-generation", "openvino", "native", thorough=True),
    Case("gpt2", "text-generation", "onnx", tokenizer_graph=True, kv_cache=True, thorough=True),
    Case("llama", "text-generation", "openvino", "bf16", kv_cache=True),
    Case("distilbert", "token-classification", "torch", compiler="aot", thorough=True),
    Case("llama", "text-generation", "torch", kv_cache=True, compiler="aot", thorough=True),
    Case("mpnet", "sentence-similarity", "torch", "bf16", compiler="eager", thorough=True),
    Case("gpt2", "text-generation", "torch", kv_cache=True, compiler="eager"),
    Case("distilbert", "text-classification", "tensorrt", "fp16"),
]


PLAIN = CASES[2]
NUMBERED = ("token-classification", "fill-mask", "text-generation")
"""Tasks whose programs without transformers print what is read otherwise."""


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: WriteRows) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def artifact(
    tiny_checkpoint: TinyCheckpoint,
    readable_checkpoint: TinyCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
    calibration: Path,
) -> Callable[[Case], Path]:
    """`artifact(case)`: made once; do not write into it."""

    @functools.cache
    def make(case: Case) -> Path:
        source = readable_checkpoint if case.tokenizer_graph and case.backend == "onnx" else tiny_checkpoint
        checkpoint = load_checkpoint(source(case.family, task=case.task), case.task)
        if case.uneven:
            checkpoint = uneven(checkpoint)
        settings = ExportSettings.model_validate(
            {"backend": case.backend, "precision": case.precision, "shapes": case.shapes}
            | {"tokenizer_graph": case.tokenizer_graph, "kv_cache": case.kv_cache}
            | {"options": {"compiler": case.compiler} if case.compiler else {}}
        )
        rows = checkpoint.read(calibration) if case.precision == "int8" else None
        out = tmp_path_factory.mktemp("artifacts") / case.name
        export(checkpoint, settings, out, calibration=rows, beside_float=False)
        return out

    return make


def uneven(checkpoint: Checkpoint) -> Checkpoint:
    smaller = select(checkpoint.model, Selection(ffn=[torch.arange(24), torch.arange(3, 43)]))
    return dataclasses.replace(checkpoint, model=smaller)


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def programs(folder: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card_of(folder).text, re.MULTILINE | re.DOTALL)


def run_alone(programs: list[str], folder: Path, scratch: Path) -> list[str]:
    """What each program prints in the artifact's folder, in a Python that has no limbeck."""
    files = [scratch / f"example-{number}.py" for number in range(len(programs))]
    for file, program in zip(files, programs, strict=True):
        file.write_text(program)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", ALONE, *map(str, files)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return [said.strip() for said in done.stdout.split("the end\n")[:-1]]


def answer(case: Case, folder: Path) -> str:
    """What limbeck's own runner says to the examples' texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runner, manifest = load_runner(folder, threads=1)
    batch, length = case.shapes.min_batch, case.shapes.min_sequence

    def run(text: str) -> tuple[Any, Any]:
        tokens = tokenizer(text)
        feed = {name: torch.tensor([[*ids, *[0] * (length - len(ids))]] * batch) for name, ids in tokens.items()}
        return tokens, runner(feed)[manifest.outputs[0].name][0]

    labels = AutoConfig.from_pretrained(folder).id2label
    if case.task == "text-classification":
        return str(labels[int(run("I was delighted with the hotel.")[1].argmax())])
    if case.task == "token-classification":
        words = ["Anna", "and", "Peter", "opened", "a", "bakery", "in", "Prague", "."]
        tokens, logits = run("Anna and Peter opened a bakery in Prague.")
        found = [labels[int(logits[tokens.word_ids().index(place)].argmax())] for place in range(len(words))]
        return "\n".join(f"{word} {label}" for word, label in zip(words, found, strict=True) if label != "O")
    if case.task == "sentence-similarity":
        _, first = run("A cat is sleeping in the sun.")
        _, second = run("The cat naps where it is sunny.")
        return f"{np.dot(first, second) / (np.linalg.norm(first) * np.linalg.norm(second)):.3f}"
    if case.task == "fill-mask":
        tokens, logits = run(f"The capital of France is {tokenizer.mask_token}.")
        return str(tokenizer.decode([logits[tokens["input_ids"].index(tokenizer.mask_token_id)].argmax()])).strip()
    if case.kv_cache:
        writer = Writer(runner.decoder(), tokenizer, manifest.max_length)
        ids = tokenizer("The old man looked at the")["input_ids"]
        told = WritingSettings(max_new_tokens=min(24, manifest.max_length - len(ids)))
        tokenizer.eos_token = None  # the examples write on
        written = [row[0] for row in writer.write([ids], told)]
        return f"The old man looked at the{tokenizer.decode(written)}"
    tokens, logits = run("The old man looked at the")
    return str(tokenizer.decode([logits[len(tokens["input_ids"]) - 1].argmax()])).strip()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.thorough] * case.thorough) for case in CASES]
)
def test_the_cards_programs_run_without_limbeck_and_answer_as_it_does(
    case: Case, artifact: Callable[[Case], Path], tmp_path: Path
) -> None:
    folder = artifact(case)
    expected = answer(case, folder)
    found = programs(folder)
    assert len(found) == case.programs
    assert ("transformers" in imports_of(found[-1])) != case.tokenizer_graph
    printed_by = run_alone(found, folder, tmp_path)
    assert len(printed_by) == len(found)
    if case.tokenizer_graph and case.task in NUMBERED:
        assert read_by_people(case, folder, printed_by.pop()) == expected
    for printed in printed_by:
        if case.task == "sentence-similarity":
            assert float(printed) == pytest.approx(float(expected), abs=0.002)
        else:
            assert printed == expected and printed
    open_artifact(folder)  # the examples leave nothing behind
    config = AutoConfig.from_pretrained(folder)
    assert hasattr(config, KEY) == case.uneven
    assert (folder / "generation_config.json").exists() == (case.task == "text-generation")
    if case.backend == "openvino" and case.precision != "native":
        hint = json.loads((folder / "manifest.json").read_text())["compile_properties"]["INFERENCE_PRECISION_HINT"]
        assert all(f'"INFERENCE_PRECISION_HINT": "{hint}"' in program for program in found)


def test_what_is_compiled_when_called_differs_in_a_line(artifact: Callable[[Case], Path], tmp_path: Path) -> None:
    """Its program is not run here a second time: compiling takes half a minute, and it is torch.compile's own line."""
    (eager,) = (case for case in CASES if case.compiler == "eager" and not case.kv_cache)
    folder = Path(shutil.copytree(artifact(eager), tmp_path / "out"))
    manifest = open_artifact(folder)
    (before,) = programs(folder)
    write_model_card(manifest.model_copy(update={"format": "torch-inductor"}), folder, Terms())
    (after,) = programs(folder)
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert added == ["model = torch.compile(model, dynamic=True)"]
    assert after.replace(f"{added[0]}\n", "") == before
    assert "C++ compiler" in card_of(folder).text


def test_sizes_that_differ_by_layer_are_limbecks_to_open(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = uneven(load_checkpoint(tiny_checkpoint("bert")))
    wanted = ExportSettings(backend="torch", shapes=SMALL, options={"compiler": "eager"})
    export(checkpoint, wanted, tmp_path / "out")
    assert programs(tmp_path / "out") == []
    assert "limbeck opens it" in card_of(tmp_path / "out").text
    runner, _ = load_runner(tmp_path / "out", threads=1)
    batch = {name: torch.ones(2, 5, dtype=torch.int64) for name in checkpoint.input_names}
    np.testing.assert_allclose(
        runner(batch)["sentence_embedding"], checkpoint.run(batch)["sentence_embedding"], atol=1e-5
    )


def read_by_people(case: Case, folder: Path, printed: str) -> str:
    """What a program without transformers prints, in the words of those with it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if case.kv_cache:
        return f"The old man looked at the{tokenizer.decode(ast.literal_eval(printed))}"
    if case.task != "token-classification":
        return str(tokenizer.decode([int(printed)])).strip()
    words = ["Anna", "and", "Peter", "opened", "a", "bakery", "in", "Prague", "."]
    of_token, labels = tokenizer("Anna and Peter opened a bakery in Prague.").word_ids(), ast.literal_eval(printed)
    assert len(labels) == len(of_token)
    found = [labels[of_token.index(place)] for place in range(len(words))]
    return "\n".join(f"{word} {label}" for word, label in zip(words, found, strict=True) if label != "O")


def imports_of(program: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(program)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


def test_limbeck_is_out_of_reach_of_the_programs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run_alone(["import limbeck.files"], tmp_path, tmp_path)


def test_a_kit_says_how_it_is_built(artifact: Callable[[Case], Path]) -> None:
    text = card_of(artifact(CASES[-1])).text
    assert "limbeck build . --out ../engine" in text
    assert "## What is unverified\n\nNever built or run on a GPU." in text


def test_the_same_export_has_the_same_id_and_card_wherever_it_is_made(
    artifact: Callable[[Case], Path], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    first, source = artifact(PLAIN), tmp_path / "elsewhere" / tiny_checkpoint("bert").name
    shutil.copytree(tiny_checkpoint("bert"), source)
    second = export(load_checkpoint(source), settings(), tmp_path / "out")
    assert second.artifact_id == open_artifact(first).artifact_id
    said = (first / "README.md").read_text()
    assert _without_rounding((tmp_path / "out" / "README.md").read_text()) == _without_rounding(said)
    assert str(tmp_path) not in said and str(first.parent) not in said and str(Path.cwd()) not in said
    assert not re.search(r"\d\d:\d\d", said)


def _without_rounding(card: str) -> str:
    """The last bits of torch's sums follow from where its buffers happen to lie."""
    return re.sub(r"at \d+ x \d+\S* (\S+ )?differs by \S+ of", "differs by little of", card)


def settings(backend: str = "onnx") -> ExportSettings:
    return ExportSettings(backend=backend, precision="fp32", shapes=SMALL)


def test_a_changed_card_is_found(artifact: Callable[[Case], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact(PLAIN), tmp_path / "out"))
    assert "README.md" in open_artifact(folder).files
    said = (folder / "README.md").read_text()
    (folder / "README.md").write_text(said.replace("import onnxruntime", "import os"))
    with pytest.raises(IntegrityError, match=r"README\.md is not the file"):
        open_artifact(folder)


def test_a_source_without_a_licence_is_said_to_state_none(artifact: Callable[[Case], Path]) -> None:
    card = card_of(artifact(PLAIN))
    assert card.data.license is None and card.data.base_model is None
    assert "states no licence" in card.text


# History and engines.


def made_manifest(checkpoint: Checkpoint, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "format": "onnx",
        "task": checkpoint.task.name,
        "settings": settings(),
        "parent_hash": checkpoint.hash,
        "parent": "/somewhere/teacher",
        "parameters": 1,
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [None, None]}],
        "outputs": [{"name": "logits", "dtype": "float16", "shape": [None, 2]}],
        "max_length": 64,
        "lineage": checkpoint.lineage,
    }
    return Manifest.model_validate({**values, **changes})


def test_what_others_wrote_does_not_become_code_or_structure(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    sly = "good\n```python\nimport shutil\n```\n# Title | <script>"
    step = Step(verb="distill", method=sly, rationale=sly, note=sly, settings={"config": "/elsewhere/me/config.json"})
    output = {"name": '"]; import os; ["', "dtype": "float32", "shape": [None, 2]}
    manifest = made_manifest(
        checkpoint.after(checkpoint.model, step), outputs=[output], unverified=sly, versions={"torch": sly}
    )
    write_model_card(manifest, tmp_path, Terms())
    text = card_of(tmp_path).text
    assert text.count("```python") == 2 and "\n# Title" not in text and "<script>" not in text
    assert "/elsewhere/me" not in text and "/somewhere" not in text and "config.json" in text
    for program in programs(tmp_path):
        imported = {
            alias.name for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import) for alias in node.names
        }
        assert imported <= {"onnxruntime"}


def test_the_engines_program_calls_what_our_runner_calls(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """No engine can be built here; what the runner calls is held to NVIDIA's bindings by its own tests."""
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    write_model_card(made_manifest(checkpoint, format="tensorrt-engine"), tmp_path, Terms())
    (program,) = programs(tmp_path)
    runner = (Path(limbeck.__file__).parent / "backends" / "tensorrt_engine.py").read_text()
    used = calls_of_tensorrt(program)
    assert {"runtime.deserialize_cuda_engine", "context.execute_async_v3", "trt.Runtime"} <= used
    assert used <= calls_of_tensorrt(runner)
    assert "dtype=torch.float16" in program


def calls_of_tensorrt(code: str) -> set[str]:
    names = (ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute))
    plain = (name.removeprefix("self.").removeprefix("_") for name in names)
    return {name for name in plain if name.partition(".")[0] in ("trt", "runtime", "engine", "context")}


def test_a_format_of_a_plug_in_has_a_card_without_examples(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    write_model_card(made_manifest(checkpoint, format="dynamo"), tmp_path, Terms())
    assert programs(tmp_path) == [] and "limbeck backends" in card_of(tmp_path).text


def test_a_distilled_students_card_tells_what_it_learnt_from(licensed: Path, tmp_path: Path, calibration: Path) -> None:
    from limbeck.distill.settings import DistillSettings, StudentSettings
    from limbeck.recipes.steps import distill

    teacher = load_checkpoint(licensed)
    data: Data = teacher.read(calibration)
    student = distill(teacher, DistillSettings(student=StudentSettings(layers=1), max_steps=2), data)
    student.save(tmp_path / "student")
    card = card_of(tmp_path / "student")
    assert card.data["license_name"] == "kitchen-1.0" and "distillation" in card.data.tags
    assert "# kettle, distilled" in card.text and f"teacher `{teacher.hash[:16]}`" in card.text
    assert "Data: rows.jsonl, 64 rows" in card.text and "student.layers=1" in card.text
    assert str(tmp_path) not in card.text and "embedding-cosine" in card.text and "throughput" not in card.text
