"""Under which terms a model may be used, as its folder states them: they travel from teacher to student to artifact."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import first_line
from ..files import path_inside

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
HUB_PATTERNS = (CARD_FILE, "LICEN[CS]E*", "NOTICE*", "COPYING*")
"""What is to be downloaded of a model beside the model."""
_LEGAL = ("license", "licence", "notice", "copying")
_TEXT = ("", ".txt", ".md", ".rst", ".pdf", ".html")
_LARGEST = 2**20
"""Bytes of a licence or a card: what is larger is something else."""
_LICENCE_KEYS = ("license", "license_name", "license_link")
_KEYS = (*_LICENCE_KEYS, "language", "base_model")


@dataclass(frozen=True)
class Terms:
    """What a model's source says of its licence and descent."""

    header: Mapping[str, str | list[str]] = field(default_factory=dict)
    """Of the YAML header of its model card: `license`, `license_name`, `license_link`, `language`, `base_model`."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Name to content of its licence files and notices."""

    @property
    def licences(self) -> list[str]:
        """The licences stated, by the names that the hub has for them; empty where none is."""
        named = _listed(self.header.get("license_name", []))
        return [name for name in _listed(self.header.get("license", [])) if name != "other" or not named] + named

    def joined_by(self, teacher: Terms) -> Terms:
        """The terms of a student that learnt from a teacher of its own terms: those of both. The descent stays the
        student's own."""
        header = dict(self.header)
        for key in _LICENCE_KEYS:
            both = [*_listed(header.get(key, [])), *_listed(teacher.header.get(key, []))]
            if each := list(dict.fromkeys(both)):
                header[key] = each[0] if len(each) == 1 else each
        files = dict(self.files)
        for name, content in teacher.files.items():
            if content not in files.values():
                files[_free_name(name, files)] = content
        return Terms(header, files)

    def save(self, folder: Path) -> None:
        """Write the licence files; the header goes into the folder's card."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def read_terms(folder: Path, hub_id: str | None = None) -> Terms:
    """The terms that a model folder states.

    Args:
        hub_id: what the model is called on the hub, where it comes from there.

    Raises:
        InputError: a licence file or a card that is a link to a place outside the folder: what is copied from here may
            be published.
    """
    folder = folder.resolve()
    # The hub's cache holds the files themselves beside its snapshots of links.
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    files = {path.name: path_inside(home, str(path.relative_to(home))).read_bytes() for path in _legal_files(folder)}
    card = path_inside(home, str((folder / CARD_FILE).relative_to(home)))
    header = _header(card) if card.is_file() and card.stat().st_size <= _LARGEST else {}
    return Terms({**header, "base_model": hub_id} if hub_id else header, files)


def _legal_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        named = path.name.lower().startswith(_LEGAL) and path.suffix.lower() in _TEXT
        if named and path.is_file() and path.stat().st_size <= _LARGEST:
            yield path


def _header(card: Path) -> dict[str, str | list[str]]:
    """Of a card's YAML header what is kept; a header that does not read says nothing."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        stated = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(
            "the header of %s does not read, so the model's licence is not known: %s", card, first_line(error)
        )
        return {}
    return {key: stated[key] for key in _KEYS if _is_text(stated.get(key))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _free_name(name: str, taken: Mapping[str, bytes]) -> str:
    path, number = Path(name), 1
    while name in taken:
        number += 1
        name = f"{path.stem}-{number}{path.suffix}"
    return name
