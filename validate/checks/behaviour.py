"""What a program must do whatever its weights are: read no padding, look at no later token, repeat itself, stay finite,
take the shapes that it says it takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...errors import InputError
from ...models.batching import padding_id
from ..proofs.tolerances import tolerance_of
from ..records.report import Check
from .base import Subject, SubjectCheck, relative_difference

Outputs = Mapping[str, np.ndarray]
_SAME_KERNELS = 1e-3
"""Share of an output's magnitude. Two calls of one shape run the same kernels, so what must not matter changes nothing,
or next to nothing, in any precision."""
_REPEATED = 1e-5
_SHORT, _PADDED = 7, 24


class PaddingMask(SubjectCheck):
    """A text alone and the same text padded in a batch give the same answer, within its precision, and what stands
    under the mask changes nothing. Cannot see a mask that is wrong in the same way in training and in the program."""

    name = "padding mask"

    def look(self, subject: Subject) -> Check | None:
        shapes = subject.manifest.settings.shapes
        padded, short = min(_PADDED, subject.longest), min(_SHORT, subject.longest // 2)
        if subject.runner is None or short < 1 or shapes.min_sequence > short or shapes.max_batch < 2:
            return None
        texts = subject.real_tokens(2, padded)
        mask = torch.ones_like(texts)
        mask[0, short:] = 0
        other = texts.where(mask.bool(), torch.tensor(padding_id(subject.tokenizer)))
        alone = _first(subject.runner(subject.batch_of(texts[:1, :short])), short)
        batched = _first(subject.runner(subject.batch_of(other, mask)), short)
        garbage = _first(subject.runner(subject.batch_of(texts, mask)), short)
        tolerance = tolerance_of(subject.manifest.settings.precision, subject.manifest.cache).module
        moved, read = relative_difference(batched, alone), relative_difference(garbage, batched)
        if moved > tolerance:
            return self.fails(
                f"the padding mask is ignored: a text of {short} tokens answers otherwise when it is padded to "
                f"{padded}, by {moved:.2g} of its magnitude (tolerance {tolerance:g})"
            )
        if read > _SAME_KERNELS:
            return self.fails(
                f"the padding mask is ignored: other tokens under the mask change the answer by {read:.2g} of its "
                "magnitude"
            )
        return self.passes(f"a text answers the same alone and padded, within {max(moved, read):.2g}")


def _first(outputs: Outputs, tokens: int) -> dict[str, np.ndarray]:
    """The first row of each output; of one per token, its first tokens."""
    return {name: value[0, :tokens] if value.ndim >= 3 else value[0] for name, value in outputs.items()}


class Causality(SubjectCheck):
    """In a decoder, later tokens change nothing before them. Means nothing for encoders."""

    name = "causal mask"

    def look(self, subject: Subject) -> Check | None:
        sequence = min(_PADDED, subject.longest)
        if subject.manifest.task != "text-generation" or subject.runner is None or sequence < 2:
            return None
        half = sequence // 2
        before = subject.real_tokens(1, sequence)
        after = before.clone()
        after[0, half:] = after[0, half:].flip(0).roll(1)
        if torch.equal(before, after):
            after[0, half:] = before[0, 0]
        first, second = (_first(subject.runner(subject.batch_of(ids)), half) for ids in (before, after))
        moved = relative_difference(second, first)
        if moved > _SAME_KERNELS:
            return self.fails(
                f"the causal mask is dropped: other tokens from {half} on change what was said before them by "
                f"{moved:.2g} of its magnitude"
            )
        return self.passes(f"tokens from {half} on change nothing before them, within {moved:.2g}")


class Repeatability(SubjectCheck):
    """The same batch gives the same outputs twice. Sees dropout that was left on and kernels that race; not what
    changes only from one machine to the next."""

    name = "determinism"

    def look(self, subject: Subject) -> Check | None:
        if subject.runner is None:
            return None
        batch = subject.batch_of(subject.real_tokens(1, min(_PADDED, subject.longest)))
        calls = [{name: value.copy() for name, value in subject.runner(batch).items()} for _ in range(3)]
        if not all(np.isfinite(value).all() for value in calls[0].values()):
            return None  # which `long inputs` and `finite outputs` say
        moved = max(relative_difference(call, calls[0]) for call in calls[1:])
        if moved > _REPEATED:
            return self.fails(
                f"it is not deterministic: the same batch answers otherwise from call to call, by {moved:.2g} of its "
                "magnitude; something in the program is drawn at random, as dropout is"
            )
        return self.passes("the same batch gives the same outputs three times")


class LongInputs(SubjectCheck):
    """Outputs are finite from the shortest text to the longest that the program takes; where they are not, it names the
    length from which on."""

    name = "long inputs"

    def look(self, subject: Subject) -> Check | None:
        if subject.runner is None:
            return None
        longest, shortest = subject.longest, subject.manifest.settings.shapes.min_sequence
        if self._finite(subject, longest):
            return self.passes(f"finite at {longest} tokens")
        low, high = shortest - 1, longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._finite(subject, middle) else (low, middle)
        return self.fails(f"NaN or infinity in texts of {high} tokens and more (the longest is {longest})")

    @staticmethod
    def _finite(subject: Subject, tokens: int) -> bool:
        assert subject.runner is not None
        outputs = subject.runner(subject.batch_of(subject.real_tokens(1, tokens)))
        return all(bool(np.isfinite(value).all()) for value in outputs.values())


class Shapes(SubjectCheck):
    """Every batch size and length within the manifest's ranges is taken, and gives outputs of its own size; otherwise
    it names the axis that was baked in."""

    name = "shapes"

    def look(self, subject: Subject) -> Check | None:
        if subject.runner is None:
            return None
        shapes = subject.manifest.settings.shapes
        batches = {min(max(size, shapes.min_batch), shapes.max_batch) for size in (1, 2, 3, 5)}
        lengths = {min(max(size, shapes.min_sequence), subject.longest) for size in (1, 7, 16, 24, subject.longest)}
        refused: dict[tuple[int, int], str] = {}
        few = min(batches)  # long texts in large batches cost time and tell nothing more
        tried = [(b, n) for b in sorted(batches) for n in sorted(lengths) if b == few or n < max(lengths)]
        for batch, length in tried:
            if (problem := _refusal(subject, batch, length)) is not None:
                refused[batch, length] = problem
        if not refused:
            return self.passes(f"{len(tried)} shapes are taken")
        taken = [size for size in tried if size not in refused]
        (batch, length), problem = next(iter(refused.items()))
        return self.fails(f"{_baked(taken, tried)}: {len(refused)} of {len(tried)} shapes are refused, such as "
                          f"{batch} x {length} ({problem})")  # fmt: skip


def _refusal(subject: Subject, batch: int, length: int) -> str | None:
    assert subject.runner is not None
    try:
        outputs = subject.runner(subject.batch_of(subject.real_tokens(batch, length)))
    except InputError as error:
        return error.message
    wrong = [name for name, value in outputs.items() if value.ndim == 0 or len(value) != batch]
    return f"{wrong[0]} has the shape {list(outputs[wrong[0]].shape)}" if wrong else None


def _baked(taken: list[tuple[int, int]], tried: list[tuple[int, int]]) -> str:
    for axis, name in enumerate(("batch", "sequence")):
        kept = {size[axis] for size in taken}
        if len(kept) == 1 and len({size[axis] for size in tried}) > 1:
            return f"the {name} axis is baked in at {kept.pop()}"
    return "an axis is baked in" if taken else "it takes none of the shapes that its manifest lists"
