"""Which rows of a stream stay when there is no room for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
# What rows are worth, given their ascending numbers; those of the lowest worth leave first.
Worth = Callable[[Rows], NDArray[np.float64]]

# Of the capacity, the share that leaves at once where rows leave from between others. Those that stay are
# written anew: the larger the share, the less often, and the fewer rows are held on average. At a quarter,
# three rows are written anew for each that is appended, and a stream is never below three quarters.
LEAVING_SHARE = 1 / 4


def leaving_at_once(capacity: int) -> int:
    """How many rows leave a full stream when another one comes."""
    return max(1, int(capacity * LEAVING_SHARE))


def rows_left(held: int, new: int, capacity: int, worth: Worth) -> Rows:
    """Which rows are held after new ones have come, one by one.

    Whenever there is no room for the next row, those of the lowest worth leave; among equals, the oldest. It
    makes no difference how the rows are cut into calls.

    Args:
        held: How many rows are held, at most `capacity`.
        new: How many come.
        capacity: Rows that can be held.
        worth: Of rows, numbered from the oldest held to the newest that comes.

    Returns:
        Their numbers, ascending.
    """
    left = np.arange(held)
    coming, total = held, held + new
    while coming < total:
        if left.size == capacity:
            staying = np.argsort(worth(left), kind="stable")[leaving_at_once(capacity) :]
            left = left[np.sort(staying)]
        stop = min(total, coming + capacity - left.size)
        left = np.concatenate([left, np.arange(coming, stop)])
        coming = stop
    return left


def every_nth(positions: Rows, n: int) -> Worth:
    """Rows whose position is a multiple of n are worth more than all others."""
    return lambda rows: (positions[rows] % n == 0).astype(np.float64)


def by_scores(scores: Sequence[NDArray[np.floating]]) -> Worth:
    """Rows are worth what routing has scored them with.

    Layers are put together by ranks: a row is worth the number of rows that it outdoes in a layer, added up
    over the layers. Scores themselves would let the layer decide whose scores spread the widest. Ranks are
    integers, so that sums and ties are exact.

    Args:
        scores: The scores of each layer that has any, of its oldest rows, NaN below all others. Rows that not
            all of these layers have scored yet are worth more than those that they have.
    """
    scored = min((each.size for each in scores), default=0)
    plain = [np.where(np.isnan(each[:scored]), -np.inf, each[:scored]) for each in scores]

    def worth(rows: Rows) -> NDArray[np.float64]:
        known = rows[rows < scored]
        total = np.full(rows.size, np.inf)
        if known.size:
            chosen = [each[known] for each in plain]
            total[: known.size] = sum(np.searchsorted(np.sort(each), each) for each in chosen)
        return total

    return worth
