"""Self-attention for causal models: local for all tokens, routed to the distant past for a few.

Shapes: b streams, n tokens, d dim, w heavy_window_size, c windows, h heads, e dim_head, r routing tokens, k
rows routed for a window. Positions count from the first token that was read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from xlroute.attention import heavy_attention
from xlroute.beside import call_beside, normed_beside
from xlroute.causal_routing import QueryRouting, check_query_routing, places_in_window, route_newest
from xlroute.cross_attention import RoutedKeysValues
from xlroute.local_attention import LocalAttention, LocalCache
from xlroute.position import rotary_at, rotate
from xlroute.router import RouterOutput, RoutingStats, overlap


class ReadTokens(NamedTuple):
    """What the heavy branch keeps of tokens that it has read, to route them and attend to them later."""

    keys: Tensor  # [b, n, h e], rotated if the layer has positions
    values: Tensor  # [b, n, h e]
    kv_scores: Tensor  # [b, n, r], -inf for tokens that do not count
    q_scores: Tensor  # [b, n]
    mask: Tensor | None  # bool [b, n]; None if every token counts

    @property
    def length(self) -> int:
        """How many there are."""
        return self.keys.shape[1]

    def cut(self, start: int, end: int | None = None) -> ReadTokens:
        """The tokens at places `start` to `end`, as views."""
        mask = None if self.mask is None else self.mask[:, start:end]
        keys, values, kv_scores, q_scores = (t[:, start:end] for t in self[:4])
        return ReadTokens(keys, values, kv_scores, q_scores, mask)

    def followed_by(self, other: ReadTokens) -> ReadTokens:
        """These tokens and then those, in the dtypes of those, both with masks."""
        if other.length == 0 or self.length == 0:
            return self if other.length == 0 else other
        assert self.mask is not None
        assert other.mask is not None
        pairs = zip(self, other, strict=True)
        return ReadTokens(*(torch.cat((mine.to(its.dtype), its), dim=1) for mine, its in pairs))  # type: ignore[arg-type, union-attr]


class AutoregressiveCache(NamedTuple):
    """What the layer remembers of the tokens read. A step leaves the one that it is given as it was."""

    light: LocalCache | None  # None without a light branch
    ended: ReadTokens  # the tokens of all windows that have ended
    opened: ReadTokens  # those of the window that has not, fewer than w
    routed: RoutedKeysValues | None  # what that window attends to, [b, ...]; None before its first token


class AutoregressiveStats(NamedTuple):
    """How the routings of the heavy branch went, in each window after the first."""

    capacity_used: Tensor  # float32 [b, c - 1], the share of a window's places for queries that are used
    keys_values: RoutingStats  # [b, r, c - 1]
    overlap: Tensor  # float32 [b, r, c - 2], the share of a window's routed rows that the one before has too


class ConditionalRoutedAutoregressiveAttention(nn.Module):
    """Causal local attention for all tokens, plus attention of routed queries to routed keys of the past.

    out_i = light(x)_i + gate_i heavy(x)_i for routed queries, and light(x)_i plus a learned vector for the
    others (CoLT5, arXiv 2303.09752, made causal). For the heavy branch the tokens are cut into windows of w.
    The queries of a window attend to the k rows that each of r routing tokens picks out of all earlier
    windows, and to a learned null key. Tokens are scored, and projected to keys and values, once each; a
    soft top-k is solved for every window, over what lies before it; only the chosen keys and values are
    gathered. A window that has no past, as the first, has light attention alone.

    The output at a position depends on the tokens up to it alone: whether a query is routed is decided by a
    threshold from the window before, `query_routing="threshold"`. With the k' = `num_heavy_tokens_q` places
    of a window and v <= w valid tokens in the window before, whose scores are s'_j::

        θ = the ceil(k' v / w)-th largest of s'
        a = the level of a soft top-k of s' with the budget `fetch_k_ratio` k' v / w
        routed:  s_i >= θ, the first k' of the window that reach it
        gate_i = min(1, exp((s_i + a) / ε))

    So at most k' tokens of a window are routed, and fewer where it scores lower than the one before. Gradient
    reaches the query router through s_i and through a: like the gates of a soft top-k, these do not change if
    all scores grow alike. The level is exact even with `n_iters`, at the router's `eps`. If the window before
    has no valid token, no query is routed.

    Padding in front of a stream, by whole windows of masked tokens, changes nothing, unless there are rotary
    positions: queries have them, and the null key has none.

    Args:
        dim: d.
        num_heavy_tokens_q: k', places for routed queries in a window; a float in (0, 1] is a share of w. If
            they are w or more, all tokens are routed, with gates of 1.
        num_heavy_tokens_kv: k, rows that each routing token picks for a window; a float in (0, 1] is a share
            of w, as memory would grow with n² if it were one of the past.
        num_routed_kv: r; the heavy heads are shared out evenly over the r sets.
        has_light_attn: whether there is a light branch.
        light_dim_head: e of the light branch.
        light_heads: h of the light branch.
        light_window_size: window of the light branch, see `LocalAttention`.
        heavy_window_size: w; None for that of the light branch. If it is larger, some tokens of a window lie
            too far back for the light branch and not far enough for the heavy one.
        heavy_dim_head: e of the heavy branch.
        heavy_heads: h of the heavy branch, divisible by r.
        router_straight_through: gates of routed tokens are 1 in value and keep their gradient.
        router_kwargs: further arguments of both `CoordinateDescentRouter`s but `route_block_size`. Their
            defaults keep gates from saturating. Those of colt5-attention are `n_iters=20, eps=0.03,
            eps_init=4.0, eps_decay=0.7, score_scale=None`.
        multiply_keys_by_score: multiply keys and values by the gates of their tokens, which is to say the
            input of both, as the paper writes it; otherwise the values alone.
        multiply_queries_by_score: multiply the queries by their gates, besides their outputs.
        use_triton: whether what is not a plain matrix product runs in Triton; None picks by device.
        use_null_q_tokens: what the heavy branch gives tokens with a past whose query was not routed is
            learned; otherwise zero.
        use_flash_attn: whether the heavy branch may use PyTorch's fused attention, flash kernels among it;
            False computes the plain formula, and holds all of its logits.
        rotary_emb: queries and keys of the heavy branch are rotated by their positions.
        query_routing: "threshold", see above; or "window", the top-k of each window, as in colt5-attention.
            That one is not causal: whether a token is routed depends on the rest of its window, which in
            generation is not there. In training it warns, once.
        dropout: probability with which an attention weight of the heavy branch is dropped in training.

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
        heavy_window_size: int | None = None,
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
        query_routing: QueryRouting = "threshold",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_query_routing(query_routing)
        if light_window_size < 1:
            raise ValueError(f"light_window_size: expected at least 1, got {light_window_size}")
        if heavy_window_size is not None and heavy_window_size < 1:
            raise ValueError(f"heavy_window_size: expected None or at least 1, got {heavy_window_size}")
        if "route_block_size" in router_kwargs:
            raise ValueError("router_kwargs: expected no route_block_size in a layer that routes by windows")
        self.num_heavy_tokens_q = num_heavy_tokens_q
        self.num_heavy_tokens_kv = num_heavy_tokens_kv
        self.heavy_window_size = light_window_size if heavy_window_size is None else heavy_window_size
        self.query_routing = query_routing
        self.light_attn: LocalAttention | None = None
        if has_light_attn:
            self.light_attn = LocalAttention(
                dim,
                window_size=light_window_size,
                dim_head=light_dim_head,
                heads=light_heads,
                causal=True,
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
            dropout=dropout,
        )

    def forward(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | float | None = None,
        num_heavy_tokens_kv: int | float | None = None,
        random_route: bool = False,
        mask: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, AutoregressiveStats]:
        """Attend within whole sequences.

        Args:
            x: tokens [b, n, d], any number of them.
            num_heavy_tokens_q: overrides that of the module.
            num_heavy_tokens_kv: overrides that of the module.
            random_route: choose tokens at random, with gates of 1 and no gradient: the negative control.
            mask: bool [b, n]; the other tokens are not routed, and seen by none.
            return_stats: return how the routings of the heavy branch went too.

        Returns:
            [b, n, d]; with `return_stats`, that and `AutoregressiveStats`.

        Raises:
            ValueError: for shapes and options that do not fit together.
        """
        light = None
        if self.light_attn is not None:
            x, light = call_beside(self.light_attn, LocalAttention, x, mask)
        read = self._read(x, mask, start=0)
        whole = read.length // self.heavy_window_size * self.heavy_window_size
        out, _, stats = self._attend_to_past(
            x,
            light,
            read.cut(0, whole),
            read.cut(whole),
            None,
            self.num_heavy_tokens_q if num_heavy_tokens_q is None else num_heavy_tokens_q,
            self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv,
            random_route=random_route,
            with_stats=return_stats,
        )
        return out if stats is None else (out, stats)

    def step(
        self, x: Tensor, cache: AutoregressiveCache | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, AutoregressiveCache]:
        """Read tokens after those of a cache: what `forward` gives for them in the whole sequence.

        The work of a step grows with its window, not with the past, but for steps that begin a window, which
        route all of the past for it.

        Args:
            x: the next tokens [b, n, d], any number of them.
            cache: what the step before returned; None at the start.
            mask: bool [b, n], as in `forward`.

        Returns:
            [b, n, d], and the cache for the next step.

        Raises:
            ValueError: for a layer that looks ahead, or for shapes that do not fit together.
        """
        if self.query_routing != "threshold":
            raise ValueError(
                "query_routing: expected 'threshold' in a layer that reads step by step, "
                f"got {self.query_routing!r}"
            )
        return self.read_on(x, cache, mask=mask)

    def read_on(
        self, x: Tensor, cache: AutoregressiveCache | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, AutoregressiveCache]:
        """Do what `step` does, but with `query_routing="window"` too.

        Then the best of each window are picked out of those of x alone.
        """
        light = light_cache = None
        if self.light_attn is not None:
            light, light_cache = self.light_attn.step(x, None if cache is None else cache.light, mask)
        ended, opened = self._windows_after(x, cache, mask)
        routed = None if cache is None else cache.routed
        out, routed, _ = self._attend_to_past(
            x, light, ended, opened, routed, self.num_heavy_tokens_q, self.num_heavy_tokens_kv, step=True
        )
        return out, AutoregressiveCache(light_cache, ended, opened, routed)

    def remember(self, x: Tensor, *, mask: Tensor | None = None) -> AutoregressiveCache:
        """The cache after tokens [b, n, d] that nobody attends from."""
        light = None if self.light_attn is None else self.light_attn.step(x, mask=mask)[1]
        return AutoregressiveCache(light, *self._windows_after(x, None, mask), None)

    def _windows_after(
        self, x: Tensor, cache: AutoregressiveCache | None, mask: Tensor | None
    ) -> tuple[ReadTokens, ReadTokens]:
        """All tokens of windows that have ended with x [b, n, d], and those of the window that has not."""
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if cache is None:
            opened = self._read(x, mask, start=0)
            ended = opened.cut(0, 0)
        else:
            ended = cache.ended
            opened = cache.opened.followed_by(self._read(x, mask, ended.length + cache.opened.length))
        whole = opened.length // self.heavy_window_size * self.heavy_window_size
        return ended.followed_by(opened.cut(0, whole)), opened.cut(whole)

    def _read(self, x: Tensor, mask: Tensor | None, start: int) -> ReadTokens:
        """Score and project tokens [b, n, d], the first of which is at position `start`."""
        heavy = self.heavy_attn
        assert heavy.to_k is not None
        assert heavy.q_router is not None
        x, rows = normed_beside(heavy.context_norm, x, heavy.kv_router.use_triton)
        keys = heavy.to_k(rows)
        if heavy.rotary_emb:
            by_head = rearrange(keys, "b n (h e) -> b n h e", h=heavy.heads)
            positions = torch.arange(start, start + x.shape[1], device=x.device)[:, None]
            keys = rotate(by_head, rotary_at(positions, by_head.shape[-1], dtype=keys.dtype)).flatten(2)
        scores = heavy.q_router.scores(x, heavy.kv_router)
        kv_scores = scores[:, 1:].transpose(1, 2)
        if mask is not None:
            kv_scores = kv_scores.masked_fill(~mask[..., None], -math.inf)
        return ReadTokens(keys, heavy.to_v(rows), kv_scores, scores[:, 0], mask)

    def _attend_to_past(
        self,
        x: Tensor,
        light: Tensor | None,
        ended: ReadTokens,
        opened: ReadTokens,
        routed: RoutedKeysValues | None,
        num_q: int | float,
        num_kv: int | float,
        *,
        step: bool = False,
        random_route: bool = False,
        with_stats: bool = False,
    ) -> tuple[Tensor, RoutedKeysValues | None, AutoregressiveStats | None]:
        """The heavy branch, for the newest tokens.

        Args:
            x: the newest tokens [b, n, d].
            light: what it is added to [b, n, d]; None for nothing.
            ended: all tokens, x among them, of windows that have ended.
            opened: all tokens, x among them, of the window that has not.
            routed: what the window of the first token of x attends to, if that is known.
            num_q: k' or a share.
            num_kv: k or a share.
            step: whether more tokens will follow.
            random_route: see `forward`.
            with_stats: whether to return statistics; not with a known `routed`.

        Returns:
            [b, n, d], to which tokens without a past to attend to add nothing; what the open window attends
            to, if it has tokens and more follow; the statistics.
        """
        heavy, w = self.heavy_attn, self.heavy_window_size
        b, n, _ = x.shape
        k_q = min(places_in_window("num_heavy_tokens_q", num_q, w), w)
        k_kv = places_in_window("num_heavy_tokens_kv", num_kv, w)
        total = ended.length + opened.length
        start = total - n
        first, last = max(start // w, 1), (total - 1) // w
        if n == 0 or last < 1:
            out = torch.zeros_like(x) if light is None else light
            return out, routed, self._no_stats(x) if with_stats else None

        stats = shared = rows = None
        if routed is None or last > start // w:
            gates, indices, stats = self._route_rows(ended, first, last, k_kv, random_route, with_stats)
            rows = (ended.keys, ended.values, gates, indices)
            routed = None
            shared = overlap(indices.transpose(1, 2)) if with_stats else None
            # Without a mask, a window lacks rows only while it has fewer than k before it.
            there = None if ended.mask is None and k_kv <= first * w else indices >= 0
            if heavy.backend != "sdpa" or (heavy.dropout > 0 and self.training):
                routed = heavy.gather_keys_values(*rows, there)
        queries = self._route_queries(x, ended, opened, first, k_q, random_route)
        q = heavy.queries(queries.tokens, queries._replace(indices=queries.indices + start))
        q = rearrange(q, "b h (c k) e -> (b c) h k e", c=last - first + 1)
        past = newest = None  # which windows have a past [b, c], where some have none
        if routed is None:
            assert rows is not None
            out = heavy.attend_to_gathered(q, *rows)
            if ended.mask is not None and there is not None:
                past = there[:, :, 0].any(-1)
            if step and opened.length:
                own = None if there is None else there[:, -1:]
                newest = heavy.gather_keys_values(*rows[:2], gates[:, -1:], indices[:, -1:], own)
        else:
            out = heavy.attend(q, routed)
            if ended.mask is not None and routed.mask is not None:
                past = routed.mask[:, 0, 0, 1:].any(-1).view(b, last - first + 1)
            if step and opened.length:
                newest = _last_window(routed, last - first + 1)
        out = rearrange(out, "(b c) k d -> b (c k) d", b=b, c=last - first + 1)

        skipped = max(w - start, 0)  # tokens of the first window
        base = out.new_zeros(()).expand(x.shape) if light is None or past is not None else light
        out = heavy.add_back(base, out, queries, start=skipped)
        if past is not None:
            window = (torch.arange(start, total, device=x.device) // w - first).clamp(min=0)
            out = out.masked_fill(~past[:, window, None], 0)
            out = out if light is None else light + out
        if stats is None or shared is None:
            return out, newest, None
        used = (queries.indices >= 0).view(b, last, k_q).sum(-1) / k_q
        return out, None, AutoregressiveStats(used, stats, shared)

    def _route_rows(
        self, ended: ReadTokens, first: int, last: int, k: int, random_route: bool, with_stats: bool
    ) -> tuple[Tensor, Tensor, RoutingStats | None]:
        """Choose rows for windows `first` to `last`, for each out of all tokens before it.

        Returns:
            Their gates and indices [b, c, r, k], the statistics [b, r, c].
        """
        r, w = self.heavy_attn.sets, self.heavy_window_size
        k = min(k, last * w)
        s = ended.kv_scores.transpose(1, 2)
        # The scores of windows that are solved at once take a quarter of the keys' room.
        at_once = max(ended.keys.shape[-1] // (4 * r), 1)
        # Solved from the last window to the first, the masks of all are views of one row.
        inside = torch.arange((last + at_once) * w, device=s.device) < last * w
        gates, indices, stats = [], [], []
        for low in range(first, last + 1, at_once):
            c = min(at_once, last + 1 - low)
            past = (low + c - 1) * w
            begin = last * w - past
            chosen_gates, chosen, chosen_stats = self.heavy_attn.kv_router.choose(
                s[:, :, None, :past].expand(-1, -1, c, -1),
                num_tokens=k,
                mask=inside[begin : begin + past + (c - 1) * w].unfold(0, past, w),
                random_route=random_route,
                with_stats=with_stats,
            )
            lacking = k - chosen.shape[-1]
            gates.append(F.pad(chosen_gates, (0, lacking)))
            indices.append(F.pad(chosen, (0, lacking), value=-1))
            stats.append(chosen_stats)

        def in_order(parts: Iterable[Tensor]) -> Tensor:
            first, *others = [part.flip(2) for part in parts]
            return torch.cat((first, *others), dim=2) if others else first

        return (
            in_order(gates).transpose(1, 2),
            in_order(indices).transpose(1, 2),
            RoutingStats(*map(in_order, zip(*stats, strict=True))) if with_stats else None,
        )

    def _route_queries(
        self,
        x: Tensor,
        ended: ReadTokens,
        opened: ReadTokens,
        first: int,
        k: int,
        random_route: bool,
    ) -> RouterOutput:
        """Which of the newest tokens x [b, n, d] attend, from window `first` on: at most k of each.

        Returns:
            Their places in x [b, c k], -1 where none is used, gates and tokens; in order of windows.
        """
        router, begin = self.heavy_attn.q_router, (first - 1) * self.heavy_window_size
        assert router is not None
        mask = None
        if ended.mask is not None and opened.mask is not None:
            mask = torch.cat((ended.mask[:, begin:], opened.mask), dim=1)
        return route_newest(
            router,
            x,
            torch.cat((ended.q_scores[:, begin:], opened.q_scores), dim=1),
            mask,
            window=self.heavy_window_size,
            num_tokens=k,
            query_routing=self.query_routing,
            random_route=random_route,
        )

    def _no_stats(self, x: Tensor) -> AutoregressiveStats:
        """Of no windows."""
        none = x.new_zeros((x.shape[0], self.heavy_attn.sets, 0), dtype=torch.float32)
        return AutoregressiveStats(none[:, 0], RoutingStats(none, none), none)


def _last_window(routed: RoutedKeysValues, c: int) -> RoutedKeysValues:
    """What the last of c windows attends to, out of [b c, ...]; copies, so that the others can go."""
    last = slice(c - 1, None, c)
    mask = None if routed.mask is None else routed.mask[last].clone()
    return RoutedKeysValues(routed.keys[last].clone(), routed.values[last].clone(), mask)
