from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import AttentionStats, ConditionalRoutedImageAttention


def build(**options: Any) -> ConditionalRoutedImageAttention:
    small = {
        "dim": 12,
        "num_heavy_tokens_q": 6,
        "num_heavy_tokens_kv": 7,
        "num_routed_kv": 2,
        "light_dim_head": 5,
        "light_heads": 2,
        "light_window_size": 3,
        "heavy_dim_head": 4,
        "heavy_heads": 4,
        "router_kwargs": {"eps": 0.7},
    }
    return ConditionalRoutedImageAttention(**{**small, **options})


def light_by_hand(layer: ConditionalRoutedImageAttention, by_hand: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Place by place of one map x [p, q, d]: to what is visible in its window."""
    light, w = layer.light_attn, layer.light_attn.window_size
    rows, columns, _ = x.shape
    normed = torch.stack([by_hand.rms_norm(light.norm, place) for place in x.flatten(0, 1)])
    projected = (normed @ light.to_qkv.weight.T).unflatten(-1, (3, light.heads, -1))
    q, k, v = projected.unflatten(0, (rows, columns)).unbind(2)
    out = torch.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            window = [
                (y, z) for y in range(rows) for z in range(columns) if y // w == i // w and z // w == j // w
            ]
            window = [place for place in window if mask[place]] or window
            heads = []
            for h in range(light.heads):
                keys, values = (torch.stack([t[y, z, h] for y, z in window]) for t in (k, v))
                heads.append((keys @ q[i, j, h] / keys.shape[-1] ** 0.5).softmax(0) @ values)
            out[i, j] = light.to_out.weight @ torch.cat(heads)
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("sides", "options"),
    [
        ((6, 3), {}),
        ((4, 5), {"router_straight_through": False, "multiply_keys_by_score": True}),
        ((5, 2), {"light_window_size": 8, "multiply_queries_by_score": True, "use_null_q_tokens": False}),
        ((1, 1), {}),
    ],
    ids=str,
)
def test_it_is_attention_in_windows_plus_attention_among_routed_places(
    sides: tuple[int, int], options: dict[str, Any], masked: bool, by_hand: Any
) -> None:
    layer = build(**options).double()
    for norm in (layer.light_attn.norm, layer.heavy_attn.norm, layer.heavy_attn.context_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(2, *sides, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, *sides) < 0.6 if masked else None
    if mask is not None:
        mask[0, :3, :3] = False  # windows in which nothing is visible, one of them cut off by the border
        mask[1, 3:, 3:] = False
    out = layer(x, mask=mask)
    maps = []
    for b in range(2):
        seen = torch.ones(sides, dtype=torch.bool) if mask is None else mask[b]
        heavy = by_hand.heavy(layer.heavy_attn, x[b].flatten(0, 1), seen.flatten(), (6, 7))
        maps.append(light_by_hand(layer, by_hand, x[b], seen) + heavy.unflatten(0, sides))
    expected = torch.stack(maps)
    torch.testing.assert_close(out, expected)
    inputs = (x, *layer.parameters())
    cotangent = torch.randn_like(out)
    given = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for ours, theirs, tensor in zip(given, wanted, inputs, strict=True):
        zero = torch.zeros_like(tensor)
        torch.testing.assert_close(zero if ours is None else ours, zero if theirs is None else theirs)


def test_channels_may_come_first() -> None:
    last, first = build(), build(channel_first=True)
    first.load_state_dict(last.state_dict())
    x, mask = torch.randn(2, 7, 5, 12), torch.rand(2, 7, 5) < 0.7
    out = first(x.permute(0, 3, 1, 2), mask=mask)
    assert out.shape == (2, 12, 7, 5)
    torch.testing.assert_close(out.permute(0, 2, 3, 1), last(x, mask=mask))


def test_numbers_may_vary_by_call_and_statistics_come_on_request() -> None:
    layer = build(num_heavy_tokens_q=0.2, num_heavy_tokens_kv=0.4)
    x = torch.randn(2, 5, 7, 12)
    assert torch.equal(layer(x), layer(x, num_heavy_tokens_q=7, num_heavy_tokens_kv=14))
    out, stats = layer(x, return_stats=True)
    torch.testing.assert_close(out, layer(x))
    assert isinstance(stats, AttentionStats)
    assert stats.overlap.shape == (2, 1)


def test_maps_without_places() -> None:
    assert build()(torch.randn(2, 0, 5, 12)).shape == (2, 0, 5, 12)
    assert build(channel_first=True)(torch.randn(0, 12, 4, 5)).shape == (0, 12, 4, 5)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="light_window_size: expected at least 1, got 0"):
        build(light_window_size=0)
    with pytest.raises(ValueError, match="num_heavy_tokens_q: expected at least 1, got 0"):
        build(num_heavy_tokens_q=0)
    with pytest.raises(ValueError, match=r"x: expected maps \[b, p, q, d\] with d = 12, got \(2, 12, 4, 4\)"):
        build()(torch.randn(2, 12, 4, 4))
    with pytest.raises(ValueError, match=r"x: expected maps \[b, d, p, q\] with d = 12, got \(2, 4, 4, 12\)"):
        build(channel_first=True)(torch.randn(2, 4, 4, 12))
    with pytest.raises(ValueError, match=r"mask: expected bool \(2, 4, 4\), got torch.bool \(2, 16\)"):
        build()(torch.randn(2, 4, 4, 12), mask=torch.ones(2, 16, dtype=torch.bool))
