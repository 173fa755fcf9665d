"""Learned routing tokens of several memory layers choose at once what they choose one by one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import (
    CoordinateDescentRouter,
    RoutedTransformerXL,
    TransformerXLState,
    blocks,
    router,
    shortlist,
)
from xlroute.memory import MemoryLayer, MemoryStore
from xlroute.router import choose_alike, pick_together
from xlroute.shortlist import shortlisted

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB, D, LAYERS = 50, 16, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "without straight-through": {"router_kwargs": {"straight_through": False}},
    "shortlist": {"routing_shortlist": 2.0},
    "both by tokens": {"memory_routing": "both"},
    "both by chunks": {"memory_routing": "both", "routing_chunk": 3},
    "both, of a shortlist": {"memory_routing": "both", "routing_shortlist": 2.5},
    "rows with a graph": {"memory_grad_segments": 3},
}
APART: dict[str, dict[str, Any]] = {
    "share": {"num_tokens_kv": 0.3},
    "random": {"memory_routing": "random"},
    "blocks": {"router_kwargs": {"route_block_size": 4}},
    "coordinate descent": {"router_kwargs": {"n_iters": 20}},
    "one layer": {"memory_layers": (2,)},
    "content": {"memory_routing": "content"},
}


def filled(lengths: list[int], dtype: torch.dtype) -> list[MemoryLayer]:
    """The layers of a memory whose streams hold so many rows."""
    store = MemoryStore.create(layers=LAYERS, streams=len(lengths), dim=D, dtype=dtype, device=DEVICE)
    for part in ([n // 2 for n in lengths], [n - n // 2 for n in lengths]):
        rows = torch.randn(LAYERS, len(lengths), max(*part, 1), D, device=DEVICE)
        store.append(rows, lengths=torch.tensor(part))
    return [store.layer(i) for i in range(LAYERS)]


def routers_of(count: int, **options: Any) -> list[CoordinateDescentRouter]:
    return [CoordinateDescentRouter(D, count, eps=0.5, **options).to(DEVICE) for _ in range(LAYERS)]


# The longest rows take all of a GPU's launches.
ROWS: dict[str, list[int]] = {
    "even": [23, 23],
    "uneven": [40, 3, 0, 17],
    "one stream": [31],
    "fewer than are chosen": [4, 4],
    "none": [0, 0],
    "long": [3001, 3001],
    "long, uneven": [2900, 3001, 1000],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("straight_through", [True, False])
def test_picks_at_once_are_those_of_one_by_one(
    lengths: list[int], dtype: torch.dtype, straight_through: bool
) -> None:
    routers, layers = routers_of(2, straight_through=straight_through), filled(lengths, dtype)
    assert choose_alike(routers)
    tokens = [each.routing_token for each in routers]
    for guard in (torch.no_grad, torch.enable_grad):
        with guard():
            together = pick_together(routers, layers, num_tokens=7)
            alone = [each.pick(layer, num_tokens=7) for each, layer in zip(routers, layers, strict=True)]
        assert len(together) == LAYERS
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours.indices, theirs.indices)
            assert ours.gates is not None
            assert theirs.gates is not None
            assert ours.gates.dtype == theirs.gates.dtype
            assert torch.equal(ours.gates, theirs.gates)
            assert ours.stats is None
    cotangents = [torch.randn_like(each.gates) for each in alone if each.gates is not None]
    gradients = [
        torch.autograd.grad([each.gates for each in picks], tokens, cotangents)  # type: ignore[misc]
        for picks in (together, alone)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        if dtype == torch.float64 and DEVICE == "cuda":  # which sums by what fits in how many programs
            torch.testing.assert_close(ours, theirs)
        else:
            assert torch.equal(ours, theirs)
    assert max(lengths) < 7 or all(each.any() for each in gradients[0])


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_shortlists_at_once_are_those_of_one_by_one(lengths: list[int]) -> None:
    routers = routers_of(2)
    layers = filled(lengths, torch.float32)
    alone = [shortlisted([each], [layer], 5, 2.5)[0] for each, layer in zip(routers, layers, strict=True)]
    for ours, theirs in zip(shortlisted(routers, layers, 5, 2.5), alone, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape == (len(lengths), 2, min(13, max(lengths)))


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0.4},
        {"fetch_k_ratio": 1.5},
        {"straight_through": False},
        {"num_routing_tokens": 2},
        {"use_triton": False},
        {"n_iters": 20},
        {"route_block_size": 9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_routers_that_choose_otherwise_are_told_apart(options: dict[str, Any]) -> None:
    first, second = CoordinateDescentRouter(D), CoordinateDescentRouter(D, **options)
    assert choose_alike([first, CoordinateDescentRouter(D)])
    assert not choose_alike([first, second])
    assert not choose_alike([second, first])
    exact = second.n_iters is None and second.route_block_size is None
    assert choose_alike([second, CoordinateDescentRouter(D, **options)]) is exact


def read(
    model: RoutedTransformerXL, memory: MemoryStore, read: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[list[Tensor], TransformerXLState]:
    state, found = model.initial_state(streams=3, memory=memory), []
    for step, (tokens, lengths, ends) in enumerate(read):
        torch.manual_seed(step)  # of rows that are chosen at random
        logits, state = model(tokens, state, lengths, ends)
        found.append(logits[torch.arange(tokens.shape[1]) < lengths[:, None]])
    return found, state


def both_ways(
    model: RoutedTransformerXL,
    monkeypatch: pytest.MonkeyPatch,
    memories: Callable[[], MemoryStore],
    uneven: bool,
) -> tuple[list[list[Tensor]], list[dict[str, Tensor]], list[list[int]]]:
    """Logits, gradients, and of how many streams were chosen from in each selection; apart, and at once."""
    sizes: list[int] = []

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(s: Tensor, *args: Any, **options: Any) -> Any:
            sizes.append(s.shape[0])
            return call(s, *args, **options)

        return noted

    for module, name in ((router, "top_gates"), (shortlist, "top_indices")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    segments = []
    for step in range(7):
        lengths, ends = torch.full((3,), 5), torch.zeros(3, dtype=torch.bool)
        if uneven:
            lengths[step % 3], ends[1] = step % 6, step == 4
        segments.append((torch.randint(VOCAB, (3, 5)), lengths, ends))
    outputs, gradients, selections, cotangents = [], [], [], None
    for at_once in (False, True):
        monkeypatch.setattr(blocks, "gains_at_once", lambda _, at_once=at_once: at_once)
        logits, _ = read(model, memories(), segments)
        outputs.append([each.detach() for each in logits])
        selections.append([*sizes])
        sizes.clear()
        if logits[-1].requires_grad:
            cotangents = [torch.randn_like(each) for each in logits] if cotangents is None else cotangents
            model.zero_grad()
            torch.autograd.backward(logits, cotangents)
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return outputs, gradients, selections


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_the_same(
    build_model: BuildModel,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    training: bool,
    uneven: bool,
    place: str,
    tmp_path: Path,
) -> None:
    model = build_model(num_content_tokens_kv=2, routing_key_dim=8, **KINDS[kind]).train(training)
    stores = iter(range(2))

    def memory() -> MemoryStore:
        path = tmp_path / str(next(stores)) if place == "disk" else None
        return MemoryStore.create(path, layers=2, streams=3, dim=model.dim, dtype=torch.float64, capacity=15)

    with torch.set_grad_enabled(training):
        outputs, gradients, selections = both_ways(model, monkeypatch, memory, uneven)
    apart, at_once = selections
    # Of each segment, once for both layers in place of once for each; chunks of a segment choose besides.
    assert at_once.count(6) - apart.count(6) == 7
    assert apart.count(3) - at_once.count(3) == 14
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)
    if training:
        assert gradients[0].keys() == gradients[1].keys()
        assert any(each.any() for name, each in gradients[0].items() if "routing_token" in name)
        for name, gradient in gradients[0].items():
            if "memory_grad_segments" in KINDS[kind]:  # what reaches a row is summed in another order
                torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", APART)
def test_what_differs_is_chosen_apart(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch, kind: str, training: bool
) -> None:
    model = build_model(num_content_tokens_kv=2, routing_key_dim=8, **APART[kind]).train(training)
    with torch.set_grad_enabled(training):
        outputs, _, selections = both_ways(model, monkeypatch, lambda: model.create_memory(streams=3), True)
    assert selections[0] == selections[1]
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_told_of_routing_is_chosen_apart(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    monkeypatch.setattr(blocks, "gains_at_once", lambda _: True)
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
    for _ in range(4):
        tokens = torch.randint(VOCAB, (2, 5))
        told, _, report = model(tokens, state.fork(), return_routing=True)
        logits, state = model(tokens, state)
        torch.testing.assert_close(logits, told)
        assert [each.layer for each in report] == [2, 3]
    assert all((each.gate_sum > 0).all() for each in report)
