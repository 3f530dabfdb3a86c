"""Licences and descent travel with the weights: from the teacher to the student, and on to the artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from limbeck.errors import InputError
from limbeck.exporters.artifact import open_artifact
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint
from limbeck.models.terms import Terms, read_terms
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.steps import export, prune

SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=32, opt_sequence=16)


def test_a_teachers_licence_travels_to_the_student_and_to_its_artifact(licensed: Path, tmp_path: Path) -> None:
    student = prune(load_checkpoint(licensed), PruneSettings(structure="ffn", keep=0.5), rationale="it was too slow")
    student.save(tmp_path / "student")
    export(
        load_checkpoint(tmp_path / "student"), ExportSettings(backend="openvino", shapes=SMALL), tmp_path / "artifact"
    )
    for folder in (tmp_path / "student", tmp_path / "artifact"):
        header = ModelCard.load(folder / "README.md").data
        assert (header.license, header["license_name"], header["license_link"]) == ("other", "kitchen-1.0", "LICENSE")
        assert (header.base_model, header.language) == ("somebody/kettle", ["en"])
        assert header.datasets is None  # the student has not seen them
        assert header.pipeline_tag == "sentence-similarity" and "pruning" in header.tags
        assert (folder / "LICENSE").read_bytes() == b"Boil before use.\r\n"
        assert (folder / "NOTICE.txt").read_text() == "Kettles by Somebody.\n"
        text = ModelCard.load(folder / "README.md").text
        assert "**kitchen-1.0**" in text and "[NOTICE.txt](NOTICE.txt)" in text
        assert "### 1. Pruned:" in text and "Why: it was too slow" in text and "32 of 64 channels" in text
    assert {"LICENSE", "NOTICE.txt", "README.md"} <= set(open_artifact(tmp_path / "artifact").files)


def test_a_student_of_another_origin_is_under_its_own_licence_and_its_teachers() -> None:
    own = Terms({"license": "mit", "base_model": "a/b"}, {"LICENSE": b"MIT", "NOTICE": b"same"})
    teacher = Terms({"license": "apache-2.0", "base_model": "c/d"}, {"LICENSE": b"Apache", "NOTICE": b"same"})
    joined = own.joined_by(teacher)
    assert joined.header == {"license": ["mit", "apache-2.0"], "base_model": "a/b"}
    assert joined.files == {"LICENSE": b"MIT", "NOTICE": b"same", "LICENSE-2": b"Apache"}
    assert joined.joined_by(teacher) == joined
    assert own.joined_by(Terms()) == own


def test_a_licence_is_not_read_from_outside_the_folder(licensed: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (licensed / "LICENSE").unlink()
    (licensed / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="points outside"):
        load_checkpoint(licensed)


def test_a_snapshot_of_the_hub_is_read_through_its_links(licensed: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("LICENSE", "README.md"):
        shutil.copyfile(licensed / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    terms = read_terms(snapshot, hub_id="a/b")
    assert terms.header["license_name"] == "kitchen-1.0" and terms.header["base_model"] == "a/b"
    assert terms.files == {"LICENSE": b"Boil before use.\r\n"}


UNREADABLE = ["---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: {a: 1}\n---\n", "", "\xff"]


@pytest.mark.parametrize("header", UNREADABLE)
def test_a_card_that_does_not_read_keeps_no_model_from_loading(licensed: Path, header: str) -> None:
    (licensed / "README.md").write_bytes(header.encode("latin-1"))
    assert load_checkpoint(licensed).terms.header == {}
