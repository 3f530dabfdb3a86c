"""Good artifacts, made once, and copies of them in which a fault is planted before they are sealed again: no hash gives
it away."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from limbeck.errors import IntegrityError
from limbeck.exporters.artifact import read_manifest, seal
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes.steps import export, validate
from limbeck.validate.records.report import Report

SHAPES = ShapeRange(max_batch=8, opt_batch=2, max_sequence=48, opt_sequence=16)
LABELS = ["short", "middling", "long"]
ROWS = 192


@dataclass(frozen=True)
class Home:
    """A trained student with its neighbours and rows."""

    folder: Path
    data: Data

    @property
    def student(self) -> Checkpoint:
        return load_checkpoint(self.folder / "student")


def rows_of(texts: list[str]) -> list[dict[str, Any]]:
    """Texts of one to three sentences, labelled by how many they are."""
    joined = [" ".join(texts[(i + k) % len(texts)] for k in range(1 + i % 3)) for i in range(ROWS)]
    return [{"text": text, "label": i % 3} for i, text in enumerate(joined)]


@pytest.fixture(scope="session")
def home(tiny_checkpoint: Any, texts: list[str], write_jsonl: Any, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Three folders side by side: `older`, a state of the training; `student`, its end; `untrained`, with which it
    began."""
    folder = tmp_path_factory.mktemp("faults")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("bert", task="text-classification"))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)},
    )  # fmt: skip
    rows = rows_of(texts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.08)
        for name, steps in (("untrained", 0), ("older", 60), ("student", 20)):
            _train(model, tokenizer, rows, steps)
            model.eval().save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    file = write_jsonl(folder / "rows.jsonl", rows)
    return Home(folder, load_checkpoint(folder / "student").read(file))


def _train(model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int) -> None:
    batch = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=48, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = model.train()(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def good(home: Home) -> Callable[[str, str], Path]:
    """`good("onnx", "fp32")`: an artifact of the student, exported as a user does. Copy it; do not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def make(backend: str, precision: str) -> Path:
        if (backend, precision) not in made:
            folder = home.folder / f"{backend}-{precision}"
            settings = ExportSettings(backend=backend, precision=precision, shapes=SHAPES)
            export(home.student, settings, folder, calibration=home.data, beside_float=False)
            made[backend, precision] = folder
        return made[backend, precision]

    return make


Plant = Callable[[Path], None]


@dataclass(frozen=True)
class Bench:
    """Copies a good artifact, plants a fault, seals it, and validates it whole."""

    home: Home
    good: Callable[[str, str], Path]
    scratch: Path
    fault: str
    """In words."""
    caught: list[tuple[str, str, str, float]]
    """Fault, check, what it said, seconds to the verdict: the table that `--faults` writes."""

    def planted(self, backend: str, precision: str, plant: Plant | None = None, **changes: Any) -> Path:
        """The copy's folder; `changes` are fields of its manifest."""
        folder = Path(shutil.copytree(self.good(backend, precision), self.scratch / f"{backend}-{precision}"))
        if plant is not None:
            plant(folder)
        seal(read_manifest(folder).model_copy(update=changes), folder)
        return folder

    def validated(self, folder: Path, teacher: Checkpoint | None = None, data: Data | None = None) -> Report:
        return validate({"artifact": folder}, teacher or self.home.student, data or self.home.data)

    def assert_caught(self, folder: Path, check: str, *causes: str, **against: Any) -> Report:
        """Validation says no, and this check names these causes."""
        report = self.assert_named(folder, check, *causes, **against)
        assert report.verdict == "fail"
        return report

    def assert_named(self, folder: Path, check: str, *causes: str, **against: Any) -> Report:
        """This check names these causes, whatever the verdict."""
        began = time.perf_counter()
        report = self.validated(folder, **against)
        seconds = time.perf_counter() - began
        checks = {found.name: found for found in report.candidates[0].checks}
        assert check in checks, f"no {check} among {', '.join(checks)}"
        for cause in causes:
            assert cause in checks[check].detail
        self.caught.append((self.fault, check, checks[check].detail, seconds))
        return report

    def assert_refused(self, folder: Path, cause: str) -> None:
        """The artifact is not even opened."""
        began = time.perf_counter()
        with pytest.raises(IntegrityError, match=cause) as refused:
            self.validated(folder)
        self.caught.append((self.fault, "integrity", refused.value.message, time.perf_counter() - began))


@pytest.fixture
def bench(
    home: Home,
    good: Callable[[str, str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caught: list[tuple[str, str, str, float]],
) -> Bench:
    fault = request.node.name.removeprefix("test_").replace("_", " ").replace("[", " (").replace("]", ")")
    return Bench(home, good, tmp_path, fault, caught)


@pytest.fixture(scope="session")
def caught(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, str, str, float]]]:
    """What the session's faults were caught by; with `--faults FILE` written there as a table at its end."""
    rows: list[tuple[str, str, str, float]] = []
    yield rows
    if (file := request.config.getoption("--faults")) and rows:
        lines = ["| planted | caught by | what it said | seconds |", "|---|---|---|---|"]
        lines += [f"| {fault} | {check} | {_cell(said)} | {seconds:.1f} |" for fault, check, said, seconds in rows]
        Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(said: str) -> str:
    """Short enough for a table, without the folder of this run."""
    text = re.sub(r"/\S*/", "", said).replace("|", "\\|")
    return text if len(text) <= 160 else f"{text[:159]}…"


@pytest.fixture(scope="session")
def rewrite_weights() -> Callable[[Path, dict[str, Callable[[np.ndarray], np.ndarray]]], None]:
    """`rewrite_weights(folder, {name: change})`: each float32 parameter of an ONNX or OpenVINO program becomes what
    `change` makes of it, in the parameter's own layout."""

    def rewrite(folder: Path, changes: dict[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        (_in_onnx if (folder / "model.onnx").exists() else _in_openvino)(folder, changes)

    return rewrite


def _in_onnx(folder: Path, changes: dict[str, Any]) -> None:
    def change(model: onnx.ModelProto) -> None:
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, changed in changes.items():
            turned = f"{name}.T" in held
            tensor = held[f"{name}.T" if turned else name]
            values = onnx.numpy_helper.to_array(tensor)
            new = changed((values.T if turned else values).copy()).astype(values.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(new.T if turned else new), tensor.name))

    edit_graph(folder, change)


def _in_openvino(folder: Path, changes: dict[str, Any]) -> None:
    graph, weights = (folder / "openvino_model.xml").read_text(), folder / "openvino_model.bin"
    held = bytearray(weights.read_bytes())
    for name, changed in changes.items():
        place = re.search(
            rf'name="{re.escape(name)}" type="Const".*?shape="([^"]*)" offset="(\d+)" size="(\d+)"', graph, re.DOTALL
        )
        assert place is not None, name
        start, size = int(place[2]), int(place[3])
        values = np.frombuffer(bytes(held[start : start + size]), dtype=np.float32)
        values = values.reshape([int(length) for length in place[1].split(",")])
        held[start : start + size] = np.ascontiguousarray(changed(values.copy()), dtype=np.float32).tobytes()
    weights.write_bytes(held)


def edit_graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    graph, weights = folder / "model.onnx", folder / "model.onnx.data"
    model = onnx.load(str(graph))
    change(model)
    weights.unlink(missing_ok=True)
    onnx.save(model, str(graph), save_as_external_data=True, location=weights.name)  # shapes stay inside


@pytest.fixture(scope="session")
def edit_onnx() -> Callable[[Path, Callable[[onnx.ModelProto], None]], None]:
    """`edit_onnx(folder, change)`: the artifact's ONNX graph, changed in place."""
    return edit_graph
