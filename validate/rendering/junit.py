"""JUnit XML for CI: one test case a gate and candidate, one a check."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from ..records.report import Candidate, Check, GateResult, Report

# what XML 1.0 cannot hold, even escaped
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(report: Report) -> str:
    """The report as JUnit XML. A failed gate is a `failure` of type `GateFailed`, an inconclusive one an `error` of
    type `GateInconclusive`, a failed check a `failure` of type `CheckFailed`."""
    root = ElementTree.Element("testsuites", name=_clean(report.title))
    gates = ElementTree.SubElement(root, "testsuite", name="gates", timestamp=_clean(report.created))
    for result in report.gates:
        _add_gate(gates, result)
    checks = ElementTree.SubElement(root, "testsuite", name="checks", timestamp=_clean(report.created))
    for candidate, check in report.checks():
        _add_check(checks, candidate, check)
    for suite in (gates, checks):
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
        suite.set("errors", str(len(suite.findall("testcase/error"))))
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in (gates, checks))))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_gate(suite: ElementTree.Element, result: GateResult) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_clean(result.candidate), name=_clean(result.asked))
    if result.verdict == "fail":
        ElementTree.SubElement(case, "failure", type="GateFailed", message=_clean(result.reason))
    elif result.verdict == "inconclusive":
        ElementTree.SubElement(case, "error", type="GateInconclusive", message=_clean(result.reason))
    if result.gate.why:
        ElementTree.SubElement(case, "system-out").text = _clean(result.gate.why)


def _add_check(suite: ElementTree.Element, candidate: Candidate, check: Check) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_clean(candidate.name), name=_clean(check.name))
    if not check.passed:
        failure = ElementTree.SubElement(case, "failure", type="CheckFailed", message=_clean(check.detail))
        failure.text = _clean(
            "\n".join(", ".join(f"{key}={value}" for key, value in row.items()) for row in check.rows)
        )


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
