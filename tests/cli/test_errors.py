"""Every mistake a person can make ends in one sentence that names it, in the right exit code, and with nothing left
half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from limbeck.cli.main import _run

Limbeck = Callable[..., Any]
TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]

# A machine without OpenVINO: the path finder does not find it, as if it were not installed.
WITHOUT_OPENVINO = """
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "openvino" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may break."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("errors") / "artifact"
    assert _run(["export", str(model), "--backend", "onnx", "--out", str(folder)]) == 0
    return folder


# data


def distil(limbeck: Limbeck, model: Path, data: object, out: Path, *more: object) -> Any:
    return limbeck("distill", model, "--data", data, "--layers", 1, "--max-steps", 1, "--out", out, *more)


def test_a_student_that_splits_text_otherwise(
    limbeck: Limbeck, model: Path, tiny_checkpoint: TinyCheckpoint, text_file: Path, out: Path
) -> None:
    other = ("--student", tiny_checkpoint("roberta"), "--max-steps", 1, "--out", out)
    refused = limbeck("distill", model, "--data", text_file, *other)
    refused.assert_refused(4, "split text differently", "hidden-states", "embedding-cosine")


def test_rows_that_are_all_padding(
    limbeck: Limbeck, model: Path, write_jsonl: WriteRows, tmp_path: Path, out: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Rain fell."}, {"text": "[PAD] [PAD]"}])
    distil(limbeck, model, rows, out).assert_refused(4, "Row 2", "padding")


def test_the_cache_of_another_teacher(
    limbeck: Limbeck, model: Path, tiny_checkpoint: TinyCheckpoint, text_file: Path, tmp_path: Path, out: Path
) -> None:
    cache = tmp_path / "cache"
    assert distil(limbeck, model, text_file, tmp_path / "first", "--teacher-cache", cache).code == 0
    other = tiny_checkpoint("mpnet")
    refused = distil(limbeck, other, text_file, out, "--teacher-cache", cache)
    refused.assert_refused(4, str(cache), "another teacher")


def test_a_missing_data_file(limbeck: Limbeck, model: Path, out: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    distil(limbeck, model, missing, out).assert_refused(4, f"{missing} does not exist")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv"])
def test_an_empty_data_file(limbeck: Limbeck, model: Path, out: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    distil(limbeck, model, tmp_path / name, out).assert_refused(4, f"{name} is empty", "at least one row")


def test_a_data_file_of_another_kind(limbeck: Limbeck, model: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.docx").write_text("words")
    distil(limbeck, model, tmp_path / "texts.docx", out).assert_refused(4, "texts.docx", ".jsonl", ".csv", ".parquet")


def test_a_malformed_data_file(limbeck: Limbeck, model: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": \n')
    distil(limbeck, model, tmp_path / "texts.jsonl", out).assert_refused(4, "texts.jsonl could not be read")


@pytest.fixture
def odd_columns(tmp_path: Path, write_jsonl: WriteRows) -> Path:
    return write_jsonl(tmp_path / "odd.jsonl", [{"words": "One fox.", "count": 3}, {"words": "Two.", "count": 4}])


def test_no_column_that_the_task_reads(limbeck: Limbeck, model: Path, out: Path, odd_columns: Path) -> None:
    refused = distil(limbeck, model, odd_columns, out)
    refused.assert_refused(4, "'text'", "it has words, count", "--column text=COLUMN")


def test_a_column_that_is_not_there(limbeck: Limbeck, model: Path, out: Path, odd_columns: Path) -> None:
    refused = distil(limbeck, model, odd_columns, out, "--column", "text=wods")
    refused.assert_refused(4, "no column 'wods'", "words, count", "Did you mean 'words'?")


def test_a_column_without_text(limbeck: Limbeck, model: Path, out: Path, odd_columns: Path) -> None:
    refused = distil(limbeck, model, odd_columns, out, "--column", "text=count")
    refused.assert_refused(4, "'count'", "holds no text", "--column text=COLUMN")


def test_a_field_that_the_task_does_not_have(limbeck: Limbeck, model: Path, out: Path, odd_columns: Path) -> None:
    refused = distil(limbeck, model, odd_columns, out, "--column", "txt=words")
    refused.assert_refused(2, "no field 'txt'", "text, sentence1")


def test_a_mapping_without_a_column(limbeck: Limbeck, model: Path, out: Path, odd_columns: Path) -> None:
    distil(limbeck, model, odd_columns, out, "--column", "words").assert_refused(2, "NAME=VALUE", "'words'")


# models


def export(limbeck: Limbeck, model: object, out: Path, *more: object) -> Any:
    return limbeck("export", model, "--backend", "onnx", "--out", out, *more)


def test_a_missing_model(limbeck: Limbeck, out: Path, tmp_path: Path) -> None:
    export(limbeck, tmp_path / "nowhere", out).assert_refused(4, f"{tmp_path / 'nowhere'} does not exist")


def test_a_folder_that_is_no_model(limbeck: Limbeck, out: Path, tmp_path: Path) -> None:
    export(limbeck, tmp_path, out).assert_refused(4, f"{tmp_path} has no config.json")


def test_a_task_that_the_model_was_not_made_for(limbeck: Limbeck, model: Path, out: Path) -> None:
    refused = export(limbeck, model, out, "--task", "text-classification")
    refused.assert_refused(4, "BertModel", "no weights for classifier", "cannot serve text-classification", "--task")


def test_an_unknown_task(limbeck: Limbeck, model: Path, out: Path) -> None:
    refused = export(limbeck, model, out, "--task", "sentence-similarty")
    refused.assert_refused(2, "no task 'sentence-similarty'", "text-generation", "Did you mean 'sentence-similarity'?")


def test_a_checkpoint_without_weights(limbeck: Limbeck, copy: Path, out: Path) -> None:
    (copy / "model.safetensors").unlink()
    export(limbeck, copy, out).assert_refused(4, str(copy), "no weights (*.safetensors)")


def test_weights_that_are_a_pickle_are_never_opened(limbeck: Limbeck, copy: Path, out: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    export(limbeck, copy, out).assert_refused(4, "pytorch_model.bin", "pickle", "only safetensors", "save_pretrained")


def test_weights_that_are_cut_short(limbeck: Limbeck, copy: Path, out: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    export(limbeck, copy, out).assert_refused(4, str(copy), "could not be loaded")


def test_a_configuration_that_is_no_json(limbeck: Limbeck, copy: Path, out: Path) -> None:
    (copy / "config.json").write_text("{")
    export(limbeck, copy, out).assert_refused(4, "config.json is not valid JSON")


def test_a_model_without_a_tokenizer(limbeck: Limbeck, copy: Path, out: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    export(limbeck, copy, out).assert_refused(4, str(copy), "no tokenizer")


# backends


def test_an_unknown_backend(limbeck: Limbeck, model: Path, out: Path) -> None:
    refused = limbeck("export", model, "--backend", "opnvino", "--out", out)
    refused.assert_refused(2, "no backend 'opnvino'", "onnx, openvino, tensorrt", "Did you mean 'openvino'?")


def test_a_backend_that_is_not_installed(limbeck_child: Limbeck, model: Path, out: Path) -> None:
    words = ("export", model, "--backend", "openvino", "--out", out)
    refused = limbeck_child(*words, before=WITHOUT_OPENVINO)
    refused.assert_refused(3, "openvino", "not installed", 'pip install "limbeck[openvino]"')


def test_backends_lists_the_one_that_is_not_installed(limbeck_child: Limbeck) -> None:
    shown = limbeck_child("backends", "--json", before=WITHOUT_OPENVINO)
    listed = {backend["name"]: backend["availability"] for backend in json.loads(shown.out)["backends"]}
    assert shown.code == 0
    assert not listed["openvino"]["can_export"]
    assert listed["onnx"]["can_export"]


def test_a_precision_that_the_backend_does_not_have(limbeck: Limbeck, model: Path, out: Path) -> None:
    export(limbeck, model, out, "--precision", "fp8").assert_refused(2, "no precision fp8", "fp32, fp16, bf16, int8")
    export(limbeck, model, out, "--precision", "fp12").assert_refused(2, "--precision", "'fp12'", "'fp16'")


def test_a_sparsity_that_the_backend_makes_no_use_of(limbeck: Limbeck, model: Path, out: Path) -> None:
    export(limbeck, model, out, "--sparsity", "2:4").assert_refused(2, "onnx", "2:4", "tensorrt and torch do")


def test_a_pattern_that_the_weights_do_not_have(limbeck: Limbeck, model: Path, out: Path) -> None:
    refused = limbeck("export", model, "--backend", "tensorrt", "--sparsity", "2:4", "--out", out)
    refused.assert_refused(2, "not 2:4", "attention.self.query", "limbeck prune")


def test_int8_without_texts_to_calibrate_on(limbeck: Limbeck, model: Path, out: Path) -> None:
    refused = export(limbeck, model, out, "--precision", "int8")
    assert refused.code in (2, 4)
    assert "--calibration FILE" in refused.err


def test_int8_with_a_calibration_file_of_another_shape(
    limbeck: Limbeck, model: Path, out: Path, odd_columns: Path
) -> None:
    refused = export(limbeck, model, out, "--precision", "int8", "--calibration", odd_columns)
    refused.assert_refused(4, "no column for 'text'", "it has words, count", "--column text=COLUMN")


def test_weights_that_are_no_numbers(limbeck: Limbeck, copy: Path, out: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    export(limbeck, copy, out).assert_refused(4, "layer.0.output.dense.weight", "1 NaN", "diverged")


ODD_MODEL = """
import torch
from transformers import BertModel

class Bessel(torch.nn.Module):
    def forward(self, hidden):
        return torch.special.bessel_j0(hidden)

class OddModel(BertModel):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        for layer in self.encoder.layer:
            layer.intermediate.intermediate_act_fn = Bessel()
"""


def test_an_operator_that_the_backend_lacks(limbeck: Limbeck, copy: Path, out: Path) -> None:
    """In code that comes with the model."""
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_odd.OddModel"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "modeling_odd.py").write_text(ODD_MODEL)
    refused = export(limbeck, copy, out, "--task", "sentence-similarity", "--trust-remote-code")
    refused.assert_refused(
        4,
        "encoder.layer.0.intermediate.intermediate_act_fn uses aten.special_bessel_j0",
        "ONNX opset 20",
        "--backend",
    )


# outputs


def test_an_output_folder_that_is_not_empty(limbeck: Limbeck, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    refused = limbeck("export", model, "--backend", "onnx", "--out", tmp_path)
    refused.assert_refused(2, f"{tmp_path} is not empty", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_output_that_is_a_file(limbeck: Limbeck, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    limbeck("prune", model, "--pattern", "2:4", "--out", tmp_path / "file").assert_refused(2, "is a file")


def test_a_disk_that_fills_up_under_a_checkpoint(
    limbeck: Limbeck, model: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(64)
    refused = limbeck("prune", model, "--pattern", "2:4", "--out", disk / "out")
    refused.assert_refused(4, "The disk is full", str(disk / "out"), "Free some space")
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_under_an_artifact(
    limbeck: Limbeck, model: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(64)
    export(limbeck, model, disk / "out").assert_refused(4, "The disk is full", str(disk / "out"))
    assert list(disk.iterdir()) == []


# artifacts


@pytest.fixture
def changed(artifact: Path, tmp_path: Path) -> Path:
    """The artifact with one bit of one byte of its program turned."""
    folder = Path(shutil.copytree(artifact, tmp_path / "changed"))
    program = folder / "model.onnx"
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    return folder


def test_a_changed_byte_is_found_by_every_verb_that_opens_artifacts(
    limbeck: Limbeck, changed: Path, model: Path, text_file: Path, out: Path
) -> None:
    words = ("model.onnx", "SHA-256", "do not deploy it")
    limbeck("inspect", changed).assert_refused(4, *words)
    limbeck("build", changed, "--out", out).assert_refused(4, *words)
    validate = ("validate", changed, "--teacher", model, "--data", text_file, "--no-latency", "--out", out)
    limbeck(*validate).assert_refused(4, *words)


def test_an_added_file_is_found(limbeck: Limbeck, artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "added"))
    (folder / "extra.py").touch()
    limbeck("inspect", folder).assert_refused(4, "extra.py", "manifest does not list")


def test_a_manifest_from_the_future(limbeck: Limbeck, artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "newer"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    limbeck("inspect", folder).assert_refused(4, "schema version 99", "Upgrade limbeck")


def test_a_checkpoint_is_no_artifact(limbeck: Limbeck, model: Path, out: Path) -> None:
    limbeck("build", model, "--out", out).assert_refused(4, str(model), "not a limbeck artifact", "limbeck export")


def test_too_few_texts_to_validate_on(
    limbeck: Limbeck, artifact: Path, model: Path, text_file: Path, out: Path
) -> None:
    few = ("--data", text_file, "--samples", 3, "--no-latency")
    refused = limbeck("validate", artifact, "--teacher", model, *few, "--out", out)
    refused.assert_refused(4, "3 texts to validate on", "at least 4")
