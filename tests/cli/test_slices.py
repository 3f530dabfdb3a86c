"""Slices on the command line, in gates, and in all that `validate` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck import export, load_checkpoint
from limbeck.exporters.settings import ExportSettings
from limbeck.validate.records.report import load_report

Limbeck = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Write) -> Path:
    return tiny_checkpoint("bert", task="text-classification")


@pytest.fixture(scope="module")
def artifact(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices") / "artifact"
    export(load_checkpoint(teacher), ExportSettings(backend="onnx"), folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Write) -> Path:
    topics = ["<b>sea</b>", "war"]
    written = [{"text": text, "label": i % 3, "topic": topics[i // 3 % 2]} for i, text in enumerate(texts)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", written)


def test_slices_are_measured_gated_and_shown(
    artifact: Path, teacher: Path, rows: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    options = ("--teacher", teacher, "--data", rows, "--no-latency", "--out", tmp_path / "report")
    gates = tmp_path / "gates.yaml"
    gates.write_text("- {metric: flip_rate, slice: 'topic*', max: 0.5}\n- {metric: flip_rate, slice: few, max: 0.5}\n")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
    wanted = ("--slices", "length,typos", "--slices", "case", "--slice-by", "topic", "--slice", f"few={few}")
    shown = limbeck("validate", artifact, *options, *wanted, "--gates", gates)
    assert shown.code == 5, shown.err
    assert "flip_rate of artifact on few" in shown.err
    assert "Worst slice" not in shown.out  # an exact program loses nothing anywhere
    report = load_report(tmp_path / "report")
    names = [part.name for part in report.candidates[0].slices]
    assert names[:3] == ["few", "topic=<b>sea</b>", "topic=war"] and names[-2:] == ["typos", "case"]
    verdicts = {result.slice: result.verdict for result in report.gates}
    assert verdicts == {"topic=<b>sea</b>": "pass", "topic=war": "pass", "few": "inconclusive"}
    assert [line.partition(":")[0] for line in report.data] == ["rows.jsonl", "few.jsonl, slice few"]
    unseen = [check.name for check in report.candidates[0].checks if check.name.startswith("unseen")]
    assert unseen == ["unseen data", "unseen data, slice few"]
    page, text = ((tmp_path / "report" / name).read_text() for name in ("report.html", "report.md"))
    assert 'id="slices"' in page and "topic=&lt;b&gt;sea&lt;/b&gt;" in page and "<b>sea" not in page
    assert "| topic=&lt;b&gt;sea&lt;/b&gt; | 33 |" in text and "<b>sea" not in text


@pytest.mark.parametrize(
    ("wanted", "code", "words"),
    [
        (("--slices", "length,typo"), 2, ("'typo'", "Did you mean 'typos'?")),
        (("--slice-by", "topics"), 4, ("'topics'", "Did you mean 'topic'?")),
        (("--slice", "few"), 2, ("--slice takes NAME=VALUE",)),
        (("--slice", "few=nowhere.jsonl"), 4, ("nowhere.jsonl does not exist",)),
    ],
)
def test_wrong_slices_are_refused(
    wanted: tuple[str, str], code: int, words: tuple[str, ...], artifact: Path, teacher: Path, rows: Path, out: Path,
    limbeck: Limbeck,
) -> None:  # fmt: skip
    options = ("--teacher", teacher, "--data", rows, "--no-latency", "--out", out)
    limbeck("validate", artifact, *options, *wanted).assert_refused(code, *words)
