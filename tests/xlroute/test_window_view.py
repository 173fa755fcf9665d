"""What a segment sees of the XL window is made once for as long as that is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState, blocks

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB, N = 50, 5


def segment(n: int = N) -> Tensor:
    return torch.randint(VOCAB, (2, n))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each view that was made is of."""
    counts: list[int] = []
    of = blocks.SegmentView.of

    def counting(mask: Tensor, tokens: int, dim_head: int, dtype: torch.dtype) -> blocks.SegmentView:
        counts.append(tokens)
        return of(mask, tokens, dim_head, dtype)

    monkeypatch.setattr(blocks.SegmentView, "of", counting)
    return counts


def test_it_is_made_once_for_a_full_window(build_model: BuildModel, made: list[int]) -> None:
    model = build_model(mem_len=2 * N).eval()
    state = model.initial_state(streams=2)
    with torch.no_grad():
        for _ in range(5):  # not full before the first and second, full before the others
            _, state = model(segment(), state)
        assert made == [N, N, N]
        forked = state.fork()
        _, state = model(segment(), state)
        _, forked = model(segment(), forked)
        assert made == [N, N, N]
        _, state = model(segment(3), state)
        _, state = model(segment(), state, None, torch.tensor([False, True]))
        assert made == [N, N, N, 3, N]
        for _ in range(4):  # after a document has ended, the window fills up again
            _, state = model(segment(), state)
    assert made == [N, N, N, 3, N, N, N]


def test_without_a_window_it_is_made_once(build_model: BuildModel, made: list[int]) -> None:
    model = build_model(mem_len=0, memory_layers=()).eval()
    state = model.initial_state(streams=2)
    for _ in range(3):
        _, state = model(segment(), state, None, torch.tensor([True, False]))
    assert made == [N]


def test_a_view_of_another_type_is_another(build_model: BuildModel, made: list[int]) -> None:
    model = build_model(mem_len=N).float().eval()
    state = model.initial_state(streams=2)
    with torch.no_grad():
        for _ in range(2):
            _, state = model(segment(), state)
        with torch.autocast("cpu", torch.bfloat16):
            _, state = model(segment(), state)
        assert made == [N, N, N]


@pytest.mark.parametrize("options", [{"dim_head": 6}, {"routed_self_attention": True}], ids=str)
@pytest.mark.parametrize("kept_by_other", [True, False])
def test_a_model_of_other_heads_makes_its_own(
    build_model: BuildModel, options: dict[str, Any], kept_by_other: bool
) -> None:
    """Whichever of the two has read the text before."""
    models = [build_model(mem_len=N).eval(), build_model(mem_len=N, **options).eval()]
    first, then = models if kept_by_other else models[::-1]
    state = first.initial_state(streams=2)
    with torch.no_grad():
        for _ in range(2):
            _, state = first(segment(), state)
        assert state._full_window is not None
        fresh, text = state.fork(), segment()
        fresh._full_window = None
        assert torch.equal(then(text, state)[0], then(text, fresh)[0])


def test_a_view_of_inference_serves_training(build_model: BuildModel) -> None:
    """Logits and gradients are those of a state that begins with what the other has read."""
    model = build_model(mem_len=N)
    texts = [segment() for _ in range(3)]

    def read(state: TransformerXLState) -> Tensor:
        logits, _ = model(texts[2], state)
        model.zero_grad()
        logits.square().sum().backward()
        return torch.cat([logits.flatten(), model.blocks[0].attention.to_q.weight.grad.flatten()])

    def begun(*, inference: bool) -> TransformerXLState:
        state = model.initial_state(streams=2)
        with torch.inference_mode() if inference else torch.no_grad():
            for text in texts[:2]:
                _, state = model(text, state)
        return state

    kept, fresh = begun(inference=True), begun(inference=False)
    assert kept._full_window is not None
    kept.window = kept.window.clone()
    kept.scores = kept.scores.clone()
    fresh._full_window = None
    assert torch.equal(read(kept), read(fresh))
