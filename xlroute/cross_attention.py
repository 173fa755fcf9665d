"""Cross-attention to the few rows that a router picks out of very many.

Shapes: b streams, n queries, m context rows, d dim, h heads, e dim_head, r routing tokens, k rows routed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xlroute.attend import AttentionBackend, attend
from xlroute.backend import pick_backend
from xlroute.beside import normed
from xlroute.kernels import gated_keys_values, gather_keys_values, gathered_attention, scatter_rows
from xlroute.memory import MemoryLayer
from xlroute.position import rotary_at, rotate
from xlroute.router import (
    CoordinateDescentRouter,
    RouterOutput,
    RoutingStats,
    add_routed,
    check_num_tokens,
    overlap,
    route,
    router_options,
    rows_to_route,
)
from xlroute.side_stream import run_beside

COSINE_SCALE = 20.0  # the logit of a key that equals its query, before training: e^20 outweighs all others
NULL_COSINE = 0.7  # before training, a query looks at nothing rather than at rows less like it than this


class RoutedKeysValues(NamedTuple):
    """Keys and values of the routed rows, the learned null key and value first."""

    keys: Tensor  # [b, h, 1 + k, e]
    values: Tensor  # [b, h, 1 + k, e]
    mask: Tensor | None  # bool [b, h, 1, 1 + k]; None if every row counts


class AttentionStats(NamedTuple):
    """How the routings of a routed attention went."""

    queries: RoutingStats | None  # [b]; None if all queries attend, with no router
    keys_values: RoutingStats  # [b, r]
    overlap: Tensor  # float32 [b, r - 1], the share of each set's rows that the set before it holds too


class ConditionalRoutedCrossAttention(nn.Module):
    """Attention of n queries to the k rows that a router picks out of m (CoLT5, arXiv 2303.09752).

    Each of r routing tokens chooses k rows of its own; the heads are shared out evenly over the r sets. A
    learned null key and value stand beside them, so a query may look at nothing. Values (and keys, if asked)
    are multiplied by the gates of their rows, through which gradient reaches the router. With
    `num_tokens_q`, only so many queries attend; the others get a learned output.

    The context is a tensor, or the layer of a memory: of that, only the k chosen rows are gathered.

    Args:
        dim: width d of queries and context rows.
        num_tokens_q: queries that attend; None for all, without a router for them. A float in (0, 1] is a
            share of each stream's valid queries.
        num_tokens_kv: k, rows chosen for each routing token; a float in (0, 1] is a share of each stream's
            valid rows.
        num_sets_kv: another name of `kv_routing_tokens`.
        dim_head: e.
        heads: h, divisible by the number of routing tokens.
        router_straight_through: gates of chosen rows are 1 in value and keep their gradient.
        router_kwargs: further arguments of `CoordinateDescentRouter`.
        kv_routing_tokens: r.
        multiply_keys_by_score: multiply the keys by the gates too, which is to say the input of keys and
            values, their projections being linear: what the paper writes down.
        use_triton: whether routing, norms and gathers run in Triton; None picks by device.
        use_null_q_tokens: the output of queries that do not attend is learned; otherwise zero.
        use_flash_attn: None, PyTorch's fused attention; True, the flash-attn package; False, the plain
            formula.
        route_block_size: see `CoordinateDescentRouter`; for the context alone.
        share_qk: keys are projected as queries are, so that a query finds rows like itself before anything is
            learned (Reformer, arXiv 2001.04451).
        qk_norm: queries and keys are normalised in each head, and the logit is their cosine times a learned
            factor (arXiv 2010.04245), which Memorizing Transformers (arXiv 2203.08913) found stable for rows
            that older weights wrote. The null key is then a learned logit.
        dropout: probability with which an attention weight is dropped in training.
        multiply_queries_by_score: multiply the queries that attend by their gates too.
        rotary_emb: queries and keys are rotated by their positions, which count the tokens of x and the rows
            of the context from the first: for a context that is x itself.

    Raises:
        ValueError: if h is not divisible by r, or `num_sets_kv` and `kv_routing_tokens` contradict each
        other, or for arguments out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens_q: int | float | None,
        num_tokens_kv: int | float,
        num_sets_kv: int = 1,
        dim_head: int = 64,
        heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = {},
        kv_routing_tokens: int = 1,
        multiply_keys_by_score: bool = False,
        use_triton: bool | None = None,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool | None = None,
        route_block_size: int | None = None,
        share_qk: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
        multiply_queries_by_score: bool = False,
        rotary_emb: bool = False,
    ) -> None:
        super().__init__()
        if num_sets_kv != 1 and kv_routing_tokens not in (1, num_sets_kv):
            raise ValueError(
                "num_sets_kv and kv_routing_tokens name the same number: expected equal values, "
                f"got {num_sets_kv} and {kv_routing_tokens}"
            )
        for name, number in (("num_sets_kv", num_sets_kv), ("kv_routing_tokens", kv_routing_tokens)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        sets = max(num_sets_kv, kv_routing_tokens)
        if heads % sets != 0:
            raise ValueError(f"heads: expected a multiple of the {sets} routing tokens, got {heads}")
        check_num_tokens("num_tokens_kv", num_tokens_kv)
        if num_tokens_q is not None:
            check_num_tokens("num_tokens_q", num_tokens_q)
        if rotary_emb and dim_head % 2 != 0:
            raise ValueError(f"dim_head: expected an even number with rotary_emb=True, got {dim_head}")
        self.num_tokens_q = num_tokens_q
        self.num_tokens_kv = num_tokens_kv
        self.sets = sets
        self.heads = heads
        self.multiply_keys_by_score = multiply_keys_by_score
        self.multiply_queries_by_score = multiply_queries_by_score
        self.rotary_emb = rotary_emb
        self.dropout = dropout
        self.backend: AttentionBackend = "sdpa"
        if use_flash_attn is not None:
            self.backend = "flash" if use_flash_attn else "math"

        options = router_options(
            router_kwargs, straight_through=router_straight_through, use_triton=use_triton
        )
        self.q_router = CoordinateDescentRouter(dim, **options) if num_tokens_q is not None else None
        self.kv_router = CoordinateDescentRouter(
            dim, num_routing_tokens=sets, **{"route_block_size": route_block_size, **options}
        )
        inner = heads * dim_head
        self.norm = nn.RMSNorm(dim)
        self.context_norm = nn.RMSNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = None if share_qk else nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.null_value = nn.Parameter(torch.randn(heads, 1, dim_head))
        self.null_key: nn.Parameter | None = None
        self.null_logit: nn.Parameter | None = None
        self.log_scale: nn.Parameter | None = None
        if qk_norm:
            self.null_logit = nn.Parameter(torch.full((heads, 1, 1), NULL_COSINE * COSINE_SCALE))
            self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(COSINE_SCALE)))
        else:
            self.null_key = nn.Parameter(torch.randn(heads, 1, dim_head))
        self.null_q_token: nn.Parameter | None = None
        if num_tokens_q is not None and use_null_q_tokens:
            self.null_q_token = nn.Parameter(torch.randn(dim))

    def forward(
        self,
        x: Tensor,
        context: Tensor | MemoryLayer,
        *,
        num_tokens_q: int | float | None = None,
        num_tokens_kv: int | float | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionStats]:
        """Attend to the routed rows of the context.

        Args:
            x: queries [b, n, d].
            context: rows [b, m, d], or the layer of a memory.
            num_tokens_q: overrides that of the module.
            num_tokens_kv: overrides that of the module.
            mask: bool [b, n], the queries that may be routed; the others count as not chosen. Without effect
                where every query attends (`num_tokens_q=None`).
            context_mask: bool [b, m], the rows that may be chosen; a memory layer brings its own.
            return_stats: return how the routing went too.

        Returns:
            [b, n, d]; with `return_stats`, that and `AttentionStats`.

        Raises:
            ValueError, TypeError: for shapes and options that do not fit together.
        """
        if not isinstance(context, Tensor | MemoryLayer):
            raise TypeError(
                f"context: expected a tensor [b, m, d] or a memory's layer (store.layer(i)), "
                f"got {type(context).__name__}"
            )
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if x.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[-1] != x.shape[-1]:
            raise ValueError(
                "x, context: expected [b, n, d] and [b, m, d], "
                f"got {tuple(x.shape)} and {tuple(context.shape)}"
            )
        if num_tokens_q is None:
            num_tokens_q = self.num_tokens_q
        elif self.q_router is None:
            raise ValueError(
                f"num_tokens_q: expected None in a module built with num_tokens_q=None, got {num_tokens_q}"
            )
        if num_tokens_q is not None and mask is None and not return_stats:
            num_tokens_q = None if rows_to_route(num_tokens_q, x.shape[1]) == x.shape[1] else num_tokens_q

        def choose_queries(x: Tensor) -> tuple[RouterOutput | None, RoutingStats | None, Tensor]:
            if num_tokens_q is None:
                return None, None, self.queries(x)
            assert self.q_router is not None
            chosen, stats = route(
                self.q_router, x, with_stats=return_stats, num_tokens=num_tokens_q, mask=mask
            )
            return chosen, stats, self.queries(chosen.tokens, chosen)

        # The queries do not wait for the memories, of which there are many.
        chosen_queries = run_beside(choose_queries, x)
        routed, stats = self._route(context, num_tokens_kv, context_mask, return_stats)
        keys_values = self.keys_values(routed)
        chosen, query_stats, q = chosen_queries()
        out = self.attend(q, keys_values)
        if chosen is not None:
            out = self.route_back(x, out, chosen)
        return out if stats is None else (out, AttentionStats(query_stats, stats, overlap(routed.indices)))

    def route(
        self,
        context: Tensor | MemoryLayer,
        *,
        num_tokens_kv: int | float | None = None,
        context_mask: Tensor | None = None,
    ) -> RouterOutput:
        """Choose the rows to attend to; all of the output keeps the dimension r."""
        return self._route(context, num_tokens_kv, context_mask, with_stats=False)[0]

    def _route(
        self,
        context: Tensor | MemoryLayer,
        num_tokens_kv: int | float | None,
        context_mask: Tensor | None,
        with_stats: bool,
    ) -> tuple[RouterOutput, RoutingStats | None]:
        return route(
            self.kv_router,
            context,
            with_stats=with_stats,
            num_tokens=self.num_tokens_kv if num_tokens_kv is None else num_tokens_kv,
            mask=context_mask,
            keep_one_route_dim=True,
        )

    def keys_values(self, routed: RouterOutput, value_rows: Tensor | None = None) -> RoutedKeysValues:
        """Keys and values of routed rows for the heads of their set, behind the null key and value.

        Args:
            routed: the rows, and their gates.
            value_rows: [b, r, k, d], rows whose values stand behind the keys of the routed rows; None for the
                routed rows themselves.
        """
        tokens = routed.tokens.to(self.to_v.weight)
        use_triton = self.kv_router.use_triton
        rows = normed(self.context_norm, tokens if value_rows is None else value_rows.to(tokens), use_triton)
        if self.to_k is None:
            keys = self._project(self.to_q, normed(self.norm, tokens, use_triton))
        else:
            key_rows = rows if value_rows is None else normed(self.context_norm, tokens, use_triton)
            keys = self._project(self.to_k, key_rows)
        values = self._project(self.to_v, rows)
        if self.null_key is None:
            # Autocast computes a norm in float32.
            keys = _unit(keys).to(values.dtype)
        if self.rotary_emb:
            positions = routed.indices.to(keys.device)[..., None]  # the same for all heads
            keys = rotate(keys, rotary_at(positions, keys.shape[-1], dtype=keys.dtype))
        mask = None if routed.mask is None else routed.mask.to(keys.device)
        keys, values = gated_keys_values(
            keys,
            values,
            routed.scores.to(keys.device),
            self.null_key,
            self.null_value,
            gate_keys=self.multiply_keys_by_score,
            backend=pick_backend(self.kv_router.use_triton, keys.device),
        )
        return RoutedKeysValues(keys, values, self._by_head(mask))

    def gather_keys_values(
        self, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, mask: Tensor | None
    ) -> RoutedKeysValues:
        """Keys and values that c windows chose out of those of all rows: [b c, h, 1 + k, e].

        Args:
            keys: [b, m, h e].
            values: [b, m, h e].
            gates: [b, c, r, k].
            indices: [b, c, r, k], -1 where there is no row.
            mask: bool [b, c, r, k], False where there is no row; None if there is one everywhere.
        """
        sizes = (self.sets, self.heads // self.sets, -1)
        keys, values = gather_keys_values(
            torch.unflatten(keys, -1, sizes),
            torch.unflatten(values, -1, sizes),
            gates,
            indices,
            self.null_key,
            self.null_value,
            gate_keys=self.multiply_keys_by_score,
            backend=pick_backend(self.kv_router.use_triton, keys.device),
        )
        return RoutedKeysValues(keys, values, self._by_head(None if mask is None else mask.flatten(0, 1)))

    def attend_to_gathered(
        self, q: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor
    ) -> Tensor:
        """Attend from queries [b c, h, n, e] to what `gather_keys_values` gives: [b c, n, d]."""
        assert self.null_key is not None
        sizes = (self.sets, self.heads // self.sets, -1)
        out = gathered_attention(
            q,
            torch.unflatten(keys.to(q.dtype), -1, sizes),
            torch.unflatten(values.to(q.dtype), -1, sizes),
            gates,
            indices,
            self.null_key,
            self.null_value,
            gate_keys=self.multiply_keys_by_score,
            backend=pick_backend(self.kv_router.use_triton, q.device),
        )
        return self.to_out(rearrange(out, "b h n e -> b n (h e)"))  # type: ignore[no-any-return]

    def _by_head(self, mask: Tensor | None) -> Tensor | None:
        """A mask [b, r, k] for the heads of the sets and with the null key in front, [b, h, 1, 1 + k]."""
        if mask is None:
            return None
        mask = F.pad(mask, (1, 0), value=True)
        return mask.repeat_interleave(self.heads // self.sets, dim=1)[:, :, None]

    def queries(self, x: Tensor, routed: RouterOutput | None = None) -> Tensor:
        """Queries [b, h, n, e] of x [b, n, d], which are all tokens, or the routed ones."""
        rows = normed(self.norm, x, self.kv_router.use_triton)
        q = rearrange(self.to_q(rows), "b n (h e) -> b h n e", h=self.heads)
        if self.log_scale is not None:
            # Attention divides the logits by the root of the head's width.
            q = _unit(q) * (self.log_scale.exp() * q.shape[-1] ** 0.5).to(q.dtype)
        if self.multiply_queries_by_score and routed is not None:
            q = (q * routed.scores[:, None, :, None]).to(q.dtype)
        if self.rotary_emb:
            positions = torch.arange(x.shape[1], device=x.device) if routed is None else routed.indices
            q = rotate(q, rotary_at(positions, q.shape[-1], dtype=q.dtype).unsqueeze(-3))
        return q  # type: ignore[no-any-return]

    def attend(self, q: Tensor, routed: RoutedKeysValues, bias: Tensor | None = None) -> Tensor:
        """Attend from queries [b, h, n, e], with a bias [b, h, n or 1, k] on the logits: [b, n, d]."""
        bias = self._with_null(bias, routed)
        out = attend(
            q,
            routed.keys.to(q.dtype),
            routed.values.to(q.dtype),
            mask=routed.mask,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.to_out(rearrange(out, "b h n e -> b n (h e)"))  # type: ignore[no-any-return]

    def _with_null(self, bias: Tensor | None, routed: RoutedKeysValues) -> Tensor | None:
        """The bias with that of the null key in front, [b, h, n or 1, 1 + k]; None if nothing is biased."""
        if bias is None and self.null_logit is None:
            return None
        b, h, places, _ = routed.keys.shape
        if bias is None:
            bias = routed.keys.new_zeros(b, h, 1, places - 1)
        null = bias.new_zeros(h, 1, 1) if self.null_logit is None else self.null_logit
        return torch.cat((null.to(bias).expand(b, -1, bias.shape[2], -1), bias), dim=-1)

    def _project(self, projection: nn.Linear, rows: Tensor) -> Tensor:
        """Project the rows of all sets [b, r, k, d] for the heads of their set: [b, r, k, h/r, e]."""
        weight = rearrange(projection.weight, "(r o) d -> r o d", r=self.sets)
        # A matrix product would copy the weight for every b.
        projected = torch.einsum("brkd,rod->brko", rows, weight)
        return rearrange(projected, "b r k (h e) -> b r k h e", h=self.heads // self.sets)

    def route_back(self, x: Tensor, heavy: Tensor, queries: RouterOutput) -> Tensor:
        """Put the gated outputs of routed queries in their places; others get the learned output, or zero."""
        base = x.new_zeros(()) if self.null_q_token is None else self.null_q_token
        return self._scatter(base.to(heavy).expand(x.shape), heavy, queries)

    def add_back(
        self,
        light: Tensor,
        heavy: Tensor,
        queries: RouterOutput,
        *,
        start: int = 0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """What `route_back` gives for tokens from `start` on, on top of a light branch and a residual."""
        return add_routed(
            light,
            heavy,
            queries,
            use_triton=self.kv_router.use_triton,
            residual=residual,
            other=self.null_q_token,
            other_from=start,
        )

    def _scatter(self, base: Tensor, heavy: Tensor, queries: RouterOutput, **options: Any) -> Tensor:
        return scatter_rows(
            base,
            heavy,
            queries.indices,
            backend=pick_backend(self.kv_router.use_triton, base.device),
            gates=queries.scores,
            **options,
        )


def _unit(x: Tensor) -> Tensor:
    """Vectors over their norms, along the last dimension; 0 stays 0."""
    # float16 rounds PyTorch's own eps to 0.
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))
