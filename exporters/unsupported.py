"""What a compiler could not take, in one sentence: the operator, the module whose forward uses it, and the opset that
has it. Compilers say it in pages that name neither."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import InputError, LimbeckError, first_line
from .node_scopes import module_of
from .options import NEWEST_OPSET

_FIXED = re.compile(r"marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_REPLACE = "Replace it there by operators that are supported, or try another --backend (limbeck backends)."


class _Unseen(io.StringIO):
    """Takes the graph that torch.export prints beside its error; rich's bars go on to the terminal all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


@contextmanager
def failures_named(module: nn.Module, opset: int | None = None) -> Iterator[None]:
    """Around an exporter's call: what the model is to blame for becomes one error that names where in the model it is.

    Args:
        module: what is exported.
        opset: the ONNX opset that is written, where the target is ONNX.

    Raises:
        InputError: an operator that has no translation, or code that cannot be traced. Other errors come through.
    """
    try:
        with redirect_stderr(_Unseen()):
            yield
    except LimbeckError:
        raise
    except Exception as error:
        frames = list(_frames(error))
        named = _untranslated(error, frames, opset) or _untraceable(error, frames, module)
        if named is None:
            raise
        raise named from error


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames that an error and its causes went through, outermost first. No exporter's error holds the graph, so
    it is read from where the exporter was at work."""
    while True:
        trace = error.__traceback__
        while trace is not None:
            yield trace.tb_frame
            trace = trace.tb_next
        cause = error.__cause__ or error.__context__
        if cause is None:
            return
        error = cause


def _untranslated(error: Exception, frames: list[FrameType], opset: int | None) -> InputError | None:
    kind = type(error).__name__
    if kind == "OpConversionFailure":  # OpenVINO's, which is defined in its binary module
        nodes = [node for node in _graph_nodes(frames) if str(node.target) in str(error)]
        return _operator_error(nodes[0], "OpenVINO", "") if nodes else None
    if opset is None:
        return None
    if isinstance(error, torch.onnx.errors.OnnxExporterError):
        at_work = [frame.f_locals.get("node") for frame in frames if frame.f_code.co_name == "_translate_fx_graph"]
        nodes = [node for node in at_work if isinstance(node, torch.fx.Node)]
        return _operator_error(nodes[-1], f"ONNX opset {opset}", _opset_of(_name(nodes[-1]))) if nodes else None
    if kind == "VersionConverterError":
        return _too_new(frames, opset)
    return None


def _graph_nodes(frames: list[FrameType]) -> Iterator[torch.fx.Node]:
    for frame in reversed(frames):
        for value in list(frame.f_locals.values()):
            if isinstance(value, torch.fx.GraphModule):
                yield from value.graph.nodes


def _operator_error(node: torch.fx.Node, target: str, opsets: str) -> InputError:
    name, becomes = _name(node), str(node.target)
    within = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    as_what = "" if becomes.startswith(name) else f" (it comes down to {becomes.removesuffix('.default')})"
    return InputError(f"{_owner(within)} uses {name}{as_what}, which has no translation to {target}.{opsets}", _REPLACE)


def _name(node: torch.fx.Node) -> str:
    """The operator as the model's code calls it, before it was decomposed."""
    return str(node.meta.get("original_aten") or node.target).removesuffix(".default")


def _owner(path: list[str]) -> str:
    return f"The module {path[-1]}" if path and path[-1] else "The model"


def _opset_of(name: str) -> str:
    """Which ONNX opset has an operator of this name, if any has."""
    import onnx

    plain = _letters(name.split(".")[1] if "." in name else name).removeprefix("special")
    known = [schema for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""]
    versions = {schema.since_version: schema.name for schema in known if _letters(schema.name) == plain}
    if not versions:
        return f" No opset up to {onnx.defs.onnx_opset_version()} has an operator of that name."
    since = min(versions)
    return f" ONNX has {versions[since]} since opset {since}, to which torch's exporter does not translate it."


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _too_new(frames: list[FrameType], opset: int) -> InputError | None:
    """An ONNX operator that the model's code names itself (`torch.onnx.ops`), newer than the graph's opset."""
    import onnx_ir

    found = [value for frame in frames for value in list(frame.f_locals.values()) if isinstance(value, onnx_ir.Node)]
    newer = [node for node in found if (node.version or 0) > opset]
    if not newer:
        return None
    node = newer[-1]
    wanted = int(node.version or 0)
    return InputError(
        f"{_owner([module_of(node)])} uses {node.op_type} of ONNX, which opset {opset} does not have; "
        f"opset {wanted} has it.",
        f"Use --backend onnx --option opset={wanted}." if wanted <= NEWEST_OPSET else _REPLACE,
    )


def _untraceable(error: Exception, frames: list[FrameType], module: nn.Module) -> InputError | None:
    """Python that torch.export cannot follow; errors from elsewhere are not the model's."""
    if not any(frame.f_globals.get("__name__") == "torch.export._trace" for frame in frames):
        return None
    where, line = _innermost(frames, module)
    fixed = dict.fromkeys(f"{axis} at {size}" for axis, size in _FIXED.findall(str(error)))
    if fixed:
        return InputError(
            f"{where} cannot be traced: its code fixes {' and '.join(fixed)}, the sizes of the sample it is traced "
            "with.",
            "Let it take sizes from its inputs (x.shape), or export it for one size: --batch N --sequence N.",
        )
    if not line:
        return None  # nothing of the model was at work: ours, or the exporter's
    said = first_line(error)
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        said = "its code takes a branch or a size from values that are only known when it runs"
    return InputError(f"{where} cannot be traced: {said.rstrip('.')}{line}.", "Write it with tensor operations alone.")


def _innermost(frames: list[FrameType], module: nn.Module) -> tuple[str, str]:
    """The innermost module of the model that was at work, in words, and file and line there."""
    names = {id(part): name for name, part in module.named_modules()}
    where, line = "The model", ""
    for frame in frames:
        code = frame.f_code
        owner: Any = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and id(owner) in names and not code.co_name.startswith("_"):
            where = _owner([names[id(owner)]])
            line = f" ({code.co_filename.rpartition('/')[2]}, line {frame.f_lineno})"
    return where, line
