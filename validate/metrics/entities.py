"""Entities in a row of BIO tags, and how many of them two rows share: what entity-level F1 is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Span = tuple[int, int, str]
"""First token, the token after the last one, and the type."""


def is_bio(label_names: Sequence[str]) -> bool:
    """Whether labels are `O`, `B-TYPE` and `I-TYPE` (Ramshaw and Marcus 1995), so that they spell out entities."""
    tags = [name for name in label_names if name != "O"]
    return bool(tags) and all(name[:2] in ("B-", "I-") and len(name) > 2 for name in tags)


def spans(tags: Sequence[str]) -> Iterator[Span]:
    """The entities of one row, read as CoNLL's own scorer reads them (`conlleval`, Tjong Kim Sang and Buchholz 2000):
    an `I-` that continues no entity of its type begins one."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        head, type_ = tag[:2], tag[2:]
        if kind and (head != "I-" or type_ != kind):
            yield start, place, kind
            kind = ""
        if head in ("B-", "I-") and not kind:
            start, kind = place, type_


def entity_counts(found: Sequence[np.ndarray], right: Sequence[np.ndarray], label_names: Sequence[str]) -> np.ndarray:
    """Counts of each row, float64 [rows, 3]: entities in both (same ends, same type), found, and there are.

    Args:
        found, right: label ids of every row's tokens, [tokens] each.
    """
    counts = np.zeros((len(found), 3))
    for row, sides in enumerate(zip(found, right, strict=True)):
        ours, gold = (set(spans([label_names[label] for label in side])) for side in sides)
        counts[row] = len(ours & gold), len(ours), len(gold)
    return counts


def micro_f1(sums: np.ndarray) -> np.ndarray:
    """F1 over the entities of all rows together, from the sums [..., 3] of `entity_counts` over the rows: 2 shared /
    (found + there), 0 to 1; not a number where no row has an entity on either side."""
    below = sums[..., 1] + sums[..., 2]
    return np.asarray(np.divide(2 * sums[..., 0], below, out=np.full(np.shape(below), np.nan), where=below > 0))
