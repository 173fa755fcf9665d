"""The router: picks the rows worth attending to, and gives them gates that carry gradient.

Shapes: b streams, m rows, d dim, r routing tokens, k rows routed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlroute.attached import MemoryRows
from xlroute.backend import pick_backend
from xlroute.kernels import (
    Backend,
    coordinate_descent,
    gather_gated_rows,
    gather_rows,
    row_scores,
    scatter_rows,
    soft_topk,
    soft_topk_with_indices,
    top_gates,
    top_indices,
)
from xlroute.memory.kept_values import KeptValues
from xlroute.memory.layer import Keep, MemoryLayer
from xlroute.memory.scores import Scoring


class RoutingStats(NamedTuple):
    """How a routing went, float32 [b, r] (or [b], as the output it belongs to).

    `gate_sum` is the sum of all gates over the number of chosen rows: `fetch_k_ratio` as long as there are
    rows enough. Far above it, the gates are saturated, and their order says nothing. `gradient_share` is the
    share of the chosen rows whose gate lies below 1 and so carries gradient to the router.
    """

    gate_sum: Tensor
    gradient_share: Tensor


class RouterOutput(NamedTuple):
    """What a router chose: k rows for each of r routing tokens, the highest score first.

    The dimension r is absent from all of them with a single routing token, unless it was asked for.
    """

    indices: Tensor  # int64 [b, r, k]; -1 where there was no row left to choose
    scores: Tensor  # the gates of the chosen rows [b, r, k], 0 where there is no row
    tokens: Tensor  # the chosen rows [b, r, k, d], 0 where there is no row
    mask: Tensor | None  # bool [b, r, k], False where there is no row; None if every row could be chosen


class PickedRows(NamedTuple):
    """The rows of a memory that were picked for some routing tokens, and are still to be read."""

    indices: Tensor  # int64 [b, r, k], or [b, g, r, k] by chunk; -1 where there was no row left to pick
    gates: Tensor | None  # the same shape, 0 where there is no row; None for a shortlist, which has none yet
    stats: RoutingStats | None  # if they were asked for


class CoordinateDescentRouter(nn.Module):
    """Scores rows against routing tokens and picks the k best of each, with a soft top-k for gradient.

    gates = argmax_λ <s, λ> + ε H(λ) subject to Σ λ = budget, 0 <= λ <= 1, where the budget is
    `fetch_k_ratio` x k: with a little more than k, the last chosen rows still compete (CoLT5, arXiv
    2303.09752). It is solved exactly (`xlroute.kernels.soft_topk`), or by `n_iters` steps of coordinate
    descent (Wright, arXiv 1502.04759). The rows are the top-k of the scores, ties going to the lower index.

    ε only has meaning against the spread of the scores. So rows are divided by their root mean square and
    scores by √d, which makes the spread about 1 for a routing token of unit variance. All routing runs in
    float32 (float64 for float64 rows), under autocast too.

    Args:
        dim: width d of the rows.
        num_routing_tokens: r; each token chooses k rows of its own.
        n_iters: steps of coordinate descent; None for the exact soft top-k.
        eps: ε, the temperature: larger lets more rows share the gradient.
        eps_init: the ε of the first step, for coordinate descent.
        eps_decay: factor from one step's ε to the next, for coordinate descent.
        straight_through: gates of chosen rows are 1 in value and keep their gradient.
        fetch_k_ratio: the budget of the gates over k, at least 1.
        learned_routing_tokens: the caller gives the routing tokens at each call; the router has none of its
            own.
        use_triton: whether the Triton kernels solve for the gates; None picks by the device of the rows. On a
            CPU, True runs the PyTorch reference, with one warning.
        cosine_sim_routing: scores are `cosine_sim_scale` x the cosine of row and token.
        cosine_sim_scale: see there.
        score_scale: factor of the scores of RMS-normalised rows; "auto" is d**-0.5; None takes raw inner
            products.
        route_block_size: route block by block of this many rows; each block's share of k is proportional to
            its valid rows (largest remainder). None routes over all rows at once.
        triton_checkpoint_segments: accepted for code written for colt5-attention, and without effect: the
            backward needs no checkpoints.

    Raises:
        ValueError: for arguments out of range.
    """

    routing_token: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_routing_tokens: int = 1,
        n_iters: int | None = None,
        eps: float = 0.1,
        eps_init: float | None = None,
        eps_decay: float = 1.0,
        *,
        straight_through: bool = True,
        fetch_k_ratio: float = 9 / 8,
        learned_routing_tokens: bool = False,
        use_triton: bool | None = None,
        cosine_sim_routing: bool = False,
        cosine_sim_scale: float = 8.0,
        score_scale: float | Literal["auto"] | None = "auto",
        route_block_size: int | None = None,
        triton_checkpoint_segments: int | None = None,
    ) -> None:
        super().__init__()
        _require(dim >= 1, "dim", "at least 1", dim)
        _require(num_routing_tokens >= 1, "num_routing_tokens", "at least 1", num_routing_tokens)
        _require(n_iters is None or n_iters >= 1, "n_iters", "None or at least 1", n_iters)
        _require(0 < eps < math.inf, "eps", "more than 0", eps)
        _require(eps_init is None or eps_init >= eps, "eps_init", f"None or at least eps ({eps})", eps_init)
        _require(0 < eps_decay <= 1, "eps_decay", "more than 0 and at most 1", eps_decay)
        _require(fetch_k_ratio >= 1, "fetch_k_ratio", "at least 1", fetch_k_ratio)
        _require(
            route_block_size is None or route_block_size >= 1,
            "route_block_size",
            "None or at least 1",
            route_block_size,
        )
        _require(
            score_scale is None or score_scale == "auto" or isinstance(score_scale, int | float),
            "score_scale",
            "a number, 'auto' or None",
            score_scale,
        )
        if triton_checkpoint_segments is not None:
            warnings.warn(
                "triton_checkpoint_segments has no effect: the backward needs no checkpoints", stacklevel=2
            )
        self.dim = dim
        self.num_routing_tokens = num_routing_tokens
        self.n_iters = n_iters
        self.eps = eps
        self.eps_init = eps_init
        self.eps_decay = eps_decay
        self.straight_through = straight_through
        self.fetch_k_ratio = fetch_k_ratio
        self.use_triton = use_triton
        self.cosine_sim_routing = cosine_sim_routing
        self.cosine_sim_scale = cosine_sim_scale
        self.score_scale = dim**-0.5 if score_scale == "auto" else score_scale
        self.route_block_size = route_block_size
        if learned_routing_tokens:
            self.register_parameter("routing_token", None)
        else:
            self.routing_token = nn.Parameter(torch.randn(num_routing_tokens, dim))

    def forward(
        self,
        x: Tensor | MemoryRows,
        *,
        num_tokens: int | float,
        mask: Tensor | None = None,
        random_route: bool = False,
        routing_tokens: Tensor | None = None,
        keep_one_route_dim: bool = False,
    ) -> RouterOutput:
        """Choose `num_tokens` rows for each routing token.

        Args:
            x: rows [b, m, d], or the layer of a memory, of which only the chosen rows are gathered.
            num_tokens: k; all rows are chosen, and none twice, where there are fewer. A float in (0, 1] is a
                share of the rows: of those that a stream may choose from, rounded, and at least one. Then k
                is the largest choice, and shorter ones are padded.
            mask: bool [b, m], the rows that may be chosen; a memory layer brings its own. The others must be
                finite too.
            random_route: choose rows at random, with gates of 1 and no gradient: the negative control.
            routing_tokens: [b, d] or [b, r, d], for a router built with `learned_routing_tokens=True`.
            keep_one_route_dim: keep the dimension r although there is one routing token.

        Returns:
            RouterOutput, with k = min(num_tokens, m), or the share of m.

        Raises:
            ValueError, TypeError: for shapes and options that do not fit together.
        """
        return self._route(
            x,
            num_tokens=num_tokens,
            mask=mask,
            random_route=random_route,
            routing_tokens=routing_tokens,
            keep_one_route_dim=keep_one_route_dim,
            with_stats=False,
        )[0]

    def route_with_stats(
        self,
        x: Tensor | MemoryRows,
        *,
        num_tokens: int | float,
        mask: Tensor | None = None,
        random_route: bool = False,
        routing_tokens: Tensor | None = None,
        keep_one_route_dim: bool = False,
    ) -> tuple[RouterOutput, RoutingStats]:
        """Choose rows as a call of the router does, and tell how saturated the gates are."""
        out, stats = self._route(
            x,
            num_tokens=num_tokens,
            mask=mask,
            random_route=random_route,
            routing_tokens=routing_tokens,
            keep_one_route_dim=keep_one_route_dim,
            with_stats=True,
        )
        assert stats is not None
        return out, stats

    def pick(
        self,
        memory: MemoryRows,
        *,
        num_tokens: int | float,
        random_route: bool = False,
        with_stats: bool = False,
        routing_tokens: Tensor | None = None,
    ) -> PickedRows:
        """Choose rows of a memory as a call of the router does, and read none of them."""
        b, m, d = _rows_shape(memory)
        _require(d == self.dim, "memory", f"rows of width {self.dim}", (b, m, d))
        k = rows_to_route(num_tokens, m)
        s = self.scores_by(memory, self._tokens(routing_tokens, b))  # [b, r, m]
        mask = None if memory.even else memory.mask[:, None].expand(s.shape)
        backend = pick_backend(self.use_triton, s.device)
        picked, indices, gates = self._choose(s, num_tokens, k, mask, random_route, with_stats, backend)
        stats = None
        if gates is not None:
            stats = _stats(gates.detach(), indices) if with_stats else None
            flat = gates.flatten(0, 1)
            _, picked = gather_gated_rows(
                flat.detach()[..., None],  # the rows come from elsewhere
                flat,
                indices.flatten(0, 1),
                backend=backend,
                straight_through=self.straight_through,
            )
            picked = picked.view(indices.shape)
            if random_route:
                picked = (indices >= 0).to(picked.dtype)
        return PickedRows(indices, picked, stats)

    def scores(self, x: Tensor, *others: CoordinateDescentRouter) -> Tensor:
        """Scores of rows by the router's own tokens, and by those of others built alike, in one pass.

        For callers that choose out of the same rows several times, by `choose`.

        Args:
            x: rows [b, m, d].
            others: further routers with the same options, but for the number of tokens.

        Returns:
            [b, r, m], r the tokens of all of them, float32 unless the rows are float64.
        """
        b, _, d = _rows_shape(x)
        _require(d == self.dim, "x", f"rows of width {self.dim}", tuple(x.shape))
        tokens = [router._tokens(None, b) for router in (self, *others)]
        return self.scores_by(x, torch.cat(tokens, dim=-2))

    def choose(
        self,
        s: Tensor,
        *,
        num_tokens: int,
        mask: Tensor | None = None,
        random_route: bool = False,
        with_stats: bool = False,
    ) -> tuple[Tensor, Tensor, RoutingStats | None]:
        """Choose by given scores what a call of the router chooses by those of its rows, not in blocks.

        Args:
            s: scores [..., m]; those of rows that may not be chosen may be -inf.
            num_tokens: k.
            mask: bool, broadcasts to [..., m].
            random_route: as in a call of the router.
            with_stats: tell how saturated the gates are.

        Returns:
            Gates and indices [..., k] with k = min(num_tokens, m), 0 and -1 where there is no row; the
            statistics [...], or None.
        """
        m = s.shape[-1]
        k = min(num_tokens, m)
        backend = pick_backend(self.use_triton, s.device)
        if self.n_iters is None and not (random_route or with_stats):
            return *self._top_gates(s, k, k, mask, backend), None
        chosen_by = torch.rand_like(s).masked_fill(s == -math.inf, -math.inf) if random_route else None
        gates, indices = self._select(s, self._budget(k, mask, m), k, mask, chosen_by, backend)
        stats = _stats(gates.detach(), indices) if with_stats else None
        picked = gates.gather(-1, indices.clamp(min=0))
        if random_route:
            picked = torch.ones_like(picked)
        elif self.straight_through:
            picked = picked - picked.detach() + 1
        return picked.masked_fill(indices < 0, 0), indices, stats

    def _route(
        self,
        x: Tensor | MemoryRows,
        *,
        num_tokens: int | float,
        mask: Tensor | None,
        random_route: bool,
        routing_tokens: Tensor | None,
        keep_one_route_dim: bool,
        with_stats: bool,
    ) -> tuple[RouterOutput, RoutingStats | None]:
        b, m, d = _rows_shape(x)
        _require(d == self.dim, "x", f"rows of width {self.dim}", tuple(x.shape))
        if isinstance(x, MemoryRows):
            if mask is not None:
                raise ValueError("mask: expected None with the layer of a memory, which brings its own")
            indices, picked, stats = self.pick(
                x,
                num_tokens=num_tokens,
                random_route=random_route,
                with_stats=with_stats,
                routing_tokens=routing_tokens,
            )
            assert picked is not None
            rows, masked = x.take_routed(indices), not x.even
        else:
            if mask is not None and (mask.shape != (b, m) or mask.dtype != torch.bool):
                raise ValueError(f"mask: expected bool {(b, m)}, got {mask.dtype} {tuple(mask.shape)}")
            k = rows_to_route(num_tokens, m)
            tokens = self._tokens(routing_tokens, b)
            backend = pick_backend(self.use_triton, x.device)
            s = self.scores_by(x, tokens)  # [b, r, m]
            route_mask = None if mask is None else mask[:, None].expand(s.shape)
            best, indices, gates = self._choose(
                s, num_tokens, k, route_mask, random_route, with_stats, backend
            )
            stats, masked = None, mask is not None
            if gates is None:
                picked, rows = best, gather_rows(x, indices, backend)
                assert picked is not None
            else:
                stats = _stats(gates.detach(), indices) if with_stats else None
                rows, picked = gather_gated_rows(
                    x, gates, indices, backend=backend, straight_through=self.straight_through
                )
                if random_route:
                    picked = (indices >= 0).to(picked.dtype)
        out = RouterOutput(indices, picked, rows, indices >= 0 if masked else None)
        if self.num_routing_tokens == 1 and not keep_one_route_dim:
            out = RouterOutput(*(None if t is None else t.squeeze(1) for t in out))  # type: ignore[arg-type]
            stats = None if stats is None else RoutingStats(*(t.squeeze(1) for t in stats))
        return out, stats

    def _tokens(self, routing_tokens: Tensor | None, b: int) -> Tensor:
        """The routing tokens, [r, d] or [b, r, d]."""
        if self.routing_token is not None:
            if routing_tokens is not None:
                raise ValueError(
                    "routing_tokens: expected None, since this router has its own "
                    "(build it with learned_routing_tokens=True to give them)"
                )
            return self.routing_token
        if routing_tokens is None:
            raise ValueError(
                "routing_tokens: expected a tensor, since this router has none of its own "
                "(it was built with learned_routing_tokens=True)"
            )
        if routing_tokens.ndim == 2:
            routing_tokens = routing_tokens[:, None]
        shape = (b, self.num_routing_tokens, self.dim)
        _require(routing_tokens.shape == shape, "routing_tokens", str(shape), tuple(routing_tokens.shape))
        return routing_tokens

    def scores_by(
        self, x: Tensor | MemoryRows, tokens: Tensor, *, keep: Keep = True, copy: bool = True
    ) -> Tensor:
        """Scores of rows by any routing tokens.

        Args:
            x: rows [b, m, d], or the layer of a memory.
            tokens: [r, d] or [b, r, d].
            keep: whether a memory keeps the scores for the next call, or gives those that its rows got first.
            copy: whether these are copies; see `MemoryLayer.scores` for both.

        Returns:
            [b, r, m], float32 unless the rows are float64.
        """
        tokens, how = self._scoring(tokens, x)
        if isinstance(x, MemoryRows):
            return x.scores(tokens, **how, keep=keep, copy=copy)
        return row_scores(x, tokens, **how)

    def kept_scoring(self, memory: MemoryLayer) -> tuple[Scoring, KeptValues] | None:
        """How the router's own tokens score a memory, and the scores that it keeps.

        None where they are computed, or copied to where the memory is, whenever they score.
        """
        assert self.routing_token is not None
        tokens, how = self._scoring(self.routing_token, memory)
        return memory.kept_scoring(tokens, **how) if tokens is self.routing_token else None

    def _scoring(self, tokens: Tensor, x: Tensor | MemoryRows) -> tuple[Tensor, dict[str, Any]]:
        """Tokens as they score rows, and how."""
        normalize: Literal["rms", "l2"] | None = "rms"
        scale = self.score_scale
        if self.cosine_sim_routing:
            normalize, scale = "l2", self.cosine_sim_scale
            wide = torch.promote_types(tokens.dtype, torch.float32)
            tokens = F.normalize(tokens.to(wide), dim=-1)
        elif scale is None:
            normalize, scale = None, 1.0
        if isinstance(x, MemoryRows):
            # A memory may be kept elsewhere than the weights.
            tokens = tokens.to(x.device)
        backend = pick_backend(self.use_triton, x.device)
        return tokens, {"normalize": normalize, "scale": scale, "backend": backend}

    def _top_gates(
        self, s: Tensor, wanted: Tensor | int, k: int, mask: Tensor | None, backend: Backend | None
    ) -> tuple[Tensor, Tensor]:
        """Gates and indices [..., k] of the best of scores [..., m], by the exact soft top-k."""
        return top_gates(
            s,
            k=self._budget(wanted, mask, s.shape[-1]),
            num=k,
            eps=self.eps,
            mask=mask,
            backend=backend,
            largest=self._largest_budget(k),
            straight_through=self.straight_through,
        )

    def _budget(self, wanted: Tensor | int, mask: Tensor | None, m: int) -> Tensor | float:
        """What the gates of a row sum to: fetch_k_ratio x the rows wanted, at most the valid rows."""
        budget = wanted * self.fetch_k_ratio
        if isinstance(budget, Tensor):
            assert mask is not None
            return torch.minimum(budget, mask.sum(-1))
        if mask is None:
            return min(budget, float(m))
        # Where sizes are dynamic, the compiler would round the bound to the whole numbers that are counted.
        return mask.sum(-1, dtype=torch.float64).clamp(max=budget)

    def _largest_budget(self, k: int) -> int:
        """No budget is larger than this, unless it reaches all valid rows."""
        return math.ceil(k * self.fetch_k_ratio)

    def _in_blocks(self, m: int) -> bool:
        return self.route_block_size is not None and self.route_block_size < m

    def _choose(
        self,
        s: Tensor,
        num_tokens: int | float,
        k: int,
        mask: Tensor | None,
        random_route: bool,
        with_stats: bool,
        backend: Backend | None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Choose by scores [b, r, m]: gates and indices [b, r, k]; or None, indices and gates of all rows."""
        wanted: Tensor | int = k
        if mask is not None and isinstance(num_tokens, float):
            wanted = _share(num_tokens, mask.sum(-1))  # [b, r]
        if self.n_iters is None and not (self._in_blocks(s.shape[-1]) or random_route or with_stats):
            picked, indices = self._top_gates(s, wanted, k, mask, backend)
            if isinstance(wanted, Tensor):
                indices = _first(indices, wanted)
                picked = picked.masked_fill(indices < 0, 0)
            return picked, indices, None
        chosen_by = torch.rand_like(s) if random_route else None
        gates, indices = self._solve(s, mask, k, wanted, chosen_by, backend)
        return None, indices, gates

    def _solve(
        self,
        s: Tensor,
        mask: Tensor | None,
        k: int,
        wanted: Tensor | int,
        chosen_by: Tensor | None,
        backend: Backend | None,
    ) -> tuple[Tensor, Tensor]:
        """Gates of all rows [b, r, m]; indices [b, r, k] of the best, or of the best of ``chosen_by``.

        Those beyond the number that is wanted, at most k, are -1.
        """
        m = s.shape[-1]
        if self._in_blocks(m):
            return self._route_blocks(s, mask, k, wanted, chosen_by, backend)
        gates, indices = self._select(s, self._budget(wanted, mask, m), k, mask, chosen_by, backend)
        return gates, _first(indices, wanted) if isinstance(wanted, Tensor) else indices

    def _select(
        self,
        s: Tensor,
        budget: Tensor | float,
        num_tokens: int,
        mask: Tensor | None,
        chosen_by: Tensor | None,
        backend: Backend | None,
    ) -> tuple[Tensor, Tensor]:
        """Gates [..., n] of scores [..., n]; the best of them, or of ``chosen_by``, as indices [..., k]."""
        k = min(num_tokens, s.shape[-1])
        if self.n_iters is None and chosen_by is None:
            largest = self._largest_budget(num_tokens)
            return soft_topk_with_indices(
                s, k=budget, num=k, eps=self.eps, mask=mask, backend=backend, largest=largest
            )
        if self.n_iters is None:
            gates = soft_topk(s, k=budget, eps=self.eps, mask=mask, backend=backend)
        else:
            gates = coordinate_descent(
                s,
                k=budget,
                n_iters=self.n_iters,
                eps=self.eps,
                eps_init=self.eps_init,
                eps_decay=self.eps_decay,
                mask=mask,
                backend=backend,
            )
        best = s.detach() if chosen_by is None else chosen_by
        return gates, top_indices(best, k, mask=mask, backend=backend)

    def _route_blocks(
        self,
        s: Tensor,
        mask: Tensor | None,
        k: int,
        wanted: Tensor | int,
        chosen_by: Tensor | None,
        backend: Backend | None,
    ) -> tuple[Tensor, Tensor]:
        """Route within blocks of rows: gates [b, r, m], indices [b, r, k]."""
        w = self.route_block_size
        assert w is not None
        m = s.shape[-1]
        blocks = math.ceil(m / w)

        def cut(t: Tensor) -> Tensor:
            return F.pad(t, (0, blocks * w - m)).view(*t.shape[:-1], blocks, w)

        s_blocks = cut(s)  # [b, r, blocks, w]
        mask_blocks = cut(torch.ones_like(s, dtype=torch.bool) if mask is None else mask)
        by_blocks = None if chosen_by is None else cut(chosen_by)
        valid = mask_blocks.sum(-1)
        quotas = block_quotas(valid, wanted)
        budgets = (quotas * self.fetch_k_ratio).clamp(max=valid)
        gates, offered = self._select(s_blocks, budgets, k, mask_blocks, by_blocks, backend)

        # Each block offers its best rows; those beyond its quota are struck out.
        best = s_blocks.detach() if by_blocks is None else by_blocks
        kept = (offered >= 0) & (torch.arange(offered.shape[-1], device=s.device) < quotas[..., None])
        offset = w * torch.arange(blocks, device=s.device)[:, None]
        candidates = torch.where(kept, offered + offset, -1).flatten(-2)
        scores = best.flatten(-2).gather(-1, candidates.clamp(min=0))
        scores = scores.masked_fill(candidates < 0, -math.inf)
        order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :k]
        return gates.flatten(-2)[..., :m], candidates.gather(-1, order)


def choose_alike(routers: Sequence[CoordinateDescentRouter]) -> bool:
    """Whether one can choose for all: by the same soft top-k, solved exactly, over all rows at once."""
    if any(each.n_iters is not None or each.route_block_size is not None for each in routers):
        return False
    options = {
        (each.num_routing_tokens, each.eps, each.fetch_k_ratio, each.straight_through, each.use_triton)
        for each in routers
    }
    return len(options) == 1


def scores_together(
    routers: Sequence[CoordinateDescentRouter], layers: Sequence[MemoryRows], *, keep: Keep = True
) -> tuple[Tensor, Tensor | None]:
    """Scores of l layers of a memory, each by its router's own tokens, and which of the rows there are.

    Args:
        routers: l, with equally many tokens.
        layers: l, of one memory as it stands at one moment, so that streams are as long in all of them.
        keep: see `CoordinateDescentRouter.scores_by`.

    Returns:
        [l b, r, m], for reading only, and bool [l b, 1, m]; or None if there are all.
    """
    first, scores = layers[0], []
    for router, layer in zip(routers, layers, strict=True):
        tokens = router._tokens(None, layer.shape[0])
        scores.append(router.scores_by(layer, tokens, keep=keep, copy=False))
    mask = None if first.even else first.mask.repeat(len(layers), 1)[:, None]
    return scores[0] if len(scores) == 1 else torch.cat(scores), mask


def pick_together(
    routers: Sequence[CoordinateDescentRouter], layers: Sequence[MemoryRows], *, num_tokens: int
) -> list[PickedRows]:
    """What `CoordinateDescentRouter.pick` picks of each of l layers of a memory, chosen at once.

    Args:
        routers: l, with tokens of their own, of which `choose_alike` is True.
        layers: l, of one memory as it stands at one moment.
        num_tokens: k, of each.
    """
    b, m, _ = layers[0].shape
    k = rows_to_route(num_tokens, m)
    s, mask = scores_together(routers, layers)
    mask = None if mask is None else mask.expand(s.shape)
    gates, indices = routers[0]._top_gates(s, k, k, mask, pick_backend(routers[0].use_triton, s.device))
    split = zip(torch.split(indices, b), torch.split(gates, b), strict=True)
    return [PickedRows(*each, None) for each in split]


def route(
    router: CoordinateDescentRouter, x: Tensor | MemoryRows, *, with_stats: bool, **options: Any
) -> tuple[RouterOutput, RoutingStats | None]:
    """A call of the router, and how saturated the gates are if that is asked for."""
    if with_stats:
        return router.route_with_stats(x, **options)
    return router(x, **options), None


def overlap(indices: Tensor) -> Tensor:
    """The share of the rows of each set of rows, after the first, that the set before it holds too.

    Args:
        indices: int64 [..., s, k], distinct in a set; -1 for no row.

    Returns:
        float32 [..., s - 1], 0 for a set without rows.
    """
    both = torch.cat((indices[..., :-1, :], indices[..., 1:, :]), dim=-1).sort(dim=-1).values
    shared = ((both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)).sum(-1)
    return shared / (indices[..., 1:, :] >= 0).sum(-1).clamp(min=1)


def add_routed(
    light: Tensor,
    heavy: Tensor,
    routed: RouterOutput,
    *,
    use_triton: bool | None,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    other_from: int = 0,
) -> Tensor:
    """The output of a light branch, and for routed tokens that of the heavy one times their gates on top.

    Args:
        light: [b, n, d].
        heavy: [b, k, d].
        routed: the tokens, with a single routing token.
        use_triton: see `CoordinateDescentRouter`.
        residual: [b, n, d], added to all; None for nothing.
        other: [d], what the others get from the heavy branch; None for nothing.
        other_from: the first token to get that.

    Returns:
        [b, n, d], rounded once, unless the residual is of another dtype.
    """
    inside = residual is not None and residual.dtype == light.dtype
    out = scatter_rows(
        light,
        heavy.to(light),
        routed.indices,
        pick_backend(use_triton, light.device),
        gates=routed.scores,
        add=True,
        other=other,
        other_from=other_from,
        residual=residual if inside else None,
    )
    return out if residual is None or inside else out + residual


def router_options(router_kwargs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The arguments of a layer's router: the layer's own options, and over them those that its user gave.

    Raises:
        ValueError: for options that the layer decides itself.
    """
    for name in ("num_routing_tokens", "learned_routing_tokens"):
        if name in router_kwargs:
            raise ValueError(f"router_kwargs: expected no {name}, which this layer decides itself")
    return {**options, **router_kwargs}


def check_num_tokens(name: str, num_tokens: int | float) -> None:
    """Refuse a number of rows to route below 1, or a share of them (a float) outside (0, 1].

    Raises:
        ValueError: for those.
    """
    if isinstance(num_tokens, float):
        _require(0 < num_tokens <= 1, name, "an int, or a share in (0, 1]", num_tokens)
    else:
        _require(num_tokens >= 1, name, "at least 1", num_tokens)


def rows_to_route(num_tokens: int | float, m: int) -> int:
    """How many of m rows are routed: `num_tokens` of them, or that share of them if it is a float."""
    check_num_tokens("num_tokens", num_tokens)
    if isinstance(num_tokens, float):
        return min(max(int(num_tokens * m + 0.5), 1), m)
    return min(num_tokens, m)


def _share(share: float, rows: Tensor) -> Tensor:
    """As many of the rows (int64) as `rows_to_route` says, for each stream."""
    return (share * rows.to(torch.float64) + 0.5).to(torch.int64).clamp(min=1)


def _first(indices: Tensor, wanted: Tensor) -> Tensor:
    """Indices [b, r, k] of which the first ``wanted`` [b, r] are kept, and the others -1."""
    places = torch.arange(indices.shape[-1], device=indices.device)
    return indices.masked_fill(places >= wanted[..., None], -1)


def _stats(gates: Tensor, indices: Tensor) -> RoutingStats:
    """How saturated gates [b, r, m] are, of which those at indices [b, r, k] belong to the chosen rows."""
    chosen = indices >= 0
    picked = gates.gather(-1, indices.clamp(min=0))
    count = chosen.sum(-1).clamp(min=1)
    return RoutingStats(
        gate_sum=(gates.sum(-1) / count).to(torch.float32),
        gradient_share=(((picked < 1) & chosen).sum(-1) / count).to(torch.float32),
    )


def block_quotas(valid: Tensor, total: Tensor | int) -> Tensor:
    """Share out `total` rows over blocks in proportion to their valid rows, by largest remainder.

    Args:
        valid: int64 [..., blocks], valid rows of each block.
        total: rows to share out; int64 [...] if they differ.

    Returns:
        int64 [..., blocks], at most `valid` each, summing to min(total, the valid rows); where remainders
        are equal, the earlier block comes first.
    """
    everything = valid.sum(-1, keepdim=True)
    share = everything.clamp(max=total[..., None] if isinstance(total, Tensor) else total)
    divisor = everything.clamp(min=1)
    quotas = share * valid // divisor
    remainders = share * valid % divisor
    left = share - quotas.sum(-1, keepdim=True)
    rank = torch.argsort(torch.argsort(remainders, dim=-1, descending=True, stable=True), dim=-1)
    return quotas + (rank < left)


def _rows_shape(x: Tensor | MemoryRows) -> tuple[int, int, int]:
    if not isinstance(x, Tensor | MemoryRows):
        raise TypeError(f"x: expected a tensor [b, m, d] or a MemoryLayer, got {type(x).__name__}")
    if len(x.shape) != 3:
        raise ValueError(f"x: expected rows [b, m, d], got {tuple(x.shape)}")
    b, m, d = x.shape
    return b, m, d


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")
