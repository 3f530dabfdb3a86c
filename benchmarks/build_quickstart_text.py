"""Make the quickstart's unlabelled text from the sets that may be shipped.

Only public-domain sets (gutenberg, us_presidential, tinyshakespeare) and CC BY 4.0 sets (wnut17,
movie_reviews_long) are read. ``train`` comes from their train splits, ``validation`` from their
validation splits, and a text that is in ``validation`` is never in ``train``. The same input and
seed give the same bytes.

    python build_quickstart_text.py --data shared/data --out text
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SEED = 20240229
SIZE_LIMIT = 1_900_000  # bytes of both files together

# Rows wanted of each kind from each set: (fragment, sentence, paragraph, passage).
KINDS = ("fragment", "sentence", "paragraph", "passage")
TRAIN_ROWS = {
    "movie_reviews_long": (6600, 7600, 2200, 550),
    "us_presidential": (2800, 3200, 800, 180),
    "gutenberg": (3200, 3200, 800, 220),
    "tinyshakespeare": (700, 600, 150, 40),
    "wnut17": (600, 2400, 0, 0),
}
VALIDATION_ROWS = {
    "movie_reviews_long": (230, 311, 130, 20),
    "us_presidential": (90, 130, 50, 10),
    "gutenberg": (100, 130, 50, 10),
    "tinyshakespeare": (30, 45, 15, 5),
    "wnut17": (30, 115, 0, 0),
}
# Words a kind may hold, lowest and highest.
WORDS = {"fragment": (3, 12), "sentence": (5, 40), "paragraph": (16, 80), "passage": (75, 150)}

ABBREVIATIONS = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|etc|jr|sr|gen|gov|sen|prof|hon|no|vol|[a-z])\.$", re.I)
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
CLAUSE_END = re.compile(
    r"(?:,|;|:| - | -- |\.\.\.)\s+|\s+(?=(?:because|although|while|when|which|where|after|before|and then)\s)"
)
STAGE = re.compile(r"^(?:(?:act|scene|chapter|volume|book|canto|finis|enter|exit|exeunt)\b|\[|[A-Z][A-Z ]+$)", re.I)


def tidy(text: str) -> str:
    """One line, no underscores, and punctuation joined to its word."""
    text = html.unescape(text).replace("``", '"').replace("''", '"').replace("´", "'").replace("`", "'")
    text = re.sub(r"\S*@\S*", " ", text)  # user names and addresses of mail
    text = re.sub(r"[\[\]{}<>_*|~^=\\]+", " ", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r" ([.,;:!?%)])", r"\1", text)
    text = re.sub(r"([($]) ", r"\1", text)
    text = re.sub(r" ' ?(s|t|d|m|ll|re|ve)\b", r"'\1", text, flags=re.I)
    text = re.sub(r" n'? ?'t\b", "n't", text, flags=re.I)
    text = re.sub(r"(?:\. ){2,}\.|\.{3,}", "...", text)
    text = re.sub(r"-{2,}", " - ", text)
    text = re.sub(r"([!?])\1+", r"\1", text)
    # quotation marks cut from their partner say nothing
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text) if text.count('"') == 2 else text.replace('"', " ")
    return re.sub(r"\s+", " ", text).strip(" ,;:-")


def is_clean(text: str) -> bool:
    """False for headings, lists of names, numbers and other junk."""
    words = text.split()
    letters = sum(c.isalpha() for c in text)
    if not words or letters < 0.7 * len(text) or STAGE.match(text):
        return False
    if sum(w[0].isdigit() for w in words) > max(1, len(words) // 5):
        return False
    if sum(w.isupper() and len(w) > 1 for w in words) > max(1, len(words) // 4):
        return False
    ascii_only = sum(ord(c) < 128 for c in text)
    return ascii_only >= 0.97 * len(text) and len({w.lower() for w in words}) >= 0.6 * min(len(words), 40)


def sentences(text: str) -> list[str]:
    """Sentences of one run of text, with the usual abbreviations kept whole."""
    found: list[str] = []
    for piece in SENTENCE_END.split(text):
        if found and ABBREVIATIONS.search(found[-1]):
            found[-1] += " " + piece
        else:
            found.append(piece)
    return found


def blocks(name: str, row: dict) -> Iterator[list[str]]:
    """Runs of sentences that stand together in the source."""
    if name == "wnut17":
        words = [word for word in row["tokens"] if not re.match(r"https?\b|www\.|RT$", word)]
        yield [tidy(" ".join(word.lstrip("#") for word in words))]
    elif name == "tinyshakespeare":
        for speech in row["text"].split("\n\n"):
            yield [tidy(s) for s in sentences(tidy(speech.partition(":\n")[2].replace("\n", " ")))]
    elif name == "us_presidential":
        for paragraph in re.split(r"\n\s*\n|\n(?=[A-Z])", row["text"]):
            if not paragraph.isupper():
                yield [tidy(s) for s in sentences(re.sub(r"\s+", " ", paragraph))]
    else:  # one sentence a line
        lines = [tidy(s) for s in row["text"].split("\n")]
        for start in range(0, len(lines), 8):
            yield lines[start : start + 8]


def candidates(name: str, split_file: Path, rng: random.Random) -> dict[str, list[str]]:
    """Every text of a set by kind, shuffled."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def keep(kind: str, text: str) -> None:
        low, high = WORDS[kind]
        if low <= len(text.split()) <= high and len(text) <= 8 * high and is_clean(text):
            found[kind].append(text)

    with gzip.open(split_file, "rt", encoding="utf-8") as lines:
        for line in lines:
            for block in blocks(name, json.loads(line)):
                # Each block serves one kind, so that the kinds do not repeat one another.
                use = rng.choices(KINDS, weights=(3, 4, 2, 2))[0] if len(block) > 1 else "sentence"
                if name == "wnut17" and rng.random() < 0.25:
                    use = "fragment"
                if use == "fragment":
                    for sentence in block:
                        clauses = [tidy(c) for c in CLAUSE_END.split(sentence)]
                        good = [c for c in clauses if len(c.split()) >= WORDS["fragment"][0]]
                        for clause in rng.sample(good, min(2, len(good))):
                            keep("fragment", clause)
                elif use == "sentence":
                    for sentence in block:
                        keep("sentence", sentence)
                elif use == "paragraph":
                    start = 0
                    while start < len(block):
                        size = rng.randint(2, 4)
                        if len(block[start : start + size]) > 1:
                            keep("paragraph", " ".join(block[start : start + size]))
                        start += size
                else:
                    words = WORDS["passage"]
                    text, target = "", rng.randint(*words)
                    for sentence in block:
                        if text and len((text + " " + sentence).split()) > target:
                            break
                        text = f"{text} {sentence}".strip()
                    keep("passage", text)
    for texts in found.values():
        rng.shuffle(texts)
    return found


def key(text: str) -> str:
    """What counts as the same text: letters and digits only."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def gather(data: Path, split: str, wanted: dict[str, tuple[int, ...]], seen: set[str]) -> list[dict[str, str]]:
    """Rows of one split; adds what it takes to ``seen``."""
    rng = random.Random(f"{SEED}-{split}")
    rows = []
    for name, numbers in wanted.items():
        by_kind = candidates(name, data / name / f"{split}.jsonl.gz", rng)
        for kind, number in zip(KINDS, numbers, strict=True):
            taken = 0
            for text in by_kind[kind]:
                if taken == number:
                    break
                if key(text) not in seen:
                    seen.add(key(text))
                    rows.append({"text": text, "source": name})
                    taken += 1
    rng.shuffle(rows)
    return rows


def write(rows: list[dict[str, str]], path: Path) -> int:
    """Write gzip JSON lines without a time stamp; return the size in bytes."""
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(body, compresslevel=9, mtime=0))
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path}: {len(rows)} rows, {size} bytes, sha256 {digest}")
    print("  ", dict(Counter(row["source"] for row in rows)))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("LIMBECK_DATA")
    parser.add_argument("--data", type=Path, default=default, required=default is None, help="folder of the sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    validation = gather(args.data, "validation", VALIDATION_ROWS, seen)
    train = gather(args.data, "train", TRAIN_ROWS, seen)
    size = write(validation, args.out / "validation.jsonl.gz") + write(train, args.out / "train.jsonl.gz")
    if size > SIZE_LIMIT:
        raise SystemExit(f"{size} bytes together, more than {SIZE_LIMIT}")


if __name__ == "__main__":
    main()
