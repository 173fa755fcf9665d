from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState, blocks

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
    return model.initial_state(streams=3, memory=model.create_memory(streams=3, capacity=100))


def step(
    model: RoutedTransformerXL, drawn: tuple[Tensor, Tensor, Tensor], state: TransformerXLState
) -> tuple[Tensor, TransformerXLState, dict[str, Tensor]]:
    """The logits of the tokens that count, the next state, and the gradients."""
    tokens, lengths, ends = drawn
    torch.compiler.cudagraph_mark_step_begin()
    logits, state = model(tokens, state, lengths, ends)
    logits = logits[torch.arange(tokens.shape[1]) < lengths[:, None]]
    model.zero_grad()
    logits.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().clone(), state, grads


def segment(i: int, uneven: bool) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([16, 16, 9 if uneven and i % 2 else 16])
    ends = torch.tensor([False, uneven and i == 6, False])
    return torch.randint(32, (3, 16), device="cuda"), lengths, ends


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("mode", MODES)
def test_all_layers_choose_at_once_what_each_chooses(
    mode: str, uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, and then without gradient."""
    model, read = build(MODES[mode]), [segment(i, uneven) for i in range(10)]
    results = []
    for at_once in (True, False):
        monkeypatch.setattr(blocks, "gains_at_once", lambda _, at_once=at_once: at_once)
        state, found = start(model), []
        for each in read:
            logits, state, gradients = step(model, each, state)
            found.append((logits, gradients))
        with torch.no_grad():
            found.append((model(read[0][0], state)[0], {}))
        results.append(found)
    for (logits, gradients), (expected, others) in zip(*results, strict=True):
        assert torch.equal(logits, expected)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, others[name], rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("mode", MODES)
def test_in_training_the_host_waits_for_the_tokens_alone(mode: str) -> None:
    """Whose event the debug mode does not count."""
    model = build(MODES[mode])
    state = start(model)
    for i in range(8):
        tokens, lengths, ends = segment(i, True)
        torch.cuda.set_sync_debug_mode("error" if i > 3 else "default")
        try:
            logits, state = model(tokens, state, lengths, ends)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        logits.square().mean().backward()
    with pytest.raises(ValueError, match="tokens: expected 0 to 31, got 0 to 32"):
        model(torch.arange(33, device="cuda").expand(3, -1), state)
    model(tokens, state)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("mode", MODES)
def test_blocks_as_cuda_graphs_read_the_memory_that_moves(mode: str, uneven: bool, together: bool) -> None:
    """While it grows and moves, and the next rows are appended before a backward."""
    model, other = build(MODES[mode]), build(MODES[mode])
    other.load_state_dict(model.state_dict())
    other.compile_blocks(together=together, mode="reduce-overhead")
    state, theirs, moved = start(model), start(other), set()
    for i in range(14):
        drawn = segment(i, uneven)
        expected, state, gradients = step(model, drawn, state)
        given, theirs, others = step(other, drawn, theirs)
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                others[name], gradient, rtol=1e-2, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert theirs.memory is not None
        moved.add(theirs.memory.layer(0).views()[0].untyped_storage().data_ptr())
    assert len(moved) > 1
    with torch.no_grad():
        tokens = torch.randint(32, (3, 16), device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        given, _ = other(tokens, theirs)
        torch.testing.assert_close(given, model(tokens, state)[0], rtol=1e-3, atol=1e-3)
