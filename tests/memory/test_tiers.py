"""Rows in tiers: what a store gives is the same wherever its rows are, and memory is bounded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlroute import RoutedTransformerXL
from xlroute.kernels import row_scores
from xlroute.memory import MemoryStore
from xlroute.memory.chunks import ChunkFiles
from xlroute.memory.cold import ColdRows

DIM = 6
ROW = DIM * 4
SHAPE: dict[str, Any] = {"layers": 2, "streams": 2, "dim": DIM}
SHARE = 2 * SHAPE["layers"] * SHAPE["streams"] * ROW  # bytes for one row of each layer and stream
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.3}

KINDS: dict[str, dict[str, Any]] = {
    "host and device": {"path": None, "device_bytes": 5 * SHARE},
    "disk and device": {"path": "s", "device_bytes": 5 * SHARE},
    "disk, host and device": {"path": "s", "device_bytes": 3 * SHARE, "host_bytes": 11 * SHARE},
}


def create(kind: str, folder: Path, **options: Any) -> MemoryStore:
    given = {**SHAPE, "chunk_bytes": 16 * ROW, **KINDS[kind], **options}
    path = given.pop("path")
    return MemoryStore.create(None if path is None else folder / path, **given)


def same(given: MemoryStore, expected: MemoryStore, tokens: Tensor) -> None:
    """All that two stores give is the same, bit for bit."""
    assert torch.equal(given.lengths, expected.lengths)
    longest = int(expected.lengths.max())
    indices = torch.stack([torch.randint(-1, max(int(n), 1), (2, 9)) for n in expected.lengths])
    indices.masked_fill_((expected.lengths == 0)[:, None, None], -1)
    indices = indices.to(random.choice(["cpu", given.device]))
    for layer in range(expected.layers):
        assert torch.equal(given.gather(layer, indices), expected.gather(layer, indices))
        for ours, theirs in zip(given.rows(layer), expected.rows(layer), strict=True):
            assert torch.equal(ours, theirs)
        if longest:
            scores = given.layer(layer).scores(tokens, **HOW)
            assert torch.equal(scores, expected.layer(layer).scores(tokens, **HOW))
    assert torch.equal(given.positions(indices), expected.positions(indices))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [None, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_a_store_gives_the_same_wherever_its_rows_are(
    kind: str, capacity: int | None, device: str, tmp_path: Path
) -> None:
    plain = MemoryStore.create(**SHAPE, capacity=capacity, device=device)
    store = create(kind, tmp_path, capacity=capacity, device=device)
    forks: list[tuple[MemoryStore, MemoryStore]] = []
    tokens = torch.randn(3, DIM, device=device)
    for step in range(30):
        count = random.choice([1, 2, 4, 7, 25])
        states, lengths = torch.randn(2, 2, count, DIM), [count, random.randint(0, count)]
        for each in (store, plain):
            each.append(states, lengths)
        if step % 7 == 5:
            for each in (store, plain):
                each.reset([step % 2])
        if step % 9 == 4:
            forks.append((store.fork(), plain.fork()))
        for ours, theirs in forks:
            for each in (ours, theirs):
                each.append(states[:, :, :2])
            same(ours, theirs, tokens)
        if step == 20:
            tokens = torch.randn(3, DIM, device=device)
        same(store, plain, tokens)
        if store.path is not None and step % 4 == 3:
            store.commit()
        if store.path is not None and step % 10 == 9:
            store.commit()
            store.close()
            forks.clear()  # what they have not read is there for as long as a commit holds it
            budgets = {name: KINDS[kind].get(name) for name in ("device_bytes", "host_bytes")}
            store = MemoryStore.open(store.path, mode="r+", device=device, **budgets)
            same(store, plain, tokens)


@pytest.mark.parametrize("kind", ["disk and device", "disk, host and device"])
def test_memory_is_bounded(kind: str, tmp_path: Path) -> None:
    store = create(kind, tmp_path)
    bound = sum(KINDS[kind].get(name, 0) for name in ("device_bytes", "host_bytes"))
    for count in (1, 30, 3, 3, 3, 3, 100, 2, 50):
        store.append(torch.randn(2, 2, count, DIM))
        assert 0 < store.info().memory_bytes <= bound
    with MemoryStore.open(tmp_path / "s", device_bytes=5 * SHARE) as reader:
        assert reader.info().memory_bytes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_evicted_rows_take_no_memory(kind: str, tmp_path: Path) -> None:
    store = create(kind, tmp_path, capacity=40)
    tokens = torch.randn(2, DIM)
    sizes = []
    for _ in range(60):
        store.append(torch.randn(2, 2, 8, DIM))
        for layer in range(2):
            store.layer(layer).scores(tokens, **HOW)
        sizes.append(store.info().memory_bytes)
    assert max(sizes[30:]) <= max(sizes[:30])


def test_only_rows_that_were_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create("disk and device", tmp_path, layers=1, device_bytes=10 * SHARE)
    states = torch.randn(1, 2, 50, DIM)
    store.append(states)
    read: list[list[int]] = []
    gather = ColdRows.gather

    def counting(self: ColdRows, index: Tensor) -> Tensor:
        read.append(index.tolist())
        return gather(self, index)

    monkeypatch.setattr(ColdRows, "gather", counting)
    indices = torch.tensor([[49, 3, -1, 48], [40, 41, 31, 49]])
    assert torch.equal(store.gather(0, indices)[0, [0, 1, 3]], states[0, 0, [49, 3, 48]])
    assert read == [[3]]
    read.clear()
    store.gather(0, torch.tensor([[0, 1], [2, -1]]))
    assert read == [[0, 1], [2]]


@pytest.mark.parametrize("kind", KINDS)
def test_prefetch_asks_for_rows_on_disk_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create(kind, tmp_path, layers=1)
    states = torch.randn(1, 2, 80, DIM)
    store.append(states)
    asked: list[tuple[int, list[int]]] = []
    prefetch = ChunkFiles.prefetch

    def counting(self: ChunkFiles, layer: int, stream: int, rows: NDArray[np.int64]) -> None:
        asked.append((stream, rows.tolist()))
        prefetch(self, layer, stream, rows)

    monkeypatch.setattr(ChunkFiles, "prefetch", counting)
    indices = torch.tensor([[79, 3, -1, 40], [78, 0, 79, 17]])
    store.layer(0).prefetch(indices)
    assert asked == ([] if store.path is None else [(0, [3, 40]), (1, [0, 17])])
    assert torch.equal(store.gather(0, indices)[1], states[0, 1, indices[1]])
    with pytest.raises(IndexError, match="indices: expected -1"):
        store.layer(0).prefetch(torch.tensor([[80], [0]]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_scores_of_rows_elsewhere(kind: str, device: str, tmp_path: Path) -> None:
    store = create(kind, tmp_path, dtype=torch.float64, device=device)
    store.append(torch.randn(2, 2, 60, DIM, dtype=torch.float64), [60, 33])
    tokens = torch.randn(3, DIM, dtype=torch.float64, device=device, requires_grad=True)
    rows, mask = store.rows(1)
    given = store.layer(1).scores(tokens, **HOW)
    expected = row_scores(rows, tokens, **HOW).masked_fill(~mask[:, None], 0.0)
    assert torch.equal(given, expected)
    cotangent = torch.randn_like(given)
    torch.testing.assert_close(
        torch.autograd.grad(given, tokens, cotangent), torch.autograd.grad(expected, tokens, cotangent)
    )


def test_a_model_reads_on_from_disk(build_model: Callable[..., RoutedTransformerXL], tmp_path: Path) -> None:
    model = build_model()
    shape = {"layers": 2, "streams": 2, "dim": 16, "dtype": torch.float64}
    bounded = MemoryStore.create(tmp_path / "s", **shape, device_bytes=4096)
    ours, plain = (
        model.initial_state(streams=2, memory=memory) for memory in (bounded, MemoryStore.create(**shape))
    )
    for _ in range(12):
        tokens = torch.randint(50, (2, 5))
        with torch.no_grad():
            given, ours = model(tokens, ours)
            expected, plain = model(tokens, plain)
        assert torch.equal(given, expected)
    assert bounded.info().memory_bytes < 3 * 4096
    assert int(bounded.lengths[0]) > 4096 // (2 * 2 * 2 * 16 * 8)
    ours.save(tmp_path / "state")
    again = model.load_state(tmp_path / "state", device_bytes=4096)
    tokens = torch.randint(50, (2, 5))
    with torch.no_grad():
        assert torch.equal(model(tokens, again)[0], model(tokens, plain)[0])
    assert again.memory is not None
    assert again.memory.info().memory_bytes < 3 * 4096


def test_bad_budgets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device_bytes: expected at least 1, got 0"):
        MemoryStore.create(**SHAPE, device_bytes=0)
    with pytest.raises(TypeError, match="device_bytes: expected an integer, got float"):
        MemoryStore.create(**SHAPE, device_bytes=1e9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="host_bytes: expected None for a store in memory, got 100"):
        MemoryStore.create(**SHAPE, device_bytes=100, host_bytes=100)
    MemoryStore.create(tmp_path / "s", **SHAPE).close()
    with pytest.raises(ValueError, match="device_bytes: expected a number beside host_bytes=100, got None"):
        MemoryStore.open(tmp_path / "s", host_bytes=100)
