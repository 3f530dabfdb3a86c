"""Texts for the embedding benchmark: what to train on, and questions with the passages that answer them.

Everything is drawn with a fixed seed, training text from train splits and held-out text from validation splits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import load_dataset

Count = Callable[[list[str]], list[int]]
"""Texts -> tokens of each."""

_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=\S)")
_HEADING = re.compile(r"\s*((?:= )+)(.*?)((?: =)+)\s*")
_PASSAGES = {"movie_reviews_long": 380_000, "gutenberg": 380_000, "us_presidential": 260_000, "imdb_cad": 220_000}
"""Source to how many tokens of passages are taken from it."""


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one file of the data folder, for example `stsb_en/train`."""
    return list(load_dataset("json", data_files=str(data / f"{name}.jsonl.gz"), split="train"))


def training_texts(data: Path, count: Count, seed: int = 0) -> list[str]:
    """94,000 texts, 3.6 million tokens: sentences and questions of all kinds, news, passages of 100 to 250 tokens.

    More than half are sentences of such passages, since a search asks with sentences.
    """
    draw = _Draw(count, seed)
    held_out = {row[side] for row in rows(data, "stsb_en/validation") for side in ("sentence1", "sentence2")}
    pairs = [row[side] for row in rows(data, "stsb_en/train") for side in ("sentence1", "sentence2")]
    news = [row["text"].replace("\\", " ") for row in rows(data, "ag_news_10k/train")]
    texts = draw.some([text for text in pairs if text not in held_out])
    texts += draw.some([row["text"] for row in rows(data, "trec/train")])
    texts += draw.some(news, 330_000)
    texts += draw.some([part for text in news for part in sentences(text) if len(part) > 25], 70_000)
    texts += draw.some([row["text"] for row in rows(data, "sst2/train")], 80_000)
    texts += draw.some([" ".join(row["tokens"]) for row in rows(data, "wnut17/train")], 60_000)
    for source, budget in _PASSAGES.items():
        cut = [" ".join(p) for row in rows(data, f"{source}/train") for p in draw.passages(row["text"], 100, 250)]
        texts += draw.some(cut, budget)
        texts += draw.some([part for text in cut for part in sentences(text) if 20 < len(part) < 400], 400_000)
    return texts + draw.some(draw.joined(news), 180_000)


def questions(data: Path, count: Count, seed: int = 17) -> list[dict[str, str]]:
    """Rows of a query (`sentence1`), its own passage (`sentence2`) and its `document`; no passage is trained on.

    Queries are headlines (ag_news), headings (wikitext2), and sentences taken out of their passage of 100 to 250 tokens
    (inverse cloze, Lee et al. 2019; wikitext2, long film reviews, addresses of presidents). At most two passages of a
    document: more of them are too much alike to be told apart.
    """
    draw, found = _Draw(count, seed), []
    for source, most in (("wikitext2", 2), ("movie_reviews_long", 1), ("us_presidential", 2)):
        for place, row in enumerate(rows(data, f"{source}/validation")):
            sections = wikitext_sections(row["text"]) if source == "wikitext2" else [("", row["text"])]
            made = [cloze for heading, text in sections for cloze in draw.clozes(heading, text)]
            draw.random.shuffle(made)
            for heading, asked, passage in made[:most]:
                pair = {"sentence2": passage, "document": f"{source} {place}"}
                found += [{"sentence1": query, **pair} for query in (*asked, heading) if query]
    for place, row in enumerate(rows(data, "ag_news_10k/validation")):
        title, _, body = row["text"].replace("\\", " ").partition(" . ")
        if len(title) > 15 and len(body) > 60:
            found.append({"sentence1": title, "sentence2": body, "document": f"ag_news_10k {place}"})
    return found


def sentences(text: str) -> list[str]:
    """A text's sentences, line breaks ending one."""
    lines = (line.strip() for line in re.sub(r"<br ?/?>", " ", text).split("\n"))
    return [part.strip() for line in lines if line for part in _SENTENCE_END.split(line) if part.strip()]


def wikitext_sections(text: str) -> list[tuple[str, str]]:
    """(heading, text) of every section of an article, the words' odd spacing mended."""
    text = re.sub(r" @(.)@ ", r"\1", text.replace("<unk>", ""))
    found, title, heading = [], "", ""
    for is_heading, lines in groupby(text.split("\n"), lambda line: _HEADING.fullmatch(line) is not None):
        if is_heading:
            match = _HEADING.fullmatch(list(lines)[-1])
            assert match is not None
            title = match[2] if len(match[1].split()) == 1 else title
            heading = title if match[2] == title else f"{title}: {match[2]}"
        elif heading:
            found.append((heading, "\n".join(lines)))
    return found


class _Draw:
    """Random choices with one generator."""

    def __init__(self, count: Count, seed: int) -> None:
        self.count, self.random = count, random.Random(seed)

    def some(self, texts: Iterable[str], tokens: int | None = None) -> list[str]:
        """Different texts in random order, until they hold so many tokens."""
        unlike = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
        self.random.shuffle(unlike)
        taken, held = [], 0
        for text, length in zip(unlike, self.count(unlike), strict=True):
            if tokens is not None and held > tokens:
                break
            taken.append(text)
            held += length
        return taken

    def passages(self, text: str, low: int, high: int) -> list[list[str]]:
        """Consecutive sentences in pieces of `low` to `high` tokens, lengths evenly spread."""
        made: list[list[str]] = []
        piece: list[str] = []
        held, wanted = 0, self.random.randint(low, high)
        parts = sentences(text)
        for part, length in zip(parts, self.count(parts) if parts else [], strict=True):
            if held + length > high:
                piece, held = [], 0
            if length <= high:
                piece.append(part)
                held += length
            if held >= wanted:
                made.append(piece)
                piece, held, wanted = [], 0, self.random.randint(low, high)
        return made

    def clozes(self, heading: str, text: str) -> list[tuple[str, list[str], str]]:
        """(heading, two sentences taken out, what is left) of each passage that is long enough."""
        made = []
        for piece in self.passages(text, 130, 290):
            lengths = self.count(piece)
            fit = [index for index, length in enumerate(lengths) if 12 <= length <= 40]
            if len(fit) < 2:
                continue
            out = self.random.sample(fit, 2)
            left = [index for index in range(len(piece)) if index not in out]
            if 100 <= sum(lengths[index] for index in left) <= 250:
                made.append((heading, [piece[index] for index in out], " ".join(piece[index] for index in left)))
        return made

    def joined(self, texts: list[str]) -> list[str]:
        """Two to five texts in one."""
        shuffled, made = self.random.sample(texts, len(texts)), []
        while shuffled:
            many = self.random.randint(2, 5)
            made.append(" ".join(shuffled[:many]))
            shuffled = shuffled[many:]
        return made
