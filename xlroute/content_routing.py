"""Routing of memory rows by what is being read: routing tokens for chunks of tokens, or queries of each one.

Nothing looks ahead: the routing tokens of a chunk are computed from the chunk before it, and a token's query
from the token itself.

Shapes: b streams, n tokens in a segment, c tokens in a chunk, g = ⌈n / c⌉ chunks, m memory rows, d dim, r
sets of rows, k rows routed, e width of routing keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlroute.attached import MemoryRows
from xlroute.backend import pick_backend
from xlroute.kernels import gather_rows, search_topk
from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.scoring import RMS_EPS
from xlroute.kernels.search import take_best
from xlroute.memory.layer import Keep
from xlroute.memory.routing_keys import routing_keys
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats


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
    ) -> tuple[RouterOutput, RoutingStats]:
        """Choose rows for each chunk of x.

        Args:
            router: with the r tokens of a chunk with nothing before it.
            memory: m rows.
            x: states [b, n, d], the first of which begins a chunk.
            before: those before them, [b, t, d], of which only the last c matter.
            before_mask: which of them count, bool [b, t].
            num_tokens: k.

        Returns:
            What the router chose, all with the dimensions [b, g, r], and how saturated the gates are.
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
        return choose(router, memory, torch.unflatten(scores, 1, (chunks, -1)), None, num_tokens)

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

    Keys of rows and queries of tokens are the same projection of the normalised state, of unit length, so
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

    def keys(self, memory: MemoryRows) -> Tensor:
        """Those of all rows [b, r, m, e], without gradient."""
        keep: Keep = not torch.is_grad_enabled()
        if self.shortlist is not None and not keep:
            keep = "first"
        return memory.keys(self.projection.detach().to(memory.device), keep=keep)

    def route(
        self,
        router: CoordinateDescentRouter,
        memory: MemoryRows,
        keys: Tensor,
        x: Tensor,
        num_tokens: int,
    ) -> tuple[RouterOutput, RoutingStats]:
        """Choose rows for each token.

        Args:
            router: solves for the gates.
            memory: m rows.
            keys: those of the rows.
            x: states [b, n, d].
            num_tokens: k.

        Returns:
            What the router chose, all with the dimensions [b, n, r], and how saturated the gates are.
        """
        count = 2 * num_tokens
        if self.shortlist is not None and torch.is_grad_enabled():
            count = math.ceil(num_tokens * self.shortlist)
        projection = self.projection.to(memory.device)
        queries = routing_keys(x.to(memory.device), projection).transpose(1, 2)  # [b, r, n, e]
        scores, found = search_topk(
            queries.detach().to(keys.dtype).flatten(0, 1),
            keys.flatten(0, 1),
            count,
            mask=None if memory.even else memory.mask.repeat_interleave(projection.shape[0], dim=0),
            backend=pick_backend(router.use_triton, keys.device),
        )
        b, r, n, e = queries.shape
        scores, found = (torch.unflatten(t, 0, (b, r)) for t in (scores, found))  # [b, r, n, K]
        if torch.is_grad_enabled():
            rows, places = distinct(found.flatten(1), memory.shape[1])
            row_keys = routing_keys(memory.take(rows), projection).transpose(1, 2)
            row_keys = gather_rows(row_keys.flatten(0, 1), places.view(b * r, -1)).view(b, r, n, -1, e)
            with torch.autocast(row_keys.device.type, enabled=False):
                scores = torch.einsum("brne,brnke->brnk", queries.to(row_keys.dtype), row_keys)
            if found.shape[-1] > 2 * num_tokens:
                scores, found = take_best(scores.masked_fill(found < 0, -math.inf), found, 2 * num_tokens)
        scores = (scores * e**0.5).masked_fill(found < 0, -math.inf)
        return choose(router, memory, scores.transpose(1, 2), found.transpose(1, 2), num_tokens)


def distinct(indices: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The rows that indices [b, n] below m name, each once in a stream, and where each index is among them.

    Returns:
        Rows, int64 [b, u], ascending, behind them -1; and places in them, int64 [b, n]; -1 for -1.
    """
    named = torch.zeros(len(indices), m + 1, dtype=torch.bool, device=indices.device)
    named = named.scatter(1, torch.where(indices < 0, m, indices), True)[:, :m]
    count = int(named.sum(1).max())
    rows = named.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    places = F.pad(named.cumsum(1) - 1, (0, 1), value=-1).gather(1, torch.where(indices < 0, m, indices))
    return torch.where(named.gather(1, rows), rows, -1), places


def choose(
    router: CoordinateDescentRouter,
    memory: MemoryRows,
    scores: Tensor,
    candidates: Tensor | None,
    num_tokens: int,
) -> tuple[RouterOutput, RoutingStats]:
    """Choose rows of a memory by given scores.

    Args:
        router: solves for the gates.
        memory: m rows.
        scores: [b, g, r, m], or those of the candidates.
        candidates: rows [b, g, r, K], -1 for none; None for all m.
        num_tokens: k.

    Returns:
        As `ChunkRouting`.
    """
    mask = None
    if not memory.even:
        mask = memory.mask[:, None, None] if candidates is None else candidates >= 0
    gates, indices, stats = router.choose(scores, num_tokens=num_tokens, mask=mask, with_stats=True)
    assert stats is not None
    if candidates is not None:
        indices = candidates.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, -1)
    rows = memory.take_routed(indices)
    return RouterOutput(indices, gates, rows, None if mask is None else indices >= 0), stats
