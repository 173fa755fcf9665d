from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xlroute.causal_routing as causal_routing
from xlroute import AutoregressiveCache, ConditionalRoutedAutoregressiveAttention

W = 4
SMALL = {
    "dim": 12,
    "num_heavy_tokens_q": 2,
    "num_heavy_tokens_kv": 5,
    "light_dim_head": 5,
    "light_heads": 2,
    "light_window_size": 3,
    "heavy_window_size": W,
    "heavy_dim_head": 6,
    "heavy_heads": 4,
    "router_kwargs": {"eps": 0.7},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_routed_kv": 2, "rotary_emb": True, "router_straight_through": False},
    {
        "num_routed_kv": 4,
        "multiply_keys_by_score": True,
        "multiply_queries_by_score": True,
        "router_straight_through": False,
        "use_flash_attn": False,
    },
    {"num_heavy_tokens_q": 9, "num_heavy_tokens_kv": 50, "use_null_q_tokens": False},
    {"num_heavy_tokens_q": 0.75, "num_heavy_tokens_kv": 0.25, "rotary_emb": True},
]
NAMES = ["plain", "sets-rotary-soft", "gated-soft-formula", "all", "shares-rotary"]
DESCENT = {"router_kwargs": {"n_iters": 20, "eps": 0.3, "eps_init": 4.0, "eps_decay": 0.7}}
every_option = pytest.mark.parametrize("options", [*OPTIONS, DESCENT], ids=[*NAMES, "descent"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where cores are shared, threads that wait for each other are slow
    yield
    torch.set_num_threads(threads)


def build(**options: Any) -> ConditionalRoutedAutoregressiveAttention:
    return ConditionalRoutedAutoregressiveAttention(**{**SMALL, **options})


def light_by_hand(layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    light = layer.light_attn
    q, k, v = light.to_qkv(light.norm(x)).unflatten(-1, (3, light.heads, -1)).unbind(1)
    w = light.window_size
    rows = []
    for i in range(len(x)):
        seen = range(max(i // w - 1, 0) * w, i + 1)
        near = [j for j in seen if i == j or mask is None or mask[j]]
        weights = [(k[near, h] @ q[i, h] / q.shape[-1] ** 0.5).softmax(0) for h in range(light.heads)]
        rows.append(torch.cat([weights[h] @ v[near, h] for h in range(light.heads)]))
    return light.to_out(torch.stack(rows))  # type: ignore[no-any-return]


def queries_by_hand(
    by_hand: Any, layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, mask: Tensor | None, k: int
) -> dict[int, Tensor]:
    """Which tokens of a stream are routed queries, and their gates."""
    router = layer.heavy_attn.q_router
    s = by_hand.scores(router, x)
    routed = {}
    for begin in range(W, len(x), W):
        own, before = (
            [i for i in range(start, min(start + W, len(x))) if mask is None or mask[i]]
            for start in (begin, begin - W)
        )
        routed.update(by_hand.picked(router, s, own, before, k, W))
    return routed


def layer_by_hand(
    by_hand: Any, layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, mask: Tensor | None
) -> Tensor:
    """The layer for one stream x [n, d], token by token."""
    heavy = layer.heavy_attn
    k_q, k_kv = (
        round(k * W) if isinstance(k, float) else k
        for k in (layer.num_heavy_tokens_q, layer.num_heavy_tokens_kv)
    )
    queries = queries_by_hand(by_hand, layer, x, mask, k_q)
    null = torch.zeros_like(x[0]) if heavy.null_q_token is None else heavy.null_q_token
    rows = [torch.zeros_like(x[0])] * min(W, len(x))
    for begin in range(W, len(x), W):
        past = None if mask is None else mask[:begin]
        sets = [by_hand.route(heavy.kv_router, x[:begin], k_kv, past, r) for r in range(heavy.sets)]
        for i in range(begin, min(begin + W, len(x))):
            row = by_hand.query(heavy, x, i, queries[i], sets) if i in queries else null
            rows.append(row if sets[0] else torch.zeros_like(row))
    return light_by_hand(layer, x, mask) + torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("n", [14, 3])
def test_it_is_local_attention_plus_attention_to_the_routed_past(
    n: int, masked: bool, options: dict[str, Any], by_hand: Any
) -> None:
    layer = build(**options).double()
    for norm in (layer.heavy_attn.norm, layer.heavy_attn.context_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(3, n, 12, dtype=torch.float64, requires_grad=True)
    mask = None
    if masked:
        mask = torch.rand(3, n) < 0.6
        mask[1], mask[2] = False, torch.arange(n) >= 6
    out = layer(x, mask=mask)
    expected = torch.stack(
        [layer_by_hand(by_hand, layer, x[b], None if mask is None else mask[b]) for b in range(3)]
    )
    torch.testing.assert_close(out, expected)
    inputs = (x, *layer.parameters())
    cotangent = torch.randn_like(out)
    given = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for ours, theirs, tensor in zip(given, wanted, inputs, strict=True):
        zero = torch.zeros_like(tensor)
        torch.testing.assert_close(zero if ours is None else ours, zero if theirs is None else theirs)


@every_option
def test_no_token_sees_a_later_one(options: dict[str, Any]) -> None:
    layer = build(**options).double()
    n = 18
    x = torch.randn(2, n, 12).double()
    out = layer(x)
    for t in range(n):
        other = torch.cat((x[:, :t], 100 * torch.randn(2, n - t, 12).double()), dim=1)
        torch.testing.assert_close(layer(other)[:, :t], out[:, :t])
        torch.testing.assert_close(layer(x[:, :t]), out[:, :t])
    torch.testing.assert_close(layer.eval()(x), out)


def test_not_even_a_nan_comes_from_later_windows() -> None:
    # Within a window the light branch multiplies later values by a weight of zero, which NaN survives.
    layer = build(light_window_size=W, num_routed_kv=2).double()
    x = torch.randn(2, 20, 12).double()
    out = layer(x)
    for t in range(W, 20, W):
        poisoned = torch.cat((x[:, :t], torch.full_like(x[:, t:], torch.nan)), dim=1)
        torch.testing.assert_close(layer(poisoned)[:, :t], out[:, :t])


def test_the_first_window_reaches_far_beyond_the_light_one() -> None:
    layer = build(num_heavy_tokens_q=W, num_heavy_tokens_kv=20).double()
    x = torch.randn(1, 40, 12).double()
    other = torch.cat((torch.randn(1, W, 12).double(), x[:, W:]), dim=1)
    moved = (layer(other) - layer(x)).abs().amax(-1)[0]
    light = (layer.light_attn(other) - layer.light_attn(x)).abs().amax(-1)[0]
    assert (moved > 1e-9).all()
    assert not light[2 * W + 2 :].any()


def steps(
    layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, pieces: list[int], mask: Tensor | None = None
) -> Tensor:
    cache: AutoregressiveCache | None = None
    outs = []
    for part, part_mask in zip(
        x.split(pieces, dim=1),
        [None] * len(pieces) if mask is None else mask.split(pieces, dim=1),
        strict=True,
    ):
        out, cache = layer.step(part, cache, mask=part_mask)
        outs.append(out)
        assert cache.opened.length < W
    return torch.cat(outs, dim=1)


@every_option
@pytest.mark.parametrize(
    "pieces", [[1] * 23, [23], [3, 1, 0, 9, 2, 8], [4, 4, 8, 1, 6], [10, *[1] * 13]], ids=str
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_steps_equal_the_whole(masked: bool, pieces: list[int], options: dict[str, Any]) -> None:
    layer = build(**options).double()
    x = torch.randn(3, 23, 12).double()
    mask = None
    if masked:
        mask = torch.rand(3, 23) < 0.7
        mask[1] = torch.arange(23) >= 9
    torch.testing.assert_close(steps(layer, x, pieces, mask), layer(x, mask=mask))


def test_a_step_leaves_its_cache_as_it_was_and_has_a_gradient() -> None:
    layer = build().double()
    x = torch.randn(2, 15, 12, dtype=torch.float64, requires_grad=True)
    _, cache = layer.step(x[:, :9])
    first, _ = layer.step(x[:, 9:], cache)
    layer.step(torch.randn(2, 5, 12).double(), cache)
    again, _ = layer.step(x[:, 9:], cache)
    assert torch.equal(first, again)
    whole = layer(x)[:, 9:]
    torch.testing.assert_close(first, whole)
    cotangent = torch.randn_like(first)
    torch.testing.assert_close(
        torch.autograd.grad(first, x, cotangent), torch.autograd.grad(whole, x, cotangent)
    )


@pytest.mark.parametrize("has_light_attn", [True, False])
def test_tokens_that_are_only_remembered_are_seen_all_the_same(has_light_attn: bool) -> None:
    layer = build(has_light_attn=has_light_attn).double()
    x = torch.randn(2, 25, 12).double()
    mask = torch.rand(2, 25) < 0.8
    for start in (3, 4, 14):
        cache = layer.remember(x[:, :start], mask=mask[:, :start])
        out, _ = layer.read_on(x[:, start:], cache, mask=mask[:, start:])
        torch.testing.assert_close(out, layer(x, mask=mask)[:, start:])


def test_without_a_light_branch_it_is_the_heavy_one() -> None:
    layer, heavy = build().double(), build(has_light_attn=False).double()
    heavy.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 15, 12).double()
    assert layer.light_attn is not None
    torch.testing.assert_close(heavy(x), layer(x) - layer.light_attn(x))
    assert not heavy(x[:, :W]).any()


@pytest.mark.parametrize("query_routing", ["threshold", "window"])
def test_padding_in_front_changes_nothing(query_routing: str) -> None:
    layer = build(light_window_size=W, query_routing=query_routing).double().eval()
    x = torch.randn(2, 3 * W + 2, 12).double()
    padded = torch.cat((torch.randn(2, 2 * W, 12).double(), x), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 2 * W).expand(2, -1)
    torch.testing.assert_close(layer(padded, mask=mask)[:, 2 * W :], layer(x))


def test_no_tokens_and_no_streams() -> None:
    layer = build()
    assert layer(torch.randn(2, 0, 12)).shape == (2, 0, 12)
    assert layer(torch.randn(0, 11, 12)).shape == (0, 11, 12)
    assert layer(torch.randn(2, 1, 12)).shape == (2, 1, 12)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def memory_of(n: int) -> tuple[int, int]:
    """Bytes of the largest tensor, and of all that is kept for the backward, at n tokens in windows of 4."""
    layer = build(dim=8, num_heavy_tokens_kv=3, light_dim_head=4, heavy_dim_head=4)
    x = torch.randn(1, n, 8, requires_grad=True)
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x).sum().backward()
    return largest.bytes, sum(kept.values())


def test_memory_grows_with_tokens_and_routed_rows_alone() -> None:
    small, large = memory_of(1024), memory_of(4096)
    for before, after in zip(small, large, strict=True):
        assert after <= 4.1 * before
    # One number for each token and window would be 4 MiB; with their rows, 32 and more.
    assert large[0] <= 1 << 20


def test_routed_queries_keep_to_their_places_and_the_first_of_them_come_first() -> None:
    layer = build(num_heavy_tokens_q=2)
    assert layer.heavy_attn.q_router is not None
    token = layer.heavy_attn.q_router.routing_token
    assert token is not None
    low, high = -token.detach(), token.detach()
    null = layer.heavy_attn.null_q_token
    x = torch.cat([low] * W + [high] * W + [low] * W)[None]
    routed = ((layer(x) - layer.light_attn(x))[0, W:] - null).abs().amax(-1) > 1e-4
    assert routed.tolist() == [True, True, False, False] + [False] * W


def test_window_routing_warns_once_in_training() -> None:
    causal_routing._warn_of_looking_ahead.cache_clear()
    layer = build(query_routing="window")
    x = torch.randn(2, 11, 12)
    layer.eval()(x)
    layer.train()
    with pytest.warns(UserWarning, match="query_routing='window' looks ahead"):
        layer(x)
    layer(x)
    with pytest.raises(ValueError, match="query_routing: expected 'threshold' in a layer that reads step by"):
        layer.step(x)


def test_random_routes_differ_and_have_no_gradient() -> None:
    layer = build()
    x = torch.randn(16, 40, 12)  # the last windows of a stream are alike by chance in one of about 18
    first, second = (layer(x, random_route=True) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, -W:], second[:, -W:])
    first.sum().backward()
    for router in (layer.heavy_attn.q_router, layer.heavy_attn.kv_router):
        assert router is not None
        assert router.routing_token is not None
        assert router.routing_token.grad is None


def test_statistics() -> None:
    layer = build(num_routed_kv=2)
    x = torch.randn(3, 18, 12)
    out, stats = layer(x, return_stats=True)
    torch.testing.assert_close(out, layer(x))
    assert stats.capacity_used.shape == (3, 4)
    assert ((stats.capacity_used >= 0) & (stats.capacity_used <= 1)).all()
    assert stats.keys_values.gate_sum.shape == stats.keys_values.gradient_share.shape == (3, 2, 4)
    torch.testing.assert_close(stats.keys_values.gate_sum[:, :, 1:], torch.full((3, 2, 3), 9 / 8))
    assert stats.overlap.shape == (3, 2, 3)
    # All four rows before the second window are among the five of the third, or fewer.
    assert ((5 * stats.overlap).round() == 5 * stats.overlap).all()
    assert layer(x[:, :3], return_stats=True)[1].capacity_used.shape == (3, 0)
    _, everything = layer(x[:, :16], num_heavy_tokens_q=W, num_heavy_tokens_kv=100, return_stats=True)
    assert (everything.capacity_used == 1).all()
    torch.testing.assert_close(everything.overlap[0, 0], torch.tensor([4 / 8, 8 / 12]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_in_half_precision_route_as_the_whole_does(dtype: torch.dtype) -> None:
    layer = build(num_routed_kv=2, rotary_emb=True).to(dtype)
    x = torch.randn(2, 19, 12).to(dtype)
    out = steps(layer, x, [5, 1, 13])
    assert out.dtype == dtype
    whole = layer(x)
    assert (out - whole).float().norm() < 8 * torch.finfo(dtype).eps * whole.float().norm()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="query_routing: expected 'threshold' or 'window', got 'top'"):
        build(query_routing="top")
    with pytest.raises(ValueError, match="router_kwargs: expected no route_block_size"):
        build(router_kwargs={"route_block_size": 4})
    with pytest.raises(ValueError, match="heavy_window_size: expected None or at least 1, got 0"):
        build(heavy_window_size=0)
    with pytest.raises(ValueError, match="num_heavy_tokens_q: expected at least 1, got 0"):
        build(num_heavy_tokens_q=0)
    layer = build()
    x = torch.randn(2, 9, 12)
    with pytest.raises(
        ValueError, match=r"num_heavy_tokens_kv: expected an int, or a share in \(0, 1\], got 1.5"
    ):
        layer(x, num_heavy_tokens_kv=1.5)
    with pytest.raises(ValueError, match=r"mask: expected bool \(2, 9\)"):
        layer(x, mask=torch.ones(2, 8, dtype=torch.bool))
    _, cache = layer.step(x)
    with pytest.raises(ValueError, match="x: expected the 2 streams of the cache, got 1"):
        layer.step(x[:1], cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def peer_of(layer: ConditionalRoutedAutoregressiveAttention, **options: Any) -> Any:
    """colt5-attention's layer with the weights of ours; for one routing token."""
    package = pytest.importorskip("colt5_attention.transformer_block")
    numbers = {**SMALL, "router_kwargs": {}, **options}
    peer = package.ConditionalRoutedAutoregressiveAttention(**numbers)
    heavy = layer.heavy_attn
    assert heavy.q_router is not None
    assert heavy.to_k is not None
    assert heavy.null_key is not None
    by_head = [t.weight.unflatten(0, (heavy.heads, -1)) for t in (heavy.to_k, heavy.to_v)]
    weights = {
        **{f"light_attn.{name}": t for name, t in layer.light_attn.state_dict().items()},
        "null_q_token": heavy.null_q_token,
        "q_router.routing_token": heavy.q_router.routing_token,
        "kv_router.routing_token": heavy.kv_router.routing_token,
        "heavy_attn.norm.gamma": heavy.norm.weight,
        "heavy_attn.null_kv": torch.stack((heavy.null_key[:, 0], heavy.null_value[:, 0])),
        "heavy_attn.to_q.weight": heavy.to_q.weight,
        "heavy_attn.to_kv.weight": torch.cat(by_head, dim=1).flatten(0, 1),
        "heavy_attn.to_out.weight": heavy.to_out.weight,
    }
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert set(missing) <= {"rotary_emb.inv_freq"}
    assert not unexpected
    return peer.double()


PEER_ROUTER = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "score_scale": None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary_emb": True, "router_straight_through": False},
        {"multiply_keys_by_score": True, "multiply_queries_by_score": True},
    ],
    ids=str,
)
def test_it_equals_colt5_attention_where_that_is_right(options: dict[str, Any]) -> None:
    options = {"num_heavy_tokens_kv": 3, **options}
    layer = build(router_kwargs=PEER_ROUTER, query_routing="window", **options).eval()
    # So near each other that fewer than k gates are 1: it takes the top-k of gates, not of scores.
    for router in (layer.heavy_attn.q_router, layer.heavy_attn.kv_router):
        assert router is not None
        assert router.routing_token is not None
        router.routing_token.data *= 0.01
    layer = layer.double()
    peer = peer_of(layer, **options)
    x = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), peer(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(out)
    ours = dict(layer.named_parameters())
    theirs = dict(peer.named_parameters())
    names = {
        "light_attn.to_qkv.weight": "light_attn.to_qkv.weight",
        "light_attn.to_out.weight": "light_attn.to_out.weight",
        "heavy_attn.null_q_token": "null_q_token",
        "heavy_attn.q_router.routing_token": "q_router.routing_token",
        "heavy_attn.kv_router.routing_token": "kv_router.routing_token",
        "heavy_attn.to_q.weight": "heavy_attn.to_q.weight",
        "heavy_attn.to_out.weight": "heavy_attn.to_out.weight",
    }
    given, wanted = (
        torch.autograd.grad(result, (x, *inputs), cotangent, allow_unused=True, materialize_grads=True)
        for result, inputs in (
            (out, [ours[name] for name in names]),
            (expected, [theirs[name] for name in names.values()]),
        )
    )
    for got, want in zip(given, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_it_equals_colt5_attention_where_all_tokens_are_routed() -> None:
    options = {"num_heavy_tokens_q": W, "num_heavy_tokens_kv": 50, "rotary_emb": True}
    layer = build(**options).double()
    x = torch.randn(2, 19, 12).double()
    torch.testing.assert_close(layer(x), peer_of(layer, **options)(x), rtol=1e-5, atol=1e-5)


def test_colt5_attention_sees_the_future_and_this_layer_does_not() -> None:
    layer = build(light_window_size=W).double()
    peer = peer_of(layer, light_window_size=W)
    x = torch.randn(1, 3 * W, 12).double()
    moved = {"ours": False, "theirs": False}
    for _ in range(20):
        other = torch.cat((x[:, :-1], 10 * torch.randn(1, 1, 12).double()), dim=1)
        for name, module in (("ours", layer), ("theirs", peer)):
            moved[name] |= bool((module(other) - module(x))[:, :-1].abs().max() > 1e-6)
    assert moved == {"ours": False, "theirs": True}


def test_what_was_read_takes_the_dtype_of_what_is_read_on() -> None:
    layer = build()
    x = torch.randn(1, 3 * W, SMALL["dim"])
    expected = layer(x)
    out, cache = layer.step(x[:, : W + 1])
    with torch.autocast("cpu", torch.bfloat16):
        rest, cache = layer.step(x[:, W + 1 :], cache)
    assert cache.ended.keys.dtype == cache.ended.values.dtype == torch.bfloat16
    assert (torch.cat((out, rest), dim=1) - expected).norm() < 0.05 * expected.norm()
