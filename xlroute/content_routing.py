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

from xlroute.attached import MemoryRows, ReadableRows
from xlroute.backend import pick_backend
from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.scoring import RMS_EPS
from xlroute.kernels.search import take_best
from xlroute.memory.layer import Keep
from xlroute.memory.routing_keys import RoutingKeys, keys_of_sets, routing_keys
from xlroute.router import CoordinateDescentRouter, PickedRows, RoutingStats


class FoundCandidates(NamedTuple):
    """The rows that each token may choose from."""

    indices: Tensor  # int64 [b, r, n, K], the best of all first; -1 for none
    cosines: Tensor  # of their keys with the token's own, [b, r, n, K], without gradient


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

    def pick(
        self,
        router: CoordinateDescentRouter,
        memory: MemoryRows,
        x: Tensor,
        before: Tensor,
        before_mask: Tensor,
        num_tokens: int,
        *,
        with_stats: bool,
    ) -> PickedRows:
        """Choose rows for each chunk of x, and read none of them.

        Args:
            router: with the r tokens of a chunk with nothing before it.
            memory: m rows.
            x: states [b, n, d], the first of which begins a chunk.
            before: those before them, [b, t, d], of which only the last c matter.
            before_mask: which of them count, bool [b, t].
            num_tokens: k.
            with_stats: tell how saturated the gates are.

        Returns:
            What the router chose, all with the dimensions [b, g, r].
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
        return PickedRows(indices, gates, stats)

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

    def find(
        self,
        router: CoordinateDescentRouter,
        memory: MemoryRows,
        keys: RoutingKeys,
        x: Tensor,
        num_tokens: int,
    ) -> FoundCandidates:
        """The rows that each token may choose from, without gradient.

        Args:
            router: what it says of Triton holds here too.
            memory: m rows.
            keys: those of the rows.
            x: states [b, n, d].
            num_tokens: k.
        """
        count = 2 * num_tokens
        if self.shortlist is not None and torch.is_grad_enabled():
            count = math.ceil(num_tokens * self.shortlist)
        backend = pick_backend(router.use_triton, memory.device)
        with torch.no_grad():
            queries = routing_keys(
                x.to(memory.device), self.projection.to(memory.device), backend=backend
            ).transpose(1, 2)  # [b, r, n, e]
            cosines, indices = keys.search(queries, count, backend=backend)
        return FoundCandidates(indices, cosines)

    def choose(
        self,
        router: CoordinateDescentRouter,
        memory: ReadableRows,
        found: FoundCandidates,
        x: Tensor,
        num_tokens: int,
        *,
        with_stats: bool,
    ) -> tuple[FoundRows, RoutingStats | None]:
        """Choose rows for each token out of what `find` has found; where gradient is recorded, with it.

        Args:
            router: solves for the gates.
            memory: m rows.
            found: what there is to choose from.
            x: states [b, n, d].
            num_tokens: k.
            with_stats: tell how saturated the gates are.

        Returns:
            What was chosen, and the statistics [b, n, r], or None.
        """
        indices, cosines = found
        if torch.is_grad_enabled():
            cosines = self._cosines(router, memory.take(indices), x.to(indices.device))
            if indices.shape[-1] > 2 * num_tokens:
                cosines = cosines.masked_fill(indices < 0, -math.inf)
                cosines, indices = take_best(cosines, indices, 2 * num_tokens)
        cosines, indices = cosines.transpose(1, 2), indices.transpose(1, 2)  # [b, n, r, K]
        there = None if memory.even else indices >= 0
        scores = cosines * self.projection.shape[1] ** 0.5
        if there is not None:
            scores = scores.masked_fill(~there, -math.inf)
        gates, chosen, stats = router.choose(scores, num_tokens=num_tokens, mask=there, with_stats=with_stats)
        nowhere, chosen = chosen < 0, chosen.clamp(min=0)
        indices = indices.gather(-1, chosen).masked_fill(nowhere, -1)
        return FoundRows(indices, gates, cosines.gather(-1, chosen).masked_fill(nowhere, 0)), stats

    def _cosines(self, router: CoordinateDescentRouter, rows: Tensor, x: Tensor) -> Tensor:
        """The cosines of the keys of rows [b, r, n, K, d] and of tokens x [b, n, d], [b, r, n, K]."""
        projection = self.projection.to(x.device)
        backend = pick_backend(router.use_triton, x.device)
        queries = routing_keys(x, projection, backend=backend).transpose(1, 2)  # [b, r, n, e]
        keys = torch.unflatten(keys_of_sets(rows.flatten(2, 3), projection), 2, rows.shape[2:4])
        return (queries[..., None, :].to(keys.dtype) * keys).sum(-1)
