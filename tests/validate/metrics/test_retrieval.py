"""Nearest passages of many queries against those of each query by itself."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.validate.metrics.retrieval import first_hits, ranking_agreement


def test_many_queries_are_taken_a_part_at_a_time() -> None:
    generator = np.random.default_rng(5)
    queries = generator.normal(size=(600, 4))
    both = np.concatenate([queries, queries + 0.3 * generator.normal(size=queries.shape)])
    ours, theirs = first_hits(both, both)
    passages = both[600:] / np.linalg.norm(both[600:], axis=1, keepdims=True)
    own = np.array([np.argmax(passages @ (queries[i] / np.linalg.norm(queries[i]))) == i for i in range(600)])
    assert theirs is not None and ours.tolist() == theirs.tolist() == own.tolist()
    assert ranking_agreement(both, both, 500) == pytest.approx(np.ones(500))
