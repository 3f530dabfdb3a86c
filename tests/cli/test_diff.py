"""`limbeck diff` and what `limbeck gate` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from limbeck.validate.records.report import Candidate, Check, Metric, Report, save_report
from limbeck.validate.rendering import write_report

Limbeck = Callable[..., Any]


def saved(folder: Path, value: float, passed: bool = True) -> Path:
    accuracy = Metric(name="accuracy", value=value, low=value - 0.01, high=value + 0.01, higher_is_better=True,
                      description="right answers", teacher=0.9)  # fmt: skip
    flips = Metric(name="flip_rate", value=0.02, higher_is_better=False, description="share that left the teacher's")
    checks = [Check(name="parity", passed=passed, detail="far off")]
    item = Candidate(name="onnx", kind="artifact", backend="onnx", precision="fp32", path="out",
                     metrics=[accuracy, flips], checks=checks)  # fmt: skip
    save_report(Report(kind="validation", title="t", created="", command="", candidates=[item]), folder)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return saved(tmp_path / "old", 0.8)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return saved(tmp_path / "new", 0.85)


@pytest.fixture
def gates(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "gates.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_difference_is_shown_and_never_an_error(old: Path, new: Path, limbeck: Limbeck) -> None:
    shown = limbeck("diff", old, new / "report.json")
    assert shown.code == 0 and shown.err == ""
    assert "+0.050" in shown.out and "better" in shown.out
    worse = limbeck("diff", new, old)
    assert worse.code == 0 and "worse" in worse.out


def test_a_difference_as_json_and_as_markdown(old: Path, new: Path, limbeck: Limbeck) -> None:
    found = json.loads(limbeck("diff", old, new, "--json").out)
    assert found["candidates"][0]["figures"][0]["meaning"] == "better"
    assert limbeck("diff", old, new, "--markdown").out.startswith("## ✅ Pass as before: 1 better")
    limbeck("diff", old, new, "--markdown", "--json").assert_refused(2, "--markdown and --json")


def test_what_cannot_be_compared_is_named(old: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    limbeck("diff", old, tmp_path / "none").assert_refused(4, "none does not exist")
    limbeck("diff", tmp_path, old).assert_refused(4, "report.json does not exist")
    newer = tmp_path / "newer.json"
    newer.write_text('{"schema_version": 99}', encoding="utf-8")
    limbeck("diff", newer, old).assert_refused(4, "version 99")


@pytest.mark.parametrize(
    ("limit", "code", "outcome"), [("min: 0.8", 0, "Pass"), ("min: 0.85", 5, "Inconclusive"), ("min: 0.9", 1, "Fail")]
)
def test_gate_writes_whatever_the_verdict(
    limit: str, code: int, outcome: str, new: Path, gates: Any, tmp_path: Path, limbeck: Limbeck
) -> None:
    junit, markdown = tmp_path / "made" / "junit.xml", tmp_path / "made" / "gates.md"
    asked = gates(f"- {{metric: flip_rate, max: 0.1}}\n- {{metric: accuracy, {limit}, why: search}}")
    assert limbeck("gate", new, "--gates", asked, "--junit", junit, "--markdown", markdown).code == code
    suite = ElementTree.fromstring(junit.read_text(encoding="utf-8"))
    assert (suite.get("failures"), suite.get("errors")) == (str(int(code == 1)), str(int(code == 5)))
    text = markdown.read_text(encoding="utf-8")
    assert f"{outcome}: t" in text.splitlines()[0]
    rows = [line for line in text.splitlines() if "flip" in line or "accuracy" in line]
    assert len(rows) == 2
    assert ("accuracy" in rows[0]) == (code != 0)  # what failed comes first
    assert "report.html" not in text  # there is none
    assert sorted(path.name for path in junit.parent.iterdir()) == ["gates.md", "junit.xml"]


def test_the_summary_links_to_the_page_beside_the_report(
    new: Path, gates: Any, tmp_path: Path, limbeck: Limbeck
) -> None:
    write_report(Report.model_validate_json((new / "report.json").read_text(encoding="utf-8")), tmp_path / "a b")
    asked = gates("- {metric: accuracy, min: 0.5}")
    for report in (tmp_path / "a b", tmp_path / "a b" / "report.json"):
        assert limbeck("gate", report, "--gates", asked, "--markdown", tmp_path / "ci" / "gates.md").code == 0
        assert "(../a%20b/report.html)" in (tmp_path / "ci" / "gates.md").read_text(encoding="utf-8").splitlines()[-1]


def test_a_failed_check_is_in_the_summary(gates: Any, tmp_path: Path, limbeck: Limbeck) -> None:
    report, markdown = saved(tmp_path / "bad", 0.8, passed=False), tmp_path / "gates.md"
    asked = gates("- {metric: accuracy, min: 0.5}")
    assert limbeck("gate", report, "--gates", asked, "--markdown", markdown).code == 1
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith("## ❌ Fail") and "parity" in text


def test_gates_relative_to_the_last_release(old: Path, new: Path, gates: Any, limbeck: Limbeck) -> None:
    asked = gates("- {metric: accuracy, relative_to: previous, as: difference, min: -0.02}")
    assert limbeck("gate", new, "--gates", asked, "--previous", old).code == 0
    assert limbeck("gate", old, "--gates", asked, "--previous", new).code == 1
    limbeck("gate", new, "--gates", asked).assert_refused(4, "--previous")
    limbeck("gate", new, "--gates", asked, "--previous", old / "none").assert_refused(4, "none does not exist")
    shown = json.loads(limbeck("gate", new, "--gates", asked, "--previous", old, "--json").out)
    assert shown["gates"][0]["gate"]["as"] == "difference" and shown["gates"][0]["observed"] == 0.05


def test_a_folder_is_no_file_to_write(new: Path, gates: Any, tmp_path: Path, limbeck: Limbeck) -> None:
    asked = gates("- {metric: accuracy, min: 0.5}")
    limbeck("gate", new, "--gates", asked, "--junit", tmp_path).assert_refused(2, "--junit", "folder")
    limbeck("gate", new, "--gates", asked, "--markdown", tmp_path).assert_refused(2, "--markdown", "folder")


def test_a_bound_that_is_infinite_is_valid_json(new: Path, gates: Any, tmp_path: Path, limbeck: Limbeck) -> None:
    old = saved(tmp_path / "near zero", 0.005)  # its interval reaches below 0: a ratio to it has no bounds
    asked = gates("- {metric: accuracy, relative_to: previous, min: 1}")
    shown = limbeck("gate", new, "--gates", asked, "--previous", old, "--json")
    assert shown.code == 5
    read = json.loads(shown.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (read["gates"][0]["low"], read["gates"][0]["high"]) == ("-Infinity", "Infinity")
