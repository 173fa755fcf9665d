"""Blocks that read the memory by themselves compute what they do of rows that the model has read."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.blocks import UnreadRows
from xlroute.memory import MemoryStore

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB = 50

KINDS: dict[str, dict[str, Any]] = {
    "learned": {"memory_routing": "learned"},
    "learned, of a shortlist": {"memory_routing": "learned", "routing_shortlist": 2},
    "a share": {"memory_routing": "learned", "num_tokens_kv": 0.3},
    "random": {"memory_routing": "random"},
    "tokens": {"memory_routing": "content", "routing_chunk": 1},
    "tokens, of a shortlist": {"memory_routing": "content", "routing_chunk": 1, "routing_shortlist": 3},
    "chunks": {"memory_routing": "content", "routing_chunk": 3},
    "both": {"memory_routing": "both", "routing_chunk": 3},
    "both by tokens": {"memory_routing": "both", "routing_chunk": 1},
    "both, of a shortlist": {"memory_routing": "both", "routing_chunk": 1, "routing_shortlist": 2.5},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"num_content_tokens_kv": 2, "routing_key_dim": 8, "mem_len": 4, **KINDS[request.param]}


def segments(streams: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, lengths and ends, for streams that grow alike, or three apart, of which one ends twice."""
    b = {"one": 1, "even": 2, "uneven": 3}[streams]
    read = []
    for step in range(7):
        tokens = torch.randint(VOCAB, (b, 5))
        lengths, ends = torch.full((b,), 5), torch.zeros(b, dtype=torch.bool)
        if streams == "uneven":
            lengths[step % 2] = random.randrange(6) if step > 4 else 5
            ends[1] = step in (2, 5)
        read.append((tokens, lengths, ends))
    return read


def begin(model: RoutedTransformerXL, streams: int, **options: Any) -> TransformerXLState:
    memory = MemoryStore.create(
        layers=2, streams=streams, dim=model.dim, **{"dtype": torch.float64, **options}
    )
    return model.initial_state(streams=streams, memory=memory)


def watch(model: RoutedTransformerXL) -> list[bool]:
    """For each branch of a block that is called, whether it reads rows by itself."""
    unread: list[bool] = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda _, args: unread.extend(isinstance(rows, UnreadRows) for rows in args[4])
        )
    return unread


def read_both_ways(
    model: RoutedTransformerXL, begun: Callable[[], TransformerXLState], read: list[tuple[Tensor, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of all tokens that count, by blocks that read, and by the model, which reads to tell of it."""
    unread = watch(model)
    results = []
    for told in (False, True):
        state, found = begun(), []
        for step, (tokens, lengths, ends) in enumerate(read):
            torch.manual_seed(step)  # of rows that are chosen at random
            logits, state = model(tokens, state, lengths, ends, return_routing=told)[:2]
            there = torch.arange(tokens.shape[1]) < lengths[:, None]
            found.append(logits[there])
        results.append(found)
        # A CPU has rows at hand that are of one stream, or side by side, as they are before long.
        assert any(unread) is not told
        unread.clear()
    return results[0], results[1]


@pytest.mark.parametrize("streams", ["one", "even", "uneven"])
def test_blocks_compute_the_same_whoever_reads(
    build_model: BuildModel, kind: dict[str, Any], streams: str
) -> None:
    """From an empty memory on, over one of fewer rows than are chosen, and documents that end in between."""
    model, read = build_model(**kind), segments(streams)
    ours, theirs = read_both_ways(model, lambda: begin(model, len(read[0][0])), read)
    cotangents = [torch.randn_like(logits) for logits in ours]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [
        torch.autograd.grad(found, parameters, cotangents, allow_unused=True) for found in (ours, theirs)
    ]
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)
    for name, got, expected in zip(names, *gradients, strict=True):
        assert (got is None) == (expected is None), name
        if got is not None:
            torch.testing.assert_close(got, expected)
    assert gradients[0][next(i for i, name in enumerate(names) if "memory_gate" in name)] is not None


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradient(build_model: BuildModel, kind: dict[str, Any], guard: Any) -> None:
    model, read = build_model(**kind), segments("uneven")
    with guard():
        ours, theirs = read_both_ways(model, lambda: begin(model, 3), read)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_of_rows_in_half_precision(build_model: BuildModel, kind: dict[str, Any]) -> None:
    model, read = build_model(torch.float32, **kind), segments("even")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = read_both_ways(model, lambda: begin(model, 2, dtype=torch.bfloat16), read)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_a_store_that_counts_routes_learns_of_all(build_model: BuildModel, kind: dict[str, Any]) -> None:
    """Once of each, whoever asks for what was routed."""
    if kind["memory_routing"] == "random":
        pytest.skip("two readings choose differently")
    model, read = build_model(**kind), segments("even")
    expected: list[Counter[int]] = [Counter() for _ in range(4)]  # of each layer and stream
    state = begin(model, 2)
    for tokens, *rest in read:
        _, state, report = model(tokens, state, *rest, return_routing=True)
        for routing in report:
            for stream, positions in enumerate(routing.positions):
                expected[2 * model.memory_layers.index(routing.layer) + stream].update(
                    positions[positions >= 0].tolist()
                )
    unread = watch(model)
    for told in (False, True):
        state = begin(model, 2)
        assert state.memory is not None
        counts = state.memory.record_routes()
        for tokens, *rest in read:
            state = model(tokens, state, *rest, return_routing=told)[1]
        for i, each in enumerate(expected):
            positions, times = counts.of(i // 2, i % 2)
            assert dict(zip(positions.tolist(), times.tolist(), strict=True)) == each
    assert not any(unread)
    counts.recording = False
    model(tokens, state)
    assert any(unread)


def test_blocks_that_are_computed_twice_read_nothing(build_model: BuildModel, kind: dict[str, Any]) -> None:
    """Until their backward, rows may move. Where nothing is computed twice, they read."""
    model = build_model(**kind, gradient_checkpointing=True)
    unread, state = watch(model), begin(model, 2)
    for tokens, *rest in segments("even"):
        state = model(tokens, state, *rest)[1]
    assert not any(unread)
    with torch.no_grad():
        model(tokens, state)
    assert unread[-1]
