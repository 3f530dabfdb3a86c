"""Data files of every kind, and what is wrong with them said in one sentence."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError, UsageError
from limbeck.models.data import Data, Field, hash_of_row, read_data

FIELDS = (Field("text", ("sentence", "content")),)
OPTIONAL = (Field("label", ("labels", "target")),)
ROWS: list[dict[str, Any]] = [
    {"text": "Rain fell, all night.", "label": 1},
    {"text": 'He said "no".', "label": 0},
    {"text": "Žluťoučký kůň", "label": 2},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the ending asks for (a saved data set for none)."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    name = path.name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".jsonl"):
        path.write_text(lines, encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name.endswith(".splits"):
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def read(path: Path | str, **settings: Any) -> Data:
    return read_data(path, FIELDS, optional=OPTIONAL, **settings)


KINDS = ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "rows.saved", "rows.splits"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    data = read(write(tmp_path / name, ROWS))
    assert len(data) == 3
    assert data.values("text") == [row["text"] for row in ROWS]
    assert data.values("label") == [1, 0, 2]
    reference = read(write(tmp_path / "reference.jsonl", ROWS))
    assert data.fingerprint == reference.fingerprint
    assert data.row_hashes == reference.row_hashes


def test_a_folder_of_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", ROWS)
    assert read(tmp_path / "folder").values("label") == [1, 0, 2]


def test_a_guessed_column_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": i, "sentence": row["text"], "target": row["label"]} for i, row in enumerate(ROWS)]
    with caplog.at_level(logging.INFO, "limbeck"):
        data = read(write(tmp_path / "rows.jsonl", rows))
    assert data.values("text") == [row["text"] for row in ROWS]
    assert data.has("label") and data.values("label") == [1, 0, 2]
    assert data.columns == {"text": "sentence", "label": "target"}
    assert "text = column 'sentence', label = column 'target'" in caplog.text
    assert "--column" in caplog.text


def test_nothing_is_said_where_nothing_was_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "limbeck"):
        read(write(tmp_path / "rows.jsonl", ROWS))
        read(write(tmp_path / "other.jsonl", [{"t": "a"}]), columns={"text": "t"})
    assert "column" not in caplog.text


def test_the_fields_own_name_goes_before_the_usual_ones(tmp_path: Path) -> None:
    rows = [{"sentence": "wrong", "text": "right"}]
    assert read(write(tmp_path / "rows.jsonl", rows)).values("text") == ["right"]


def test_a_column_is_mapped_by_option(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "not this", "body": "this", "label": 1}])
    data = read(path, columns={"text": "body"})
    assert data.values("text") == ["this"]
    assert data.columns["text"] == "body"


def test_one_column_does_not_serve_two_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"a": "one"}])
    fields = (Field("first", ("a",)), Field("second", ("a",)))
    with pytest.raises(InputError, match="no column for 'second'"):
        read_data(path, fields)


def test_an_optional_field_may_be_absent(tmp_path: Path) -> None:
    data = read(write(tmp_path / "rows.jsonl", [{"text": "alone"}]))
    assert not data.has("label")


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"headline": "a", "body": "b"}])
    with pytest.raises(InputError, match="no column for 'text'; it has headline, body") as caught:
        read(path)
    assert "--column text=COLUMN" in str(caught.value.hint)
    with pytest.raises(InputError, match=r"no column 'headlin'.*Did you mean 'headline'"):
        read(path, columns={"text": "headlin"})
    with pytest.raises(UsageError, match=r"no field 'txt'.*reads text, label"):
        read(path, columns={"txt": "body"})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("bad.jsonl", b'{"text": "good"}\n{"text": "bad"\n', "bad.jsonl could not be read as json"),
        ("bad.jsonl.gz", b"not gzip", r"bad.jsonl.gz could not be read as json"),
        ("bad.parquet", b"not parquet", "bad.parquet could not be read as parquet"),
        ("notes.txt", b"text", "valid endings are .jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path / name)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/absent"])
def test_a_missing_file_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(name)


def test_a_folder_that_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a Hugging Face data set folder"):
        read(tmp_path)


def test_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="has the splits train, test"):
        read(tmp_path / "two")


def test_a_file_that_changed_under_its_name_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "before"}])
    then = path.stat().st_mtime_ns
    assert read(path).values("text") == ["before"]
    write(path, [{"text": "after!"}])
    os.utime(path, ns=(then, then))  # as long as before, and as old as before
    assert read(path).values("text") == ["after!"]


def test_head_is_the_first_rows(tmp_path: Path) -> None:
    data = read(write(tmp_path / "rows.jsonl", ROWS))
    assert data.head(2).values("label") == [1, 0]
    assert data.head(2).row_hashes == data.row_hashes[:2]
    assert data.head(None) is data and data.head(99) is data


@given(st.lists(st.text(string.ascii_letters + "é ,\"'", min_size=1).filter(str.strip), min_size=1, max_size=5))
@settings(max_examples=3)
def test_the_fingerprint_is_that_of_the_rows_not_of_the_format(texts: list[str]) -> None:
    rows = [{"text": f"x {text}"} for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        kinds = [read(write(Path(folder) / f"rows{kind}", rows)) for kind in (".jsonl", ".csv", ".parquet")]
        assert len({data.fingerprint for data in kinds}) == 1
        more = read(write(Path(folder) / "more.jsonl", [*rows, {"text": "one more"}]))
    assert more.fingerprint != kinds[0].fingerprint
    assert more.row_hashes[:-1] == kinds[0].row_hashes


@given(st.text(string.ascii_letters, min_size=1), st.text(string.ascii_letters, min_size=1))
def test_row_hashes_even_out_case_and_spacing_only(first: str, second: str) -> None:
    plain = hash_of_row({"text": f"{first} {second}"}, {"text": ""})
    assert hash_of_row({"text": f"  {first.upper()} \n\t {second.upper()} "}, {"text": ""}) == plain
    assert hash_of_row({"text": f"{first} {second}!"}, {"text": ""}) != plain
    assert len(plain) == 16


def test_a_row_hash_tells_columns_apart_and_looks_past_labels() -> None:
    both = {"a": "", "b": ""}
    assert hash_of_row({"a": "x y", "b": "z"}, both) != hash_of_row({"a": "x", "b": "y z"}, both)
    assert hash_of_row({"a": "x", "b": 1}, both) == hash_of_row({"a": "x", "b": 2}, both)


def test_the_fingerprint_heeds_the_order_of_rows(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    forwards = read(write_jsonl(tmp_path / "a.jsonl", ROWS))
    backwards = read(write_jsonl(tmp_path / "b.jsonl", ROWS[::-1]))
    assert forwards.fingerprint != backwards.fingerprint
    assert sorted(forwards.row_hashes) == sorted(backwards.row_hashes)


def test_rows_read_some_at_a_time_keep_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.models.data._CHUNK", 2)
    data = read(write(tmp_path / "rows.jsonl", ROWS))
    chunks = list(data.chunks())
    assert [(chunk.first_row, len(chunk)) for chunk in chunks] == [(0, 2), (2, 1)]
    assert [value for chunk in chunks for value in chunk.values("label")] == [1, 0, 2]
    assert [value for chunk in chunks for value in chunk.row_hashes] == data.row_hashes
    assert [chunk.first_row for chunk in chunks[1].chunks()] == [2]


def test_the_exact_hash_heeds_what_the_fingerprint_looks_past(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    plain = read(write_jsonl(tmp_path / "a.jsonl", ROWS))
    shouted = read(write_jsonl(tmp_path / "b.jsonl", [{**row, "text": row["text"].upper()} for row in ROWS]))
    relabelled = read(write_jsonl(tmp_path / "c.jsonl", [{**row, "label": 0} for row in ROWS]))
    again = read(write(tmp_path / "d.parquet", ROWS))
    assert plain.fingerprint == shouted.fingerprint == relabelled.fingerprint
    assert len({data.exact_hash() for data in (plain, shouted, relabelled, again)}) == 3
