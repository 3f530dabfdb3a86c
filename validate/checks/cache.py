"""What a program kept of a text, against the text itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...backends.decoder import Decoder
from ...backends.torch_eager import EagerRunner
from ...errors import InputError
from ...models.checkpoint import Checkpoint
from ..proofs.cache import CACHE_CHECK, Reading, check_cache, readings_of
from ..proofs.tolerances import tolerance_of
from ..records.report import Check
from .base import Subject, SubjectCheck

_RESTORED = 0.1
"""Share of the difference that may be left when a defect explains it."""


class KeptTokens(SubjectCheck):
    """A text that is read piece by piece, each going on from the keys and values of those before, is answered as when
    it is read in one piece: alone, in a batch, with padding on the left, up to the longest length. Where it is not,
    known defects of caches are tried on the student, and the one that answers as the program does is named. Means
    nothing for programs that keep nothing; cannot see what is wrong in one piece too (`parity`)."""

    name = CACHE_CHECK

    def look(self, subject: Subject) -> Check | None:
        manifest = subject.manifest
        if manifest.cache is None or subject.runner is None:
            return None
        tolerance = tolerance_of(manifest.settings.precision, manifest.cache).itself
        readings = readings_of(subject.real_tokens, manifest.settings.shapes, subject.longest)
        found = Check(**check_cache(subject.runner, readings, tolerance).model_dump())
        if found.passed or subject.student is None:
            return found
        cause = _cause(subject.runner.decoder(), subject.student, readings)
        return found.model_copy(update={"detail": f"{cause}: {found.detail}"}) if cause else found


Step = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids, mask and positions, as `Decoder.step` is given them."""


@dataclass(frozen=True)
class _Defect:
    """What may be wrong with a cache; `planted` makes of a sound decoder's step the one that it takes with the
    defect, told how many tokens had been read after each step before."""

    cause: str
    planted: Callable[[Step, Sequence[int]], Step]


class _Defective(Decoder):
    def __init__(self, sound: Decoder, defect: _Defect) -> None:
        self._sound, self._defect = sound, defect
        self._ends: list[int] = []

    def start(self, rows: int) -> None:
        self._sound.start(rows)
        self._ends = []

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        changed = self._defect.planted((ids, mask.copy(), positions.copy()), self._ends)
        self._ends.append(mask.shape[1])
        return self._sound.step(*changed)

    def cache_bytes(self) -> int:
        return self._sound.cache_bytes()


def _cause(program: Decoder, student: Checkpoint, readings: Sequence[Reading]) -> str | None:
    """The defect with which the student reads in pieces as the program does, in every reading."""
    sound = EagerRunner(student, torch.get_num_threads()).decoder()
    short = [reading for reading in readings if reading.ids.shape[1] == readings[0].ids.shape[1]]
    try:
        known = [reading.in_pieces(program) for reading in short]
    except InputError:
        return None
    before = _furthest(known, [reading.in_pieces(sound) for reading in short])
    for defect in _DEFECTS:
        planted = _Defective(sound, defect)
        if _furthest(known, [reading.in_pieces(planted) for reading in short]) <= _RESTORED * before:
            return defect.cause
    return None


def _furthest(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    return max(float(np.max(np.abs(ours - theirs))) for ours, theirs in zip(left, right, strict=True))


def _shifted(by: int) -> Callable[[Step, Sequence[int]], Step]:
    def plant(step: Step, ends: Sequence[int]) -> Step:
        ids, mask, positions = step
        return ids, mask, (positions + by).clip(min=0) if ends else positions

    return plant


def _restarted(step: Step, ends: Sequence[int]) -> Step:
    ids, mask, positions = step
    return ids, mask, np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy() if ends else positions


def _from_the_padding(step: Step, ends: Sequence[int]) -> Step:
    ids, mask, _ = step
    places = np.arange(mask.shape[1] - ids.shape[1], mask.shape[1])
    return ids, mask, np.broadcast_to(places, ids.shape).copy()


def _padding_read(step: Step, ends: Sequence[int]) -> Step:
    ids, mask, positions = step
    return ids, np.ones_like(mask), positions


def _lost(which: Callable[[Sequence[int]], list[int]]) -> Callable[[Step, Sequence[int]], Step]:
    def plant(step: Step, ends: Sequence[int]) -> Step:
        ids, mask, positions = step
        mask[:, which(ends)] = 0
        return ids, mask, positions

    return plant


def _first_lost(step: Step, ends: Sequence[int]) -> Step:
    """One more with every step."""
    ids, mask, positions = step
    mask[mask.cumsum(axis=1) <= len(ends)] = 0
    return ids, mask, positions


_DEFECTS = (
    _Defect("padding on the left is read as text", _padding_read),
    _Defect("positions are counted from the padding on", _from_the_padding),
    _Defect("positions are off by one after the prompt (+1)", _shifted(1)),
    _Defect("positions are off by one after the prompt (-1)", _shifted(-1)),
    _Defect("positions start again with every piece", _restarted),
    _Defect("nothing is kept of what was read", _lost(lambda ends: list(range(ends[-1] if ends else 0)))),
    _Defect("a token is lost at every step: the first that is kept", _first_lost),
    _Defect("a token is lost at every step: the last that was read", _lost(lambda ends: [end - 1 for end in ends])),
)
