"""What a routed layer would be without routing: every token attends to all, and is fed to a wide layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlroute.feedforward import FeedForward


class DenseSelfAttention(nn.Module):
    """Attention of every token to all, or to all before it, fused by PyTorch."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x [b, n, d]: [b, n, d]."""
        q, k, v = self._project(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self._merge(out)

    def last(self, x: Tensor, count: int) -> Tensor:
        """What `forward` gives for the last tokens [b, count, d], in the memory that they alone take."""
        n = x.shape[1]
        q, k, v = self._project(x)
        seen = torch.ones(count, n, dtype=torch.bool, device=x.device)
        out = F.scaled_dot_product_attention(
            q[:, :, -count:], k, v, attn_mask=seen.tril(n - count) if self.causal else None
        )
        return self._merge(out)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        return q, k, v

    def _merge(self, out: Tensor) -> Tensor:
        return self.to_out(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class DenseFeedForward(FeedForward):
    """The heavy feedforward for every token."""

    def last(self, x: Tensor, count: int) -> Tensor:
        """What `forward` gives for the last tokens."""
        return self(x[:, -count:])  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """x + attention(x), then x + feedforward(x)."""

    def __init__(self, dim: int, heads: int, dim_head: int, mult: float) -> None:
        super().__init__()
        self.attention = DenseSelfAttention(dim, heads, dim_head, causal=False)
        self.feedforward = DenseFeedForward(dim, mult=mult, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Read x [b, n, d]: [b, n, d]."""
        x = x + self.attention(x)
        return x + self.feedforward(x)  # type: ignore[no-any-return]

    def last(self, x: Tensor, count: int) -> Tensor:
        """What `forward` gives for the last tokens."""
        x = x[:, -count:] + self.attention.last(x, count)
        return x + self.feedforward(x)  # type: ignore[no-any-return]
