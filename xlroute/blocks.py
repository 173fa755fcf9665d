"""The block of the Transformer-XL: self-attention over [window, segment], routed memory, feedforward.

Shapes: b streams, n tokens in a segment, w rows of the XL window, t tokens of an open segment, v tokens in a
routing window, d dim, h heads, e dim_head, r routing tokens, k rows routed, g chunks of the segment that have
rows of their own, 1 if they are routed for the whole segment. Reading a block is a function of tensors alone,
so that it can be compiled and checkpointed; the memory store is read before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xlroute.attached import MemoryRows, ReadableRows
from xlroute.attend import attend
from xlroute.autoregressive import AutoregressiveCache, ConditionalRoutedAutoregressiveAttention
from xlroute.beside import call_beside, normed, normed_beside
from xlroute.causal_routing import QueryRouting, route_on
from xlroute.content_routing import ChunkRouting, FoundCandidates, FoundRows
from xlroute.cross_attention import ConditionalRoutedCrossAttention, RoutedKeysValues
from xlroute.feedforward import ConditionalRoutedFeedForward, FeedForward
from xlroute.memory import MemoryLayer
from xlroute.memory.at_hand import RowsAtHand
from xlroute.memory.kept_values import KeptValues
from xlroute.memory.scores import Scoring
from xlroute.position import AGES, age_bias, age_place, rotary_table, rotate
from xlroute.router import (
    CoordinateDescentRouter,
    PickedRows,
    RouterOutput,
    RoutingStats,
    choose_alike,
    pick_together,
)
from xlroute.shortlist import choose_of_shortlist, shortlisted
from xlroute.token_memory import TokenMemoryAttention, TokenRows


class RoutedRows(NamedTuple):
    """Rows of the long-term memory that were routed to a block, what followed them, and how old they are."""

    routed: RouterOutput  # all [b g, r, k]
    followers: Tensor  # [b g, r, k, d], the row after each; 0 where there is none
    age_places: Tensor  # [b g, r, k], see `age_place`


class UnreadRows(NamedTuple):
    """What a branch has found in the memory for the tokens of a segment, and where it is to be read.

    Tensors alone, of sizes that stay while the memory grows: a compiled block reads the rows itself.
    """

    memory: RowsAtHand
    found: PickedRows | FoundCandidates


class MemoryContext(NamedTuple):
    """The routed rows as a block attends to them."""

    keys_values: RoutedKeysValues  # [b g, h, 1 + k, e]
    bias: Tensor  # [b g, h, 1, k]

    def last(self, streams: int) -> MemoryContext:
        """That of the last chunk of each stream."""
        keys, values, mask = self.keys_values
        if keys.shape[0] == streams:
            return self

        def of_last(t: Tensor) -> Tensor:
            return torch.unflatten(t, 0, (streams, -1))[:, -1]

        mask = None if mask is None else of_last(mask)
        return MemoryContext(RoutedKeysValues(of_last(keys), of_last(values), mask), of_last(self.bias))


class MemoryBranch(Protocol):
    """A branch of a block that attends to the memory, `RoutedMemoryAttention` or `TokenMemoryAttention`."""

    age_bias: nn.Embedding
    memory_gate: nn.Parameter
    to_out: nn.Linear

    @property
    def by_text(self) -> bool:
        """Whether rows are chosen by what is being read."""

    @property
    def looks_back(self) -> bool:
        """Whether rows are chosen by the tokens before a chunk."""

    def begin_of_chunk(self, t: int) -> int:
        """The first token of the chunk that token t of a segment is in: they share their rows."""

    def kept_scoring(self, memory: MemoryLayer) -> tuple[Scoring, KeptValues] | None:
        """How `open` would score rows, and what is kept of them; None if it compares nothing."""

    def open(self, memory: MemoryRows, *, with_stats: bool) -> Any:
        """What `find` needs to know of all rows, whatever is being read."""

    def find(
        self,
        memory: MemoryRows,
        opened: Any,
        x: Tensor,
        before: Tensor,
        before_mask: Tensor,
        *,
        with_stats: bool,
    ) -> Any:
        """Look for the rows that tokens are to read.

        Args:
            memory: all rows.
            opened: what is known of them.
            x: states [b, n, d] of tokens of one segment, from the start of a chunk.
            before: states [b, t, d] of the tokens before them; what routing looks at are the last.
            before_mask: which of them there are, bool [b, t].
            with_stats: tell how saturated the gates are.
        """

    def choose(
        self, memory: ReadableRows, found: Any, x: Tensor, *, with_stats: bool
    ) -> tuple[RouterOutput | FoundRows, RoutingStats | None]:
        """Choose the rows that tokens x [b, n, d] read, out of what was found for them."""

    def score_ages(self, memory: MemoryRows, indices: Tensor) -> Tensor:
        """How many rows have come since rows at indices [b, ...] got what `find` has found them by."""

    def rows(self, memory: ReadableRows, routed: Any, age_places: Tensor) -> Any:
        """What is read of a memory of which rows are chosen, of given ages; it has left the memory."""

    def context(self, rows: Any) -> MemoryContext | TokenRows:
        """The same as tokens attend to it."""

    def gated(self, x: Tensor, memory: Any, queries: RouterOutput | None) -> Tensor:
        """The gated output [b, n, d] for x [b, n, d], of which all tokens attend, or the routed ones."""


def read_rows(branch: MemoryBranch, unread: UnreadRows, x: Tensor) -> RoutedRows | TokenRows:
    """What a branch of a block reads of the memory for the tokens of a segment, x [b, n, d]."""
    memory, found = unread
    routed, _ = branch.choose(memory, found, x, with_stats=False)
    return branch.rows(memory, routed, age_place(memory.ages(routed.indices)))  # type: ignore[no-any-return]


class BlockContext(NamedTuple):
    """Everything that a block looks at besides the tokens it is given."""

    # Of the XL window, or what the light attention sees of it, and of earlier tokens of an open segment.
    keys: Tensor  # [b, h, w + t, e], not rotated
    values: Tensor  # [b, h, w + t, e]
    mask: Tensor  # bool [b, w + t]
    heavy: AutoregressiveCache | None  # all of them, for the heavy attention
    # Of each branch that attends to the memory; none without a memory.
    memories: tuple[MemoryContext | TokenRows, ...]
    scores: Tensor  # [b, v + t, 2], of the tokens before as memory queries and for the feedforward, or empty


class SegmentView(NamedTuple):
    """Where the tokens of a segment and the rows before them stand, and which of them a token sees.

    It is the same for all blocks.
    """

    table: Tensor  # [2, w + n, e / 2], see `rotary_table`
    bias: Tensor  # [b, 1, n, w + n], for the logits: 0 where a token sees a row, -inf elsewhere

    @classmethod
    def of(cls, mask: Tensor, tokens: int, dim_head: int, dtype: torch.dtype) -> SegmentView:
        """That of some tokens behind the rows of a mask [b, w], for logits of a dtype."""
        w = mask.shape[1]
        # Positions count from the first row. Only differences matter, so they serve every segment.
        table = rotary_table(w + tokens, dim_head, device=mask.device, dtype=dtype)
        causal = torch.ones(tokens, w + tokens, dtype=torch.bool, device=mask.device).tril(w)
        seen = F.pad(mask, (0, tokens), value=True)[:, None] & causal
        bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, -math.inf)
        return cls(table, bias[:, None])


class SelfAttention(nn.Module):
    """Causal attention over earlier rows and the tokens themselves, with rotary positions.

    With `window_size`, a token sees only so many rows before it, and the work grows with those alone.
    """

    def __init__(
        self, dim: int, *, heads: int, dim_head: int, dropout: float, window_size: int | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.window_size = window_size
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
        kv = rearrange(
            self.to_kv(normed(self.norm, states)), "b n (two h e) -> two b h n e", two=2, h=self.heads
        )
        return kv[0] + self.k_bias.to(kv.dtype), kv[1]

    def forward(
        self, x: Tensor, context: BlockContext, view: SegmentView | None
    ) -> tuple[Tensor, BlockContext]:
        """Attend from x [b, n, d] to the context and to x up to each token, as seen in the view.

        With `window_size`, the view is None.

        Returns:
            The output [b, n, d], and the context with the keys and values of x in it.
        """
        return self.beside(x, context, view)[1]

    def beside(
        self, x: Tensor, context: BlockContext, view: SegmentView | None
    ) -> tuple[Tensor, tuple[Tensor, BlockContext]]:
        """See `xlroute.beside`."""
        x, rows = normed_beside(self.norm, x)
        q = rearrange(self.to_q(rows), "b n (h e) -> b h n e", h=self.heads)
        q = q + self.q_bias.to(q.dtype)
        keys, values = self.keys_values(x)
        context = context._replace(
            keys=torch.cat((context.keys.to(keys.dtype), keys), dim=2),
            values=torch.cat((context.values.to(values.dtype), values), dim=2),
            mask=F.pad(context.mask, (0, x.shape[1]), value=True),
        )
        if view is None:
            out = self._attend_nearby(q, context.keys, context.values, context.mask)
        else:
            out = self._attend(q, context.keys, context.values, view)
        return x, (self.to_out(rearrange(out, "b h n e -> b n (h e)")), context)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, view: SegmentView) -> Tensor:
        """Attend from queries [b, h, n, e] to all rows [b, h, w + n, e] up to each token."""
        return attend(
            rotate(q, view.table[:, -q.shape[2] :]),
            rotate(keys, view.table),
            values,
            bias=view.bias,
            dropout=self.dropout if self.training else 0.0,
        )

    def _attend_nearby(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend to the token itself and `window_size` rows before it, from chunks of queries at a time."""
        assert self.window_size is not None
        n, s = q.shape[2], self.window_size
        chunk = min(n, s)
        lacking, fill = max(s + n - keys.shape[2], 0), -n % chunk

        def last(rows: Tensor) -> Tensor:
            return F.pad(rows[:, :, -(s + n) :], (0, 0, lacking, fill))

        def chunks(rows: Tensor) -> Tensor:
            return rearrange(rows.unfold(2, s + chunk, chunk), "b h c e s -> (b c) h s e")

        table = rotary_table(s + n + fill, q.shape[-1], device=q.device, dtype=q.dtype)
        q = rotate(F.pad(q, (0, 0, 0, fill)), table[:, s:])
        distance = (
            s + torch.arange(chunk, device=q.device)[:, None] - torch.arange(s + chunk, device=q.device)
        )
        present = F.pad(mask[:, -(s + n) :], (lacking, fill)).unfold(1, s + chunk, chunk)  # [b, c, s + chunk]
        visible = present[:, :, None] & (distance >= 0) & (distance <= s)
        out = attend(
            rearrange(q, "b h (c q) e -> (b c) h q e", q=chunk),
            chunks(rotate(last(keys), table)),
            chunks(last(values)),
            mask=visible.flatten(0, 1)[:, None],
            dropout=self.dropout if self.training else 0.0,
        )
        return rearrange(out, "(b c) h q e -> b h (c q) e", b=len(mask))[:, :, :n]


class RoutedMemoryAttention(ConditionalRoutedCrossAttention):
    """Routed cross-attention to what followed the states that resemble the present one, behind a gate.

    Keys are the routed rows, compared to the tokens by the cosine of one shared projection; values are the
    rows that followed them, as the neighbours of RETRO (arXiv 2112.04426) come with their continuation and
    those of the kNN language model (arXiv 1911.00172) with their next token. So the branch finds its way
    from the start, and only has to learn what to make of what it reads.

    A bias for the age of a row joins the logits. The output is multiplied by tanh of `memory_gate`, so that a
    model starts close to one without memory.

    The rows are chosen by learned routing tokens, once for a segment; or at random; or by what is being read,
    for each chunk of a segment.

    Args:
        dim: d.
        heads: h.
        num_tokens_q: see `ConditionalRoutedCrossAttention`.
        random_route: choose rows at random, the negative control.
        routing_chunk: choose rows by content, for chunks of so many tokens; None for the learned tokens.
        routing_shortlist: where gradient is recorded, choose for learned tokens out of so many x k rows,
            taken by the scores that rows got first; None to score all rows anew. Chance needs no scores.
        **options: further ones of `ConditionalRoutedCrossAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        num_tokens_q: int | float | None = None,
        random_route: bool = False,
        routing_chunk: int | None = None,
        routing_shortlist: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_tokens_q=num_tokens_q, heads=heads, share_qk=True, qk_norm=True, **options)
        self.memory_gate = nn.Parameter(torch.zeros(()))
        self.age_bias = nn.Embedding(AGES, heads)
        self.random_route = random_route
        self.routing_shortlist = None if random_route else routing_shortlist
        self.content_routing: ChunkRouting | None = None
        if routing_chunk is not None:
            self.content_routing = ChunkRouting(dim, sets=self.sets, chunk=routing_chunk)

    @property
    def by_text(self) -> bool:
        """See `MemoryBranch`."""
        return self.content_routing is not None

    @property
    def looks_back(self) -> bool:
        """See `MemoryBranch`."""
        return self.by_text

    def kept_scoring(self, memory: MemoryLayer) -> tuple[Scoring, KeptValues] | None:
        """See `MemoryBranch`, as for what follows."""
        compares = self.by_learned_tokens and not torch.is_grad_enabled()
        return self.kv_router.kept_scoring(memory) if compares else None

    @property
    def by_learned_tokens(self) -> bool:
        """Whether rows are chosen whatever is being read, and not by chance."""
        return not (self.by_text or self.random_route)

    def open(self, memory: MemoryRows, *, with_stats: bool) -> PickedRows | None:
        """What learned routing tokens find; None without them."""
        if not self.by_learned_tokens:
            return None
        k = self.num_tokens_kv
        if self.routing_shortlist is not None and torch.is_grad_enabled():
            assert isinstance(k, int)
            [found] = shortlisted([self.kv_router], [memory], k, self.routing_shortlist)
            return PickedRows(found, None, None)
        return self.kv_router.pick(memory, num_tokens=k, with_stats=with_stats)

    def find(
        self,
        memory: MemoryRows,
        opened: PickedRows | None,
        x: Tensor,
        before: Tensor,
        before_mask: Tensor,
        *,
        with_stats: bool,
    ) -> PickedRows:
        """Rows for all tokens, [b, r, ...], or by content for each chunk, [b, g, r, ...]."""
        k = self.num_tokens_kv
        if self.random_route:
            return self.kv_router.pick(memory, num_tokens=k, random_route=True, with_stats=with_stats)
        if self.content_routing is None:
            assert opened is not None
            return opened
        assert isinstance(k, int)
        return self.content_routing.pick(
            self.kv_router, memory, x, before, before_mask, k, with_stats=with_stats
        )

    def choose(
        self, memory: ReadableRows, found: PickedRows, x: Tensor, *, with_stats: bool
    ) -> tuple[RouterOutput, RoutingStats | None]:
        """Read what was picked, or choose out of a shortlist."""
        indices, gates, stats = found
        if gates is None:
            k = self.num_tokens_kv
            assert isinstance(k, int)
            return choose_of_shortlist(self.kv_router, memory, indices, k, with_stats=with_stats)
        mask = None if memory.even else indices >= 0
        return RouterOutput(indices, gates, memory.take(indices), mask), stats

    def score_ages(self, memory: MemoryRows, indices: Tensor) -> Tensor:
        """See `MemoryBranch`."""
        if self.routing_shortlist is None or not torch.is_grad_enabled():
            return indices.clamp(max=0)
        return memory.score_ages(indices, "first scores")

    def begin_of_chunk(self, t: int) -> int:
        """All tokens of a segment share their rows where they are not routed by content."""
        return 0 if self.content_routing is None else t - t % self.content_routing.chunk

    def rows(self, memory: ReadableRows, routed: RouterOutput, age_places: Tensor) -> RoutedRows:
        """What is read of a memory of which rows are routed, of ages [b, r, k] or [b, g, r, k]."""
        followers = memory.take(memory.followers(routed.indices))
        if age_places.ndim == 3:
            return RoutedRows(routed, followers, age_places)
        flat = RouterOutput(*(None if t is None else t.flatten(0, 1) for t in routed))  # type: ignore[arg-type]
        return RoutedRows(flat, followers.flatten(0, 1), age_places.flatten(0, 1))

    def context(self, rows: RoutedRows) -> MemoryContext:
        """Keys and values of routed rows, and the bias on their logits."""
        table = rearrange(self.age_bias.weight, "a (r h) -> a r h", r=self.sets)
        bias = rearrange(age_bias(table, rows.age_places), "b r h k -> b (r h) 1 k")
        return MemoryContext(self.keys_values(rows.routed, rows.followers), bias)

    def gated(self, x: Tensor, memory: MemoryContext, queries: RouterOutput | None) -> Tensor:
        """The gated output [b, n, d] for x [b, n, d], of which all tokens attend, or the routed ones."""
        if queries is None:
            out = self._attend_in_chunks(self.queries(x), memory)
        else:
            out = self.attend(self.queries(queries.tokens, queries), *memory)
            out = self.route_back(x, out, queries)
        return self.memory_gate.tanh() * out

    def _attend_in_chunks(self, q: Tensor, memory: MemoryContext) -> Tensor:
        """Attend from queries [b, h, n, e], those of each chunk to its own rows: [b, n, d]."""
        b, _, n, _ = q.shape
        chunks = memory.bias.shape[0] // b
        if chunks == 1:
            return self.attend(q, *memory)
        assert self.content_routing is not None
        q = F.pad(q, (0, 0, 0, chunks * self.content_routing.chunk - n))
        out = self.attend(rearrange(q, "b h (g c) e -> (b g) h c e", g=chunks), *memory)
        return rearrange(out, "(b g) c d -> b (g c) d", b=b)[:, :n]


def open_branches(
    branches: Sequence[tuple[MemoryBranch, MemoryRows]], *, with_stats: bool
) -> dict[MemoryBranch, Any]:
    """What `find` of each branch needs to know of its rows, whatever is being read.

    Branches with learned routing tokens choose all at once if they choose alike and no stats are asked for.

    Args:
        branches: each with its layer of one memory as it stands at one moment.
        with_stats: see `MemoryBranch`.
    """
    learned = [
        (branch, memory)
        for branch, memory in branches
        if isinstance(branch, RoutedMemoryAttention) and branch.by_learned_tokens
    ]
    at_once = len(learned) > 1 and not with_stats and gains_at_once(learned[0][1].device)
    opened = _open_at_once(learned) if at_once else {}
    for branch, memory in branches:
        if branch not in opened:
            opened[branch] = branch.open(memory, with_stats=with_stats)
    return opened


def gains_at_once(device: torch.device) -> bool:
    """Whether one selection from the rows of several layers takes less time than one for each.

    It saves launches, and has to copy the scores. On a CPU, those of one layer are faster to go through, over
    and over, as more of them stay in its caches.
    """
    return device.type != "cpu"


def _open_at_once(
    learned: Sequence[tuple[RoutedMemoryAttention, MemoryRows]],
) -> dict[MemoryBranch, Any]:
    """What branches with learned routing tokens find, chosen in one call; none where they differ."""
    branches, layers = [branch for branch, _ in learned], [memory for _, memory in learned]
    routers = [branch.kv_router for branch in branches]
    [(k, shortlist), *others] = {(branch.num_tokens_kv, branch.routing_shortlist) for branch in branches}
    if others or not isinstance(k, int) or not choose_alike(routers):
        return {}
    if shortlist is None or not torch.is_grad_enabled():
        found = pick_together(routers, layers, num_tokens=k)
    else:
        found = [PickedRows(each, None, None) for each in shortlisted(routers, layers, k, shortlist)]
    return dict(zip(branches, found, strict=True))


class Block(nn.Module):
    """Pre-norm block: self-attention, on memory layers gated routed cross-attention, feedforward.

    Self-attention and feedforward may have a heavy branch for routed tokens. Tokens are routed in windows of
    v, the first of which begins with the segment.

    Args:
        dim: d.
        heads: of self-attention, or of its light branch.
        dim_head: e.
        dropout: of attention weights, of hidden units and of each branch's output.
        ff_mult: hidden width of the feedforward over d, or of its heavy branch.
        memory_heads: of the attention to the memory.
        memory_options: further arguments of that; None for none by learned routing.
        chunk_options: as those, for one whose rows are routed for each chunk; it may stand beside the other.
        token_options: as those, for a `TokenMemoryAttention` in place of the latter.
        routing_window: v.
        query_routing: how tokens are routed, see `route_newest`.
        heavy_options: arguments of the heavy branch of self-attention; None for none.
        light_window_size: rows that a token sees before itself; None for all.
        feedforward_options: further arguments of a routed feedforward; None for a plain one.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        dropout: float,
        ff_mult: int,
        memory_heads: int,
        memory_options: Mapping[str, Any] | None,
        chunk_options: Mapping[str, Any] | None,
        token_options: Mapping[str, Any] | None,
        routing_window: int,
        query_routing: QueryRouting,
        heavy_options: Mapping[str, Any] | None,
        light_window_size: int | None,
        feedforward_options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.routing_window = routing_window
        self.query_routing = query_routing
        self.attention = SelfAttention(
            dim, heads=heads, dim_head=dim_head, dropout=dropout, window_size=light_window_size
        )
        self.heavy_attention: ConditionalRoutedAutoregressiveAttention | None = None
        if heavy_options is not None:
            self.heavy_attention = ConditionalRoutedAutoregressiveAttention(
                dim,
                has_light_attn=False,
                heavy_window_size=routing_window,
                heavy_dim_head=dim_head,
                rotary_emb=True,
                query_routing=query_routing,
                dropout=dropout,
                **heavy_options,
            )
        sizes: dict[str, Any] = {"heads": memory_heads, "dim_head": dim_head, "dropout": dropout}
        self.memory: RoutedMemoryAttention | None = None
        self.content_memory: RoutedMemoryAttention | TokenMemoryAttention | None = None
        if memory_options is not None:
            self.memory = RoutedMemoryAttention(dim, **sizes, **memory_options)
        if chunk_options is not None:
            self.content_memory = RoutedMemoryAttention(dim, **sizes, **chunk_options)
        elif token_options is not None:
            self.content_memory = TokenMemoryAttention(dim, **sizes, **token_options)
        self.feedforward: FeedForward | ConditionalRoutedFeedForward
        if feedforward_options is None:
            self.feedforward = FeedForward(dim, mult=ff_mult, dropout=dropout)
        else:
            self.feedforward = ConditionalRoutedFeedForward(
                dim, heavy_ff_mult=ff_mult, dropout=dropout, **feedforward_options
            )
        self.dropout = nn.Dropout(dropout)

    def memories(self) -> list[MemoryBranch]:
        """The branches that attend to the memory."""
        return [memory for memory in (self.memory, self.content_memory) if memory is not None]

    def last_projections(self) -> list[nn.Linear]:
        """Those that join the residual stream, but for that of the memory."""
        feedforward, found = self.feedforward, [self.attention.to_out]
        if self.heavy_attention is not None:
            found.append(self.heavy_attention.heavy_attn.to_out)
        if isinstance(feedforward, ConditionalRoutedFeedForward):
            return [*found, feedforward.light_ff.to_out, feedforward.heavy_ff.to_out]
        return [*found, feedforward.to_out]

    def context(
        self,
        window: Tensor,
        window_mask: Tensor,
        opened: Tensor,
        rows: Sequence[RoutedRows | TokenRows],
        scores: Tensor,
    ) -> BlockContext:
        """What the block looks at before the next token.

        Args:
            window: states [b, w, d] of the XL window.
            window_mask: bool [b, w].
            opened: states [b, t, d] of the tokens of an open segment.
            rows: those of the memory that were routed to each of `memories`; none without a memory.
            scores: [b, s, 2], of at least the last v + t % v tokens, -inf where there are none; or empty.
        """
        t = opened.shape[1]
        near = self.attention.window_size or 0  # -0 is the first row
        states = torch.cat((window, opened), dim=1) if t else window
        mask = F.pad(window_mask, (0, t), value=True)
        heavy = None
        if self.heavy_attention is not None:
            # The segment begins with a window of its own.
            lacking = -window.shape[1] % self.routing_window
            heavy = self.heavy_attention.remember(
                F.pad(states, (0, 0, lacking, 0)), mask=F.pad(mask, (lacking, 0))
            )
        memories = self.memories() if rows else []
        return BlockContext(
            *self.attention.keys_values(states[:, -near:]),
            mask[:, -near:],
            heavy,
            tuple(memory.context(routed) for memory, routed in zip(memories, rows, strict=True)),
            scores[:, -(self.routing_window + t % self.routing_window) :],
        )

    def read(self, x: Tensor, context: BlockContext, view: SegmentView | None) -> tuple[Tensor, BlockContext]:
        """Read tokens x [b, n, d]: the output [b, n, d], and what to look at after them."""
        x, (out, after) = call_beside(self.attention, SelfAttention, x, context, view)
        if self.heavy_attention is not None:
            heavy, cache = self.heavy_attention.read_on(x, context.heavy)
            out, after = out + heavy, after._replace(heavy=cache)
        x = x + self.dropout(out)
        scores = context.scores.new_full((*x.shape[:2], context.scores.shape[-1]), -math.inf)
        if context.memories:
            queries = None
            if self.memory is not None and self.memory.q_router is not None:
                assert self.memory.num_tokens_q is not None
                queries, scores[..., 0] = self._route(
                    self.memory.q_router, self.memory.num_tokens_q, x, context.scores[..., 0]
                )
            branches = zip(self.memories(), context.memories, strict=True)
            found = (branch.gated(x, memory, queries) for branch, memory in branches)
            x = x + self.dropout(reduce(torch.add, found))
        if isinstance(self.feedforward, ConditionalRoutedFeedForward):
            routed, scores[..., 1] = self._route(
                self.feedforward.router, self.feedforward.num_heavy_tokens, x, context.scores[..., 1]
            )
            x, fed = self.feedforward.both_branches_beside(x, routed)
        else:
            x, fed = call_beside(self.feedforward, FeedForward, x)
        x = x + self.dropout(fed)
        return x, after._replace(
            memories=tuple(memory.last(len(x)) for memory in context.memories),
            scores=torch.cat((context.scores, scores), dim=1),
        )

    def _route(
        self, router: CoordinateDescentRouter, num_tokens: int | float, x: Tensor, before: Tensor
    ) -> tuple[RouterOutput, Tensor]:
        """Pick among tokens x [b, n, d] by the scores of those before them; their own, without gradient."""
        routed, scores = route_on(
            router,
            x,
            before,
            window=self.routing_window,
            num_tokens=num_tokens,
            query_routing=self.query_routing,
        )
        return routed, scores.detach()

    def forward(
        self,
        x: Tensor,
        window: Tensor,
        window_mask: Tensor,
        view: SegmentView | None,
        rows: Sequence[RoutedRows | TokenRows | UnreadRows],
        scores: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Read a whole segment x [b, n, d]: the output [b, n, d], and the scores [b, n, 2] of its tokens."""
        branches = self.memories() if rows else []
        there = [
            read_rows(branch, each, x) if isinstance(each, UnreadRows) else each
            for branch, each in zip(branches, rows, strict=True)
        ]
        x, after = self.read(x, self.context(window, window_mask, x[:, :0], there, scores), view)
        return x, after.scores[:, -x.shape[1] :]


class BlockRun(nn.Module):
    """Reads a segment through blocks that follow each other. Without weights, to be compiled as one."""

    def forward(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        windows: Tensor,
        window_mask: Tensor,
        view: SegmentView | None,
        rows: Sequence[Sequence[UnreadRows]],
        scores: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Read a whole segment.

        Args:
            blocks: l.
            x: [b, n, d].
            windows: states of the XL window that enter each block, [l, b, w, d].
            window_mask: bool [b, w].
            view: see `SegmentView`.
            rows: what each block reads of the memory, one of each branch; none without a memory.
            scores: by which tokens before were routed in each block, [l, b, s, 2], or empty.

        Returns:
            The output [b, n, d]; the states that enter each block but the first, without gradient; and the
            scores of the tokens by each block.
        """
        entering: list[Tensor] = []
        found: list[Tensor] = []
        for block, window, of_block, before in zip(blocks, windows, rows, scores, strict=True):
            if found:
                entering.append(x.detach())
            x, new = block(x, window, window_mask, view, of_block, before)
            found.append(new)
        return x, entering, found
