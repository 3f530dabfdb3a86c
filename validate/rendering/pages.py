"""What every HTML page is made with: text from a report is untrusted, so all of it is escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment() -> Environment:
    """An environment for the templates of this folder, which escapes text and refuses names that are not given."""
    return Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
