"""Scores that are kept beside the rows: the bits of scoring all rows again, for the work of the new ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import MemoryStore
from xlroute.memory.scores import Scoring, StoredScores

HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.3}


def expected(store: MemoryStore, tokens: Tensor, **how: Any) -> Tensor:
    """All rows of the store, scored at once."""
    rows, mask = store.rows(0)
    return row_scores(rows, tokens, **(HOW | how)).masked_fill(~mask[:, None], 0)


def check(store: MemoryStore, tokens: Tensor, **how: Any) -> None:
    assert torch.equal(store.layer(0).scores(tokens, **(HOW | how)), expected(store, tokens, **how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_only_new_rows_are_scored(scored: list[int], dtype: torch.dtype) -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=12, dtype=dtype)
    tokens = torch.randn(3, 12, dtype=torch.promote_types(dtype, torch.float32))
    store.append(torch.randn(1, 1, 40, 12))
    check(store, tokens)
    check(store, tokens)
    for count in (7, 1, 9, 60, 5):  # into the room that the buffer has, and with 60 into a larger one
        store.append(torch.randn(1, 1, count, 12))
        check(store, tokens)
    assert scored == [40, 7, 1, 9, 60, 5]


def test_full_streams_and_forks_score_only_new_rows(scored: list[int]) -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=8, capacity=20)
    tokens = torch.randn(2, 8)
    for _ in range(30):
        store.append(torch.randn(1, 1, 3, 8))
        check(store, tokens)
    assert scored == [3] * 30
    fork = store.fork()
    for each in (store, fork):
        each.append(torch.randn(1, 1, 4, 8))
        check(each, tokens)
    assert scored == [3] * 30 + [4] * 2


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("place", ["memory", "tiers", "disk"])
def test_who_writes_into_scores_changes_none_that_are_kept(place: str, streams: int, tmp_path: Path) -> None:
    store = MemoryStore.create(
        tmp_path / "store" if place == "disk" else None,
        layers=1,
        streams=streams,
        dim=8,
        device_bytes=1024 if place == "tiers" else None,
    )
    tokens = torch.randn(2, 8)
    for _ in range(2):
        store.append(torch.randn(1, streams, 5, 8))
        check(store, tokens)
        store.layer(0).scores(tokens, **HOW).zero_()
        check(store, tokens)


def change_in_place(tokens: Tensor) -> Tensor:
    tokens.data[0, 0] += 1  # leaves the tensor's version as it was
    return tokens


@pytest.mark.parametrize(
    "change",
    [change_in_place, lambda tokens: tokens[:1], lambda tokens: tokens.clone().neg()],
    ids=["in place", "fewer", "others"],
)
def test_other_tokens_score_all_rows_again(scored: list[int], change: Callable[[Tensor], Tensor]) -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=8)
    store.append(torch.randn(1, 1, 20, 8))
    tokens = torch.randn(3, 8)
    check(store, tokens)
    check(store, change(tokens))
    for how in ({"normalize": None}, {"scale": 2.0}):
        check(store, tokens, **how)
    assert scored == [20] * 4


class OnDisk:
    """Very many scores that are said to be on disk, each 0."""

    stamp = ""
    first = 0
    stop = 2**24 + 4  # float32 rounds the number of the last one to this

    def read(self, start: int, stop: int) -> Tensor:
        return torch.zeros(1, stop - start)


def test_samples_of_very_many_scores_are_rows_of_them() -> None:
    stored = StoredScores(torch.float32, torch.device("cpu"), OnDisk())
    scoring = Scoring(torch.zeros(1, 2), normalize=None, scale=1.0, backend=None)
    OnDisk.stamp = scoring.stamp
    read: list[int] = []

    def rows(start: int, stop: int) -> list[Tensor]:
        read.append(start)
        return [torch.zeros(stop - start, 2)]

    assert stored.of(0, OnDisk.stop, scoring, rows).shape == (1, OnDisk.stop)
    assert (read[0], read[-1], len(read)) == (0, OnDisk.stop - 1, 16)


def test_evicted_reset_and_forked_rows() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=8, capacity=10)
    tokens = torch.randn(2, 8)
    for step in range(12):
        store.append(torch.randn(1, 2, 4, 8), [4, step % 5])
        check(store, tokens)
        if step == 5:
            store.reset([0])
            check(store, tokens)
        if step == 7:
            before, snapshot = expected(store, tokens), store.layer(0)
            fork = store.fork()
            fork.append(torch.randn(1, 2, 3, 8))
            check(fork, tokens)
    check(fork, tokens)
    assert torch.equal(snapshot.scores(tokens, **HOW), before)


def test_skipped_rows_are_scored_later() -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=8, capacity=6)
    tokens = torch.randn(2, 8)
    store.append(torch.randn(1, 1, 2, 8))
    early = store.layer(0)
    check(store, tokens)
    store.append(torch.randn(1, 1, 6, 8))
    check(store, tokens)
    assert early.scores(tokens, **HOW).shape == (1, 2, 2)
    check(store, tokens)


def test_scores_that_carry_gradient_are_not_kept(scored: list[int]) -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=8)
    store.append(torch.randn(1, 1, 20, 8))
    tokens = torch.randn(2, 8, requires_grad=True)
    found = store.layer(0).scores(tokens, **HOW)
    found.sum().backward()
    assert tokens.grad is not None
    with torch.inference_mode():
        check(store, tokens)
    store.append(torch.randn(1, 1, 5, 8))
    with torch.no_grad():
        check(store, tokens)
    assert torch.equal(store.layer(0).scores(tokens, **HOW).detach(), expected(store, tokens.detach()))
    assert scored == [20, 20, 5, 25]
