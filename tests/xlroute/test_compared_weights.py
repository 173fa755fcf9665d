"""Weights that scores or keys are kept of are compared with those of before: of all layers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL
from xlroute.memory import kept_values, scores

KINDS: dict[str, dict[str, Any]] = {
    "learned": {"memory_routing": "learned"},
    "cosines": {"memory_routing": "learned", "router_kwargs": {"cosine_sim_routing": True}},
    "tokens": {"memory_routing": "content", "routing_chunk": 1},
    "chunks": {"memory_routing": "content", "routing_chunk": 3},
    "both": {"memory_routing": "both", "routing_chunk": 3},
    "both by tokens": {"memory_routing": "both", "routing_chunk": 1},
}
# Tokens of cosines are made anew each time, and compared when they are; those of a chunk are not compared.
WAITS = dict.fromkeys(KINDS, 0) | {"cosines": 2}
ASSUMED = dict.fromkeys(KINDS, 1) | {"cosines": 0, "chunks": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_how_often_they_are_compared(
    build_model: Callable[..., RoutedTransformerXL], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, for which the host waits at each comparison, but where it assumes how one ends."""
    model = build_model(num_content_tokens_kv=2, routing_key_dim=8, mem_len=4, **KINDS[kind])
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
    compared, assumed, equal, begin = [], [], torch.equal, kept_values.begin_to_host

    def spy(ours: Tensor, theirs: Tensor) -> bool:
        if sys._getframe(1).f_code.co_filename == scores.__file__:
            compared.append(ours)
        return equal(ours, theirs)

    def noted(values: Tensor) -> Callable[[], Tensor]:
        assumed.append(values)
        return begin(values)

    with torch.no_grad():
        for _ in range(3):
            state = model(torch.randint(50, (2, 5)), state)[1]
        monkeypatch.setattr(torch, "equal", spy)
        monkeypatch.setattr(kept_values, "assumes", lambda device: True)
        monkeypatch.setattr(kept_values, "begin_to_host", noted)
        model(torch.randint(50, (2, 5)), state)
    assert (len(compared), len(assumed)) == (WAITS[kind], ASSUMED[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_that_has_changed(
    build_model: Callable[..., RoutedTransformerXL], kind: str, layer: int
) -> None:
    """Without a trace on its tensors: what is kept of it is made anew, and only of it."""
    model = build_model(num_content_tokens_kv=2, routing_key_dim=8, mem_len=4, **KINDS[kind])
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
    with torch.no_grad():
        for _ in range(4):
            state = model(torch.randint(50, (2, 5)), state)[1]
        for branch in model.typed_blocks()[model.memory_layers[layer] - 1].memories():
            for weight in branch.parameters():  # type: ignore[attr-defined]
                weight.data.normal_()
        assert state.memory is not None
        anew = state.memory.fork()
        for kept in anew._kept:
            for each in (kept.keys, kept.scores):
                if each is not None:
                    each.forget()
        other = state.fork()
        other.memory = anew
        tokens = torch.randint(50, (2, 5))
        torch.testing.assert_close(model(tokens, state)[0], model(tokens, other)[0])
