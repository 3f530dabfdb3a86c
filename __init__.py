"""limbeck: distil, prune, export and prove transformer models.

Names are imported on first use, so that `import limbeck` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# `distill`, `prune` and `validate` are rooms; their verbs are imported from `limbeck.recipes.steps`.
_LAZY = {
    "LimbeckError": ".errors",
    "load_checkpoint": ".models.checkpoint",
    "export": ".recipes.steps",
    "load_runner": ".backends.registry",
    "load_report": ".validate.records.report",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
