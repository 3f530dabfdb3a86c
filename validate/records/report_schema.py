"""The JSON Schema of `report.json`, for programs that read reports without limbeck.

It is published as `report.schema.json` beside this module. Its version is that of the reports, `schema_version`: within
one, fields may be added, and none changes its meaning.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from .report import SCHEMA_VERSION, Report

SCHEMA_FILE = "report.schema.json"
_NOT_FINITE = {"enum": ["NaN", "Infinity", "-Infinity"]}


class _OfWhatIsWritten(GenerateJsonSchema):
    """Figures that are not finite are written as words, which pydantic's own schema does not say."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), _NOT_FINITE]}


def report_schema() -> dict[str, Any]:
    """The schema, as it is published."""
    schema = Report.model_json_schema(mode="serialization", schema_generator=_OfWhatIsWritten)
    title = f"limbeck report, schema version {SCHEMA_VERSION}"
    return {"$schema": _OfWhatIsWritten.schema_dialect, **schema, "title": title}
