"""Routing of memory rows by what is being read: routing tokens for chunks of tokens, or queries of each one.

Nothing looks ahead: the routing tokens of a chunk are computed from the chunk before it, and a token's query
from the token itself.

Shapes: b streams, n tokens in a segment, c tokens in a chunk, g = ⌈n / c⌉ chunks, m memory rows, d dim, r
sets of rows, k rows routed, e width of routing keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlroute.attached import MemoryRows
from xlroute.backend import pick_backend
from xlroute.kernels import gathered_products
from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.scoring import RMS_EPS
from xlroute.kernels.search import take_best
from xlroute.memory.layer import Keep
from xlroute.memory.routing_keys import RoutingKeys, routing_keys
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats


class FoundRows(NamedTuple):
    """The rows that each token has found."""

    indices: Tensor  # int64 [b, n, r, k], -1 for none
    scores: Tensor  # the gates of the rows, [b, n, r, k]
    cosines: Tensor  # of their keys with the token's own, [b, n, r, k]; 0 for none


class ChunkRouting(nn.Module):
    """Routing tokens for each chunk of c tokens, from the states of the chunk before it.

    Each of the r tokens pools the normalised states with learned weights (a softmax of inner products with a
    vector of its own), and projects the result, at first to itself: so a chunk finds rows like the chunk
    before it until it learns better. A chunk with nothing before it has learned routing tokens.

    Args:
        dim: d.
        sets: r.
        chunk: c.
    """

    def __init__(self, dim: int, *, sets: int, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.pool = nn.Parameter(torch.randn(sets, dim) * dim**-0.5)
        self.projection = nn.Parameter(torch.eye(dim).repeat(sets, 1, 1))

    def route(
        self,
        router: CoordinateDescentRouter,
        memory: MemoryRows,
        x: Tensor,
        before: Tensor,
        before_mask: Tensor,
        num_tokens: int,
        *,
        with_stats: bool,
    ) -> tuple[RouterOutput, RoutingStats | None]:
        """Choose rows for each chunk of x.

        Args:
            router: with the r tokens of a chunk with nothing before it.
            memory: m rows.
            x: states [b, n, d], the first of which begins a chunk.
            before: those before them, [b, t, d], of which only the last c matter.
            before_mask: which of them count, bool [b, t].
            num_tokens: k.
            with_stats: tell how saturated the gates are.

        Returns:
            What the router chose, all with the dimensions [b, g, r], and the statistics, or None.
        """
        b, n, d = x.shape
        chunks = math.ceil(n / self.chunk)
        # Negative padding cuts off.
        lacking, sources = self.chunk - before.shape[1], (chunks - 1) * self.chunk
        states = torch.cat((F.pad(before, (0, 0, lacking, 0)), x[:, :sources]), dim=1)
        mask = F.pad(F.pad(before_mask, (lacking, 0)), (0, sources), value=True)
        assert router.routing_token is not None
        tokens = self.tokens(
            states.view(b, chunks, self.chunk, d), mask.view(b, chunks, self.chunk), router.routing_token
        )
        # Tokens that no later call can use.
        scores = router.scores_by(memory, tokens.flatten(1, 2), keep=False)
        there = None if memory.even else memory.mask[:, None, None]
        gates, indices, stats = router.choose(
            torch.unflatten(scores, 1, (chunks, -1)), num_tokens=num_tokens, mask=there, with_stats=with_stats
        )
        rows = memory.take_routed(indices)
        return RouterOutput(indices, gates, rows, None if there is None else indices >= 0), stats

    def tokens(self, states: Tensor, mask: Tensor, start: Tensor) -> Tensor:
        """Routing tokens [b, g, r, d] of unit variance, from chunks [b, g, c, d].

        Args:
            states: of the chunk before each.
            mask: which of them there are, bool [b, g, c].
            start: the tokens [r, d] of a chunk that has none before it.
        """
        wide = compute_dtype(states.dtype)
        with torch.autocast(states.device.type, enabled=False):
            states = F.rms_norm(states.to(wide), states.shape[-1:], eps=RMS_EPS)
            logits = torch.einsum("bgcd,rd->bgrc", states, self.pool.to(wide))
            # Finite, so that a chunk of nothing has weights too.
            weights = logits.masked_fill(~mask[:, :, None], torch.finfo(wide).min).softmax(-1)
            pooled = torch.einsum("bgrd,rod->bgro", weights @ states, self.projection.to(wide))
            tokens = F.rms_norm(pooled, pooled.shape[-1:], eps=RMS_EPS)
            return torch.where(mask.any(-1)[..., None, None], tokens, start.to(wide))


class TokenRouting(nn.Module):
    """Each token routes for itself: it reads the rows whose keys are most like its own.

    Keys of rows and queries of tokens are the same projection of the state, of unit length, so
    that a token finds rows like itself before anything is learned. A row's score is √e x the cosine of the
    two, which spreads by about 1 over unlike rows. The gates are a soft top-k of the K best rows, K >= 2k,
    which are found without gradient and then scored again with it (Memorizing Transformers, arXiv
    2203.08913, read the k best, without a gradient to the choice).

    Args:
        dim: d.
        sets: r, each with a projection of its own.
        key_dim: e.
        shortlist: where gradient is recorded, the best are chosen out of so many x k rows, found by the keys
            that rows got first; None to project all rows anew.
    """

    chunk = 1

    def __init__(self, dim: int, *, sets: int, key_dim: int, shortlist: float | None = None) -> None:
        super().__init__()
        self.shortlist = shortlist
        self.projection = nn.Parameter(torch.randn(sets, key_dim, dim) * dim**-0.5)

    def keys(self, memory: MemoryRows) -> RoutingKeys:
        """Those of all rows, without gradient."""
        keep: Keep = not torch.is_grad_enabled()
        if self.shortlist is not None and not keep:
            keep = "first"
        return memory.keys(self.projection.detach().to(memory.device), keep=keep)

    def route(
        self,
        router: CoordinateDescentRouter,
        memory: MemoryRows,
        keys: RoutingKeys,
        x: Tensor,
        num_tokens: int,
        *,
        with_stats: bool,
    ) -> tuple[FoundRows, RoutingStats | None]:
        """Choose rows for each token.

        Args:
            router: solves for the gates.
            memory: m rows.
            keys: those of the rows.
            x: states [b, n, d].
            num_tokens: k.
            with_stats: tell how saturated the gates are.

        Returns:
            What was chosen, and the statistics [b, n, r], or None.
        """
        count = 2 * num_tokens
        if self.shortlist is not None and torch.is_grad_enabled():
            count = math.ceil(num_tokens * self.shortlist)
        projection = self.projection.to(memory.device)
        backend = pick_backend(router.use_triton, memory.device)
        queries = routing_keys(x.to(memory.device), projection, backend=backend)
        queries = queries.transpose(1, 2)  # [b, r, n, e]
        b, r, n, e = queries.shape
        cosines, found = keys.search(queries.detach(), count, backend=backend)  # [b, r, n, K]
        if torch.is_grad_enabled():
            rows, places = distinct(found.flatten(1), memory.shape[1])
            row_keys = routing_keys(memory.take(rows), projection, backend=backend)
            row_keys = row_keys.transpose(1, 2)  # [b, r, u, e]
            cosines = gathered_products(
                queries.to(row_keys.dtype).reshape(b * r, n, 1, e),
                row_keys.flatten(0, 1),
                places.view(b * r, n, -1),
                backend=backend,
            ).view(found.shape)
            if found.shape[-1] > 2 * num_tokens:
                cosines = cosines.masked_fill(found < 0, -math.inf)
                cosines, found = take_best(cosines, found, 2 * num_tokens)
        cosines, found = cosines.transpose(1, 2), found.transpose(1, 2)  # [b, n, r, K]
        there = None if memory.even else found >= 0
        scores = cosines * e**0.5 if there is None else (cosines * e**0.5).masked_fill(~there, -math.inf)
        gates, chosen, stats = router.choose(scores, num_tokens=num_tokens, mask=there, with_stats=with_stats)
        nowhere, chosen = chosen < 0, chosen.clamp(min=0)
        indices = found.gather(-1, chosen).masked_fill(nowhere, -1)
        return FoundRows(indices, gates, cosines.gather(-1, chosen).masked_fill(nowhere, 0)), stats


def distinct(indices: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The rows that indices [b, n] below m name, each once in a stream, and where each index is among them.

    There is room for as many rows as could be named, on a GPU, for which the host so does not wait, and whose
    compiler sees one size; elsewhere for as many as are named.

    Returns:
        Rows, int64 [b, u], ascending, behind them -1; and places in them, int64 [b, n]; -1 for -1.
    """
    at = torch.where(indices < 0, m, indices)
    named = torch.zeros(len(indices), m + 1, dtype=torch.bool, device=indices.device)
    named = named.scatter(1, at, True)[:, :m]
    places = named.cumsum(1) - 1
    count = min(indices.shape[1], m) if indices.is_cuda else int(named.sum(1).max())
    # Those that nothing names go to a column that is cut off again.
    to, every = torch.where(named, places, count), torch.arange(m, device=indices.device)
    rows = indices.new_full((len(indices), count + 1), -1).scatter(1, to, every.expand_as(to))[:, :count]
    return rows, F.pad(places, (0, 1), value=-1).gather(1, at)
