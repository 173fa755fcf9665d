from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # What the compiler of PyTorch warns of is its own.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MODES: dict[str, dict[str, Any]] = {
    "by token": {},
    "learned": {"memory_routing": "learned"},
    "shortlist": {"memory_routing": "learned", "routing_shortlist": 2.0},
    "both": {"memory_routing": "both"},
}


def build(options: dict[str, Any]) -> RoutedTransformerXL:
    sizes: dict[str, Any] = {
        "dim": 64,
        "depth": 2,
        "heads": 2,
        "dim_head": 32,
        "mem_len": 16,
        "segment_len": 16,
    }
    model = RoutedTransformerXL(32, **sizes, memory_layers=(1, 2), num_tokens_kv=4, **options).cuda()
    for block in model.typed_blocks():
        for branch in block.memories():
            torch.nn.init.constant_(branch.memory_gate, 0.5)
    return model


def start(model: RoutedTransformerXL) -> TransformerXLState:
    return model.initial_state(streams=2, memory=model.create_memory(streams=2, capacity=100))


def step(model: RoutedTransformerXL, tokens: Tensor, state: TransformerXLState) -> tuple[Any, ...]:
    torch.compiler.cudagraph_mark_step_begin()
    logits, state = model(tokens, state)
    model.zero_grad()
    logits.square().mean().backward()
    return logits.detach().clone(), state, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", MODES)
def test_blocks_as_cuda_graphs_read_the_memory_that_moves(mode: str) -> None:
    """While it grows and moves, and the next rows are appended before a backward."""
    model, other = build(MODES[mode]), build(MODES[mode])
    other.load_state_dict(model.state_dict())
    for block in other.blocks:
        block.compile(mode="reduce-overhead")
    states, moved = (start(model), start(other)), set()
    for _ in range(14):
        tokens = torch.randint(32, (2, 16), device="cuda")
        expected, *rest = step(model, tokens, states[0])
        given, *others = step(other, tokens, states[1])
        states = (rest[0], others[0])
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(others[1], rest[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
        assert others[0].memory is not None
        moved.add(others[0].memory.layer(0).views()[0].untyped_storage().data_ptr())
    assert len(moved) > 1
    with torch.no_grad():
        tokens = torch.randint(32, (2, 16), device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        given, _ = other(tokens, states[1])
        torch.testing.assert_close(given, model(tokens, states[0])[0], rtol=1e-3, atol=1e-3)
