from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import (
    AttentionStats,
    BlockStats,
    ConditionalRoutedAttention,
    ConditionalRoutedTransformerBlock,
)
from xlroute.router import overlap

SMALL = {
    "dim": 12,
    "light_dim_head": 5,
    "light_heads": 2,
    "light_window_size": 6,
    "heavy_dim_head": 6,
    "heavy_heads": 4,
    "router_kwargs": {"eps": 0.7},
}


def build(**options: Any) -> ConditionalRoutedAttention:
    return ConditionalRoutedAttention(
        **{**SMALL, "num_heavy_tokens_q": 4, "num_heavy_tokens_kv": 5, **options}
    )


def build_block(**options: Any) -> ConditionalRoutedTransformerBlock:
    numbers = {"num_heavy_attn_tokens_q": 4, "num_heavy_attn_tokens_kv": 5, "num_heavy_ff_tokens": 3}
    return ConditionalRoutedTransformerBlock(**{**SMALL, **numbers, **options})


def light_by_hand(layer: ConditionalRoutedAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Each token to those at most half a window away, and to itself even if it is masked."""
    light = layer.light_attn
    if light is None:
        return torch.zeros_like(x)
    q, k, v = light.to_qkv(light.norm(x)).unflatten(-1, (3, light.heads, -1)).unbind(1)
    rows = []
    for i in range(len(x)):
        near = [j for j in range(len(x)) if abs(i - j) <= 3 and (i == j or mask is None or mask[j])]
        weights = [(k[near, h] @ q[i, h] / q.shape[-1] ** 0.5).softmax(0) for h in range(light.heads)]
        rows.append(torch.cat([weights[h] @ v[near, h] for h in range(light.heads)]))
    return light.to_out(torch.stack(rows))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_routed_kv": 2, "rotary_emb": True, "router_straight_through": False},
        {"num_routed_kv": 4, "multiply_keys_by_score": True, "multiply_queries_by_score": True},
        {
            "multiply_queries_by_score": True,
            "multiply_keys_by_score": True,
            "rotary_emb": True,
            "router_straight_through": False,
            "use_flash_attn": False,
        },
        {"has_light_attn": False, "use_null_q_tokens": False, "num_routed_kv": 2},
    ],
    ids=["plain", "sets-rotary-soft", "gated", "gated-rotary-soft-formula", "heavy-alone"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("n", [10, 1])
def test_it_is_local_attention_plus_attention_among_routed_tokens(
    n: int, masked: bool, options: dict[str, Any], by_hand: Any
) -> None:
    layer = build(**options).double()
    for norm in (layer.heavy_attn.norm, layer.heavy_attn.context_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(3, n, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(n) < torch.tensor([n, (n + 1) // 2, 0])[:, None] if masked else None
    out = layer(x, mask=mask)
    streams = []
    for b in range(3):
        row_mask = None if mask is None else mask[b]
        heavy = by_hand.heavy(layer.heavy_attn, x[b], row_mask, (4, 5))
        streams.append(heavy + light_by_hand(layer, x[b], row_mask))
    expected = torch.stack(streams)
    torch.testing.assert_close(out, expected)
    inputs = (x, *layer.parameters())
    cotangent = torch.randn_like(out)
    given = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for ours, theirs, tensor in zip(given, wanted, inputs, strict=True):
        zero = torch.zeros_like(tensor)
        torch.testing.assert_close(zero if ours is None else ours, zero if theirs is None else theirs)


def test_gates_on_keys_and_values_are_gates_on_their_input() -> None:
    """The paper's form: the scores multiply the (normalised) tokens that keys and values are made of."""
    layer = build(multiply_keys_by_score=True, router_straight_through=False, has_light_attn=False).double()
    heavy = layer.heavy_attn
    x = torch.randn(2, 20, 12).double()
    out = layer(x)
    gates = heavy.route(x).scores[..., None]
    heavy.multiply_keys_by_score = False
    heavy.kv_router.register_forward_hook(
        lambda _, __, routed: routed._replace(scores=torch.ones_like(routed.scores))
    )
    heavy.context_norm.register_forward_hook(lambda _, __, rows: rows * gates)
    torch.testing.assert_close(heavy(x, x), out)


def test_hooks_of_the_routers_see_what_was_chosen() -> None:
    layer = build(num_heavy_tokens_q=4, num_heavy_tokens_kv=5)
    x = torch.randn(2, 20, 12)
    expected, chosen = layer(x), []
    routers = (layer.heavy_attn.q_router, layer.heavy_attn.kv_router)
    for router in routers:
        router.register_forward_hook(lambda _, __, out: chosen.append(out.indices.shape[-1]))
    torch.testing.assert_close(layer(x), expected)
    assert chosen == [4, 5]


def test_numbers_of_routed_tokens_may_be_shares_and_vary_by_call() -> None:
    layer = build(num_heavy_tokens_q=0.25, num_heavy_tokens_kv=0.5, num_routed_kv=2)
    x = torch.randn(2, 20, 12)
    numbers = build(num_heavy_tokens_q=5, num_heavy_tokens_kv=10, num_routed_kv=2)
    numbers.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), numbers(x))
    again = layer(x, num_heavy_tokens_q=7, num_heavy_tokens_kv=0.9)
    assert torch.equal(again, numbers(x, num_heavy_tokens_q=0.35, num_heavy_tokens_kv=18))
    # A share counts a stream's own tokens: padding changes nothing.
    padded = torch.cat((x, torch.randn(2, 9, 12)), 1)
    mask = (torch.arange(29) < 20).expand(2, -1)
    torch.testing.assert_close(layer(padded, mask=mask)[:, :20], layer(x))


def test_statistics_come_on_request() -> None:
    layer = build(num_routed_kv=2, router_kwargs={"eps": 1.0})
    x = torch.randn(2, 60, 12)
    out, stats = layer(x, return_stats=True)
    torch.testing.assert_close(out, layer(x))
    assert isinstance(stats, AttentionStats)
    assert stats.queries is not None
    torch.testing.assert_close(stats.queries.gate_sum, torch.full((2,), 9 / 8))
    torch.testing.assert_close(stats.keys_values.gate_sum, torch.full((2, 2), 9 / 8))
    sets = layer.heavy_attn.route(x).indices
    for b in range(2):
        first, second = (set(rows.tolist()) for rows in sets[b])
        assert stats.overlap[b, 0] == pytest.approx(len(first & second) / 5)


def test_overlap_leaves_out_what_is_no_row() -> None:
    sets = torch.tensor([[4, 2, -1], [2, 9, 4], [-1, -1, -1], [-1, 1, 2]])
    assert overlap(sets).tolist() == pytest.approx([2 / 3, 0.0, 0.0])


def test_a_block_is_both_layers_with_residuals() -> None:
    block = build_block(num_routed_kv=2, rotary_emb=True)
    x, mask = torch.randn(2, 30, 12), torch.rand(2, 30) < 0.7
    middle = x + block.conditional_attn(x, mask=mask)
    assert torch.equal(block(x, mask), middle + block.conditional_ff(middle, mask))
    middle = x + block.conditional_attn(x, num_heavy_tokens_q=2, num_heavy_tokens_kv=0.5)
    expected = middle + block.conditional_ff(middle, num_heavy_tokens=9)
    assert torch.equal(block(x, None, 2, 0.5, 9), expected)
    out, stats = block(x, mask, return_stats=True)
    torch.testing.assert_close(out, block(x, mask))
    assert isinstance(stats, BlockStats)
    assert stats.attention.overlap.shape == (2, 1)
    assert stats.feedforward.gate_sum.shape == (2,)


def test_bad_arguments_are_refused() -> None:
    for name in ("num_heavy_tokens_q", "num_heavy_tokens_kv"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            build(**{name: 0})
        with pytest.raises(ValueError, match=rf"{name}: expected an int, or a share in \(0, 1\], got 2.0"):
            build(**{name: 2.0})
    with pytest.raises(ValueError, match="light_window_size: expected at least 2, got 1"):
        build(light_window_size=1)
    with pytest.raises(ValueError, match="num_routed_kv: expected at least 1, got 0"):
        build(num_routed_kv=0)
    with pytest.raises(ValueError, match="heads: expected a multiple of the 3 routing tokens, got 4"):
        build(num_routed_kv=3)
    with pytest.raises(ValueError, match="dim_head: expected an even number with rotary_emb=True, got 5"):
        build(rotary_emb=True, heavy_dim_head=5)
    with pytest.raises(ValueError, match=r"mask: expected bool \(2, 9\)"):
        build()(torch.randn(2, 9, 12), mask=torch.ones(2, 8, dtype=torch.bool))
