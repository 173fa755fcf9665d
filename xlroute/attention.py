"""Self-attention with a light branch for all tokens and a heavy one for the few that a router picks.

Shapes: b streams, n tokens, d dim, h heads, e dim_head, r routing tokens, k tokens routed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xlroute.backend import pick_backend
from xlroute.beside import is_plain
from xlroute.cross_attention import AttentionStats, ConditionalRoutedCrossAttention
from xlroute.kernels import gather_rows
from xlroute.local_attention import LocalAttention
from xlroute.router import (
    CoordinateDescentRouter,
    RouterOutput,
    RoutingStats,
    check_num_tokens,
    overlap,
    rows_to_route,
)


class ConditionalRoutedAttention(nn.Module):
    """Local attention for all tokens, plus attention of routed queries to routed keys and values.

    out_i = light(x)_i + gate_i heavy(x)_i for routed queries, and light(x)_i plus a learned vector for the
    others (CoLT5, arXiv 2303.09752). The light branch sees `light_window_size` / 2 tokens to either side. The
    heavy branch is `ConditionalRoutedCrossAttention` of the sequence to itself: `num_heavy_tokens_q` queries
    attend to the `num_heavy_tokens_kv` tokens that each of r routing tokens picks out of all, and to a
    learned null key. Only routed tokens are projected.

    The routed tokens are the best of the whole sequence, so a token's output depends on later ones: this is
    no layer for causal models.

    Args:
        dim: width d of the tokens.
        num_heavy_tokens_q: queries that take the heavy branch; a float in (0, 1] is a share of each stream's
            valid tokens.
        num_heavy_tokens_kv: k, tokens that each routing token picks as keys and values; or a share.
        num_routed_kv: r; the heavy heads are shared out evenly over the r sets.
        has_light_attn: whether there is a light branch.
        light_dim_head: e of the light branch.
        light_heads: h of the light branch.
        light_window_size: how many others a token sees in the light branch, half of them to either side.
        heavy_dim_head: e of the heavy branch.
        heavy_heads: h of the heavy branch, divisible by r.
        router_straight_through: gates of routed tokens are 1 in value and keep their gradient.
        router_kwargs: further arguments of both `CoordinateDescentRouter`s, whose defaults keep gates from
            saturating. Those of colt5-attention are `n_iters=20, eps=0.03, eps_init=4.0, eps_decay=0.7,
            score_scale=None`.
        multiply_keys_by_score: multiply keys and values by the gates of their tokens, which is to say the
            input of both, as the paper writes it; otherwise the values alone.
        multiply_queries_by_score: multiply the queries by their gates, besides their outputs.
        use_triton: whether what is not a plain matrix product runs in Triton; None picks by device.
        use_null_q_tokens: what the heavy branch gives tokens whose query was not routed is learned; otherwise
            zero.
        use_flash_attn: whether the heavy branch may use PyTorch's fused attention, flash kernels among it;
            False computes the plain formula, and holds all of its logits.
        rotary_emb: queries and keys of the heavy branch are rotated by their positions in the sequence.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: int | float,
        num_heavy_tokens_kv: int | float,
        num_routed_kv: int = 1,
        has_light_attn: bool = True,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = {},
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: bool | None = None,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = True,
        rotary_emb: bool = False,
    ) -> None:
        super().__init__()
        self.light_attn: LocalAttention | None = None
        if has_light_attn:
            if light_window_size < 2:
                raise ValueError(f"light_window_size: expected at least 2, got {light_window_size}")
            self.light_attn = LocalAttention(
                dim,
                window_size=light_window_size // 2,
                dim_head=light_dim_head,
                heads=light_heads,
                use_triton=use_triton,
            )
        self.heavy_attn = heavy_attention(
            dim,
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            num_routed_kv=num_routed_kv,
            dim_head=heavy_dim_head,
            heads=heavy_heads,
            router_straight_through=router_straight_through,
            router_kwargs=router_kwargs,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            use_triton=use_triton,
            use_null_q_tokens=use_null_q_tokens,
            use_flash_attn=use_flash_attn,
            rotary_emb=rotary_emb,
        )

    def forward(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | float | None = None,
        num_heavy_tokens_kv: int | float | None = None,
        mask: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionStats]:
        """Attend within whole sequences.

        Args:
            x: tokens [b, n, d].
            num_heavy_tokens_q: overrides that of the module.
            num_heavy_tokens_kv: overrides that of the module.
            mask: bool [b, n]; the other tokens are not routed, and seen by none.
            return_stats: return how the routings of the heavy branch went too.

        Returns:
            [b, n, d]; with `return_stats`, that and `AttentionStats`.

        Raises:
            ValueError: for shapes and options that do not fit together.
        """
        return self._attend(
            x, num_heavy_tokens_q, num_heavy_tokens_kv, mask, residual=False, return_stats=return_stats
        )

    def with_residual(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | float | None = None,
        num_heavy_tokens_kv: int | float | None = None,
        mask: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionStats]:
        """What `forward` gives, and x added to it."""
        return self._attend(
            x, num_heavy_tokens_q, num_heavy_tokens_kv, mask, residual=True, return_stats=return_stats
        )

    def _attend(
        self,
        x: Tensor,
        num_heavy_tokens_q: int | float | None,
        num_heavy_tokens_kv: int | float | None,
        mask: Tensor | None,
        *,
        residual: bool,
        return_stats: bool,
    ) -> Tensor | tuple[Tensor, AttentionStats]:
        light, scored, gathered = None, x, x
        if self.light_attn is not None and is_plain(self.light_attn, LocalAttention):
            scored, gathered, *read, light = self.light_attn.beside(x, mask, readers=2 + residual)
            x = read[0] if residual else x
        elif self.light_attn is not None:
            light = self.light_attn(x, mask)
        out, stats = attend_within(
            self.heavy_attn,
            scored,
            gathered,
            light,
            num_tokens_q=num_heavy_tokens_q,
            num_tokens_kv=num_heavy_tokens_kv,
            mask=mask,
            with_stats=return_stats,
            residual=x if residual else None,
        )
        return out if stats is None else (out, stats)


def heavy_attention(
    dim: int,
    *,
    num_heavy_tokens_q: int | float,
    num_heavy_tokens_kv: int | float,
    num_routed_kv: int,
    use_flash_attn: bool,
    **options: Any,
) -> ConditionalRoutedCrossAttention:
    """The heavy branch of an attention layer, with the layer's names for its numbers."""
    check_num_tokens("num_heavy_tokens_q", num_heavy_tokens_q)
    check_num_tokens("num_heavy_tokens_kv", num_heavy_tokens_kv)
    if num_routed_kv < 1:
        raise ValueError(f"num_routed_kv: expected at least 1, got {num_routed_kv}")
    return ConditionalRoutedCrossAttention(
        dim,
        num_tokens_q=num_heavy_tokens_q,
        num_tokens_kv=num_heavy_tokens_kv,
        kv_routing_tokens=num_routed_kv,
        # None lets PyTorch choose among its kernels; that layer's True stands for the flash-attn package.
        use_flash_attn=None if use_flash_attn else False,
        **options,
    )


def attend_within(
    heavy: ConditionalRoutedCrossAttention,
    x: Tensor,
    gathered: Tensor,
    light: Tensor | None,
    *,
    num_tokens_q: int | float | None,
    num_tokens_kv: int | float | None,
    mask: Tensor | None,
    with_stats: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, AttentionStats | None]:
    """The output of a light branch and of a heavy one: light + `heavy(x, x)`, but x is scored only once.

    Args:
        heavy: a heavy branch, as `heavy_attention` builds it.
        x: tokens [b, n, d].
        gathered: the same, of which those that are chosen are read; see `xlroute.beside`.
        light: what the light branch gives for them, [b, n, d]; None if there is none.
        num_tokens_q: overrides that of the heavy branch.
        num_tokens_kv: overrides that of the heavy branch.
        mask: bool [b, n].
        with_stats: return how the routings went too.
        residual: [b, n, d], added to both; None for nothing.

    Returns:
        [b, n, d], and the statistics or None.
    """
    router, kv_router = heavy.q_router, heavy.kv_router
    assert router is not None
    assert heavy.num_tokens_q is not None
    num_q = heavy.num_tokens_q if num_tokens_q is None else num_tokens_q
    num_kv = heavy.num_tokens_kv if num_tokens_kv is None else num_tokens_kv
    shares = mask is not None and (isinstance(num_q, float) or isinstance(num_kv, float))
    blocks = router.route_block_size is not None
    # Who watches the branch or a router sees its calls.
    plain = is_plain(heavy, ConditionalRoutedCrossAttention) and all(
        is_plain(each, CoordinateDescentRouter) for each in (router, kv_router)
    )
    if x.ndim != 3 or shares or blocks or not plain or rows_to_route(num_q, x.shape[1]) == x.shape[1]:
        out = heavy(
            x,
            x,
            num_tokens_q=num_tokens_q,
            num_tokens_kv=num_tokens_kv,
            mask=mask,
            context_mask=mask,
            return_stats=with_stats,
        )
        out, stats = out if with_stats else (out, None)
        out = out if light is None else light + out
        return (out if residual is None else out + residual), stats
    b, n, _ = x.shape
    if mask is not None and (mask.shape != (b, n) or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected bool {(b, n)}, got {mask.dtype} {tuple(mask.shape)}")
    s = router.scores(x, kv_router)  # [b, 1 + r, n]
    k_q, k_kv = rows_to_route(num_q, n), rows_to_route(num_kv, n)
    there = None if mask is None else mask[:, None]
    q_stats = kv_stats = None
    if k_q == k_kv and not with_stats:
        # The routers are built alike, so that one solves for both.
        gates, indices, _ = router.choose(s, num_tokens=k_q, mask=there)
        q_gates, kv_gates = torch.split(gates, [1, heavy.sets], dim=1)
        q_indices, kv_indices = torch.split(indices, [1, heavy.sets], dim=1)
    else:
        q_gates, q_indices, q_stats = router.choose(
            s[:, :1], num_tokens=k_q, mask=there, with_stats=with_stats
        )
        kv_gates, kv_indices, kv_stats = kv_router.choose(
            s[:, 1:], num_tokens=k_kv, mask=there, with_stats=with_stats
        )
    chosen = torch.cat((q_indices.flatten(1), kv_indices.flatten(1)), dim=1)
    tokens = gather_rows(gathered, chosen, pick_backend(router.use_triton, x.device))
    queries = RouterOutput(q_indices[:, 0], q_gates[:, 0], tokens[:, :k_q], None)
    rows = torch.unflatten(tokens[:, k_q:], 1, kv_indices.shape[1:])
    routed = RouterOutput(kv_indices, kv_gates, rows, None if mask is None else kv_indices >= 0)
    out = heavy.attend(heavy.queries(queries.tokens, queries), heavy.keys_values(routed))
    if light is None:
        light, residual = residual, None
    if light is None:
        out = heavy.route_back(x, out, queries)
    else:
        out = heavy.add_back(light, out, queries, residual=residual)
    if q_stats is None or kv_stats is None:
        return out, None
    q_stats = RoutingStats(*(t[:, 0] for t in q_stats))
    return out, AttentionStats(q_stats, kv_stats, overlap(kv_indices))
