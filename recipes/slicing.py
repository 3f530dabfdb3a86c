"""The slices that a recipe asks for, with the rows that its files hold."""

from __future__ import annotations

from collections.abc import Callable

from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..validate.rows.pairs import read_pairs
from ..validate.slices.choosing import SlicesAsked, check_builtin, values_by_row
from .schema import Recipe
from .sources import Sources


def slices_of(recipe: Recipe, teacher: Checkpoint, sources: Sources, read: Callable[[str], Data]) -> SlicesAsked:
    """What to measure beside the whole of the recipe's validation rows.

    Args:
        read: the rows of a file by its name in the recipe.

    Raises:
        InputError: a file, or a column of it, that is missing or cannot be sliced by.
        UsageError: a slice that does not suit the task.
    """
    asked, columns = recipe.slices, recipe.data.columns
    check_builtin(asked.builtin, recipe.task)
    for column in asked.by:
        values_by_row(read(recipe.data.validation), column)
    return SlicesAsked(
        files={name: read(file) for name, file in asked.files.items()},
        by=asked.by,
        builtin=asked.builtin,
        pairs={
            name: read_pairs(teacher, pairs.kind, sources.data(pairs.file), {**columns, **pairs.columns})
            for name, pairs in asked.pairs.items()
        },
    )
