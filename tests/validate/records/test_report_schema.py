"""The published JSON Schema says what `report.json` holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.resources import files

from limbeck.validate.records.report import SCHEMA_VERSION, Report
from limbeck.validate.records.report_schema import SCHEMA_FILE, report_schema


def test_the_published_schema_is_that_of_the_model() -> None:
    """To renew it: `json.dumps(report_schema(), indent=2)` into `validate/records/report.schema.json`."""
    assert json.loads((files("limbeck.validate.records") / SCHEMA_FILE).read_text(encoding="utf-8")) == report_schema()


def test_it_names_its_version_and_everything_that_is_written(full_report: Callable[..., Report]) -> None:
    schema = report_schema()
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    written = json.loads(full_report().model_dump_json())
    assert set(written) == set(schema["properties"])  # the verdict, which is computed, too
    candidate = schema["$defs"]["Candidate"]["properties"]
    assert set(written["candidates"][0]) == set(candidate)


def test_figures_that_are_not_finite_are_words_in_it(full_report: Callable[..., Report]) -> None:
    report = full_report()
    metric = report.candidates[0].metrics[0].model_copy(update={"value": math.inf})
    written = json.loads(metric.model_dump_json())["value"]
    number, words = report_schema()["$defs"]["Metric"]["properties"]["value"]["anyOf"]
    assert number == {"type": "number"} and written in words["enum"]
