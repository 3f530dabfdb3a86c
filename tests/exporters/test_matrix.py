"""Architectures and pruned variants x backends x precisions: how far each program is from torch, or why there is none.

`make test` exports each precision of each backend once; `make thorough` a choice in which every pair of two of the
three occurs; `make matrix` exports all and writes docs/matrix.md.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from limbeck.environment import versions
from limbeck.errors import ExportMismatch
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.steps import export, prune

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=64, opt_sequence=16)
DECODERS = ("gpt2", "llama", "qwen3", "mistral")
ARCHITECTURES = ("bert", "roberta", "distilbert", "electra", "mpnet", "modernbert", "deberta-v2", *DECODERS)
PRUNED = {
    "bert, FFN halved": PruneSettings(structure="ffn", keep=0.5, method="magnitude"),
    "bert, heads that differ by layer": PruneSettings(structure="heads", keep=[0.5, 0.75], method="magnitude"),
    "bert, a layer dropped": PruneSettings(structure="layers", keep=0.5, method="magnitude"),
    "bert, 2:4": PruneSettings(pattern="2:4"),
}
MODELS = (*ARCHITECTURES, *PRUNED)
BACKENDS = ("onnx", "openvino", "tensorrt")
PRECISIONS = ("fp32", "fp16", "int8")
Cell = tuple[str, str, str]
PAIRWISE: list[Cell] = [
    (model, backend, PRECISIONS[(row + column) % 3])
    for row, model in enumerate(MODELS)
    for column, backend in enumerate(BACKENDS)
]
QUICK: list[Cell] = [PAIRWISE[3 * row + (0, 2, 1)[row // 3]] for row in range(9)]
WHOLE: list[Cell] = list(itertools.product(MODELS, BACKENDS, PRECISIONS))
_COARSE = re.compile(r"differs by 0\.[5-9]\d? of its magnitude, tolerance 0\.5")
"""What may be said of OpenVINO's int8: random weights have wide ranges, and SmoothQuant moves them about."""


def test_the_choice_covers_every_pair() -> None:
    for first, second in itertools.combinations(range(3), 2):
        names = (MODELS, BACKENDS, PRECISIONS)
        wanted = set(itertools.product(names[first], names[second]))
        assert {(cell[first], cell[second]) for cell in PAIRWISE} == wanted


def test_the_quick_choice_has_every_precision_of_every_backend_once() -> None:
    assert set(QUICK) < set(PAIRWISE)
    assert sorted(cell[1:] for cell in QUICK) == sorted(itertools.product(BACKENDS, PRECISIONS))


@dataclass
class Matrix:
    """What was found; written where `--matrix` says."""

    out: Path | None
    found: dict[Cell, str] = field(default_factory=dict)

    def write(self) -> None:
        if self.out is None or not self.found:
            return
        reasons = list(dict.fromkeys(said for said in self.found.values() if not _is_number(said)))
        columns = [f"{backend} {precision}" for backend in BACKENDS for precision in PRECISIONS]
        rows = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
        for model in MODELS:
            cells = [self.found.get((model, *column), "") for column in itertools.product(BACKENDS, PRECISIONS)]
            shown = [said if not said or _is_number(said) else f"none[^{reasons.index(said) + 1}]" for said in cells]
            rows.append(f"| {model} | {' | '.join(shown)} |")
        notes = [f"[^{number}]: {said}" for number, said in enumerate(reasons, 1)]
        kept = versions()
        named = ", ".join(
            f"{name} {kept[name]}" for name in ("torch", "transformers", "onnxruntime", "openvino", "nncf")
        )
        table = "\n".join(rows)
        self.out.write_text(_PAGE.format(table=table, notes="\n".join(notes), versions=named), encoding="utf-8")


_PAGE = """# What exports, and how near it is

Made by `make matrix`. Each figure is the largest difference of an output from torch's, as a share of the output's
largest magnitude, over five shapes of input (1 x 1, 1 x 7, 3 x 13, 5 x 24 padded, 1 x 64). The models are small ones of
each architecture with random weights. TensorRT's programs are kits, run by ONNX Runtime's CPU; none was built on
a GPU here. In every program each weight was compared with the checkpoint's too.

{table}

{notes}

With {versions}.
"""


def _is_number(text: str) -> bool:
    return text[:1].isdigit()


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    out = request.config.getoption("--matrix")
    found = Matrix(Path(out) if out else None)
    yield found
    found.write()


@pytest.fixture(scope="module")
def calibration_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Callable[..., Path]
) -> Path:
    rows = [{"text": text, "label": number % 3} for number, text in enumerate(texts)]
    return write_jsonl(tmp_path_factory.mktemp("calibration") / "texts.jsonl", rows)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = WHOLE if metafunc.config.getoption("--matrix") else PAIRWISE
        metafunc.parametrize("cell", [_marked(cell) for cell in cells])


def _marked(cell: Cell) -> Any:
    name = "-".join(cell).replace(", ", "-").replace(" ", "-")
    return pytest.param(cell, id=name, marks=() if cell in QUICK else pytest.mark.thorough)


def model_of(name: str, tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    family = name.partition(",")[0]
    task = "text-generation" if family in DECODERS else "text-classification"
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task)
    return prune(checkpoint, PRUNED[name]) if name in PRUNED else checkpoint


def test_a_program_is_near_torch_or_says_why_there_is_none(
    cell: Cell, matrix: Matrix, tiny_checkpoint: TinyCheckpoint, calibration_file: Path, tmp_path: Path
) -> None:
    model, backend, precision = cell
    checkpoint = model_of(model, tiny_checkpoint)
    settings: dict[str, Any] = {"backend": backend, "precision": precision, "shapes": SMALL}
    if backend == "tensorrt" and model.endswith("2:4"):
        settings["sparsity"] = "2:4"
    calibration = checkpoint.read(str(calibration_file))
    wanted, refused = ExportSettings.model_validate(settings), ""
    try:
        manifest = export(checkpoint, wanted, tmp_path / "out", calibration=calibration, beside_float=False)
    except ExportMismatch as error:
        refused = matrix.found[cell] = error.message
    else:
        parity = manifest.checks[0]
        matrix.found[cell] = f"{max(float(row['share of the output']) for row in parity.rows):.1g}"
        assert parity.name == "parity" and all(check.passed for check in manifest.checks)
    assert not refused or ((backend, precision) == ("openvino", "int8") and _COARSE.search(refused)), refused
    assert (tmp_path / "out").exists() != bool(refused)
