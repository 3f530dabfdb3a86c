"""The cache of a program that writes text: what it answers to a text that it reads piece by piece, going on from keys
and values that it kept, is what it answers to the text in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ...backends.base import Runner
from ...backends.decoder import Decoder
from ...errors import InputError
from ...exporters.artifact import CheckRecord
from ...exporters.settings import ShapeRange
from ...models.batching import Run

CACHE_CHECK = "cache"
Draw = Callable[[int, int], torch.Tensor]
"""Token ids of so many texts of so many tokens, int64 [texts, tokens]."""
_TEXTS, _TOKENS = 3, 24


@dataclass(frozen=True)
class Reading:
    """Texts that are read in pieces.

    Attributes:
        name: in words.
        ids, mask: int64 [texts, tokens], padded on the left.
        ends: how many tokens have been read after each piece, the last one's are all.
    """

    name: str
    ids: np.ndarray
    mask: np.ndarray
    ends: tuple[int, ...]

    @property
    def positions(self) -> np.ndarray:
        """The place of each token in its text, int64 [texts, tokens]."""
        return np.asarray((self.mask.cumsum(axis=1) - 1).clip(min=0))

    def steps(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """What a decoder is given, piece by piece."""
        for start, end in zip((0, *self.ends), self.ends, strict=False):
            pieces = self.ids[:, start:end], self.mask[:, :end], self.positions[:, start:end]
            ids, mask, positions = map(np.ascontiguousarray, pieces)
            yield ids, mask, positions

    def in_pieces(self, decoder: Decoder) -> np.ndarray:
        """What follows each piece, float32 [pieces, texts, vocabulary]."""
        decoder.start(len(self.ids))
        return np.stack([decoder.step(*step).copy() for step in self.steps()])

    def in_one(self, run: Run) -> np.ndarray:
        """The same of texts that are read whole, padded on the right as everywhere else."""
        lengths = self.mask.sum(axis=1)
        ids, mask = np.zeros_like(self.ids), np.zeros_like(self.mask)
        for row, length in enumerate(lengths):
            ids[row, :length], mask[row, :length] = self.ids[row, -length:], 1
        found = run({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)})["logits"]
        rows, padding = np.arange(len(ids)), len(ids[0]) - lengths
        return np.stack([found[rows, end - padding - 1] for end in self.ends])


def readings_of(draw: Draw, shapes: ShapeRange, longest: int) -> list[Reading]:
    """One text, several of one length, several of unequal lengths, and one as long as any may be; each is read as a
    prompt, then by several tokens at a time, then token by token."""
    texts, tokens = min(_TEXTS, shapes.max_batch), min(_TOKENS, longest)
    ends, found = _ends(tokens), [("one text", 1, tokens, 0)]
    if texts > 1:
        found += [(f"{texts} texts of one length", texts, tokens, 0)]
    if texts > 1 and ends[0] > 1:
        found += [(f"{texts} texts, padded on the left", texts, tokens, (ends[0] - 1) // (texts - 1))]
    if longest > tokens:
        found += [("the longest text", 1, longest, 0)]
    return [_reading(name, draw(rows, size), padding) for name, rows, size, padding in found]


def _ends(tokens: int) -> tuple[int, ...]:
    singles = range(max(1, tokens - 3), tokens + 1)
    return tuple(sorted({max(1, tokens // 2), max(1, 3 * tokens // 4), *singles}))


def _reading(name: str, drawn: torch.Tensor, padding: int) -> Reading:
    """Each text has so much more padding than the one before."""
    ids = drawn.numpy().copy()
    mask = np.ones_like(ids)
    for row in range(len(ids)):
        ids[row, : row * padding], mask[row, : row * padding] = 0, 0
    return Reading(name, ids, mask, _ends(ids.shape[1]))


@dataclass(frozen=True)
class Read:
    """What a program answered to one reading, in pieces and in one."""

    reading: Reading
    pieces: np.ndarray
    whole: np.ndarray

    @property
    def largest(self) -> float:
        """The largest logit that is a number."""
        return float(np.abs(self.whole[np.isfinite(self.whole)]).max(initial=0.0))

    @property
    def differences(self) -> np.ndarray:
        """The largest after each piece, float [pieces]; infinite where an answer is no number."""
        apart = np.abs(self.pieces - self.whole).max(axis=(1, 2), initial=0.0)
        return np.where(np.isfinite(apart), apart, np.inf)


def check_cache(runner: Runner, readings: Iterable[Reading], tolerance: float) -> CheckRecord:
    """Read all of them both ways. A program that cannot go on from what it has read fails."""
    decoder, read = runner.decoder(), list[Read]()
    for reading in readings:
        whole = reading.in_one(runner)
        try:
            read.append(Read(reading, reading.in_pieces(decoder), whole))
        except InputError as error:
            said = f"{reading.name} cannot be read in pieces: {error.message.rstrip('.')}"
            return CheckRecord(name=CACHE_CHECK, passed=False, detail=said)
    scale = max(each.largest for each in read) or 1.0
    worst = {each.reading.name: float(each.differences.max()) / scale for each in read}
    wrong = next((each for each in read if each.differences.max() > tolerance * scale), None)
    share = max(worst.values()) if wrong is None else worst[wrong.reading.name]
    apart = f"by {share:.2g} of the largest logit, tolerance {tolerance:g}"
    if wrong is None:
        detail = f"a text that is read in pieces is answered as one that is read whole; the furthest apart {apart}"
    else:
        detail = f"{wrong.reading.name}: {_where(wrong, tolerance * scale)}, {apart}"
    rows: list[dict[str, str | float | int | bool]] = [
        {
            "texts": each.reading.name,
            "pieces": ", ".join(map(str, np.diff((0, *each.reading.ends)))),
            "share of the output": min(worst[each.reading.name], float(np.finfo(np.float64).max)),
            "passed": worst[each.reading.name] <= tolerance,
        }
        for each in read
    ]
    return CheckRecord(name=CACHE_CHECK, passed=wrong is None, detail=detail, rows=rows)


def _where(read: Read, allowed: float) -> str:
    """The first piece after which it answers otherwise."""
    first = int(np.argmax(read.differences > allowed))
    before, end = (0, *read.reading.ends)[first], read.reading.ends[first]
    if not before:
        return f"{end} tokens that are read onto an empty cache are answered otherwise than in one call"
    many = "1 token" if end - before == 1 else f"{end - before} tokens"
    return f"{many} read after {before} others are answered otherwise than the {end} in one piece"
