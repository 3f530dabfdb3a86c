"""Constraints that are refused before anything is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.errors import UsageError
from limbeck.recipes.plan import refuse_unmeasurable
from limbeck.recipes.schema import Recipe


def test_a_recipe_may_limit_energy_where_there_is_a_meter(tmp_path: Path) -> None:
    """On a folder that looks like Linux's `/sys/class/powercap`."""
    recipe = Recipe.model_validate({
        "name": "thrifty",
        "teacher": "teacher",
        "task": "sentence-similarity",
        "data": {"train": "a.jsonl", "validation": "b.jsonl"},
        "constraints": [{"artifact": "small", "energy_mj": 5}],
        "stages": [{"name": "narrow", "prune": {"structure": "ffn", "keep": 0.5}}],
        "exports": [{"name": "small", "start": "narrow", "backend": "onnx"}],
    })  # fmt: skip
    with pytest.raises(UsageError, match=r"energy_mj on small cannot be checked here: .* has no RAPL counter"):
        refuse_unmeasurable(recipe, tmp_path)
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for file, value in (("name", "package-0"), ("max_energy_range_uj", "1000"), ("energy_uj", "0")):
        (zone / file).write_text(value)
    refuse_unmeasurable(recipe, tmp_path)
