"""Renderings of a report: `report.json` for programs, HTML for people, Markdown for pull requests, JUnit for CI."""

from __future__ import annotations

from pathlib import Path

from ...files import write_text
from ..records.report import Report, save_report
from .html import render_html
from .junit import render_junit
from .markdown import render_diff_markdown, render_gate_summary, render_markdown
from .terminal import render_diff_table, render_table

__all__ = ["render_diff_markdown", "render_diff_table", "render_gate_summary", "render_html", "render_junit",
           "render_markdown", "render_table", "write_report"]  # fmt: skip


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.json`, `report.html`, `report.md` and `junit.xml` into `folder`, each whole or not at all; returns
    the path of `report.html`.

    Raises:
        DiskFull: no room was left.
    """
    # rendered before anything is written, so that the files of one folder tell of one report
    texts = {
        "report.html": render_html(report),
        "report.md": render_markdown(report),
        "junit.xml": render_junit(report),
    }
    save_report(report, folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / "report.html"
