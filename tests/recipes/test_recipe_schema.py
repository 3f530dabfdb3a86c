"""The JSON Schema that editors check recipes with says what the code accepts."""

from __future__ import annotations

import json

from limbeck.recipes.schema import Recipe
from limbeck.recipes.sources import RECIPE_FOLDER

SCHEMA_FILE = RECIPE_FOLDER / "recipe.schema.json"


def test_the_shipped_schema_is_that_of_the_model() -> None:
    """To renew it: `json.dumps(Recipe.model_json_schema(), indent=2)` into `recipes/builtin/recipe.schema.json`."""
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == Recipe.model_json_schema()
