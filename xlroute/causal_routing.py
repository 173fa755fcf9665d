"""Routing of tokens without a look ahead: whether a token is picked is decided by the window before.

Shapes: b streams, n tokens, d dim, w tokens in a window, c windows, k places for routed tokens in a window.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from xlroute.backend import pick_backend
from xlroute.kernels import gather_rows, water_levels
from xlroute.router import CoordinateDescentRouter, RouterOutput, check_num_tokens, rows_to_route

QueryRouting = Literal["threshold", "window"]


def places_in_window(name: str, number: int | float, w: int) -> int:
    """A number of tokens; a float is a share of the w tokens of a window.

    Raises:
        ValueError: for a number out of range.
    """
    check_num_tokens(name, number)
    return rows_to_route(number, w) if isinstance(number, float) else number


def check_query_routing(query_routing: str) -> None:
    """Raise ValueError for a way of routing that there is not."""
    if query_routing not in ("threshold", "window"):
        raise ValueError(f"query_routing: expected 'threshold' or 'window', got {query_routing!r}")


def route_newest(
    router: CoordinateDescentRouter,
    x: Tensor,
    s: Tensor,
    mask: Tensor | None,
    *,
    window: int,
    num_tokens: int,
    query_routing: QueryRouting = "threshold",
    random_route: bool = False,
) -> RouterOutput:
    """Pick among the newest tokens, at most so many of each window.

    Args:
        router: whose scores these are.
        x: the newest tokens [b, n, d].
        s: scores [b, t] of tokens up to the last of x, from the start of the window before that of the first
            of x. They are cut into windows of w from there on.
        mask: bool [b, t], the tokens that count; None for all.
        window: w.
        num_tokens: k, at most w.
        query_routing: "threshold", by the window before: see `ConditionalRoutedAutoregressiveAttention`; or
            "window", the top-k of each window, which looks ahead, and in training warns of it once.
        random_route: pick by random scores, with gates of 1 and no gradient.

    Returns:
        Places in x [b, c k], -1 for places that are not used, gates and tokens; in order of windows.
    """
    n, t = x.shape[1], s.shape[1]
    fill = -t % window

    def windows(row: Tensor) -> Tensor:
        return rearrange(F.pad(row, (0, fill)), "b (c w) -> b c w", w=window)

    if query_routing == "window" and router.training and not torch.compiler.is_compiling():
        _warn_of_looking_ahead()
    valid = windows(torch.ones_like(s, dtype=torch.bool) if mask is None else mask)
    s = windows(s)  # [b, 1 + c, w]
    if random_route:
        s = torch.rand_like(s)
    places = torch.arange(window - t + n, s.shape[1] * window - t + n, device=x.device).view(-1, window)
    if query_routing == "window":
        gates, chosen, _ = router.choose(
            s[:, 1:], num_tokens=num_tokens, mask=valid[:, 1:], random_route=random_route
        )
    else:
        gates, kept = _above_threshold(router, s, valid, num_tokens, random_route)
        kept = kept & (places >= 0)
        chosen = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)[..., : min(num_tokens, n)]
        chosen = chosen.masked_fill(~kept.gather(-1, chosen), -1)
        gates = gates.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0)
    indices = torch.where(chosen < 0, -1, chosen + places[:, :1]).flatten(1)
    tokens = gather_rows(x, indices, pick_backend(router.use_triton, x.device))
    return RouterOutput(indices, gates.flatten(1), tokens, None)


def route_on(
    router: CoordinateDescentRouter,
    x: Tensor,
    before: Tensor,
    *,
    window: int,
    num_tokens: int | float,
    query_routing: QueryRouting = "threshold",
) -> tuple[RouterOutput, Tensor]:
    """Score the next tokens and pick among them.

    Args:
        router: with one routing token.
        x: the next tokens [b, n, d].
        before: scores [b, t] of the tokens before them, the last w + i of them or some whole windows more if
            i < w tokens of the present window have been read; -inf for tokens that there are not.
        window: w.
        num_tokens: places for them in each window; a float is a share of w.
        query_routing: see `route_newest`.

    Returns:
        What `route_newest` does, and the scores [b, n].
    """
    s = router.scores(x)[:, 0]
    begin = before.shape[1] // window * window - window
    strip = torch.cat((before[:, begin:], s), dim=1)
    routed = route_newest(
        router,
        x,
        strip,
        strip > -math.inf,
        window=window,
        num_tokens=min(places_in_window("num_tokens", num_tokens, window), window),
        query_routing=query_routing,
    )
    return routed, s


def _above_threshold(
    router: CoordinateDescentRouter, s: Tensor, valid: Tensor, k: int, random_route: bool
) -> tuple[Tensor, Tensor]:
    """Gates of all tokens, and which are routed, of the windows after the first in s [b, 1 + c, w]."""
    w = s.shape[-1]
    own, before = s[:, 1:], s[:, :-1]
    if k == w:
        return torch.ones_like(own), valid[:, 1:]
    count = valid[:, :-1].sum(-1)
    wanted = -(-count * k // w)
    best = before.detach().masked_fill(~valid[:, :-1], -math.inf).topk(k, dim=-1).values
    threshold = best.gather(-1, (wanted - 1).clamp(min=0)[..., None])
    threshold = threshold.masked_fill((wanted == 0)[..., None], math.inf)
    reached = valid[:, 1:] & (own >= threshold)
    kept = reached & (reached.cumsum(-1) <= k)
    if random_route:
        return torch.ones_like(own), kept
    budget = k * router.fetch_k_ratio
    levels = water_levels(
        before,
        k=(count.to(torch.float64) * budget / w).clamp(max=count),
        eps=router.eps,
        mask=valid[:, :-1],
        backend=pick_backend(router.use_triton, s.device),
        largest=math.ceil(budget),
    )
    gates = ((own + levels[..., None]) / router.eps).clamp(max=0).exp()
    return (gates - gates.detach() + 1 if router.straight_through else gates), kept


@functools.cache
def _warn_of_looking_ahead() -> None:
    warnings.warn(
        "query_routing='window' looks ahead: which tokens are routed depends on later ones, so that the loss "
        "in training is not that of generation; 'threshold' does not",
        stacklevel=2,
    )
