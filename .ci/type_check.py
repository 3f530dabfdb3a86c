"""Runs mypy --strict over what the wheel holds.

mypy wants a package that lies in a folder of its name; the repository's root is that package under another name. So the
packages are copied, as a wheel would hold them, into a folder called `limbeck` and checked there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]["packages"]
    with tempfile.TemporaryDirectory() as scratch:
        for package in packages:
            folder = Path(*package.split(".")[1:])
            target = Path(scratch) / "limbeck" / folder
            target.mkdir(parents=True, exist_ok=True)
            for file in (ROOT / folder).glob("*.py*"):
                if file.suffix in (".py", ".typed"):
                    shutil.copyfile(file, target / file.name)
        config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.run(
            [sys.executable, "-m", "mypy", *config, "-p", "limbeck"], cwd=scratch, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
