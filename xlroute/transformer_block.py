"""The transformer block of CoLT5: routed attention, routed feedforward, each with a residual.

Shapes: b streams, n tokens, d dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from xlroute.attention import ConditionalRoutedAttention
from xlroute.beside import call_with_residual
from xlroute.cross_attention import AttentionStats
from xlroute.feedforward import ConditionalRoutedFeedForward
from xlroute.router import RoutingStats


class BlockStats(NamedTuple):
    """How the routings of a block went."""

    attention: AttentionStats
    feedforward: RoutingStats  # [b]


class ConditionalRoutedTransformerBlock(nn.Module):
    """x + attention(x), then x + feedforward(x), both conditionally routed (CoLT5, arXiv 2303.09752).

    Norms stand at the start of each branch. The routed tokens are the best of the whole sequence, so this is
    no block for causal models.

    Args:
        dim: width d of the tokens.
        num_heavy_attn_tokens_q: queries that take the heavy attention; a float in (0, 1] is a share of each
            stream's valid tokens.
        num_heavy_attn_tokens_kv: tokens that each routing token picks as keys and values; or a share.
        num_routed_kv: routing tokens of keys and values.
        num_heavy_ff_tokens: tokens that take the heavy feedforward; or a share.
        light_ff_mult: see `ConditionalRoutedFeedForward`, as for `heavy_ff_mult`.
        heavy_ff_mult: see there.
        rotary_emb: see `ConditionalRoutedAttention`, as for all other arguments.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_attn_tokens_q: int | float,
        num_heavy_attn_tokens_kv: int | float,
        num_routed_kv: int = 1,
        num_heavy_ff_tokens: int | float,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
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
        self.conditional_ff = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            router_straight_through=router_straight_through,
            router_kwargs=router_kwargs,
            use_triton=use_triton,
        )
        self.conditional_attn = ConditionalRoutedAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            num_routed_kv=num_routed_kv,
            light_dim_head=light_dim_head,
            light_heads=light_heads,
            light_window_size=light_window_size,
            heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads,
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
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: int | float | None = None,
        num_heavy_attn_tokens_kv: int | float | None = None,
        num_heavy_ff_tokens: int | float | None = None,
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, BlockStats]:
        """Read whole sequences.

        Args:
            x: tokens [b, n, d].
            mask: bool [b, n]; the other tokens are not routed, and seen by none.
            num_heavy_attn_tokens_q: overrides that of the module.
            num_heavy_attn_tokens_kv: overrides that of the module.
            num_heavy_ff_tokens: overrides that of the module.
            return_stats: return how the routings went too.

        Returns:
            [b, n, d]; with `return_stats`, that and `BlockStats`.

        Raises:
            ValueError: for shapes and options that do not fit together.
        """
        x, attention_stats = call_with_residual(
            self.conditional_attn,
            ConditionalRoutedAttention,
            x,
            mask=mask,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            return_stats=return_stats,
        )
        x, feedforward_stats = call_with_residual(
            self.conditional_ff,
            ConditionalRoutedFeedForward,
            x,
            mask=mask,
            num_heavy_tokens=num_heavy_ff_tokens,
            return_stats=return_stats,
        )
        return (x, BlockStats(attention_stats, feedforward_stats)) if return_stats else x
