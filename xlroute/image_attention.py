"""Attention over feature maps: within windows for all places, and among the few that a router picks.

Shapes: b images, p rows and q columns of a map, n = p q places, d dim, h heads, e dim_head, w window_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xlroute.attend import attend
from xlroute.attention import attend_within, heavy_attention
from xlroute.beside import normed
from xlroute.cross_attention import AttentionStats


class WindowAttention(nn.Module):
    """Multi-head attention within windows of w x w places, the light branch of routed image attention.

    The map is cut into windows from its first place; those at its ends are smaller where a side is no
    multiple of w. There are no positions but the windows.
    """

    def __init__(
        self, dim: int, *, window_size: int, dim_head: int, heads: int, use_triton: bool | None = None
    ) -> None:
        super().__init__()
        self.use_triton = use_triton
        self.window_size = window_size
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows of x [b, p, q, d]; places without mask, bool [b, p, q], are seen by none."""
        b, *sides = x.shape[:3]
        sizes = [max(1, min(self.window_size, side)) for side in sides]
        counts = [-(-side // size) for side, size in zip(sides, sizes, strict=True)]
        missing = [count * size - side for count, size, side in zip(counts, sizes, sides, strict=True)]

        def cut(t: Tensor) -> Tensor:
            """Windows [b windows, places, features] of t [b, p, q, features]."""
            if any(missing):
                t = F.pad(t, (0, 0, 0, missing[1], 0, missing[0]))
            return rearrange(t, "b (r u) (c v) f -> (b r c) (u v) f", u=sizes[0], v=sizes[1])

        visible = None
        if mask is not None or any(missing):
            visible = cut(torch.ones_like(x[..., :1], dtype=torch.bool))[..., 0]
            if mask is not None:
                seen = cut(mask[..., None])[..., 0]
                # Where none is to be seen, the output means nothing, but has to be finite.
                visible = torch.where(seen.any(-1, keepdim=True), seen, visible)
            visible = visible[:, None, None]
        qkv = self.to_qkv(cut(normed(self.norm, x, self.use_triton)))
        q, k, v = rearrange(qkv, "b n (three h e) -> three b h n e", three=3, h=self.heads)
        out = rearrange(attend(q, k, v, mask=visible), "b h n e -> b n (h e)")
        out = rearrange(
            self.to_out(out),
            "(b r c) (u v) d -> b (r u) (c v) d",
            b=b,
            r=counts[0],
            c=counts[1],
            u=sizes[0],
            v=sizes[1],
        )
        return out[:, : sides[0], : sides[1]]  # type: ignore[no-any-return]


class ConditionalRoutedImageAttention(nn.Module):
    """Windowed attention for all places of a map, plus attention of routed queries to routed places.

    out_i = light(x)_i + gate_i heavy(x)_i for routed places, and light(x)_i plus a learned vector for the
    others (CoLT5, arXiv 2303.09752). The light branch attends within windows. The heavy branch routes over
    the whole map, so that places see each other at any distance. It is that of `ConditionalRoutedAttention`,
    over the places of the map row by row.

    The map may have any sides; they need be no multiples of the window, nor equal.

    Args:
        dim: d, channels of the map.
        num_heavy_tokens_q: places of the map whose queries take the heavy branch; a float in (0, 1] is a
            share of each map's valid places.
        num_heavy_tokens_kv: places that each routing token picks as keys and values; or a share.
        num_routed_kv: routing tokens of keys and values; the heavy heads are shared out evenly over them.
        light_dim_head: e of the light branch.
        light_heads: h of the light branch.
        light_window_size: w, the side of a window. The default is that of colt5-attention, and large: a place
            sees w² others.
        heavy_dim_head: see `ConditionalRoutedAttention`, as for the arguments that follow.
        channel_first: whether maps are [b, d, p, q] instead of [b, p, q, d].

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
        channel_first: bool = False,
    ) -> None:
        super().__init__()
        if light_window_size < 1:
            raise ValueError(f"light_window_size: expected at least 1, got {light_window_size}")
        self.dim = dim
        self.channel_first = channel_first
        self.light_attn = WindowAttention(
            dim,
            window_size=light_window_size,
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
        """Attend within whole maps.

        Args:
            x: maps [b, p, q, d], or [b, d, p, q] if channels come first.
            num_heavy_tokens_q: overrides that of the module.
            num_heavy_tokens_kv: overrides that of the module.
            mask: bool [b, p, q]; the other places are not routed, and seen by none.
            return_stats: return how the routings of the heavy branch went too.

        Returns:
            The shape of x; with `return_stats`, that and `AttentionStats`.

        Raises:
            ValueError: for shapes and options that do not fit together.
        """
        layout = "[b, d, p, q]" if self.channel_first else "[b, p, q, d]"
        if x.ndim != 4 or x.shape[1 if self.channel_first else 3] != self.dim:
            raise ValueError(f"x: expected maps {layout} with d = {self.dim}, got {tuple(x.shape)}")
        if self.channel_first:
            x = rearrange(x, "b d p q -> b p q d").contiguous()
        if mask is not None and (mask.shape != x.shape[:3] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool {tuple(x.shape[:3])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        places, places_mask = x.flatten(1, 2), None if mask is None else mask.flatten(1, 2)
        light = self.light_attn(x, mask)
        out, stats = attend_within(
            self.heavy_attn,
            places,
            places,
            light.flatten(1, 2),
            num_tokens_q=num_heavy_tokens_q,
            num_tokens_kv=num_heavy_tokens_kv,
            mask=places_mask,
            with_stats=return_stats,
        )
        out = out.view(x.shape)
        if self.channel_first:
            out = rearrange(out, "b p q d -> b d p q")
        return out if stats is None else (out, stats)
