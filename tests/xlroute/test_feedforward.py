from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import ConditionalRoutedFeedForward, RoutingStats
from xlroute.feedforward import FeedForward


def build(**options: Any) -> ConditionalRoutedFeedForward:
    defaults = {"dim": 12, "num_heavy_tokens": 4, "router_kwargs": {"eps": 0.7}}
    layer = ConditionalRoutedFeedForward(**{**defaults, **options})
    for branch in (layer.light_ff, layer.heavy_ff):
        torch.nn.init.uniform_(branch[0].weight, 0.5, 2.0)
    return layer


def feed(by_hand: Any, ff: FeedForward, row: Tensor) -> Tensor:
    hidden = ff[1].weight @ by_hand.rms_norm(ff[0], row) + ff[1].bias
    hidden = hidden / 2 * (1 + torch.erf(hidden / math.sqrt(2)))
    return ff[4].weight @ hidden + ff[4].bias  # type: ignore[no-any-return]


def reference(
    by_hand: Any, layer: ConditionalRoutedFeedForward, x: Tensor, mask: Tensor | None, ks: list[int]
) -> Tensor:
    streams = []
    for b, k in enumerate(ks):
        gates = by_hand.route(layer.router, x[b], k, None if mask is None else mask[b])
        rows = []
        for i, row in enumerate(x[b]):
            out = feed(by_hand, layer.light_ff, row)
            rows.append(out + gates[i] * feed(by_hand, layer.heavy_ff, row) if i in gates else out)
        streams.append(torch.stack(rows))
    return torch.stack(streams)


@pytest.mark.parametrize("straight", [True, False], ids=["straight", "soft"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("n", "k"), [(15, 4), (15, 0.3), (4, 4), (3, 7), (1, 2)])
def test_it_is_the_light_branch_plus_the_gated_heavy_one(
    n: int, k: int | float, masked: bool, straight: bool, by_hand: Any
) -> None:
    layer = build(num_heavy_tokens=k, router_straight_through=straight).double()
    x = torch.randn(3, n, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(n) < torch.tensor([n, (n + 1) // 2, 0])[:, None] if masked else None
    ks = [n] * 3 if mask is None else mask.sum(1).tolist()
    ks = [k if isinstance(k, int) else max(int(k * valid + 0.5), 1) for valid in ks]
    out, expected = layer(x, mask), reference(by_hand, layer, x, mask, ks)
    torch.testing.assert_close(out, expected)
    inputs = (x, *layer.parameters())
    cotangent = torch.randn_like(out)
    given = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for ours, theirs, tensor in zip(given, wanted, inputs, strict=True):
        zero = torch.zeros_like(tensor)
        torch.testing.assert_close(zero if ours is None else ours, zero if theirs is None else theirs)


def test_only_routed_tokens_enter_the_heavy_branch() -> None:
    layer = build()
    seen: list[torch.Size] = []
    layer.heavy_ff.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    layer(torch.randn(2, 50, 12))
    layer(torch.randn(2, 50, 12), num_heavy_tokens=0.2)
    assert seen == [(2, 4, 12), (2, 10, 12)]


def test_statistics_come_on_request() -> None:
    layer = build(router_kwargs={"eps": 1.0})
    x = torch.randn(2, 50, 12)
    out, stats = layer(x, return_stats=True)
    assert torch.equal(out, layer(x))
    assert isinstance(stats, RoutingStats)
    torch.testing.assert_close(stats.gate_sum, torch.full((2,), 9 / 8))
    assert (stats.gradient_share > 0).all()
    assert (layer(x[:, :3], return_stats=True)[1].gradient_share == 0).all()


def test_nothing_in_nothing_out() -> None:
    layer = build()
    assert layer(torch.randn(2, 0, 12)).shape == (2, 0, 12)
    assert layer(torch.randn(2, 0, 12), torch.ones(2, 0, dtype=torch.bool)).shape == (2, 0, 12)
    assert layer(torch.randn(0, 9, 12)).shape == (0, 9, 12)


def test_bad_arguments_are_refused() -> None:
    for k in (0, 1.5, 0.0):
        with pytest.raises(ValueError, match=r"num_heavy_tokens: expected .*, got"):
            build(num_heavy_tokens=k)
    with pytest.raises(ValueError, match=r"mult: expected at least 1 / dim.*, got 0.01"):
        build(light_ff_mult=0.01)
    with pytest.raises(ValueError, match="router_kwargs: expected no num_routing_tokens"):
        build(router_kwargs={"num_routing_tokens": 2})
    layer = build()
    with pytest.raises(ValueError, match=r"x: expected tokens \[b, n, d\], got \(3, 12\)"):
        layer(torch.randn(3, 12))
    with pytest.raises(ValueError, match=r"mask: expected bool \(2, 9\), got torch.bool \(2, 8\)"):
        layer(torch.randn(2, 9, 12), torch.ones(2, 8, dtype=torch.bool))
