"""`limbeck inspect`: what a checkpoint and an artifact are made of, as JSON, as a table and as a picture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.lineage import Step
from limbeck.models.surgery import HeadSelection, Selection, select
from limbeck.prune.costs import counted_flops

Limbeck = Callable[..., Any]
SVG = "{http://www.w3.org/2000/svg}"
WIDTHS = [24, 32]  # feed-forward channels of the two layers


@pytest.fixture(scope="module")
def uneven(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned BERT whose layers differ: 1 and 4 heads, 24 and 32 channels; half of one matrix is zero."""
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    heads = [HeadSelection(torch.arange(count), torch.arange(count)) for count in (1, 4)]
    smaller = select(checkpoint.model, Selection(heads=heads, ffn=[torch.arange(width) for width in WIDTHS]))
    weight = smaller.get_submodule("encoder.layer.1.output.dense").weight.data
    weight.view(-1)[::2] = 0
    step = Step(verb="prune", method="by hand", rationale="to see what is left")
    folder = tmp_path_factory.mktemp("uneven") / "uneven"
    replace(checkpoint, training_rows={}).after(smaller, step).save(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from limbeck.cli.main import _run

    folder = tmp_path_factory.mktemp("artifacts") / "artifact"
    assert _run(["export", str(uneven), "--backend", "onnx", "--batch", "1:8", "--out", str(folder)]) == 0
    return folder


def widths(summary: dict[str, Any]) -> list[int]:
    return [layer["shape"][0] for layer in summary["linear_layers"] if layer["kind"] == "down"]


def loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


def test_a_checkpoint_whose_layers_differ(uneven: Path, limbeck: Limbeck) -> None:
    shown = limbeck("inspect", uneven, "--json", "--shape", "2x7")
    assert shown.code == 0, shown.err
    summary = json.loads(shown.out)
    assert widths(summary) == summary["ffn_widths"] == WIDTHS
    assert summary["heads"] == [1, 4]
    assert summary["flops"]["total"] == counted_flops(loaded(uneven), 7, 2)
    assert summary["size_bytes"] == (uneven / "model.safetensors").stat().st_size
    last = summary["linear_layers"][-1]
    assert last["zeros"] == 0.5 and last["sparsity"] == "2:4" and last["eligible"]
    assert "is not a multiple of 32" in summary["linear_layers"][0]["reason"]  # one head has 8 channels
    assert {layer["precision"] for layer in summary["linear_layers"]} == {"float32"}
    assert summary["inputs"][0]["sequence"] == [1, summary["max_length"]]
    (step,) = summary["history"]
    assert (step["verb"], step["method"], step["rationale"]) == ("prune", "by hand", "to see what is left")


def test_an_artifact_says_the_same_of_its_graph(uneven: Path, artifact: Path, limbeck: Limbeck) -> None:
    summary = json.loads(limbeck("inspect", artifact, "--json").out)
    assert widths(summary) == WIDTHS
    assert summary["flops"]["shape"] == [1, 64]  # 128 tokens are more than it takes
    assert summary["flops"]["total"] == counted_flops(loaded(uneven), 64, 1)
    assert summary["linear_layers"][-1]["zeros"] == 0.5
    assert summary["inputs"][0]["batch"] == [1, 8] and summary["inputs"][0]["sequence"] == [1, 64]
    assert summary["size_bytes"] == sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    assert [table["shape"] for table in summary["tables"]] and summary["history"][0]["method"] == "by hand"
    table = limbeck("inspect", artifact).out
    for words in ("batch 1 to 8, sequence 1 to 64", "FLOPs for 1 x 64 tokens", "float32", "2:4", "to see what is left",
                  "encoder.encoder.layer.1.output.dense", "no kernels for sparse weights"):  # fmt: skip
        assert words in " ".join(table.split()), words


def drawn(path: Path) -> dict[str, tuple[float, float]]:
    """The widths of a cell's bar as a whole and of what is not zero in it, by the name in its tooltip."""
    cells = {}
    for group in ElementTree.parse(path).getroot().iter(f"{SVG}g"):
        bars = [float(bar.attrib["width"]) for bar in group.iter(f"{SVG}rect")]
        name = (group.findtext(f"{SVG}title") or "").partition(":")[0]
        cells[name] = max(bars), min(bars)
    return cells


@pytest.mark.parametrize("made", ["uneven", "artifact"])
def test_the_picture_is_to_scale(made: str, tmp_path: Path, limbeck: Limbeck, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(made)
    summary = json.loads(limbeck("inspect", folder, "--json").out)
    shown = limbeck("inspect", folder, "--picture", tmp_path / "layers.svg")
    assert shown.code == 0, shown.err
    cells = drawn(tmp_path / "layers.svg")
    assert set(cells) == {layer["layer"] for layer in summary["linear_layers"]}
    unit = max(whole for whole, _ in cells.values()) / 1024  # 32 x 32 weights are the most
    for layer in summary["linear_layers"]:
        whole, kept = cells[layer["layer"]]
        assert whole == pytest.approx(unit * layer["shape"][0] * layer["shape"][1], abs=0.01)
        assert kept == pytest.approx(whole * (1 - layer["zeros"]), abs=0.01)
    written = (tmp_path / "layers.svg").read_text()
    assert "prefers-color-scheme: dark" in written
    assert all(f">{kind}</text>" in written for kind in ("q", "k", "v", "o", "up", "down", "layer 0", "layer 1"))


def test_a_format_that_no_backend_here_opens_still_shows_its_manifest(
    artifact: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    shutil.copytree(artifact, tmp_path / "foreign")
    manifest = json.loads((artifact / "manifest.json").read_text())
    (tmp_path / "foreign" / "manifest.json").write_text(json.dumps({**manifest, "format": "tflite"}))
    summary = json.loads(limbeck("inspect", tmp_path / "foreign", "--json").out)
    assert summary["linear_layers"] is None and summary["flops"]["total"] is None
    assert "'tflite'" in summary["layers_unknown"]
    assert summary["parameters"] == manifest["parameters"]
    shown = limbeck("inspect", tmp_path / "foreign")
    assert shown.code == 0 and "Layers: not known." in shown.out
    refused = limbeck("inspect", tmp_path / "foreign", "--picture", tmp_path / "layers.svg")
    assert refused.code == 4 and "'tflite'" in refused.err
    assert not (tmp_path / "layers.svg").exists()


@pytest.mark.parametrize("shape", ["8", "8*128", "0x8", "8x", "x", "1x2x3", "-1x8", "axb"])
def test_a_shape_is_two_numbers(shape: str, uneven: Path, limbeck: Limbeck) -> None:
    shown = limbeck("inspect", uneven, f"--shape={shape}")
    assert shown.code == 2
    assert f"--shape takes BATCHxSEQUENCE (8x128), not {shape!r}" in shown.err


@pytest.mark.parametrize(("made", "shape"), [("uneven", "1x65"), ("artifact", "1x65"), ("artifact", "9x8")])
def test_a_shape_is_one_that_the_model_takes(
    made: str, shape: str, limbeck: Limbeck, request: pytest.FixtureRequest
) -> None:
    shown = limbeck("inspect", request.getfixturevalue(made), "--shape", shape)
    assert shown.code == 2
    assert f"--shape {shape}" in shown.err and "1 to 64 tokens" in shown.err


def test_a_path_that_is_not_there(tmp_path: Path, limbeck: Limbeck) -> None:
    shown = limbeck("inspect", tmp_path / "nothing")
    assert shown.code == 4 and "does not exist" in shown.err


def test_a_picture_is_an_svg(uneven: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shown = limbeck("inspect", uneven, "--picture", tmp_path / "layers.png")
    assert shown.code == 2 and "SVG" in shown.err


def test_a_manifest_of_a_gigabyte_is_refused_unread(artifact: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shutil.copytree(artifact, tmp_path / "huge")
    os.truncate(tmp_path / "huge" / "manifest.json", 10**9)  # sparse: it takes no room
    shown = limbeck("inspect", tmp_path / "huge")
    assert shown.code == 4
    assert "manifest.json is too large" in shown.err and "1,000,000,000 bytes" in shown.err


def test_a_changed_artifact_is_refused_before_its_graph_is_read(
    artifact: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    shutil.copytree(artifact, tmp_path / "changed")
    (tmp_path / "changed" / "model.onnx").write_bytes(b"no graph")
    shown = limbeck("inspect", tmp_path / "changed")
    assert shown.code == 4 and "is not the file that was exported" in shown.err
