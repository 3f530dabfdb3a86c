"""Whether the artifact splits text as its student does, to the last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...files import read_json
from ...models.batching import Feature
from ...models.checkpoint import Checkpoint
from ...models.tasks.base import tokenize
from ..proofs.tokenizer_check import AWKWARD_TEXTS
from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 60
_MOSTLY = 0.8


class SameTokenizer(SubjectCheck):
    """Token ids and masks equal the student's on validation texts and on awkward ones. Names the likely cause: another
    vocabulary, capitals that are no longer lower-cased, other special tokens. Without the student, the teacher's
    tokenizer stands in where both started from the same model. It cannot see text that was changed before the
    tokenizer."""

    name = "tokenizer"
    from_files = True

    def look(self, subject: Subject) -> Check | Unchecked:
        expected = subject.reference
        if expected is None:
            return Unchecked(subject.student_missing)
        theirs, limit = expected.tokenizer, subject.manifest.max_length
        texts = list(dict.fromkeys([*AWKWARD_TEXTS, *_texts(subject)]))
        if (cause := _vocabulary(subject.tokenizer, theirs)) is not None:
            return self.fails(cause)
        ours, wanted = (tokenize(texts, tokenizer, limit) for tokenizer in (subject.tokenizer, theirs))
        wrong = [place for place in range(len(texts)) if ours[place] != wanted[place]]
        if not wrong:
            return self.passes(f"{len(texts)} texts are split as the checkpoint's tokenizer splits them")
        said = f"{len(wrong)} of {len(texts)} texts are split otherwise than by the checkpoint's tokenizer"
        return self.fails(f"{_cause([texts[i] for i in wrong], subject.tokenizer, theirs, limit)}: {said}, such as "
                          f"{texts[wrong[0]][:_SHOWN]!r}")  # fmt: skip


def _texts(subject: Subject) -> Iterator[str]:
    if subject.standard is None:
        return
    rows = subject.standard.data.head(128)
    for name in rows.columns:
        for value in rows.values(name):
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield " ".join(map(str, value))


def _vocabulary(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    mine, other = ours.get_vocab(), theirs.get_vocab()
    differing = sum(other.get(token) != index for token, index in mine.items()) + len(other.keys() - mine.keys())
    if not differing:
        return None
    sizes = f"{len(mine):,} tokens" + (f" instead of {len(other):,}" if len(mine) != len(other) else "")
    return f"it has another vocabulary: {sizes}, {differing:,} of which are not the checkpoint's"


def _cause(
    texts: list[str], ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, limit: int
) -> str:  # fmt: skip
    cased = [text for text in texts if text != text.lower()]
    mine, other, lowered_mine, lowered_other = (
        tokenize(given, tokenizer, limit) if given else []
        for given in (cased, [text.lower() for text in cased])
        for tokenizer in (ours, theirs)
    )
    if _mostly(lowered_mine, other):
        return "lower-casing is lost"
    if _mostly(mine, lowered_other):
        return "it lower-cases, which the checkpoint's tokenizer does not"
    tokens = ("pad_token", "unk_token", "cls_token", "sep_token", "bos_token", "eos_token")
    pairs = [(name, getattr(ours, name, None), getattr(theirs, name, None)) for name in tokens]
    special = [f"{name} is {one!r} instead of {wanted!r}" for name, one, wanted in pairs if one != wanted]
    if special:
        return f"other special tokens ({', '.join(special)})"
    if ours.padding_side != theirs.padding_side:
        return f"it pads on the {ours.padding_side}"
    return "another tokenizer"


def _mostly(left: Sequence[Feature], right: Sequence[Feature]) -> bool:
    """Whether most are alike: what lower-cases often strips accents, too."""
    return bool(left) and sum(a == b for a, b in zip(left, right, strict=True)) > _MOSTLY * len(left)


class Truncation(SubjectCheck):
    """Texts are cut where the model's positions or the export's shapes end and not before: the manifest's length, the
    tokenizer's own, and sentence-transformers' `max_seq_length`. Sees limits that are written down; not a caller that
    cuts."""

    name = "truncation"
    from_files = True

    def look(self, subject: Subject) -> Check:
        limit = subject.manifest.max_length
        wanted = limit if subject.student is None else _length_of(subject.student, subject)
        found = {"manifest.json cuts": limit, "its tokenizer cuts": _own_limit(subject.tokenizer, wanted)}
        settings = subject.folder / "sentence_bert_config.json"
        if settings.exists() and isinstance(length := read_json(settings).get("max_seq_length"), int):
            found["sentence_bert_config.json cuts"] = length
        short = [f"{who} texts at {length} tokens" for who, length in found.items() if length < wanted]
        if short:
            return self.fails(f"{' and '.join(short)}, where the program takes {wanted}")
        return self.passes(f"texts are cut at {limit} tokens, as the program takes them")


def _length_of(student: Checkpoint, subject: Subject) -> int:
    return min(student.max_length, subject.manifest.settings.shapes.max_sequence)


def _own_limit(tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Tokens that are left of a long text where no length is given."""
    return min(len(tokenizer("a " * (2 * wanted + 8), truncation=True, verbose=False)["input_ids"]), wanted)
