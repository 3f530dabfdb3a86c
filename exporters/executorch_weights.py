"""Which constant of a `.pte` is which parameter: found by content when the program is made, and kept beside it, since
the program itself has no names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..files import read_document, write_json
from ..models.anatomy import Linear
from .executorch_program import Constant, PteProgram
from .parameter_names import TRANSPOSED, ParameterNames
from .program import ProgramWeight

WEIGHTS_FILE = "weights.json"
WEIGHTS_SCHEMA = 1
_SLACK = 1e-5


class WeightNames(BaseModel):
    """Where the parameters of the traced module lie in `model.pte`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = WEIGHTS_SCHEMA
    names: dict[str, str]
    """Place of the constant (`Constant.place`) to the parameter's name, in the order of the module's parameters; a
    constant that holds the transpose has the suffix `.T`, one that holds some rows of a table their range."""

    @classmethod
    def load(cls, folder: Path) -> WeightNames:
        """Those of an artifact.

        Raises:
            InputError: missing or malformed.
        """
        return read_document(folder / WEIGHTS_FILE, cls, WEIGHTS_SCHEMA)

    def save(self, folder: Path) -> None:
        """Write them beside the program."""
        write_json(folder / WEIGHTS_FILE, self.model_dump())


def name_weights(program: PteProgram, module: nn.Module) -> WeightNames:
    """Find the parameter of every constant: by its bytes, where it is quantised by its values within their rounding."""
    exact, rounded = ParameterNames(module), _Rounded(module)
    products = {product.weight.place for graph in program.graphs for product in graph.products}
    tables = {table.place for table in program.tables}
    parts = dict(module.named_modules())
    multiplied = [name for name, part in parts.items() if isinstance(part, Linear)]
    looked_up = [name for name, part in parts.items() if isinstance(part, nn.Embedding)]
    found: dict[str, str] = {}
    for constant in program.constants:
        # what a tied weight is called depends on what uses it
        scopes = multiplied if constant.place in products else looked_up if constant.place in tables else []
        name = exact.find(constant.raw, scopes) if constant.scale is None else rounded.find(constant, scopes)
        if name is not None:
            found[constant.place] = name
    order = {name: number for number, (name, _) in enumerate(module.named_parameters(remove_duplicate=False))}
    places = sorted(found, key=lambda place: order.get(parameter_of(found[place]), len(order)))
    return WeightNames(names={place: found[place] for place in places})


def parameter_of(name: str) -> str:
    """The parameter that a constant of this name holds, or holds some rows of."""
    return name.removesuffix(TRANSPOSED).partition("[")[0]


class _Rounded:
    """Parameters by what is left of them once they were rounded."""

    def __init__(self, module: nn.Module) -> None:
        self._known: dict[str, torch.Tensor] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._known[name] = parameter.detach()
            if parameter.ndim == 2:
                self._known[name + TRANSPOSED] = parameter.detach().T

    def find(self, constant: Constant, scopes: Sequence[str]) -> str | None:
        values, step = constant.values, np.broadcast_to(constant.step, constant.raw.shape)
        alike = {name: known for name, known in self._known.items() if known.shape == values.shape}
        for name in sorted(alike, key=lambda name: parameter_of(name).rpartition(".")[0] not in scopes):
            first = _near(values[:1], step[:1], alike[name][:1])
            if first and _near(values, step, alike[name]):
                return name
        return None


def _near(values: np.ndarray, step: np.ndarray, parameter: torch.Tensor) -> bool:
    expected = parameter.float().cpu().numpy()
    slack = _SLACK * float(np.max(np.abs(expected), initial=0.0))
    return bool((np.abs(values - expected) <= step + slack).all())


def read_weights(program: PteProgram, names: WeightNames) -> Iterator[ProgramWeight]:
    """Every named weight of a written program, as float32 in its parameter's layout, one at a time."""
    for constant in program.constants:
        if (name := names.names.get(constant.place)) is not None:
            yield from ProgramWeight.of_constant(name, constant.values, constant.step)
