"""Learned routing of memory rows out of a shortlist, which is taken by the scores that rows got first.

Shapes: b streams, m memory rows, d dim, r routing tokens, k rows routed, K rows of a shortlist.
"""

from __future__ import annotations

import math

from xlroute.attached import MemoryRows
from xlroute.backend import pick_backend
from xlroute.kernels import gather_rows, top_indices
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats


def route_shortlist(
    router: CoordinateDescentRouter,
    memory: MemoryRows,
    num_tokens: int,
    shortlist: float,
    *,
    with_stats: bool,
) -> tuple[RouterOutput, RoutingStats | None]:
    """Choose rows by the router's tokens, without scoring all rows anew.

    The K rows that were scored highest when they got their first scores are scored again by the tokens of
    now, with gradient, and the choice and its gates are made among them.

    Args:
        router: with routing tokens of its own.
        memory: m rows.
        num_tokens: k.
        shortlist: K / k, at least 2: else no gate would have a gradient.
        with_stats: tell how saturated the gates are.

    Returns:
        What a call of the router chooses out of the K rows, all with the dimensions [b, r], and the
        statistics, or None.
    """
    tokens = router.routing_token
    assert tokens is not None
    b, m, dim = memory.shape
    first = router.scores_by(memory, tokens, keep="first")
    backend = pick_backend(router.use_triton, first.device)
    there = None if memory.even else memory.mask[:, None]
    candidates = top_indices(first, min(math.ceil(num_tokens * shortlist), m), there, backend=backend)
    rows = memory.take(candidates)  # [b, r, K, d]
    own = tokens[:, None].to(rows.device)  # each set of rows has its own token
    scores = router.scores_by(rows.flatten(0, 1), own.repeat(b, 1, 1)).view(candidates.shape)
    mask = None if memory.even else candidates >= 0
    gates, places, stats = router.choose(scores, num_tokens=num_tokens, mask=mask, with_stats=with_stats)
    indices = candidates.gather(-1, places.clamp(min=0)).masked_fill(places < 0, -1)
    memory.count_routed(indices)
    chosen = gather_rows(rows.flatten(0, 1), places.flatten(0, 1), backend).view(*indices.shape, dim)
    return RouterOutput(indices, gates, chosen, None if mask is None else indices >= 0), stats
