"""Learned routing of memory rows out of a shortlist, which is taken by the scores that rows got first.

Shapes: b streams, l layers, m memory rows, d dim, r routing tokens, k rows routed, K rows of a shortlist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xlroute.attached import MemoryRows, ReadableRows
from xlroute.backend import pick_backend
from xlroute.kernels import gather_rows, top_indices
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats, scores_together


def shortlisted(
    routers: Sequence[CoordinateDescentRouter],
    layers: Sequence[MemoryRows],
    num_tokens: int,
    shortlist: float,
) -> tuple[Tensor, ...]:
    """The K rows that were scored highest when they got their first scores, int64 [b, r, K]; -1 for none.

    Args:
        routers: l, with routing tokens of their own, equally many.
        layers: l, of one memory as it stands at one moment: m rows.
        num_tokens: k.
        shortlist: K / k, at least 2: else no gate would have a gradient.

    Returns:
        l tensors.
    """
    first, there = scores_together(routers, layers, keep="first")
    backend = pick_backend(routers[0].use_triton, first.device)
    count = min(math.ceil(num_tokens * shortlist), first.shape[-1])
    return torch.split(top_indices(first, count, there, backend=backend), layers[0].shape[0])


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
