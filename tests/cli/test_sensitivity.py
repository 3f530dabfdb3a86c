"""`limbeck sensitivity` from words to folder, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from limbeck.validate.records.sensitivity import load_sensitivity

Make = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]
FILES = ["sensitivity.html", "sensitivity.json", "sensitivity.md"]


def test_every_part_of_a_model_is_measured(
    tiny_checkpoint: Make, held_out: Path, limbeck: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("sensitivity", tiny_checkpoint("bert"), "--data", held_out, "--samples", 8, "--shares", "0.5,0.1")
    told = limbeck(*words, "--out", out)
    assert told.code == 0, told.err
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert "With half of one part cut" in told.out and "sensitivity.html" in told.err
    found = load_sensitivity(out)
    assert (found.data.rows, found.shares, found.layers) == (8, [0.1, 0.5], 2)
    assert found.structures == ["heads", "ffn", "layers", "2:4", "unstructured"]
    assert (found.metric, found.against_references, found.method) == ("agreement_spearman", False, "taylor")
    assert len(found.records) == 2 * (3 * 2 + 2)
    assert all(record.drift["cosine_mean"] < 1 for record in found.records)

    again = limbeck(*words, "--out", out)
    assert again.code == 2 and "not empty" in again.err
    told = limbeck(*words, "--out", out, "--overwrite", "--structures", "layers, heads", "--method", "fisher", "--json")
    assert told.code == 0
    assert json.loads(told.out)["structures"] == ["heads", "layers"]
    assert load_sensitivity(out).method == "fisher"


@pytest.mark.parametrize(
    ("task", "row", "metric", "drift"),
    [
        ("text-classification", {"label": "positive"}, "accuracy", "kl_mean"),
        ("text-classification", {}, "flip_rate", "kl_mean"),
        ("fill-mask", {}, "perplexity", "token_agreement"),
    ],
)
def test_quality_is_what_the_task_measures(
    task: str, row: dict[str, str], metric: str, drift: str, tiny_checkpoint: Make, texts: list[str],
    write_jsonl: WriteRows, limbeck: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": text, **row} for text in texts[:10]])
    out = tmp_path / "out"
    told = limbeck("sensitivity", tiny_checkpoint("distilbert", task), "--data", file, "--shares", 0.5, "--out", out)
    assert told.code == 0, told.err
    found = load_sensitivity(out)
    assert (found.metric, found.drift_metric) == (metric, drift)
    assert found.against_references == (metric != "flip_rate")
    assert all(drift in record.drift for record in found.records)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--structures", "heads,fnn"), 2, "no structure 'fnn'; valid are heads, ffn, layers, 2:4, unstructured"),
        (("--structures", ","), 2, "No structure is named"),
        (("--shares", "0.5,1"), 2, "A share of 1 cannot be cut"),
        (("--shares", "half"), 2, "--shares takes numbers between 0 and 1"),
        (("--samples", "0"), 2, "--samples"),
        (("--tolerance", "-1"), 2, "tolerance of -1"),
        (("--method", "tailor"), 2, "no importance 'tailor'"),
        (("--column", "text=body"), 4, "no column 'body'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: tuple[str, ...], code: int, message: str, tiny_checkpoint: Make, held_out: Path,
    limbeck: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    told = limbeck("sensitivity", tiny_checkpoint("bert"), "--data", held_out, "--out", tmp_path / "out", *words)
    assert told.code == code
    assert message in " ".join(told.err.split())
    assert not (tmp_path / "out").exists()


def test_data_without_rows_or_columns_is_refused(
    tiny_checkpoint: Make, write_jsonl: WriteRows, limbeck: Callable[..., Any], tmp_path: Path
) -> None:
    empty, other = write_jsonl(tmp_path / "empty.jsonl", []), write_jsonl(tmp_path / "other.jsonl", [{"body": "text"}])
    for file, message in ((empty, "is empty"), (other, "no column for 'text'"), (tmp_path / "none.jsonl", "not exist")):
        told = limbeck("sensitivity", tiny_checkpoint("bert"), "--data", file, "--out", tmp_path / "out")
        assert told.code == 4 and message in told.err
        assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(
    tiny_checkpoint: Make, held_out: Path, limbeck: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.validate.rendering.sensitivity.write_text", interrupted)
    told = limbeck("sensitivity", tiny_checkpoint("bert"), "--data", held_out, "--structures", "layers", "--out",
                   tmp_path / "out")  # fmt: skip
    assert told.code == 130
    assert list(tmp_path.iterdir()) == []
