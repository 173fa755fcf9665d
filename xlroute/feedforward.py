"""Feedforward layers: plain, and with a heavy branch for the few tokens that a router picks.

Shapes: b streams, n tokens, d dim, k tokens routed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from xlroute.backend import pick_backend
from xlroute.beside import call_beside, is_plain, normed_beside
from xlroute.kernels import bias_gelu, gather_rows
from xlroute.kernels.arguments import resolve_backend
from xlroute.router import (
    CoordinateDescentRouter,
    RouterOutput,
    RoutingStats,
    add_routed,
    check_num_tokens,
    route,
    router_options,
    rows_to_route,
)


class FeedForward(nn.Sequential):
    """Norm, expansion by `mult`, GELU, projection back: [b, n, d] -> [b, n, d].

    In Triton, GELU takes the bias of the expansion along, unless somebody watches these modules.
    """

    def __init__(
        self,
        dim: int,
        *,
        mult: float,
        dropout: float = 0.0,
        bias: bool = False,
        use_triton: bool | None = None,
    ) -> None:
        hidden = int(dim * mult)
        if hidden < 1:
            raise ValueError(f"mult: expected at least 1 / dim, so that a hidden unit is left, got {mult}")
        super().__init__(
            nn.RMSNorm(dim),
            nn.Linear(dim, hidden, bias=bias),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim, bias=bias),
        )
        self.use_triton = use_triton

    @property
    def to_out(self) -> nn.Linear:
        """The projection back."""
        return self[-1]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Feed tokens x [b, n, d] forward."""
        return self.beside(x)[1]

    def beside(self, x: Tensor, *, readers: int = 1) -> tuple[Tensor, ...]:
        """See `xlroute.beside`; x as often as there are readers."""
        norm, expand, activate, dropout, project = self
        *read, rows = normed_beside(norm, x, self.use_triton, readers=readers)
        backend = resolve_backend(pick_backend(self.use_triton, x.device), x)
        exact = is_plain(activate, nn.GELU) and activate.approximate == "none"
        if backend == "triton" and exact and is_plain(expand, nn.Linear) and expand.bias is not None:
            hidden = bias_gelu(F.linear(rows, expand.weight), expand.bias, backend=backend)
        else:
            hidden = activate(expand(rows))
        return *read, project(dropout(hidden))


class ConditionalRoutedFeedForward(nn.Module):
    """A light feedforward for all tokens, and a heavy one for the few that a router picks.

    out_i = light(x_i) + gate_i heavy(x_i), the second term for routed tokens alone (CoLT5, arXiv 2303.09752).
    Only they are projected by the heavy branch. Gradient reaches the router through the gates.

    The routed tokens are the best of the whole sequence, so a token's output depends on later ones: this is
    no layer for causal models, unless they pick the tokens themselves and call `both_branches`.

    Args:
        dim: width d of the tokens.
        num_heavy_tokens: k, tokens that take the heavy branch; a float in (0, 1] is a share of each stream's
            valid tokens.
        light_ff_mult: hidden width of the light branch over d; the paper has 1/2.
        heavy_ff_mult: hidden width of the heavy branch over d; the paper has 4.
        router_straight_through: gates of routed tokens are 1 in value and keep their gradient.
        router_kwargs: further arguments of `CoordinateDescentRouter`, whose defaults keep gates from
            saturating. Those of colt5-attention are `n_iters=20, eps=0.03, eps_init=4.0, eps_decay=0.7,
            score_scale=None`.
        use_triton: whether what is not a plain matrix product runs in Triton; None picks by device.
        dropout: of the hidden units of both branches.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens: int | float,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = {},
        use_triton: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_num_tokens("num_heavy_tokens", num_heavy_tokens)
        self.num_heavy_tokens = num_heavy_tokens
        self.router = CoordinateDescentRouter(
            dim,
            **router_options(router_kwargs, straight_through=router_straight_through, use_triton=use_triton),
        )
        options: dict[str, Any] = {"dropout": dropout, "bias": True, "use_triton": self.router.use_triton}
        self.light_ff = FeedForward(dim, mult=light_ff_mult, **options)
        self.heavy_ff = FeedForward(dim, mult=heavy_ff_mult, **options)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_tokens: int | float | None = None,
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, RoutingStats]:
        """Feed all tokens forward, the routed ones through both branches.

        Args:
            x: tokens [b, n, d].
            mask: bool [b, n], the tokens that may be routed; the others take the light branch alone.
            num_heavy_tokens: overrides that of the module.
            return_stats: return how saturated the routing was too.

        Returns:
            [b, n, d]; with `return_stats`, that and a `RoutingStats`.

        Raises:
            ValueError: for shapes and options that do not fit together.
        """
        return self._feed(x, mask, num_heavy_tokens, residual=False, return_stats=return_stats)

    def with_residual(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_tokens: int | float | None = None,
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, RoutingStats]:
        """What `forward` gives, and x added to it."""
        return self._feed(x, mask, num_heavy_tokens, residual=True, return_stats=return_stats)

    def _feed(
        self,
        x: Tensor,
        mask: Tensor | None,
        num_heavy_tokens: int | float | None,
        *,
        residual: bool,
        return_stats: bool,
    ) -> Tensor | tuple[Tensor, RoutingStats]:
        if x.ndim != 3:
            raise ValueError(f"x: expected tokens [b, n, d], got {tuple(x.shape)}")
        n, router = x.shape[1], self.router
        num_tokens = self.num_heavy_tokens if num_heavy_tokens is None else num_heavy_tokens
        k = rows_to_route(num_tokens, n)
        if k == n and mask is None and not return_stats:
            x, light = call_beside(self.light_ff, FeedForward, x)
            x, heavy = call_beside(self.heavy_ff, FeedForward, x)
            out: Tensor = light + heavy
            return out + x if residual else out
        if is_plain(self.light_ff, FeedForward):
            scored, gathered, *read, light = self.light_ff.beside(x, readers=2 + residual)
            x = read[0] if residual else x
        else:
            scored, gathered, light = x, x, self.light_ff(x)
        if mask is None and router.route_block_size is None and is_plain(router, CoordinateDescentRouter):
            # What a call of the router does, but its two readers of the tokens are told apart.
            gates, indices, stats = router.choose(
                router.scores(scored), num_tokens=k, with_stats=return_stats
            )
            indices, gates = indices[:, 0], gates[:, 0]
            tokens = gather_rows(gathered, indices, pick_backend(router.use_triton, x.device))
            routed = RouterOutput(indices, gates, tokens, None)
            stats = None if stats is None else RoutingStats(*(t[:, 0] for t in stats))
        else:
            routed, stats = route(router, scored, with_stats=return_stats, num_tokens=num_tokens, mask=mask)
        out = self._add_heavy(light, routed, x if residual else None)
        return out if stats is None else (out, stats)

    def both_branches(self, x: Tensor, routed: RouterOutput) -> Tensor:
        """Feed all tokens x [b, n, d] forward, and those of them that were routed by both branches."""
        return self.both_branches_beside(x, routed)[1]

    def both_branches_beside(self, x: Tensor, routed: RouterOutput) -> tuple[Tensor, Tensor]:
        """See `xlroute.beside`: tokens x for another to read, and what `both_branches` gives for them."""
        x, light = call_beside(self.light_ff, FeedForward, x)
        return x, self._add_heavy(light, routed, None)

    def _add_heavy(self, light: Tensor, routed: RouterOutput, residual: Tensor | None) -> Tensor:
        heavy = self.heavy_ff(routed.tokens)
        return add_routed(light, heavy, routed, use_triton=self.router.use_triton, residual=residual)
