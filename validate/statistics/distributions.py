"""How figures are distributed, as counts, and how far another sample of them has moved.

A histogram's bins hold a tenth of the first sample each, and one bin on either side holds what lies beyond all of it.
Later samples are counted in the same bins: nothing but counts is kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats
from scipy.spatial.distance import jensenshannon

from ..records.profile import Categories, Histogram

_TENTHS = 10
_HALF = 0.5
"""Added to every count, as Jeffreys' prior does: an empty bin would be infinitely unlikely."""
_FALSE_ALARMS = 1e-3
"""Of samples from an unchanged source, the share that may be called shifted."""
MODERATE, LARGE = 0.1, 0.25
"""Population stability indices from which a shift counts: the usual rule (Siddiqi, Credit Risk Scorecards, 2006)."""


def histogram_of(values: np.ndarray, like: Histogram | None = None) -> Histogram:
    """Of finite values [one or more], in bins of their own or in those of another sample."""
    values = np.asarray(values, dtype=np.float64)
    edges = np.array(like.edges) if like is not None else _edges(values)
    counts = np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)
    p5, p50, p95 = (float(value) for value in np.quantile(values, [0.05, 0.5, 0.95]))
    return Histogram(
        count=len(values),
        mean=float(values.mean()),
        p5=p5,
        p50=p50,
        p95=p95,
        edges=edges.tolist(),
        counts=counts.tolist(),
    )


def _edges(values: np.ndarray) -> np.ndarray:
    """At values that occur, so that ties stay together; the first just below the smallest."""
    tenths = np.quantile(values, np.arange(1, _TENTHS + 1) / _TENTHS, method="inverted_cdf")
    return np.unique([np.nextafter(values.min(), -np.inf), *tenths])


def categories_of(kinds: Sequence[str], found: np.ndarray, texts: int) -> Categories:
    """Of indices int64 [one or more] into the kinds, from so many texts."""
    counts = np.bincount(found, minlength=len(kinds))
    return Categories(
        count=texts, shares={kind: float(n / counts.sum()) for kind, n in zip(kinds, counts, strict=True)}
    )


@dataclass(frozen=True)
class Shift:
    """How far a sample has moved from the baseline's."""

    name: str
    psi: float
    """The population stability index, which doubt and size are judged by."""
    chance: float
    """What it stays below in 999 of 1,000 samples of this size from an unchanged source."""
    js: float
    """Jensen-Shannon divergence, 0 to 1 bit."""
    ks: float | None
    """Kolmogorov-Smirnov distance at the bins' edges, 0 to 1; `None` of kinds that have no order."""

    @property
    def size(self) -> Literal["none", "moderate", "large"]:
        """`none` also where so few values may have moved so far by chance."""
        if self.psi < max(MODERATE, self.chance):
            return "none"
        return "large" if self.psi >= LARGE else "moderate"


def shift_of(
    name: str, baseline: Histogram | Categories, sample: Histogram | Categories, comparisons: int = 1
) -> Shift:
    """How far a sample has moved.

    The index, of Lewis, An Introduction to Credit Scoring (1994), is the sum over bins of (q - p) ln(q / p). Without a
    change it is distributed as chi-square with bins - 1 degrees of freedom times 1 / n + 1 / m: Yurdakul and Naranjo,
    "Statistical properties of the population stability index", Journal of Risk Model Validation 14 (2020). The
    divergence is that of Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information
    Theory 37 (1991).

    Args:
        sample: in the baseline's bins (`histogram_of(values, like=baseline)`).
        comparisons: how many are made at once, over which the chance of a false alarm is shared.

    Raises:
        ValueError: the sample is in other bins.
    """
    expected, found = _counts(baseline, sample)
    p, q = ((side + _HALF) / (side.sum() + _HALF * len(side)) for side in (expected, found))
    spread = 1.0 / baseline.count + 1.0 / sample.count
    distance = np.abs(np.cumsum(expected / expected.sum()) - np.cumsum(found / found.sum())).max()
    return Shift(
        name=name,
        psi=float(np.sum((q - p) * np.log(q / p))),
        chance=spread * float(stats.chi2.ppf(1.0 - _FALSE_ALARMS / comparisons, max(len(p) - 1, 1))),
        js=float(jensenshannon(p, q, base=2) ** 2),
        ks=float(distance) if isinstance(baseline, Histogram) else None,
    )


def _counts(baseline: Histogram | Categories, sample: Histogram | Categories) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(baseline, Categories) and isinstance(sample, Categories):
        kinds = list(dict.fromkeys([*baseline.shares, *sample.shares]))
        before, after = (np.array([side.shares.get(kind, 0.0) for kind in kinds]) for side in (baseline, sample))
        return before * baseline.count, after * sample.count
    if isinstance(baseline, Histogram) and isinstance(sample, Histogram) and baseline.edges == sample.edges:
        return np.array(baseline.counts, dtype=float), np.array(sample.counts, dtype=float)
    raise ValueError("a sample has to be counted in the baseline's bins")
