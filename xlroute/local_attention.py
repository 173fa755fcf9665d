"""Local attention: each token looks at its neighbours alone, the light branch of the routed layers.

Shapes: b streams, n tokens, w window_size, d dim, h heads, e dim_head, t tokens kept of those read before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from xlroute.backend import pick_backend
from xlroute.beside import normed_beside
from xlroute.kernels import local_attention
from xlroute.kernels.local_attention import attend_to_windows


class LocalCache(NamedTuple):
    """What causal local attention remembers of the tokens read: the window before, and the open one."""

    keys_values: Tensor  # [b, t, 2, h, e], 0 <= t < 2w; the first is at the start of a window
    mask: Tensor  # bool [b, t]


class LocalAttention(nn.Module):
    """Multi-head attention of each token to those near it, in memory that grows as n x window_size.

    Not causal, a token sees those at most w places away, as in the light branch of CoLT5 (arXiv 2303.09752).
    Causal, the tokens are cut into windows of w, and a token sees its own window up to itself and the window
    before, which makes w to 2w - 1 others.

    On a GPU it is one kernel, `xlroute.kernels.local_attention`; elsewhere it runs in PyTorch's
    `scaled_dot_product_attention`. There are no positions but the masks.

    A masked token is seen by none but itself, so that every token sees something. The parameters have the
    names and shapes of `LocalMHA` in the local-attention package.

    Args:
        dim: d.
        window_size: w.
        dim_head: e.
        heads: h.
        causal: whether tokens see those before them alone.
        use_triton: whether it runs in Triton; None picks by device.

    Raises:
        ValueError: for an argument below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        window_size: int,
        dim_head: int = 64,
        heads: int = 8,
        causal: bool = False,
        use_triton: bool | None = None,
    ) -> None:
        super().__init__()
        named = {"dim": dim, "window_size": window_size, "dim_head": dim_head, "heads": heads}
        for name, number in named.items():
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.window_size = window_size
        self.heads = heads
        self.causal = causal
        self.use_triton = use_triton
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
        return self.beside(x, mask)[-1]

    def beside(self, x: Tensor, mask: Tensor | None = None, *, readers: int = 1) -> tuple[Tensor, ...]:
        """See `xlroute.beside`; x as often as there are readers."""
        *read, qkv = self._project(x, mask, readers)
        out = local_attention(
            qkv,
            window_size=self.window_size,
            causal=self.causal,
            mask=mask,
            backend=pick_backend(self.use_triton, x.device),
        )
        return *read, self.to_out(out.flatten(2))

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
        (qkv,) = self._project(x, mask, readers=0)
        q, kv = torch.split(qkv, [1, 2], dim=2)
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
        out = attend_to_windows(q[:, :, 0], kv, window_size=w, causal=True, mask=known)
        # Copies: a view would keep all of a long prompt alive.
        return self.to_out(out.flatten(2)), LocalCache(kv[:, start:].clone(), known[:, start:].clone())

    def _project(self, x: Tensor, mask: Tensor | None, readers: int) -> tuple[Tensor, ...]:
        """x, as often as there are readers, and last its queries, keys and values [b, n, 3, h, e]."""
        d = self.norm.normalized_shape[0]
        if x.ndim != 3 or x.shape[-1] != d:
            raise ValueError(f"x: expected [b, n, {d}], got {tuple(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        *read, rows = normed_beside(self.norm, x, self.use_triton, readers=readers)
        return *read, self.to_qkv(rows).unflatten(-1, (3, self.heads, -1))
