"""Local attention: each token looks at its neighbours alone, the light branch of the routed layers.

Shapes: b streams, n tokens, w window_size, d dim, h heads, e dim_head, t tokens kept of those read before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xlroute.attend import attend


class LocalCache(NamedTuple):
    """What causal local attention remembers of the tokens read: the window before, and the open one."""

    keys_values: Tensor  # [b, t, 2 h e], 0 <= t < 2w; the first is at the start of a window
    mask: Tensor  # bool [b, t]


class LocalAttention(nn.Module):
    """Multi-head attention of each token to those near it, in memory that grows as n x window_size.

    Not causal, a token sees those at most w places away, as in the light branch of CoLT5 (arXiv 2303.09752).
    Causal, the tokens are cut into windows of w, and a token sees its own window up to itself and the window
    before, which makes w to 2w - 1 others.

    It runs in PyTorch's `scaled_dot_product_attention`, on windows of queries beside the two or three windows
    of keys around them. (`flex_attention` would skip what the mask hides, but cannot train on a CPU.) There
    are no positions but the masks.

    A masked token is seen by none but itself, so that every token sees something. The parameters have the
    names and shapes of `LocalMHA` in the local-attention package.

    Args:
        dim: d.
        window_size: w.
        dim_head: e.
        heads: h.
        causal: whether tokens see those before them alone.

    Raises:
        ValueError: for an argument below 1.
    """

    def __init__(
        self, dim: int, *, window_size: int, dim_head: int = 64, heads: int = 8, causal: bool = False
    ) -> None:
        super().__init__()
        named = {"dim": dim, "window_size": window_size, "dim_head": dim_head, "heads": heads}
        for name, number in named.items():
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.window_size = window_size
        self.heads = heads
        self.causal = causal
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within whole sequences.

        Args:
            x: tokens [b, n, d].
            mask: bool [b, n], False for tokens that no other may see.

        Returns:
            [b, n, d].

        Raises:
            ValueError: for shapes that do not fit together.
        """
        q, kv = self._project(x, mask)
        return self._attend(q, kv, mask)

    def step(
        self, x: Tensor, cache: LocalCache | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, LocalCache]:
        """Read tokens after those of a cache: what `forward` gives for them in the whole sequence.

        Args:
            x: the next tokens [b, n, d], any number of them.
            cache: what the step before returned; None at the start.
            mask: bool [b, n], as in `forward`.

        Returns:
            [b, n, d], and the cache for the next step.

        Raises:
            ValueError: if the module is not causal, or for shapes that do not fit together.
        """
        if not self.causal:
            raise ValueError("causal: expected True in a module that reads step by step, got False")
        q, kv = self._project(x, mask)
        known = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        if cache is not None:
            if cache.mask.shape[0] != x.shape[0]:
                raise ValueError(
                    f"x: expected the {cache.mask.shape[0]} streams of the cache, got {x.shape[0]}"
                )
            kv = torch.cat((cache.keys_values.to(kv), kv), dim=1)
            known = torch.cat((cache.mask, known), dim=1)
        w = self.window_size
        start = max(0, kv.shape[1] // w - 1) * w
        # Copies: a view would keep all of a long prompt alive.
        return self._attend(q, kv, known), LocalCache(kv[:, start:].clone(), known[:, start:].clone())

    def _project(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries [b, n, h e], keys and values [b, n, 2 h e]."""
        d = self.norm.normalized_shape[0]
        if x.ndim != 3 or x.shape[-1] != d:
            raise ValueError(f"x: expected [b, n, {d}], got {tuple(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        inner = self.to_out.in_features
        q, kv = self.to_qkv(self.norm(x)).split((inner, 2 * inner), dim=-1)
        return q, kv

    def _attend(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from queries [b, n, h e] at the end of the keys and values [b, t + n, 2 h e]."""
        w, n = self.window_size, q.shape[1]
        places = kv.shape[1]
        first = (places - n) // w * w  # where the first query's window begins
        end = -(-places // w) * w
        before = places - n - first
        q = F.pad(q, (0, 0, before, end - places))
        q = rearrange(q, "b (c w) (h e) -> (b c) h w e", w=w, h=self.heads)
        k, v = rearrange(
            self._windows(kv, first, end), "b c w (two h e) -> two (b c) h w e", two=2, h=self.heads
        )
        out = attend(q, k, v, mask=self._visible(mask, kv, first, end))
        out = rearrange(out, "(b c) h w e -> b (c w) (h e)", b=kv.shape[0], c=(end - first) // w)
        return self.to_out(out[:, before : before + n])  # type: ignore[no-any-return]

    def _windows(self, rows: Tensor, first: int, end: int) -> Tensor:
        """Rows [b, places, f] around each window from `first` to `end`, [b, c, 2w or 3w, f].

        They begin one window before, and run to the end of the window, or of the next one if not causal. Rows
        that are not there are zero.
        """
        w = self.window_size
        around = 2 if self.causal else 3
        rows = F.pad(rows, (0, 0, w - first, end - rows.shape[1] + (around - 2) * w))
        windows = rearrange(rows, "b (c w) f -> b c w f", w=w)
        count = (end - first) // w
        return torch.cat([windows[:, i : i + count] for i in range(around)], dim=2)

    def _visible(self, mask: Tensor | None, kv: Tensor, first: int, end: int) -> Tensor:
        """Which keys each query sees, bool [b c, 1, w, 2w or 3w]."""
        b, places, _ = kv.shape
        w = self.window_size
        if mask is None:
            mask = torch.ones(1, places, dtype=torch.bool, device=kv.device)
        present = self._windows(mask[..., None], first, end)[..., 0]  # [b or 1, c, 2w or 3w]
        place = torch.arange(w, device=kv.device)[:, None]
        distance = torch.arange(-w, present.shape[-1] - w, device=kv.device) - place
        near = distance <= 0 if self.causal else distance.abs() <= w
        visible = (present[:, :, None] & near) | (distance == 0)
        return visible.expand(b, -1, -1, -1).flatten(0, 1)[:, None]
