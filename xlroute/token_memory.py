"""Attention of each token to the memory rows that it has found by itself.

Shapes: b streams, n tokens, m memory rows, u of them that are read, d dim, r sets of rows, k rows routed, h
heads, e dim_head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xlroute.attached import MemoryRows, ReadableRows
from xlroute.backend import pick_backend
from xlroute.content_routing import FoundCandidates, FoundRows, TokenRouting
from xlroute.cross_attention import COSINE_SCALE, NULL_COSINE
from xlroute.kernels import gathered_sums
from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.scoring import RMS_EPS
from xlroute.memory import MemoryLayer
from xlroute.memory.kept_values import KeptValues
from xlroute.memory.routing_keys import RoutingKeys
from xlroute.memory.scores import Scoring
from xlroute.position import AGES, age_bias
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats, router_options


class TokenRows(NamedTuple):
    """What each token reads of the memory."""

    rows: Tensor  # [b, u, d], what followed the rows that were found
    places: Tensor  # int64 [b, n, r, k], where among them; -1 where nothing followed
    cosines: Tensor  # [b, n, r, k], of the keys that were found with the token's own
    gates: Tensor  # [b, n, r, k]
    mask: Tensor | None  # bool [b, n, r, k], False where no row was found; None if some was everywhere
    age_places: Tensor  # [b, n, r, k], see `age_place`

    def last(self, streams: int) -> TokenRows:
        """Of no use for a token to come, which finds its own."""
        return self


class TokenMemoryAttention(nn.Module):
    """Attention of each token to what followed the rows whose routing keys are most like its own, gated.

    The keys that find the rows also weigh them: a logit is the cosine of two routing keys times a factor of
    the head, and a bias for the row's age joins it. So the rows that were found are projected no further,
    they are only added up, by the weights of each head times their gates; the sums are then projected to the
    heads' values, which is the same for fewer products. A query is compared with rows as they entered the
    block, and is what entered the block itself, so that the same text looks the same.

    Beside the rows stands a learned logit and value, so that a token may look at nothing. The output is
    multiplied by tanh of `memory_gate`. Values are what followed the rows, and why, tells
    `RoutedMemoryAttention`.

    Args:
        dim: d.
        heads: h, a multiple of r; those of a set share its cosines.
        dim_head: e.
        dropout: of attention weights.
        num_tokens_kv: k.
        sets: r.
        key_dim: width of the routing keys.
        router_kwargs: arguments of `CoordinateDescentRouter`, which solves for the gates.
        routing_shortlist: see `TokenRouting`.

    Raises:
        ValueError: for heads that are no multiple of r, or options of the router that are decided here.
    """

    by_text = True
    looks_back = False  # by itself, not by what was before it

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        dropout: float,
        num_tokens_kv: int,
        sets: int,
        key_dim: int,
        router_kwargs: Mapping[str, Any],
        routing_shortlist: float | None = None,
    ) -> None:
        super().__init__()
        if heads % sets:
            raise ValueError(f"heads: expected a multiple of the {sets} sets of rows, got {heads}")
        self.heads = heads
        self.sets = sets
        self.num_tokens_kv = num_tokens_kv
        self.kv_router = CoordinateDescentRouter(dim, **router_options(router_kwargs))
        self.kv_router.routing_token = None
        self.content_routing = TokenRouting(dim, sets=sets, key_dim=key_dim, shortlist=routing_shortlist)
        self.row_gain = nn.Parameter(torch.ones(dim))
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.null_value = nn.Parameter(torch.zeros(heads, dim_head))
        self.null_logit = nn.Parameter(torch.full((heads, 1), NULL_COSINE * COSINE_SCALE))
        self.log_scale = nn.Parameter(torch.full((heads, 1), math.log(COSINE_SCALE)))
        self.age_bias = nn.Embedding(AGES, heads)
        self.memory_gate = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)

    def kept_scoring(self, memory: MemoryLayer) -> tuple[Scoring, KeptValues] | None:
        """See `MemoryBranch`, as for what follows."""
        projection = self.content_routing.projection.detach()
        if torch.is_grad_enabled() or projection.device != memory.device:
            return None
        return memory.kept_key_scoring(projection)

    def open(self, memory: MemoryRows, *, with_stats: bool) -> RoutingKeys:
        """The routing keys of all rows."""
        return self.content_routing.keys(memory)

    def find(
        self,
        memory: MemoryRows,
        opened: RoutingKeys,
        x: Tensor,
        before: Tensor,
        before_mask: Tensor,
        *,
        with_stats: bool,
    ) -> FoundCandidates:
        """Rows like each of the tokens x [b, n, d]."""
        return self.content_routing.find(self.kv_router, memory, opened, x, self.num_tokens_kv)

    def choose(
        self, memory: ReadableRows, found: FoundCandidates, x: Tensor, *, with_stats: bool
    ) -> tuple[FoundRows, RoutingStats | None]:
        """Choose the rows that each of the tokens reads; all [b, n, r, ...]."""
        return self.content_routing.choose(
            self.kv_router, memory, found, x, self.num_tokens_kv, with_stats=with_stats
        )

    def score_ages(self, memory: MemoryRows, indices: Tensor) -> Tensor:
        """See `MemoryBranch`."""
        if self.content_routing.shortlist is None or not torch.is_grad_enabled():
            return indices.clamp(max=0)
        return memory.score_ages(indices, "first keys")

    def begin_of_chunk(self, t: int) -> int:
        """Token t is a chunk by itself."""
        return t

    def rows(self, memory: ReadableRows, found: FoundRows, age_places: Tensor) -> TokenRows:
        """What tokens read that have found rows of a memory, of ages [b, n, r, k]."""
        followers = memory.followers(found.indices)
        flat = followers.flatten(1)
        places = torch.arange(flat.shape[1], device=flat.device).masked_fill(flat < 0, -1)
        device = self.to_v.weight.device
        return TokenRows(
            memory.take(flat).to(device),
            places.view(followers.shape).to(device),
            found.cosines.to(device),
            found.scores.to(device),
            None if memory.even else (found.indices >= 0).to(device),
            age_places,
        )

    def context(self, rows: TokenRows) -> TokenRows:
        """The same, with rows of unit variance."""
        dtype = self.to_v.weight.dtype
        states = rows.rows.to(dtype)
        device = states.device.type
        with torch.autocast(device, enabled=False):
            states = F.rms_norm(states.to(compute_dtype(states.dtype)), states.shape[-1:], eps=RMS_EPS)
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device)
        return rows._replace(rows=states.to(dtype))

    def weights(self, memory: TokenRows) -> Tensor:
        """How each head of each token weighs nothing and the rows, [b, n, h, 1 + k]; they add up to 1."""
        table = rearrange(self.age_bias.weight, "a (r h) -> a r h", r=self.sets)
        logits = self._by_head(memory.cosines) * self.log_scale.exp()
        logits = logits + age_bias(table, memory.age_places).flatten(2, 3)
        if memory.mask is not None:
            logits = logits.masked_fill(~self._by_head(memory.mask), -math.inf)
        null = self.null_logit.to(logits).expand(*logits.shape[:-1], 1)
        return torch.cat((null, logits), dim=-1).softmax(-1)

    def gated(self, x: Tensor, memory: TokenRows, queries: RouterOutput | None) -> Tensor:
        """The gated output [b, n, d] for x [b, n, d], all of whose tokens have found what they read."""
        weights = self.dropout(self.weights(memory))
        gated = weights[..., 1:] * self._by_head(memory.gates)
        sums = gathered_sums(
            rearrange(gated, "b n (r h) k -> b (n r) h k", r=self.sets),
            memory.rows,
            memory.places.flatten(1, 2),
            backend=pick_backend(self.kv_router.use_triton, x.device),
        )
        sums = rearrange(sums * self.row_gain.to(sums.dtype), "b (n r) h d -> b n (r h) d", r=self.sets)
        to_v = rearrange(self.to_v.weight, "(h e) d -> h e d", h=self.heads)
        values = torch.einsum("bnhd,hed->bnhe", sums, to_v)
        values = values + (weights[..., :1] * self.null_value).to(values.dtype)
        return self.memory_gate.tanh() * self.to_out(values.flatten(2))  # type: ignore[no-any-return]

    def _by_head(self, t: Tensor) -> Tensor:
        """That of each set [b, n, r, k] for its heads, [b, n, h, k]."""
        return t.repeat_interleave(self.heads // self.sets, dim=2)
