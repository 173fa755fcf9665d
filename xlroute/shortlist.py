"""Learned routing of memory rows out of a shortlist, which is taken by the scores that rows got first.

Shapes: b streams, m memory rows, d dim, r routing tokens, k rows routed, K rows of a shortlist.
"""

from __future__ import annotations

import math

from torch import Tensor

from xlroute.attached import MemoryRows, ReadableRows
from xlroute.backend import pick_backend
from xlroute.kernels import gather_rows, top_indices
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats


def shortlisted(
    router: CoordinateDescentRouter, memory: MemoryRows, num_tokens: int, shortlist: float
) -> Tensor:
    """The K rows that were scored highest when they got their first scores, int64 [b, r, K]; -1 for none.

    Args:
        router: with routing tokens of its own.
        memory: m rows.
        num_tokens: k.
        shortlist: K / k, at least 2: else no gate would have a gradient.
    """
    tokens = router.routing_token
    assert tokens is not None
    first = router.scores_by(memory, tokens, keep="first")
    backend = pick_backend(router.use_triton, first.device)
    there = None if memory.even else memory.mask[:, None]
    count = min(math.ceil(num_tokens * shortlist), first.shape[-1])
    return top_indices(first, count, there, backend=backend)


def choose_of_shortlist(
    router: CoordinateDescentRouter,
    memory: ReadableRows,
    candidates: Tensor,
    num_tokens: int,
    *,
    with_stats: bool,
) -> tuple[RouterOutput, RoutingStats | None]:
    """Choose rows out of a shortlist, scored again by the router's tokens of now, with gradient.

    Args:
        router: with routing tokens of its own.
        memory: m rows.
        candidates: int64 [b, r, K], from `shortlisted`.
        num_tokens: k.
        with_stats: tell how saturated the gates are.

    Returns:
        What a call of the router chooses out of the K rows, all with the dimensions [b, r], and the
        statistics, or None.
    """
    tokens = router.routing_token
    assert tokens is not None
    b = len(candidates)
    rows = memory.take(candidates)  # [b, r, K, d]
    own = tokens[:, None].to(rows.device)  # each set of rows has its own token
    scores = router.scores_by(rows.flatten(0, 1), own.repeat(b, 1, 1)).view(candidates.shape)
    mask = None if memory.even else candidates >= 0
    gates, places, stats = router.choose(scores, num_tokens=num_tokens, mask=mask, with_stats=with_stats)
    indices = candidates.gather(-1, places.clamp(min=0)).masked_fill(places < 0, -1)
    backend = pick_backend(router.use_triton, rows.device)
    chosen = gather_rows(rows.flatten(0, 1), places.flatten(0, 1), backend).view(*indices.shape, router.dim)
    return RouterOutput(indices, gates, chosen, None if mask is None else indices >= 0), stats
