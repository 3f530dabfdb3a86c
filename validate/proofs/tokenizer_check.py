"""Whether a tokenizer's graph gives the tokens that the tokenizer gives, on texts where tokenizers are told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from ...exporters.artifact import CheckRecord
from ...exporters.tokenizer_graph import TextTokens, Tokenize

TOKENIZER_CHECK = "tokenizer graph"

AWKWARD_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "UPPER, Title and mIxEd CASE; iPhone, NASA",
    "Café, naïve, Ünïcode, SEÑOR, façade, smørrebrød",
    "",
    " ",
    "  leading,   inner \t tabbed\n\nand broken,  trailing  ",
    "中文字符，测试。and English 混合",
    "🙂 emoji 👩‍👩‍👧 and flags 🇵🇹",
    "don't, can't; it's \"quoted\" (bracketed) [square] {curly} <tag> a/b\\c",
    "123,456.78 € 50% 1e-6 v2.0.1 #tag @user https://example.org/a?b=c&d=e",
    "a" * 300,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "long beyond the limit " * 2_000,
    "nb\u00a0space, zero\u200bwidth, soft\u00adhyphen, “curly” – dashes…",
)
"""Casing, accents of Western Europe, empty and white space, Chinese, emoji, long texts: a graph that differs on any is
refused."""

_OTHER_TEXTS = {
    "Central European letters": "Łódź, Škoda, žluťoučký kůň, őrült",
    "Vietnamese": "Việt Nam, tiếng Việt",
    "Turkish": "İstanbul, çağdaş",
    "Greek": "Γειά σου, ΩΜΕΓΑ",
    "Cyrillic": "Привет, мир! Ёжик и йод",
    "Japanese": "日本語のカタカナとひらがな",
    "Hangul": "안녕하세요 세계",
    "Devanagari": "नमस्ते दुनिया",
    "Arabic": "مَرْحَبًا بالعالم",
    "accents as characters of their own": "e\u0301te\u0301 combining",
    "ligatures": "ﬁne ﬂow ½",
    "control characters": "be\u0007ll, nul\u0000l",
}
"""Kinds of text that a program may never see: where a graph differs, that is said and not refused."""
_SPECIAL = "special tokens that are written in a text"
_QUOTED = 60


def check_tokenizer_graph(
    graph: Tokenize, tokens: TextTokens, inputs: Sequence[str], texts: Sequence[str], *, special_matter: bool
) -> CheckRecord:
    """Compare ids, mask and what else a program takes, on awkward texts and on real ones.

    Args:
        graph: what runs the written graph.
        tokens: the tokenizer's own answer.
        inputs: what the program takes.
        texts: real ones.
        special_matter: whether texts hold special tokens, such as the mask that a model is asked to fill.

    Returns:
        A record that names the first text on which they differ; its rows say of each other kind of text whether the two
        are the same.
    """
    special = " and ".join(tokens.tokenizer.all_special_tokens)
    others = _OTHER_TEXTS if special_matter else {**_OTHER_TEXTS, _SPECIAL: special}
    required = chain(AWKWARD_TEXTS, [special] if special_matter else [], texts)
    difference = next(filter(None, (_difference(graph(text), tokens(text), inputs, text) for text in required)), None)
    if difference is not None:
        return CheckRecord(name=TOKENIZER_CHECK, passed=False, detail=difference)
    return CheckRecord(
        name=TOKENIZER_CHECK,
        passed=True,
        detail=f"the tokenizer's own tokens of {len(AWKWARD_TEXTS) + special_matter} awkward texts "
        f"and {len(texts)} of the calibration",
        rows=[
            {"kind of text": kind, "same tokens": _difference(graph(text), tokens(text), inputs, text) is None}
            for kind, text in others.items()
        ],
    )


def read_otherwise(check: CheckRecord) -> list[str]:
    """The other kinds of text that the graph reads otherwise than the tokenizer."""
    return [str(row["kind of text"]) for row in check.rows if not row["same tokens"]]


def _difference(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], inputs: Iterable[str], text: str
) -> str | None:
    for name in inputs:
        if name not in found:
            return f"it has no {name}, which the program takes"
        if not np.array_equal(found[name], expected[name]):
            quoted = repr(text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…")
            numbers = f"{_few(found[name])} where the tokenizer makes {_few(expected[name])}"
            return f"of the text {quoted} it makes {name} {numbers}"
    return None


def _few(values: np.ndarray) -> str:
    """The first numbers, and how many there are."""
    flat = values.reshape(-1).tolist()
    return f"{flat}" if len(flat) <= 12 else f"[{', '.join(map(str, flat[:12]))}, …] ({len(flat)})"
