"""The block of the Transformer-XL: self-attention over [window, segment], routed memory, feedforward.

Shapes: b streams, n tokens in a segment, w rows of the XL window, d dim, h heads, e dim_head, r routing
tokens, k rows routed. Everything here is a function of tensors alone, so that a block can be compiled and
checkpointed; the memory store is read outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from xlroute.attend import attend
from xlroute.cross_attention import ConditionalRoutedCrossAttention, RoutedKeysValues
from xlroute.feedforward import FeedForward
from xlroute.position import AGE_BUCKETS, rotary_table, rotate
from xlroute.router import RouterOutput


class RoutedRows(NamedTuple):
    """Rows of the long-term memory that were routed to a block, what followed them, and how old they are."""

    routed: RouterOutput
    followers: Tensor  # [b, r, k, d], the row after each; 0 where there is none
    age_buckets: Tensor  # int64 [b, r, k]


class BlockContext(NamedTuple):
    """Everything that a block looks at besides the tokens it is given, as keys and values."""

    keys: Tensor  # [b, h, w, e], of the XL window and of earlier tokens of an open segment, not rotated
    values: Tensor  # [b, h, w, e]
    mask: Tensor  # bool [b, w]
    memory: RoutedKeysValues | None
    memory_bias: Tensor | None  # [b, h, 1, k]


class SelfAttention(nn.Module):
    """Causal attention over earlier rows and the tokens themselves, with rotary positions."""

    def __init__(self, dim: int, *, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = nn.RMSNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        # With these, rotary positions alone can decide where a head looks, whatever the tokens.
        self.q_bias = nn.Parameter(torch.zeros(heads, 1, dim_head))
        self.k_bias = nn.Parameter(torch.zeros(heads, 1, dim_head))

    @torch.no_grad()
    def look_back(self) -> None:
        """Set the biases so that head h starts out looking h tokens back, whatever the tokens are."""
        heads, _, e = self.q_bias.shape
        peak = 20.0  # the logit there: e^20 outweighs thousands of other places
        self.q_bias.fill_((peak / e**0.5) ** 0.5)
        # A key that is rotated by h more positions is found h places after its own.
        table = rotary_table(heads, e, device=self.q_bias.device, dtype=self.q_bias.dtype)
        self.k_bias.copy_(rotate(self.q_bias, table[:, :, None]))

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, h, n, e] of states [b, n, d], without position."""
        kv = rearrange(self.to_kv(self.norm(states)), "b n (two h e) -> two b h n e", two=2, h=self.heads)
        return kv[0] + self.k_bias.to(kv.dtype), kv[1]

    def forward(self, x: Tensor, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from x [b, n, d] to the context and to x up to each token.

        Returns:
            The output [b, n, d], and the keys and values [b, h, n, e] of x.
        """
        n, w = x.shape[1], context.keys.shape[2]
        q = rearrange(self.to_q(self.norm(x)), "b n (h e) -> b h n e", h=self.heads)
        q = q + self.q_bias.to(q.dtype)
        keys, values = self.keys_values(x)
        all_keys = torch.cat((context.keys.to(keys.dtype), keys), dim=2)
        all_values = torch.cat((context.values.to(values.dtype), values), dim=2)
        # Positions count from the first place of the window. Only differences matter, so the same numbers
        # serve every segment.
        table = rotary_table(w + n, q.shape[-1], device=q.device, dtype=q.dtype)
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        mask = torch.cat(
            (context.mask[:, None, :].expand(-1, n, -1), causal.expand(x.shape[0], -1, -1)), dim=-1
        )
        out = attend(
            rotate(q, table[:, w:]),
            rotate(all_keys, table),
            all_values,
            mask=mask[:, None],
            dropout=self.dropout if self.training else 0.0,
        )
        return self.to_out(rearrange(out, "b h n e -> b n (h e)")), keys, values


class RoutedMemoryAttention(ConditionalRoutedCrossAttention):
    """Routed cross-attention to what followed the states that resemble the present one, behind a gate.

    Keys are the routed rows, compared to the tokens by the cosine of one shared projection; values are the
    rows that followed them, as the neighbours of RETRO (arXiv 2112.04426) come with their continuation and
    those of the kNN language model (arXiv 1911.00172) with their next token. So the branch finds its way
    from the start, and only has to learn what to make of what it reads.

    A bias for the age of a row joins the logits. The output is multiplied by tanh of `memory_gate`, so that a
    model starts close to one without memory.
    """

    def __init__(self, dim: int, *, heads: int, **options: Any) -> None:
        super().__init__(dim, num_tokens_q=None, heads=heads, share_qk=True, qk_norm=True, **options)
        self.memory_gate = nn.Parameter(torch.zeros(()))
        self.age_bias = nn.Embedding(AGE_BUCKETS, heads)

    def context(self, rows: RoutedRows) -> tuple[RoutedKeysValues, Tensor]:
        """Keys and values of routed rows, and the bias on their logits, [b, h, 1, k]."""
        per_set = rearrange(self.age_bias.weight, "buckets (r h) -> r h buckets", r=self.sets)
        b, _, k = rows.age_buckets.shape
        heads_per_set = per_set.shape[1]
        buckets = rows.age_buckets[:, :, None].expand(-1, -1, heads_per_set, -1)
        bias = per_set.expand(b, -1, -1, -1).gather(-1, buckets)
        return self.keys_values(rows.routed, rows.followers), bias.reshape(b, self.heads, 1, k)

    def gated(self, x: Tensor, keys_values: RoutedKeysValues, bias: Tensor) -> Tensor:
        """The gated output [b, n, d] for x [b, n, d]."""
        return self.memory_gate.tanh() * self.attend(self.queries(x), keys_values, bias)


class Block(nn.Module):
    """Pre-norm block: self-attention, on memory layers gated routed cross-attention, feedforward."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        ff_mult: int,
        dropout: float,
        memory_options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads=heads, dim_head=dim_head, dropout=dropout)
        self.memory: RoutedMemoryAttention | None = None
        if memory_options is not None:
            self.memory = RoutedMemoryAttention(
                dim, heads=heads, dim_head=dim_head, dropout=dropout, **memory_options
            )
        self.feedforward = FeedForward(dim, mult=ff_mult, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def context(self, window: Tensor, window_mask: Tensor, rows: RoutedRows | None) -> BlockContext:
        """Project the XL window [b, w, d] (mask bool [b, w]) and routed rows to keys and values."""
        keys, values = self.attention.keys_values(window)
        if rows is None:
            return BlockContext(keys, values, window_mask, None, None)
        assert self.memory is not None
        return BlockContext(keys, values, window_mask, *self.memory.context(rows))

    def read(self, x: Tensor, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
        """Read tokens x [b, n, d]: the output [b, n, d], and the keys and values [b, h, n, e] of x."""
        out, keys, values = self.attention(x, context)
        x = x + self.dropout(out)
        if context.memory is not None:
            assert self.memory is not None
            assert context.memory_bias is not None
            x = x + self.dropout(self.memory.gated(x, context.memory, context.memory_bias))
        return x + self.dropout(self.feedforward(x)), keys, values

    def forward(self, x: Tensor, window: Tensor, window_mask: Tensor, rows: RoutedRows | None) -> Tensor:
        """Read a whole segment: x [b, n, d] -> [b, n, d]."""
        return self.read(x, self.context(window, window_mask, rows))[0]
