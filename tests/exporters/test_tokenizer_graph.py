"""The tokenizer as a graph: the same tokens as the tokenizer's, or nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from limbeck.backends import registry
from limbeck.backends.registry import backend_for, get_backend
from limbeck.errors import BackendUnavailable, ExportMismatch, InputError, UsageError
from limbeck.exporters.artifact import open_artifact
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.exporters.tokenizer_graph import TextTokens
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.exporting import export
from limbeck.recipes.precision_choice import export_fastest
from limbeck.recipes.schema import Export
from limbeck.validate.proofs.tokenizer_check import check_tokenizer_graph, read_otherwise

Make = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=32, opt_sequence=16)
STATIC = ShapeRange(min_batch=2, opt_batch=2, max_batch=2, min_sequence=24, opt_sequence=24, max_sequence=24)


def settings_for(backend: str, shapes: ShapeRange = SMALL, **more: Any) -> ExportSettings:
    return ExportSettings(backend=backend, shapes=shapes, tokenizer_graph=True, **more)


def checked(backend: str, folder: Path, shapes: ShapeRange, out: Path, special_matter: bool = False) -> Any:
    """The check of the graph that the backend writes of the folder's tokenizer."""
    checkpoint = load_checkpoint(folder)
    tokens = TextTokens.of(checkpoint, shapes)
    graph = get_backend(backend).export_tokenizer(tokens, out)
    return check_tokenizer_graph(graph, tokens, checkpoint.input_names, [], special_matter=special_matter)


@pytest.mark.parametrize("shapes", [SMALL, STATIC], ids=["varying", "static"])
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "fill-mask"), ("mpnet", "fill-mask"), ("roberta", "fill-mask"),
        ("llama", "text-generation"), ("gpt2", "text-generation"),
    ],
)  # fmt: skip
def test_openvinos_graph_gives_the_tokenizers_tokens_of_every_text(
    family: str, task: str, shapes: ShapeRange, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    check = checked("openvino", tiny_checkpoint(family, task=task), shapes, tmp_path, special_matter=True)
    assert check.passed, check.detail
    assert read_otherwise(check) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["openvino_tokenizer.bin", "openvino_tokenizer.xml"]


@pytest.mark.parametrize("shapes", [SMALL, STATIC], ids=["varying", "static"])
@pytest.mark.parametrize(
    ("family", "task", "unlike"),
    [
        ("bert", "text-classification", {"Central European letters", "Greek", "control characters"}),
        ("llama", "text-generation", {"control characters"}),
        ("gpt2", "text-generation", {"control characters"}),
        ("roberta", "text-classification", {"control characters"}),
    ],
)
def test_onnxs_graph_gives_the_tokenizers_tokens_but_of_what_it_says(
    family: str, task: str, unlike: set[str], shapes: ShapeRange, readable_checkpoint: Make, tmp_path: Path
) -> None:
    check = checked("onnx", readable_checkpoint(family, task), shapes, tmp_path)
    assert check.passed, check.detail
    assert unlike <= set(read_otherwise(check)) and (family == "bert" or unlike == set(read_otherwise(check)))


def test_a_mask_that_is_to_be_filled_has_to_be_read(readable_checkpoint: Make, tmp_path: Path) -> None:
    check = checked("onnx", readable_checkpoint("bert", "fill-mask"), SMALL, tmp_path, special_matter=True)
    assert not check.passed and "[MASK]" in check.detail


@pytest.mark.parametrize(
    "planted",
    [
        lambda tokens: {**tokens, "attention_mask": np.ones_like(tokens["attention_mask"])},
        lambda tokens: {**tokens, "input_ids": tokens["input_ids"] + 1},
        lambda tokens: {name: values[:, :-1] for name, values in tokens.items()},
        lambda tokens: {"input_ids": tokens["input_ids"]},
    ],
    ids=["a mask without padding", "other ids", "one token too few", "no mask"],
)
def test_a_planted_defect_is_found(
    planted: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]], tiny_checkpoint: Make
) -> None:
    tokens = TextTokens.of(load_checkpoint(tiny_checkpoint("mpnet")), STATIC)
    inputs = ["input_ids", "attention_mask"]
    assert check_tokenizer_graph(tokens, tokens, inputs, ["real"], special_matter=False).passed
    check = check_tokenizer_graph(lambda text: planted(tokens(text)), tokens, inputs, ["real"], special_matter=False)
    assert not check.passed


def test_a_difference_on_real_text_alone_is_found(tiny_checkpoint: Make) -> None:
    tokens = TextTokens.of(load_checkpoint(tiny_checkpoint("mpnet")), SMALL)

    def graph(text: str) -> dict[str, np.ndarray]:
        return tokens("hidden" if text == "real" else text)

    check = check_tokenizer_graph(graph, tokens, ["input_ids"], ["fine", "real"], special_matter=False)
    assert not check.passed and check.detail.startswith("of the text 'real' it makes input_ids [")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_graph_that_is_not_the_tokenizer_is_refused_with_the_first_text(
    family: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """The real deviations of onnxruntime-extensions."""
    checkpoint = load_checkpoint(tiny_checkpoint(family, task="text-generation" if family == "gpt2" else "fill-mask"))
    with pytest.raises(ExportMismatch, match=r"not the tokenizer: of the text '.* it makes input_ids \[") as caught:
        export(checkpoint, settings_for("onnx"), tmp_path / "out")
    assert caught.value.hint is not None and "--tokenizer-graph" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_calibrations_texts_are_compared_too(
    readable_checkpoint: Make, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    checkpoint = load_checkpoint(readable_checkpoint("bert", "text-classification"))
    texts = [{"text": "good", "label": 0}, {"text": "Łódź", "label": 1}]
    rows = checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", texts))
    with pytest.raises(ExportMismatch, match="of the text 'Łódź' it makes"):
        export(checkpoint, settings_for("onnx"), tmp_path / "out", calibration=rows)
    with pytest.raises(ExportMismatch, match="of the text 'Łódź' it makes"):
        export_fastest(checkpoint, settings_for("onnx"), tmp_path / "out", calibration=rows, validation=rows)
    assert not (tmp_path / "out").exists()


def test_an_artifact_holds_the_graph_its_check_and_what_to_mind(readable_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(readable_checkpoint("llama", "text-generation"))
    export(checkpoint, settings_for("onnx"), tmp_path / "out")
    manifest = open_artifact(tmp_path / "out")
    assert "tokenizer.onnx" in manifest.files and "tokenizer.onnx" not in manifest.program_files
    check = next(check for check in manifest.checks if check.name == "tokenizer graph")
    assert check.passed and {"kind of text": "Greek", "same tokens": True} in check.rows
    minded = "the tokenizer's graph makes other tokens than the tokenizer of: control characters"
    assert manifest.caveats == [minded]
    assert minded[1:] in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "tokenizer.onnx").read_bytes().decode(errors="ignore")


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_tokenizer_that_is_not_known_is_refused(backend: str, tmp_path: Path) -> None:
    tokens = TextTokens(CanineTokenizer(), 32, padded=False)  # written in Python
    with pytest.raises(InputError, match=r"makes no graph of this tokenizer \(CanineTokenizer\): ") as caught:
        get_backend(backend).export_tokenizer(tokens, tmp_path)
    assert caught.value.hint is not None and "--tokenizer-graph" in caught.value.hint


def test_onnx_is_not_tried_where_its_operators_have_not_been_seen_to_be_right(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "kettle": 1}, unk_token="[UNK]"))
    tokens = TextTokens(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), 32, padded=False)
    with pytest.raises(InputError, match="limbeck makes graphs of WordPiece and byte-level BPE, not WordLevel"):
        get_backend("onnx").export_tokenizer(tokens, tmp_path)


@pytest.mark.parametrize(
    ("backend", "package"), [("onnx", "onnxruntime-extensions"), ("openvino", "openvino-tokenizers")]
)
def test_a_missing_package_is_named(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "is_importable", lambda module: module != package.replace("-", "_"))
    with pytest.raises(BackendUnavailable, match=f"needs {package}, which is not installed") as caught:
        backend_for(settings_for(backend))
    assert caught.value.hint == f"pip install {package}"


def test_a_backend_without_graphs_of_tokenizers_says_who_has_them() -> None:
    with pytest.raises(UsageError, match="tensorrt makes no graphs of tokenizers; onnx and openvino do"):
        backend_for(settings_for("tensorrt", precision="fp32"))


def test_a_recipe_asks_for_it_too() -> None:
    assert Export(name="a", start="teacher", backend="onnx", tokenizer_graph=True).settings().tokenizer_graph
