"""What a recipe's names stand for where they have variables in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.errors import InputError
from limbeck.recipes.sources import Sources


def test_a_variable_stands_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "text.jsonl").touch()
    monkeypatch.setenv("TEST_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("TEST_NAME", "text")
    sources = Sources(tmp_path)
    assert sources.model("${TEST_MODELS}/llama") == str(tmp_path / "models" / "llama")
    assert sources.data("${TEST_NAME}.jsonl") == str(tmp_path / "text.jsonl")  # beside the recipe
    assert sources.model("org/$TEST_NAME") == "org/$TEST_NAME"  # only with braces: a hub id is left as it is


@pytest.mark.parametrize("kind", ["model", "data"])
def test_a_variable_that_is_not_set_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_MODELS", raising=False)
    with pytest.raises(InputError, match=r"\$\{TEST_MODELS\}/llama.*TEST_MODELS is not set"):
        getattr(Sources(tmp_path), kind)("${TEST_MODELS}/llama")


@pytest.mark.parametrize("kind", ["model", "data"])
def test_what_the_environment_holds_is_never_taken_for_a_hub_id(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN", "secret")
    with pytest.raises(InputError, match=r"There is no org/\$\{TEST_TOKEN\}"):
        getattr(Sources(tmp_path), kind)("org/${TEST_TOKEN}")
