"""Small mistakes and other ways of writing that leave a text's meaning, hence its label, as it was: pure functions from
text to text.

After the invariance tests of CheckList: Ribeiro et al., "Beyond Accuracy: Behavioral Testing of NLP Models with
CheckList", ACL 2020.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

BuiltinSlice = Literal["length", "position", "typos", "case", "punctuation", "unicode", "adversarial", "ambiguous"]
"""Slices that need no file: by length, by the place of a token in its window, one a perturbation, and one a kind of
prompt (`prompts.py`)."""
SHARE = 0.1
"""Share of the words (of the letters, for look-alikes) that are changed; at least one, where there is one to change."""
_LETTERS_OF_A_TYPO = 3  # shorter words become other words too easily
_WORD = re.compile(r"\S+")
_MARKS = ".,;:!?\"'()[]…–—«»“”„‘’¿¡。、！？，；："
# a mark between two letters or digits is part of what is said: don't, 3.5, 10:30
_LOOSE_MARKS = re.compile(rf"(?<!\w)[{re.escape(_MARKS)}]+|[{re.escape(_MARKS)}]+(?!\w)")
_ENDS = ("", ".", "!", "...")
# Latin to Cyrillic
_LOOK_ALIKES = dict(zip("aceiopsxyABCEHIKMOPSTXY", "асеіорѕхуАВСЕНІКМОРЅТХҮ", strict=True))


@dataclass(frozen=True)
class Perturbation:
    """One way to write a text differently."""

    name: str
    change: Callable[[str, random.Random], str]
    keeps_words: bool
    """The words, split at white space, stay as many and where they are bounded."""
    for_tagged_words: bool = False
    """It changes neither where a word ends nor what it looks like to who tags it word by word."""

    def __call__(self, text: str) -> str:
        """The text as this changes it: the same text always in the same way, never to nothing; a text in which there is
        nothing to change stays as it is."""
        return self.change(text, random.Random(f"{self.name}\n{text}"))


def typos(text: str, draw: random.Random) -> str:
    """Two letters swapped, one dropped or one doubled, in a tenth of the words of at least three letters."""
    words = [match for match in _WORD.finditer(text) if len(_letters(match.group())) >= _LETTERS_OF_A_TYPO]
    return _changed(text, [(word.start(), word.end()) for word in words], draw, _typo)


def _typo(word: str, draw: random.Random) -> str:
    """The first letter stays: people rarely miss it, and a model leans on it."""
    places = _letters(word)[1:]
    at = draw.choice(places)
    kind = draw.choice(("swap", "drop", "double"))
    swappable = [place for place in places if place + 1 in places and word[place] != word[place + 1]]
    if kind == "swap" and swappable:
        at = draw.choice(swappable)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if kind == "drop" else word[: at + 1] + word[at] + word[at + 1 :]


def case(text: str, draw: random.Random) -> str:
    """All upper or all lower case; the other of the two where the text is written so already."""
    ways = [str.upper, str.lower]
    draw.shuffle(ways)
    return next((changed for way in ways if (changed := way(text)) != text), text)


def punctuation(text: str, draw: random.Random) -> str:
    """Every mark between words taken out; or, in half of the texts and in those that have none, commas after a tenth of
    the words and another end."""
    bare = _LOOSE_MARKS.sub("", text)
    if bare != text and bare.strip() and draw.random() < 0.5:
        return re.sub(r"(?<=\s)\s+", "", bare).strip()
    body = text.rstrip()
    stripped = body.rstrip(_MARKS).rstrip() or body
    end = draw.choice([end for end in _ENDS if stripped + end != body])
    words = [match for match in _WORD.finditer(stripped) if match.group()[-1].isalnum()][:-1]
    return _changed(stripped, [(word.start(), word.end()) for word in words], draw, _with_comma) + end


def _with_comma(word: str, draw: random.Random) -> str:
    return f"{word},"


def unicode(text: str, draw: random.Random) -> str:
    """A tenth of the letters that have one replaced by their Cyrillic look-alike, and accents written as marks of their
    own (Unicode's form NFD)."""
    places = [(at, at + 1) for at, letter in enumerate(text) if letter in _LOOK_ALIKES]
    return unicodedata.normalize("NFD", _changed(text, places, draw, lambda letter, _: _LOOK_ALIKES[letter]))


def _letters(word: str) -> list[int]:
    return [at for at, letter in enumerate(word) if letter.isalpha()]


def _changed(
    text: str, spans: list[tuple[int, int]], draw: random.Random, change: Callable[[str, random.Random], str]
) -> str:
    """The text with `SHARE` of the spans changed."""
    if not spans:
        return text
    chosen = sorted(draw.sample(spans, max(1, round(SHARE * len(spans)))), reverse=True)
    for start, stop in chosen:
        text = text[:start] + change(text[start:stop], draw) + text[stop:]
    return text


PERTURBATIONS: dict[str, Perturbation] = {
    each.name: each
    for each in (
        Perturbation("typos", typos, keeps_words=True),
        Perturbation("case", case, keeps_words=True, for_tagged_words=True),
        Perturbation("punctuation", punctuation, keeps_words=False),
        Perturbation("unicode", unicode, keeps_words=True, for_tagged_words=True),
    )
}
