from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlroute import CoordinateDescentRouter
from xlroute.backend import _warn_once, pick_backend
from xlroute.memory import MemoryStore
from xlroute.router import block_quotas


def by_hand(x: Tensor, tokens: Tensor) -> Tensor:
    """Normalised scores [b, r, m] in float64, straight from their definition."""
    x, tokens = x.double(), tokens.double()
    normalised = x / x.square().mean(-1, keepdim=True).sqrt()
    return torch.einsum("bmd,rd->brm", normalised, tokens) / x.shape[-1] ** 0.5


def test_it_chooses_the_top_k_of_the_scores_in_order() -> None:
    # In float32, two scores may be so close that the rounding of either formula decides.
    x = torch.randn(3, 200, 32, dtype=torch.float64)
    router = CoordinateDescentRouter(32, num_routing_tokens=2).double()
    out = router(x, num_tokens=20)
    assert router.routing_token is not None
    expected = by_hand(x, router.routing_token).topk(20).indices
    assert torch.equal(out.indices, expected)
    assert out.mask is None
    for b in range(3):
        assert torch.equal(out.tokens[b], x[b][out.indices[b]])


def test_gates_are_one_in_value_and_carry_gradient() -> None:
    x = torch.randn(2, 300, 16, requires_grad=True)
    router = CoordinateDescentRouter(16, eps=1.0)
    out = router(x, num_tokens=10)
    assert torch.equal(out.scores, torch.ones(2, 10))
    (out.scores * torch.randn(2, 10)).sum().backward()
    assert router.routing_token is not None
    assert router.routing_token.grad is not None
    assert router.routing_token.grad.abs().max() > 0
    # A rows's score competes with all others, so rows that were not chosen have gradient too.
    assert x.grad is not None
    assert (x.grad.abs().amax(-1) > 0).sum() > 20


def test_without_straight_through_the_scores_are_the_soft_top_k() -> None:
    x = torch.randn(2, 300, 16, dtype=torch.float64)
    router = CoordinateDescentRouter(16, straight_through=False, fetch_k_ratio=1.5, eps=0.5).double()
    out = router(x, num_tokens=10)
    assert router.routing_token is not None
    s = by_hand(x, router.routing_token)[:, 0]
    low, high = torch.full((2, 1), -50.0).double(), torch.full((2, 1), 50.0).double()
    for _ in range(200):  # bisect for the water level at which min(1, exp((s + a) / eps)) sums to 15
        a = (low + high) / 2
        too_much = ((s + a) / 0.5).exp().clamp(max=1).sum(-1, keepdim=True) > 15
        low, high = torch.where(too_much, low, a), torch.where(too_much, a, high)
    gates = ((s + low) / 0.5).exp().clamp(max=1)
    torch.testing.assert_close(out.scores, gates.gather(-1, out.indices), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_iters", [None, 20])
def test_masked_rows_are_never_chosen_and_short_choices_are_padded(n_iters: int | None) -> None:
    x = torch.randn(3, 50, 8)
    mask = torch.rand(3, 50) < 0.5
    mask[1] = False
    mask[2] = False
    mask[2, [4, 7]] = True
    router = CoordinateDescentRouter(8, num_routing_tokens=2, n_iters=n_iters)
    out = router(x, num_tokens=6, mask=mask)
    assert out.mask is not None
    assert mask[0][out.indices[0]].all()
    assert (out.indices[1] == -1).all()
    assert sorted(out.indices[2, 0].tolist()) == [-1, -1, -1, -1, 4, 7]
    assert torch.equal(out.mask, out.indices >= 0)
    assert torch.equal(out.scores, out.mask.float())
    assert not out.tokens[1].any()
    out.scores.sum().backward()
    assert router.routing_token is not None
    assert router.routing_token.grad is not None
    assert router.routing_token.grad.isfinite().all()


def test_ties_go_to_the_lower_index() -> None:
    x = torch.randn(1, 1, 8).repeat(1, 30, 1)
    out = CoordinateDescentRouter(8)(x, num_tokens=5)
    assert out.indices.tolist() == [[0, 1, 2, 3, 4]]


def test_fewer_rows_than_asked_for_are_all_chosen() -> None:
    out = CoordinateDescentRouter(8)(torch.randn(2, 3, 8), num_tokens=10)
    assert sorted(out.indices[0].tolist()) == [0, 1, 2]
    assert torch.equal(out.scores, torch.ones(2, 3))


@pytest.mark.parametrize("n_iters", [None, 20])
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("share", [0.3, 0.01, 1.0])
def test_a_share_of_the_rows_is_a_share_of_those_of_each_stream(
    share: float, block: int | None, n_iters: int | None
) -> None:
    lengths = [50, 0, 23, 1]
    x, mask = torch.randn(4, 50, 8), torch.arange(50) < torch.tensor(lengths)[:, None]
    router = CoordinateDescentRouter(
        8, num_routing_tokens=2, straight_through=False, route_block_size=block, n_iters=n_iters
    )
    out = router(x, num_tokens=share, mask=mask)
    for b, length in enumerate(lengths):
        k = max(round(share * length), min(length, 1))
        assert ((out.indices[b] >= 0).sum(-1) == k).all()
        assert not out.scores[b, :, k:].any()
        assert not out.tokens[b, :, k:].any()
        if length:
            alone = router(x[b : b + 1, :length], num_tokens=share)
            assert torch.equal(alone.indices[0], out.indices[b, :, :k])
            torch.testing.assert_close(alone.scores[0], out.scores[b, :, :k])
    assert torch.equal(router(x[:1], num_tokens=share).indices, router(x[:1], num_tokens=k_of(share)).indices)


def k_of(share: float) -> int:
    return max(round(share * 50), 1)


@pytest.mark.parametrize("options", [{}, {"straight_through": False}, {"n_iters": 20}], ids=str)
def test_choosing_by_given_scores_is_what_a_call_does(options: dict[str, Any]) -> None:
    router, other = (CoordinateDescentRouter(8, num_routing_tokens=r, **options) for r in (2, 1))
    x, mask = torch.randn(3, 30, 8), torch.rand(3, 30) < 0.2
    s = router.scores(x, other)
    assert s.shape == (3, 3, 30)
    torch.testing.assert_close(s[:, 2:], other.scores(x))
    expected, stats = router.route_with_stats(x, num_tokens=5, mask=mask)
    gates, indices, none = router.choose(s[:, :2], num_tokens=5, mask=mask[:, None])
    assert none is None
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(gates, expected.scores)
    again, _, given = router.choose(s[:, :2], num_tokens=5, mask=mask[:, None], with_stats=True)
    torch.testing.assert_close(again, gates)
    torch.testing.assert_close(given, stats)
    (ours,) = torch.autograd.grad((gates * torch.arange(5)).sum(), router.routing_token)
    (theirs,) = torch.autograd.grad((expected.scores * torch.arange(5)).sum(), router.routing_token)
    torch.testing.assert_close(ours, theirs)
    gates, indices, _ = router.choose(s[:, :2], num_tokens=50, mask=mask[:, None], random_route=True)
    assert torch.equal(gates, (indices >= 0).to(gates.dtype))


@pytest.mark.parametrize("kept", [False, True])
def test_the_route_dimension(kept: bool) -> None:
    out = CoordinateDescentRouter(8)(torch.randn(2, 30, 8), num_tokens=4, keep_one_route_dim=kept)
    assert out.tokens.shape == ((2, 1, 4, 8) if kept else (2, 4, 8))


def test_random_route_is_a_negative_control() -> None:
    x = torch.randn(2, 100, 8)
    mask = torch.rand(2, 100) < 0.5
    router = CoordinateDescentRouter(8)
    a, b = (router(x, num_tokens=10, mask=mask, random_route=True) for _ in range(2))
    assert not torch.equal(a.indices, b.indices)
    assert mask.gather(1, a.indices).all()
    assert torch.equal(a.scores, torch.ones(2, 10))
    assert not a.scores.requires_grad
    assert router(x, num_tokens=10, random_route=True).mask is None


def test_given_routing_tokens() -> None:
    x, tokens = torch.randn(2, 60, 8), torch.randn(2, 3, 8, requires_grad=True)
    router = CoordinateDescentRouter(8, num_routing_tokens=3, learned_routing_tokens=True, eps=1.0)
    assert not list(router.parameters())
    out = router(x, num_tokens=5, routing_tokens=tokens)
    for b in range(2):
        assert torch.equal(out.indices[b], by_hand(x[b : b + 1], tokens[b])[0].topk(5).indices)
    out.scores.square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().max() > 0
    single = CoordinateDescentRouter(8, learned_routing_tokens=True)
    assert torch.equal(single(x, num_tokens=5, routing_tokens=tokens[:, 0]).indices, out.indices[:, 0])


def test_cosine_routing() -> None:
    x = torch.randn(1, 80, 8)
    router = CoordinateDescentRouter(8, cosine_sim_routing=True, straight_through=False, eps=1.0)
    out = router(x, num_tokens=5)
    assert router.routing_token is not None
    s = 8 * torch.nn.functional.cosine_similarity(x[0], router.routing_token, dim=-1)
    assert torch.equal(out.indices[0], s.topk(5).indices)
    doubled = router(x * 2, num_tokens=5)
    torch.testing.assert_close(out.scores, doubled.scores)


def test_score_scale_none_takes_raw_products() -> None:
    x = torch.randn(1, 80, 512)
    raw = CoordinateDescentRouter(512, score_scale=None, eps=0.03)
    assert raw.routing_token is not None
    out, stats = raw.route_with_stats(x, num_tokens=16)
    assert torch.equal(out.indices[0], (x[0] @ raw.routing_token[0]).topk(16).indices)
    # At a spread of √d nearly every chosen gate saturates, which the statistics show.
    assert stats.gradient_share < 0.3
    scaled = CoordinateDescentRouter(512, eps=1.0)
    assert scaled.route_with_stats(x, num_tokens=16)[1].gradient_share > stats.gradient_share


def test_statistics_show_saturation_of_coordinate_descent() -> None:
    x = torch.randn(1, 1024, 512)
    usual = CoordinateDescentRouter(512, n_iters=20, eps=0.03, eps_init=4.0, eps_decay=0.7, score_scale=None)
    assert usual.route_with_stats(x, num_tokens=64)[1].gate_sum.item() > 1.5
    exact = CoordinateDescentRouter(512)
    torch.testing.assert_close(exact.route_with_stats(x, num_tokens=64)[1].gate_sum, torch.tensor([9 / 8]))


@given(
    valid=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    total=st.integers(0, 100),
)
def test_quotas_sum_to_the_total_and_are_proportional(valid: list[int], total: int) -> None:
    quotas = block_quotas(torch.tensor(valid), total)
    share = min(total, sum(valid))
    assert int(quotas.sum()) == share
    for quota, rows in zip(quotas.tolist(), valid, strict=True):
        assert quota <= rows
        if sum(valid):
            assert abs(quota - share * rows / sum(valid)) < 1


@given(
    m=st.integers(1, 70),
    block=st.integers(1, 30),
    k=st.integers(1, 40),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_block_routing_takes_the_best_of_each_block(
    m: int, block: int, k: int, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, m, 8, generator=generator)
    mask = torch.rand(2, m, generator=generator) < 0.6 if masked else None
    router = CoordinateDescentRouter(8, num_routing_tokens=2, route_block_size=block)
    out = router(x, num_tokens=k, mask=mask)
    assert router.routing_token is not None
    s = by_hand(x, router.routing_token)
    for b in range(2):
        rows = torch.ones(m, dtype=torch.bool) if mask is None else mask[b]
        blocks = list(torch.arange(m).split(block))
        quotas = block_quotas(torch.tensor([int(rows[i].sum()) for i in blocks]), k).tolist()
        for r in range(2):
            chosen = [i for i in out.indices[b, r].tolist() if i >= 0]
            assert len(chosen) == len(set(chosen)) == min(k, int(rows.sum()))
            for where, quota in zip(blocks, quotas, strict=True):
                best = [i for i in where[s[b, r, where].argsort(descending=True)].tolist() if rows[i]]
                assert sorted(set(best) & set(chosen)) == sorted(best[:quota])
            scores = s[b, r, chosen].tolist()
            assert scores == sorted(scores, reverse=True)
    assert out.indices.shape[-1] == min(k, m)
    assert (out.scores[out.indices >= 0] == 1).all()


def test_block_routing_gates_sum_to_the_budget_and_have_gradient() -> None:
    x = torch.randn(2, 130, 8)
    router = CoordinateDescentRouter(8, route_block_size=50, straight_through=False, eps=0.5)
    out, stats = router.route_with_stats(x, num_tokens=20)
    torch.testing.assert_close(stats.gate_sum, torch.full((2,), 9 / 8))
    out.scores.sum().backward()
    assert router.routing_token is not None
    assert router.routing_token.grad is not None
    assert router.routing_token.grad.abs().max() > 0


@pytest.mark.parametrize("block", [None, 16])
def test_the_layer_of_a_memory_routes_like_a_tensor(block: int | None) -> None:
    store = MemoryStore.create(layers=2, streams=3, dim=8)
    states = torch.randn(2, 3, 40, 8)
    store.append(states, lengths=torch.tensor([40, 13, 0]))
    router = CoordinateDescentRouter(8, num_routing_tokens=2, route_block_size=block)
    mask = torch.arange(40) < torch.tensor([40, 13, 0])[:, None]
    for layer in range(2):
        from_store = router(store.layer(layer), num_tokens=15)
        from_tensor = router(states[layer], num_tokens=15, mask=mask)
        for a, b in zip(from_store, from_tensor, strict=True):
            assert torch.equal(a, b)


def test_streams_do_not_depend_on_their_neighbours() -> None:
    x = torch.randn(4, 100, 16)
    router = CoordinateDescentRouter(16, num_routing_tokens=3)
    together = router(x, num_tokens=9)
    for b in range(4):
        alone = router(x[b : b + 1], num_tokens=9)
        assert torch.equal(alone.indices[0], together.indices[b])
        assert torch.equal(alone.tokens[0], together.tokens[b])


def test_use_triton_on_a_cpu_warns_once() -> None:
    router = CoordinateDescentRouter(8, use_triton=True)
    x = torch.randn(1, 20, 8)
    _warn_once.cache_clear()
    with pytest.warns(UserWarning, match="Triton was asked for, but the rows are on a CPU"):
        first = router(x, num_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(router(x, num_tokens=3).indices, first.indices)


def test_use_triton_names_the_backend_of_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert [pick_backend(option, gpu) for option in (None, True, False)] == [None, "triton", "torch"]


def test_checkpoint_segments_are_accepted_and_said_to_be_unneeded() -> None:
    with pytest.warns(UserWarning, match="triton_checkpoint_segments has no effect"):
        CoordinateDescentRouter(8, triton_checkpoint_segments=4)


def test_routing_is_not_downcast_by_autocast() -> None:
    x = torch.randn(1, 400, 64)
    router = CoordinateDescentRouter(64)
    plain = router(x, num_tokens=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x, num_tokens=20)
    assert torch.equal(plain.indices, cast.indices)
    assert cast.scores.dtype == torch.float32


def test_it_compiles_to_one_graph() -> None:
    router = CoordinateDescentRouter(8, num_routing_tokens=2, eps=1.0)
    x, mask = torch.randn(2, 50, 8), torch.rand(2, 50) < 0.7
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, num_tokens=6, mask=mask), router(x, num_tokens=6, mask=mask)
    assert torch.equal(out.indices, expected.indices)
    cotangent = torch.randn_like(out.scores)
    (grad,) = torch.autograd.grad((out.scores * cotangent).sum(), router.parameters())
    (reference,) = torch.autograd.grad((expected.scores * cotangent).sum(), router.parameters())
    torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps: expected more than 0, got 0.0"),
        ({"fetch_k_ratio": 0.9}, "fetch_k_ratio: expected at least 1, got 0.9"),
        ({"num_routing_tokens": 0}, "num_routing_tokens: expected at least 1, got 0"),
        ({"n_iters": 0}, "n_iters: expected None or at least 1, got 0"),
        ({"eps_init": 0.01}, r"eps_init: expected None or at least eps \(0.1\), got 0.01"),
        ({"route_block_size": 0}, "route_block_size: expected None or at least 1, got 0"),
        ({"score_scale": "none"}, "score_scale: expected a number, 'auto' or None, got none"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinateDescentRouter(8, **options)  # type: ignore[arg-type]


def test_bad_calls_are_refused() -> None:
    router = CoordinateDescentRouter(8)
    x = torch.randn(2, 20, 8)
    with pytest.raises(ValueError, match="x: expected rows of width 8"):
        router(torch.randn(2, 20, 7), num_tokens=3)
    with pytest.raises(ValueError, match="num_tokens: expected at least 1, got 0"):
        router(x, num_tokens=0)
    with pytest.raises(ValueError, match=r"num_tokens: expected an int, or a share in \(0, 1\], got 1.5"):
        router(x, num_tokens=1.5)
    with pytest.raises(ValueError, match=r"mask: expected bool \(2, 20\), got torch.float32 \(2, 20\)"):
        router(x, num_tokens=3, mask=torch.ones(2, 20))
    with pytest.raises(ValueError, match="routing_tokens: expected None"):
        router(x, num_tokens=3, routing_tokens=torch.randn(2, 8))
    with pytest.raises(ValueError, match="routing_tokens: expected a tensor"):
        CoordinateDescentRouter(8, learned_routing_tokens=True)(x, num_tokens=3)
    with pytest.raises(TypeError, match="x: expected a tensor"):
        router([[1.0]], num_tokens=3)


def test_gates_of_masked_scores_compiled_for_any_size() -> None:
    """A budget that is no whole number stays what it is."""
    router = CoordinateDescentRouter(8, eps=1.0).double()

    def gates(s: Tensor, mask: Tensor) -> Tensor:
        return router.choose(s, num_tokens=3, mask=mask)[0]

    compiled = torch.compile(gates, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=True)
    for n in (5, 9):
        s = torch.randn(4, n, dtype=torch.float64, requires_grad=True)
        mask = torch.arange(n) < torch.tensor([n, n - 1, 4, 2])[:, None]
        weights = torch.randn(4, 3, dtype=torch.float64)
        expected, given = (torch.autograd.grad((f(s, mask) * weights).sum(), s)[0] for f in (gates, compiled))
        assert expected.abs().max() > 0
        torch.testing.assert_close(given, expected)
