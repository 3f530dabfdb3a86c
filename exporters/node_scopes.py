"""Where in the model a node of an exported graph comes from, as torch's exporter notes it on each node."""

from __future__ import annotations

from typing import Any

SCOPES = "pkg.torch.onnx.name_scopes"


def module_of(node: Any) -> str:
    """The qualified name of the module whose forward made the node; empty for the root, and where nothing is noted.

    The scopes read `['', 'encoder', 'encoder.layer.0', 'linear']`: the last is the operator's, the one before it the
    innermost module's.
    """
    text = node.metadata_props.get(SCOPES, "")
    scopes = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
    return scopes[-2] if len(scopes) > 1 else ""
