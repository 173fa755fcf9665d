"""The rows of all streams in one block: what a store does with them all at once is what streams do alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.memory import MemoryLayer, MemoryStore

DIM = 4
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.5}


def make(streams: int, **options: Any) -> MemoryStore:
    return MemoryStore.create(layers=1, streams=streams, dim=DIM, **options)


def append(store: MemoryStore, *counts: int) -> None:
    store.append(torch.randn(1, len(counts), max(counts), DIM), counts)


@pytest.mark.parametrize("counts", [(2, 2), (2, 0), (2, 1)])
@pytest.mark.parametrize("what", ["rows", "scores", "scores of rows", "keys"])
def test_what_is_saved_for_backward_outlives_later_appends(what: str, counts: tuple[int, ...]) -> None:
    tokens = torch.randn(2, DIM)
    weights = torch.randn(2, DIM, requires_grad=True)

    def result(layer: MemoryLayer) -> Tensor:
        if what == "rows":
            return layer.views()[0] @ weights[0]
        if what == "scores of rows":
            return layer.scores(weights, **HOW)
        if what == "scores":
            return layer.scores(tokens, **HOW) * weights[0, 0]
        return layer.keys(tokens[None], keep=True).keys * weights[0, 0]

    store = make(2)
    append(store, 8, 8)
    [before] = {view.untyped_storage().data_ptr() for view in store.layer(0).views()}
    early = result(store.layer(0)).square().sum()
    [expected] = torch.autograd.grad(early, weights, retain_graph=True)
    append(store, *counts)
    [after] = {view.untyped_storage().data_ptr() for view in store.layer(0).views()}
    assert after == before
    result(store.layer(0))
    early.backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, expected)


def test_streams_that_take_turns_beside_an_empty_one_stay_where_they_are() -> None:
    store = make(3)
    append(store, 20, 20, 20)
    store.reset([2])
    places = []
    for step in range(16):
        append(store, step % 2, 1 - step % 2, 0)
        places.append(store.layer(0).views()[0].untyped_storage().data_ptr())
    assert len({*places}) == 1
