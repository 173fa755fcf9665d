"""What a store says of itself: the numbers are those of its files and tensors."""

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from xlroute.memory import MemoryStore, StoreClosedError


def test_a_store_on_disk_is_accounted_for(tmp_path: Path) -> None:
    started = time.time()
    path = tmp_path / "s"
    with MemoryStore.create(
        path, layers=2, streams=2, dim=8, dtype=torch.float16, capacity=7, fingerprint="f", chunk_bytes=64
    ) as store:
        store.append(torch.randn(2, 2, 9, 8), [9, 2])
        durable = store.commit(durable=True)
        store.fingerprint = "g"
        store.append(torch.randn(2, 2, 3, 8), [0, 3])
        last = store.commit()
        first = store.commits()[0]
        store.pin(first)
        os.utime(path / "commits" / f"{first}.json", (1e9, 1e9))
        store.append(torch.randn(2, 2, 1, 8))
        store.reset([0])

        info = store.info()
        assert (info.path, info.layers, info.streams, info.dim) == (path, 2, 2, 8)
        assert (info.dtype, info.capacity, info.fingerprint) == (torch.float16, 7, "g")
        assert (info.rows, info.appended, info.evicted) == ((0, 6), (0, 6), (0, 0))
        assert (info.capacity_bytes, info.rows_bytes) == (7 * 2 * 2 * 16, 6 * 2 * 16)
        assert (info.eviction, info.keep_every, info.positions) == ("oldest", None, ((0, 0), (0, 6)))
        assert [commit.id for commit in info.commits] == store.commits() == [first, durable, last]
        assert [commit.generation for commit in info.commits] == [1, 2, 3]
        assert [commit.durable for commit in info.commits] == [False, True, False]
        assert [commit.pinned for commit in info.commits] == [True, False, False]
        assert [commit.fingerprint for commit in info.commits] == ["f", "f", "g"]
        assert [commit.rows for commit in info.commits] == [(0, 0), (7, 2), (7, 5)]
        assert info.commits[0].time == datetime.fromtimestamp(1e9, UTC)
        assert started - 5 < info.commits[-1].time.timestamp() < time.time() + 5

        files = [file for file in path.rglob("*") if file.is_file()]
        chunks = [file for file in files if file.name.startswith("c.")]
        assert info.disk is not None
        assert (info.disk.format, info.disk.chunk_rows, info.disk.chunk_files) == (2, 4, len(chunks))
        # Stream 0 has written rows 0 to 7, and stream 1 rows 0 to 5: two chunks each, in two layers.
        assert len(chunks) == 2 * 2 * 2 * 2
        assert info.disk.apparent_bytes == sum(file.stat().st_size for file in files)
        assert info.disk.allocated_bytes == 512 * sum(file.stat().st_blocks for file in files)
    with pytest.raises(StoreClosedError):
        store.info()


def test_bytes_in_memory_are_those_of_the_tensors() -> None:
    store = MemoryStore.create(layers=2, streams=2, dim=8, dtype=torch.float64)
    assert store.info().memory_bytes == 0
    store.append(torch.randn(2, 2, 5, 8), [5, 3])
    info = store.info()
    assert (info.path, info.disk, info.commits) == (None, None, ())
    assert (info.rows, info.appended) == ((5, 3), (5, 3))
    buffers = {view.untyped_storage().data_ptr(): view.untyped_storage().nbytes() for view in _views(store)}
    assert len(buffers) == 4
    assert info.memory_bytes == sum(buffers.values()) >= 2 * (5 + 3) * 8 * 8
    store.layer(0).scores(torch.randn(3, 8), normalize=None, scale=1.0)
    # Three float64 scores for each row of the longest stream and a quarter more, of both streams.
    assert store.info().memory_bytes == info.memory_bytes + 3 * 8 * 2 * (5 + 2)


def test_bytes_of_a_block_count_for_as_long_as_a_stream_is_in_it() -> None:
    store = MemoryStore.create(layers=2, streams=4, dim=8)
    store.append(torch.randn(2, 4, 8, 8))
    for _ in range(10):
        store.append(torch.randn(2, 4, 2, 8), [2, 1, 0, 0])
    buffers = {view.untyped_storage().data_ptr(): view.untyped_storage().nbytes() for view in _views(store)}
    assert len(buffers) == 2 * 3
    assert store.info().memory_bytes == sum(buffers.values())


def test_what_a_policy_keeps_and_evicts_is_accounted_for() -> None:
    store = MemoryStore.create(layers=2, streams=3, dim=8, capacity=12, eviction="lowest_score")
    states = torch.arange(12.0).flip(0)[None, None, :, None].expand(2, 3, 12, 8)  # the oldest score highest
    store.append(states, [12, 5, 0])
    store.layer(0).scores(torch.ones(1, 8), normalize=None, scale=1.0)
    for _ in range(2):
        store.append(states[:, :, :4], [4, 1, 0])
    info = store.info()
    assert (info.eviction, info.keep_every) == ("lowest_score", None)
    assert (info.capacity, info.capacity_bytes) == (12, 12 * 2 * 3 * 8 * 4)
    assert [log.positions().tolist() for log in store.logs] == [[0, 1, 2, *range(12, 20)], [*range(7)], []]
    assert (info.rows, info.appended, info.evicted) == ((11, 7, 0), (20, 7, 0), (9, 0, 0))
    assert info.positions == ((0, 20), (0, 7), (0, 0))
    assert info.rows_bytes == (11 + 7) * 2 * 8 * 4 == sum(view.nbytes for view in _views(store))
    buffers = {view.untyped_storage().data_ptr(): view.untyped_storage().nbytes() for view in _views(store)}
    # Scores of the three rows that stayed, and of five with room for as many; the highest of each; positions.
    assert info.memory_bytes == sum(buffers.values()) + 4 * (3 + 2 * 5) + 4 * (3 + 5) + 8 * 3


def _views(store: MemoryStore) -> list[torch.Tensor]:
    return [view for layer in range(store.layers) for view in store.layer(layer).views()]


def test_rows_on_disk_take_up_memory_once_all_are_read(tmp_path: Path) -> None:
    with MemoryStore.create(tmp_path / "s", layers=2, streams=1, dim=8) as store:
        store.append(torch.randn(2, 1, 10, 8))
        store.commit()
    with MemoryStore.open(tmp_path / "s") as store:
        store.gather(0, torch.tensor([[3]]))
        assert store.info().memory_bytes == 0
        store.rows(0)
        assert store.info().memory_bytes == 10 * 8 * 4
