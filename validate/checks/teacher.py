"""Whether the teacher is worth being held against."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from ..metrics.quality import score
from ..records.report import Check
from ..standard import Standard
from .base import Subject, SubjectCheck, Unchecked

_FEWEST = 100
"""Examples below which chance cannot be told from skill."""
_SKILL = 0.1
"""Share of the way from chance to perfection that a teacher must reach at the upper end of its interval."""
_Z = 1.96


class TeacherSkill(SubjectCheck):
    """The teacher is better than chance on the validation rows: the upper end of its 95 % interval is a tenth of the
    way from chance to perfection. Measured are mean recall over the classes (1 / classes by chance, whatever their
    shares), rank correlation with the gold scores (0 by chance), nats a token (the logarithm of the vocabulary by
    chance). It needs references, and 100 examples; it does not see a teacher that is good at a task like this one."""

    name = "teacher"

    def look(self, subject: Subject) -> Check | Unchecked | None:
        standard = subject.standard
        if standard is None:
            return None
        if "nll" in standard.predictions:
            return self._language_model(standard)
        if standard.references is None:
            return Unchecked("the validation rows have no references to judge the teacher by")
        if len(standard.references) < _FEWEST:
            return Unchecked(f"{len(standard.references)} examples do not tell a teacher from chance; {_FEWEST} may")
        if "embedding" in standard.predictions:
            return self._similarity(standard)
        return self._classifier(standard)

    def _classifier(self, standard: Standard) -> Check:
        assert standard.references is not None
        logits = standard.predictions["logits"]
        logits = np.concatenate(list(logits)) if logits.dtype == object else logits
        gold, answers = standard.references, logits.argmax(axis=1)
        classes, counts = np.unique(gold, return_counts=True)
        if len(classes) < 2:
            return self.fails("the validation rows have one class only, on which nothing can be told")
        recalls = np.array([np.mean(answers[gold == label] == label) for label in classes])
        half = _Z * float(np.sqrt(np.sum(recalls * (1 - recalls) / counts))) / len(classes)
        return self._judged("mean recall over the classes", float(recalls.mean()), half, 1 / len(classes))

    def _similarity(self, standard: Standard) -> Check:
        assert standard.references is not None
        found = score("sentence-similarity", None, standard.predictions, standard.references, pairs=standard.pairs)
        value, n = found["spearman"], len(standard.references)
        if not math.isfinite(value):
            return self.fails("the teacher gives every pair the same score")
        # Fisher's z of a rank correlation: Bonett and Wright, Psychometrika 65 (2000)
        half = _Z * math.sqrt((1 + value**2 / 2) / (n - 3))
        low, high = (math.tanh(math.atanh(min(value, 0.999999)) + side * half) for side in (-1, 1))
        return self._judged("rank correlation with the gold scores", value, (high - low) / 2, 0.0)

    def _language_model(self, standard: Standard) -> Check | Unchecked:
        nll = np.concatenate(list(standard.predictions["nll"]))
        if len(nll) < _FEWEST:
            return Unchecked(f"{len(nll)} tokens do not tell a teacher from chance; {_FEWEST} may")
        uniform = math.log(int(standard.teacher.model.config.vocab_size))
        half = _Z * float(stats.sem(nll))
        skill, error = 1 - float(nll.mean()) / uniform, half / uniform
        return self._judged("share of the vocabulary's nats that it saves", skill, error, 0.0)

    def _judged(self, what: str, value: float, half: float, chance: float) -> Check:
        interval = f"95% interval {value - half:.3f} to {min(value + half, 1.0):.3f}"
        told = f"{what} {value:.3f} ({interval}), by chance {chance:.3f}"
        if value + half < chance + _SKILL * (1 - chance):
            return self.fails(f"the teacher is no better than chance on these rows: {told}")
        return self.passes(f"the teacher's {told}")
