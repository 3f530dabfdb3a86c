"""Perturbations as functions from text to text: what each promises, of any text."""

from __future__ import annotations

import difflib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.validate.rows.perturbations import PERTURBATIONS, Perturbation

REVIEW = "The plot, thin as it is, never gets in the way of a film that is charming, funny and café-dark ."
words = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8), min_size=1, max_size=30)
texts = st.one_of(st.text(max_size=60), words.map(" ".join))
each = pytest.mark.parametrize("change", PERTURBATIONS.values(), ids=list(PERTURBATIONS))


@each
@given(text=texts)
def test_the_same_text_is_always_changed_alike_and_never_to_nothing(change: Perturbation, text: str) -> None:
    changed = change(text)
    assert changed == change(text)
    assert bool(changed.strip()) >= bool(text.strip())


@pytest.mark.parametrize("name", [name for name, change in PERTURBATIONS.items() if change.keeps_words])
@given(text=texts)
def test_words_stay_as_many_where_that_is_promised(name: str, text: str) -> None:
    assert len(PERTURBATIONS[name](text).split()) == len(text.split())


@each
def test_a_review_is_changed(change: Perturbation) -> None:
    assert change(REVIEW) != REVIEW


def test_typos_are_in_a_tenth_of_the_words_and_leave_the_first_letter() -> None:
    text = " ".join(f"wonderful{letter}" for letter in "abcdefghijklmnopqrstuvwxyzabcdefghijklmn")
    before, after = text.split(), PERTURBATIONS["typos"](text).split()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 4
    assert all(new[0] == old[0] and abs(len(new) - len(old)) <= 1 for old, new in changed)
    assert all(difflib.SequenceMatcher(a=old, b=new).ratio() > 0.85 for old, new in changed)


def test_texts_differ_in_what_is_done_to_them() -> None:
    several = [f"{word} film with many charms" for word in ("One", "Two", "Three", "Four", "Five", "Six", "Seven")]
    assert {PERTURBATIONS["case"](text).isupper() for text in several} == {True, False}
    assert {"," in PERTURBATIONS["punctuation"](f"{text}, it seems") for text in several} == {True, False}


def test_case_takes_the_other_case_where_one_changes_nothing() -> None:
    assert PERTURBATIONS["case"]("all small") == "ALL SMALL"
    assert PERTURBATIONS["case"]("LOUD") == "loud"
    assert PERTURBATIONS["case"]("三十") == "三十"


@given(text=words.map(" ".join))
def test_punctuation_keeps_letters_and_digits(text: str) -> None:
    def said(words: str) -> list[str]:
        return [letter for letter in words if letter.isalnum()]

    assert said(PERTURBATIONS["punctuation"](text)) == said(text)


def test_marks_inside_words_and_numbers_stay() -> None:
    for text in ("I don't pay 3.50 at 10:30 for well-made tea, thanks.", "It isn't 3.5, is it?", "That's 1,000 more!"):
        changed = PERTURBATIONS["punctuation"](text)
        assert changed != text
        for word in ("don't", "3.50", "10:30", "well-made", "isn't", "3.5", "That's", "1,000"):
            assert (word in changed) == (word in text)


@given(text=texts)
def test_look_alikes_look_alike(text: str) -> None:
    changed = PERTURBATIONS["unicode"](text)
    assert unicodedata.is_normalized("NFD", changed)
    assert len(unicodedata.normalize("NFC", changed)) == len(unicodedata.normalize("NFC", text))


def test_a_tenth_of_the_letters_look_alike_and_accents_stand_alone() -> None:
    changed = PERTURBATIONS["unicode"]("a" * 40 + " café")
    assert sum(unicodedata.name(letter).startswith("CYRILLIC") for letter in changed) == 4
    assert "e\u0301" in changed
