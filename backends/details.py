"""One backend in detail: what it makes, what it needs, and the options that are its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import BackendUnavailable, LimbeckError
from .registry import Listing, get_backend, listing_of


@dataclass(frozen=True)
class Option:
    """One `--option NAME=VALUE`."""

    name: str
    takes: str
    """What values it takes, in words."""
    default: Any
    description: str


@dataclass(frozen=True)
class Details:
    """A backend with everything that it declares."""

    listing: Listing
    precisions: tuple[str, ...]
    default_precision: str
    sparsities: tuple[str, ...]
    formats: tuple[str, ...]
    built_format: str
    """The format that `limbeck build` makes of its kits; empty where there is no build."""
    options: list[Option]


def details_of(name: str) -> Details:
    """Everything about the backend of that name.

    Raises:
        UsageError: there is none; the message lists the known and suggests the near.
        BackendUnavailable: a plug-in that is broken.
    """
    backend = get_backend(name)
    listing = listing_of(name)
    try:
        schema = backend.options().model_json_schema()
        return Details(
            listing=listing,
            precisions=tuple(backend.precisions),
            default_precision=backend.default_precision,
            sparsities=tuple(backend.sparsities),
            formats=tuple(backend.formats),
            built_format=backend.built_format,
            options=[_option(option, field) for option, field in schema.get("properties", {}).items()],
        )
    except LimbeckError:
        raise
    except Exception as error:
        if listing.source == "built in":
            raise  # a defect of ours, to be seen as one
        raise BackendUnavailable(f"The plug-in backend {name!r} does not say what it takes: {error}.") from error


def _option(name: str, field: dict[str, Any]) -> Option:
    return Option(name, _takes(field), field.get("default"), field.get("description", ""))


def _takes(field: dict[str, Any]) -> str:
    """A field of a JSON Schema in words."""
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(_takes(choice) for choice in field["anyOf"])
    if field.get("type") == "boolean":
        return "true or false"
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    kind = {"null": "null", "string": "text"}.get(str(field.get("type")), str(field.get("type", "any value")))
    if low is not None and high is not None:
        return f"{kind}, {low} to {high}"
    return f"{kind}, from {low}" if low is not None else f"{kind}, up to {high}" if high is not None else kind
