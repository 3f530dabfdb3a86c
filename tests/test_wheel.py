"""The wheel, outside the checkout: everything that the code reads at run time is in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
from limbeck.recipes.schema import load_recipe
from limbeck.recipes.sources import RECIPE_FOLDER, Sources
import limbeck, limbeck.validate.rendering as rendering
from limbeck.validate.records.report import Report
recipe = load_recipe(RECIPE_FOLDER / "quickstart.yaml")
sources = Sources(RECIPE_FOLDER)
texts = [sources.data(name) for name in (recipe.data.train, recipe.data.validation)]
assert all(open(text, "rb").read(2) == b"\\x1f\\x8b" for text in texts)
report = Report(kind="run", title="smoke", created="2026-01-01T00:00:00+00:00", command="")
assert "smoke" in rendering.render_html(report)
from pathlib import Path
rooms = Path(limbeck.__file__).parent
assert (rooms / "models/checkpoint_card.md.j2").is_file() and (rooms / "exporters/artifact_card.md.j2").is_file()
print(limbeck.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout and unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    # from a copy: setuptools builds in the source tree, and ships what an earlier build left there
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(wheel, check=True, cwd=folder)
    (built,) = folder.glob("limbeck-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(built)], check=True, cwd=folder)
    return target


def run(installed: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    # -P: the current folder is not on the path, so nothing comes from the checkout
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=True)
    return done.stdout


def test_recipes_text_and_templates_are_in_the_wheel(installed: Path) -> None:
    assert Path(run(installed, "-c", SMOKE).strip()).is_relative_to(installed)


def test_the_command_runs_from_the_wheel(installed: Path) -> None:
    assert "quickstart" in run(installed, "-m", "limbeck", "--help")


def test_tests_and_benchmarks_stay_out_of_the_wheel(installed: Path) -> None:
    shipped = {path.name for path in (installed / "limbeck").iterdir() if path.is_dir()}
    assert not shipped & {"tests", "benchmarks", "docs", "examples"}
    assert (installed / "limbeck" / "py.typed").exists()
