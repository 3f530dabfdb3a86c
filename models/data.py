"""Data files of every common kind, read as rows with the field names that a task asks for."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, UsageError, did_you_mean, first_line
from ..files import sha256_of_file

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# The reader of the `datasets` package for each ending that we take.
_READERS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}
_CHUNK = 1000  # rows that are held in memory at a time, of data that is mapped from disk
_ONE_ROW = "Give a data file with at least one row."
TEXT_FIELDS = ("text", "text_pair", "sentence1", "sentence2", "tokens")
"""The fields of all tasks that hold text (a list of words as `tokens`); others say what is known of it."""
_KEPT = "column {}"
"""How a column that no field is read from is named in `Data.rows`."""
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


@dataclass(frozen=True)
class Field:
    """One field that a task reads: its name, and the column names under which files usually have it."""

    name: str
    usual: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """Rows of one file or data set, columns already renamed to the task's fields."""

    rows: Dataset
    source: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field name to the column of the file it was read from."""
    first_row: int = 0
    """How many rows of the source lie before the first of these: errors name rows by their place in the source."""

    def __len__(self) -> int:
        return len(self.rows)

    def has(self, name: str) -> bool:
        """Whether the rows have this field."""
        return name in self.columns

    def values(self, name: str) -> list[Any]:
        """The field's value in every row, in order."""
        return list(self.rows[name])

    def values_of_column(self, column: str) -> list[Any]:
        """The values, in order, of a column by its name in the file: one that a field was read from, or was kept.

        Raises:
            UsageError: it was not kept when the file was read.
        """
        name = next((name for name, read in self.columns.items() if read == column), _KEPT.format(column))
        if name not in self.rows.column_names:
            raise UsageError(f"The column {column!r} of {self.source} was not kept when it was read.")
        return self.values(name)

    def head(self, count: int | None) -> Data:
        """The first `count` rows (all when `None`)."""
        return self if count is None or count >= len(self) else self._between(0, count)

    def with_values(self, changed: Mapping[str, Sequence[Any]]) -> Data:
        """The same rows with other values in these fields."""
        from datasets import Dataset

        columns = {name: changed.get(name) or self.rows[name][:] for name in self.rows.column_names}
        return replace(self, rows=Dataset.from_dict(columns, features=self.rows.features))

    def chunks(self) -> Iterator[Data]:
        """The rows in order, some at a time: what reads all of them holds few in memory."""
        for start in range(0, len(self), _CHUNK):
            yield self._between(start, min(start + _CHUNK, len(self)))

    def _between(self, start: int, stop: int) -> Data:
        return Data(self.rows.select(range(start, stop)), self.source, self.columns, self.first_row + start)

    @cached_property
    def _hashes(self) -> np.ndarray:
        """The row hashes as ASCII, dtype S16 [rows]: a fifth of the memory that as many strings take."""
        hashes = (hash_of_row(row, self.columns) for row in self.rows)
        return np.fromiter(hashes, dtype="S16", count=len(self))

    @property
    def row_hashes(self) -> list[str]:
        """16 hex digits a row, over the row's text with case and spacing evened out: what finds the same example in
        training and test data."""
        return [value.decode() for value in self._hashes]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the row hashes in order, as 64 hex digits: the same rows have the same fingerprint whatever
        file format they came from."""
        return hashlib.sha256(self._hashes.tobytes()).hexdigest()

    def exact_hash(self) -> str:
        """SHA-256 over every field of every row as it is (case, spacing and labels count), as 64 hex digits: what a
        cache of something computed from the rows is keyed by."""
        digest = hashlib.sha256(json.dumps(sorted(self.columns)).encode())
        for chunk in self.chunks():
            digest.update(json.dumps(chunk.rows[:], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def hash_of_row(row: Mapping[str, Any], fields: Iterator[str] | Mapping[str, str]) -> str:
    """16 hex digits over the row's textual fields, lower-cased, runs of white space as one space."""
    texts = [row[name] for name in sorted(fields) if isinstance(row[name], str | list)]
    joined = "\x1f".join(" ".join(str(text).lower().split()) for text in texts)
    return hashlib.sha256(joined.encode("utf-8")).hexdigest()[:16]


def read_data(
    source: str | Path,
    fields: Sequence[Field],
    *,
    columns: Mapping[str, str] | None = None,
    optional: Sequence[Field] = (),
    keep: Sequence[str] = (),
) -> Data:
    """Read a data file (`.jsonl`, `.jsonl.gz`, `.csv`, `.parquet`), a folder of such files or of a saved Hugging Face
    data set, or a data set of the hub (`name` or `name:split`).

    Args:
        fields: what must be there; `optional` fields are read where present.
        columns: field name to column name, for columns that cannot be guessed.
        keep: columns to keep beside those that fields are read from, for `Data.values_of_column`.

    Raises:
        InputError: the file is missing, empty or malformed, or a field or a column to keep is not in it.
        UsageError: `columns` names a field that does not exist.
    """
    columns = dict(columns or {})
    known = [candidate.name for candidate in (*fields, *optional)]
    for name in columns:
        if name not in known:
            raise UsageError(f"There is no field {name!r} to map a column to; this task reads {', '.join(known)}.")
    table = _read_table(str(source))
    if len(table) == 0:
        raise InputError(f"{source} has no rows.", _ONE_ROW)
    found = _map_columns(table.column_names, fields, optional, columns, str(source))
    if not found:
        raise InputError(
            f"{source} has no column for {', '.join(map(repr, known))}; it has {', '.join(table.column_names)}.",
            f"Name the column: --column {known[0]}=COLUMN.",
        )
    guessed = {name: column for name, column in found.items() if name not in columns and name != column}
    if guessed:
        said = ", ".join(f"{name} = column {column!r}" for name, column in guessed.items())
        logger.info("%s: %s (use --column FIELD=COLUMN to change it)", Path(str(source)).name, said)
    kept = {_KEPT.format(column): column for column in keep if column not in found.values()}
    for column in kept.values():
        if column not in table.column_names:
            raise InputError(_no_column(str(source), column, table.column_names))
    rows = table.select_columns([*found.values(), *kept.values()]).rename_columns(
        {column: name for name, column in {**found, **kept}.items() if column != name}
    )
    return Data(rows, str(source), found)


def _map_columns(
    present: Sequence[str],
    fields: Sequence[Field],
    optional: Sequence[Field],
    asked: Mapping[str, str],
    source: str,
) -> dict[str, str]:
    found: dict[str, str] = {}
    for wanted in (*fields, *optional):
        if wanted.name in asked:
            if asked[wanted.name] not in present:
                raise InputError(_no_column(source, asked[wanted.name], present))
            found[wanted.name] = asked[wanted.name]
            continue
        match = next((name for name in (wanted.name, *wanted.usual) if name in present), None)
        if match is not None and match not in found.values():
            found[wanted.name] = match
        elif wanted in fields:
            raise InputError(
                f"{source} has no column for {wanted.name!r}; it has {', '.join(present)}.",
                f"Name the column: --column {wanted.name}=COLUMN.",
            )
    return found


def _no_column(source: str, column: str, present: Sequence[str]) -> str:
    return f"{source} has no column {column!r}; it has {', '.join(present)}.{did_you_mean(column, present)}"


def _read_table(source: str) -> Dataset:
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix or path.is_absolute() or source.startswith(".") or not _HUB_ID.match(source):
        raise InputError(f"The data file {source} does not exist.")
    return _read_hub(source)


def _quiet_datasets() -> Any:
    """The package without its bars and log lines: what went wrong is said by the error that we raise."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _reader_of(path: Path) -> str | None:
    name = path.name.lower()
    return next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)


def _read_file(path: Path) -> Dataset:
    datasets = _quiet_datasets()
    reader = _reader_of(path)
    if reader is None:
        raise InputError(f"{path} is of a kind that is not read here; valid endings are {', '.join(_READERS)}.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty.", _ONE_ROW)
    try:
        # Keyed by content, so that a file that changed under the same name is read anew.
        return datasets.load_dataset(reader, sha256_of_file(path)[:16], data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):  # a header and nothing below it
            raise InputError(f"{path} has no rows.", _ONE_ROW) from error
        cause = error.__cause__ or error
        raise InputError(f"{path} could not be read as {reader}: {first_line(cause)}") from error


def _read_folder(path: Path) -> Dataset:
    datasets = _quiet_datasets()
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            return _one_split(saved, str(path), None)
        return _one_split(datasets.load_dataset(str(path)), str(path), None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a Hugging Face data set folder: {first_line(error)}") from error


def _read_hub(source: str) -> Dataset:
    import datasets

    name, _, split = source.partition(":")
    try:
        return _one_split(datasets.load_dataset(name), source, split or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{source} is neither a file here nor a data set that could be had from the hub: {first_line(error)}"
        ) from error


def _one_split(loaded: Any, source: str, split: str | None) -> Dataset:
    if not isinstance(loaded, dict):
        return loaded  # a single split
    names = list(loaded)
    if split is None and len(names) == 1:
        split = names[0]
    if split not in names:
        raise InputError(f"{source} has the splits {', '.join(names)}.", f"Name one: {source}:{names[0]}.")
    return loaded[split]
