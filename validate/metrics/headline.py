"""Which metric stands for a task's quality, and which way is better: names only, so that a report is drawn without the
libraries that measure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

HEADLINE_METRICS: Mapping[str, tuple[str, ...]] = {
    "sentence-similarity": ("spearman", "recall_at_1", "agreement_spearman"),
    "text-classification": ("accuracy", "flip_rate"),
    "token-classification": ("f1", "accuracy", "flip_rate"),
    "fill-mask": ("perplexity",),
    "text-generation": ("perplexity",),
}
"""The metric that stands for a task's quality: the first of these that the data allow."""
_ACROSS_TASKS = ("spearman", "recall_at_1", "f1", "accuracy", "perplexity", "agreement_spearman", "flip_rate")
_LOWER_IS_BETTER = frozenset({
    "flip_rate", "kl_mean", "js_mean", "probability_difference_max", "logit_difference_max",
    "similarity_difference_max", "ece", "ece_equal_width", "brier", "nll", "nll_difference", "perplexity",
    "perplexity_ratio", "next_token_kl", "gap", "gap_amplification",
})  # fmt: skip


def headline_metric(task: str, scores: Mapping[str, float]) -> str:
    """The name of the metric, among these, that stands for the task's quality."""
    return next(name for name in HEADLINE_METRICS[task] if name in scores)


def headline_among(names: Collection[str]) -> str | None:
    """The same where the task is not at hand, as in a report: what was measured tells it."""
    return next((name for name in _ACROSS_TASKS if name in names), None)


def higher_is_better(metric: str) -> bool:
    """Whether more of it is better; a perplexity or a flip rate is better lower."""
    return metric not in _LOWER_IS_BETTER
