"""What TensorRT says while it builds and of what it built: the log, captured, and the inspector's list, counted."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SPARSITY = {
    "eligible": re.compile(r"layers? eligible for sparse math:?(?P<layers>.*)", re.IGNORECASE),
    "picked": re.compile(r"picked sparse implementation for layers?:?(?P<layers>.*)", re.IGNORECASE),
}
# How the inspector names types, the narrowest first: what a layer multiplies in is the narrowest that it reads.
_TYPES = {
    "fp4": ("fp4",),
    "int4": ("int4",),
    "fp8": ("fp8", "float8"),
    "int8": ("int8",),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("fp16", "half", "float16"),
    "fp32": ("fp32", "float", "float32"),
}
_WORD = re.compile(r"[a-z]+[0-9]*")


@contextmanager
def captured_log(lines: list[str]) -> Iterator[None]:
    """Collect what TensorRT and Polygraphy log, verbose lines included, instead of printing it."""
    from polygraphy.logger import G_LOGGER

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(_COLOURS.sub("", record.getMessage()).splitlines())

    logger = logging.getLogger("Polygraphy")  # where Polygraphy sends its lines when told to use `logging`
    collector = Collector(level=0)
    before = (G_LOGGER.use_python_logging_system, G_LOGGER.module_severity, logger.level, logger.propagate)
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.module_severity = {"": G_LOGGER.EXTRA_VERBOSE}  # TensorRT's own verbose lines
    logger.setLevel(1)
    logger.propagate = False
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
        logger.setLevel(before[2])
        logger.propagate = before[3]
        G_LOGGER.module_severity = before[1]
        G_LOGGER.use_python_logging_system = before[0]


def sparsity_of(lines: Sequence[str]) -> dict[str, list[str]]:
    """The layers that the log calls eligible for sparse math, and those for which a sparse kernel was picked.

    A fused layer keeps its name, `MatMul_3 + Add_4`.
    """
    found: dict[str, list[str]] = {}
    for what, wanted in _SPARSITY.items():
        said = [match["layers"] for line in lines if (match := wanted.search(line))]
        named = [name.strip() for text in said for name in text.split(", ")]
        found[what] = list(dict.fromkeys(name for name in named if name))
    return found


def first_error(lines: Sequence[str]) -> str | None:
    """The last line that TensorRT or Polygraphy logged as an error."""
    errors = [line.strip() for line in lines if line.lstrip().startswith(("[E]", "[!]"))]
    return errors[-1] if errors else None


def layer_evidence(information: Any) -> dict[str, Any]:
    """What the inspector's list says: how many layers, of which precision, with which sparse kernels.

    Args:
        information: the JSON of `EngineInspector.get_engine_information`; its layers are names, or tables where the
            engine was built with detailed profiling.
    """
    layers = information.get("Layers", []) if isinstance(information, Mapping) else []
    names = [_name_of(layer) for layer in layers]
    precisions = Counter(_precision_of(layer) for layer in layers)
    return {
        "layers": len(names),
        "layers by precision": dict(sorted(precisions.items())),
        "sparse kernels": [name for name in names if "sparse" in name.lower() or "spmma" in name.lower()],
    }


def _name_of(layer: Any) -> str:
    return (
        f"{layer.get('Name', '')} {layer.get('TacticName', '')}".strip() if isinstance(layer, Mapping) else str(layer)
    )


def _precision_of(layer: Any) -> str:
    """The narrowest floating or quantised type that a layer reads, or writes where it reads none; `other` for layers of
    indices and shapes, and where the list holds names alone."""
    if not isinstance(layer, Mapping):
        return "other"
    for side in ("Inputs", "Outputs"):
        tensors = layer.get(side)
        words = {word for tensor in (tensors if isinstance(tensors, list) else []) for word in _type_words(tensor)}
        for precision, names in _TYPES.items():
            if words & set(names):
                return precision
    return "other"


def _type_words(tensor: Any) -> list[str]:
    """The words that say a tensor's type: TensorRT 10 has one field for layout and type, 11 one for each."""
    if not isinstance(tensor, Mapping):
        return []
    fields = {str(name).lower(): str(value).lower() for name, value in tensor.items()}
    text = next((fields[name] for name in ("datatype", "format/datatype", "format") if name in fields), "")
    return _WORD.findall(text)
