"""Stores that an earlier release wrote: they open, hold what they held, and can be written to.

fixtures/format-1.tar.xz is what `python -P tests/memory/test_old_format.py FILE` wrote when format 1 was new,
and fixtures/format-2.tar.xz what it wrote when format 2 was. All numbers in them are small integers, so that
sums of products are exact in whatever order they are added: scores have the same bits on every machine.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import FingerprintError, MemoryStore, S3Path, StoreWriteError, layout, shards

# By format and name.
STORES = {
    (1, "plain"): torch.bfloat16,
    (1, "scored"): torch.float32,
    (2, "compacted"): torch.bfloat16,
    (2, "scored"): torch.float32,
}
FORMAT = 2
HOW: dict[str, Any] = {"normalize": None, "scale": 0.5}
TOKENS = torch.tensor([[1.0, 0.0, -2.0], [3.0, 1.0, 1.0]])
# The positions that each stream holds in each commit; in format 2 another one has the last in shards.
HELD = [(range(0), range(0)), (range(7), range(5)), (range(4, 13), range(3))]


def held_in(path: Path) -> list[tuple[range, range]]:
    """What the commits of a store hold."""
    return HELD if format_of(path) == 1 else [*HELD, HELD[-1]]


def format_of(path: Path) -> int:
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    number: int = attributes["xlroute_memory"]["format"]
    return number


def states(positions: range) -> Tensor:
    """Rows that tell their position, layer and stream: [2, 2, n, 3]."""
    numbers = torch.tensor([*positions], dtype=torch.float32)
    layers, streams = torch.arange(2.0)[:, None, None], torch.arange(2.0)[None, :, None]
    return torch.stack(torch.broadcast_tensors(numbers, layers, streams), dim=-1)


def make(path: Path, dtype: torch.dtype, *, scored: bool) -> None:
    with MemoryStore.create(
        path,
        layers=2,
        streams=2,
        dim=3,
        dtype=dtype,
        capacity=9,
        fingerprint="weights",
        chunk_bytes=4 * 3 * dtype.itemsize,
    ) as store:
        store.append(states(range(7)), [7, 5])
        if scored:
            for layer in range(2):
                store.layer(layer).scores(TOKENS, **HOW)
        store.pin(store.commit(durable=True))
        store.reset([1])
        store.append(states(range(7, 13)), [6, 0])
        store.append(states(range(3)), [0, 3])
        if scored:
            for layer in range(2):
                store.layer(layer).scores(TOKENS, **HOW)
        store.commit()
        store.compact(compression="zstd" if scored else None)


@pytest.fixture(params=STORES, ids=lambda store: f"format {store[0]}, {store[1]}")
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one of the stores."""
    number, name = request.param
    return unpacked(tmp_path, number, name)


def unpacked(folder: Path, number: int, name: str) -> Path:
    with tarfile.open(Path(__file__).parent / "fixtures" / f"format-{number}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    assert format_of(folder / name) == number
    return folder / name


def check(store: MemoryStore, held: tuple[range, range]) -> None:
    assert store.lengths.tolist() == [len(positions) for positions in held]
    for stream, positions in enumerate(held):
        indices = torch.full((2, len(positions)), -1)
        indices[stream] = torch.arange(len(positions))
        assert store.positions(indices)[stream].tolist() == [*positions]
        for layer in range(2):
            expected = states(positions)[layer, stream].to(store.dtype)
            assert torch.equal(store.gather(layer, indices)[stream], expected)
            assert torch.equal(store.rows(layer)[0][stream, : len(positions)], expected)


def test_every_commit_holds_what_it_held(path: Path) -> None:
    assert MemoryStore.verify(path, all_commits=True).ok
    with MemoryStore.open(path, fingerprint="weights") as store:
        assert (store.layers, store.streams, store.dim, store.capacity) == (2, 2, 3, 9)
        assert store.dtype == STORES[format_of(path), path.name]
        commits = store.info().commits
        check(store, HELD[-1])
    flags = [(False, False), (True, True), (False, False), (True, False)]
    assert [(each.durable, each.pinned) for each in commits] == flags[: len(commits)]
    for commit, held in zip(commits, held_in(path), strict=True):
        with MemoryStore.open(path, commit=commit.id) as store:
            check(store, held)


def test_scores_that_are_stored_are_used(path: Path) -> None:
    for commit, held in zip(MemoryStore.open(path).commits(), held_in(path), strict=True):
        with MemoryStore.open(path, commit=commit) as store:
            for layer in range(2):
                rows = store.layer(layer)
                found = rows.scores(TOKENS, **HOW)
                on_disk = [not getattr(each, "loaded", True) for each in rows._streams]
                assert on_disk == [path.name == "scored" and len(positions) > 0 for positions in held]
                for stream, positions in enumerate(held):
                    expected = row_scores(states(positions)[layer, stream], TOKENS, **HOW)
                    assert torch.equal(found[stream, :, : len(positions)], expected)


@pytest.mark.parametrize("back", [False, True])
def test_writing_goes_on(path: Path, back: bool) -> None:
    commits = MemoryStore.open(path).commits()
    with MemoryStore.open(path, mode="r+", commit=commits[1] if back else None) as store:
        before = HELD[1] if back else HELD[2]
        new = [range(positions.stop, positions.stop + 4) for positions in before]
        for stream in range(2):
            store.append(states(new[stream]), [4 * (stream == 0), 4 * (stream == 1)])
        for layer in range(2):
            store.layer(layer).scores(TOKENS, **HOW)
        store.commit(durable=True)
    held = tuple(
        range(max(positions.start, each.stop - 9), each.stop)
        for positions, each in zip(before, new, strict=True)
    )
    with MemoryStore.open(path) as store:
        check(store, (held[0], held[1]))
    with MemoryStore.open(path, commit=commits[1]) as store:
        check(store, HELD[1])
    assert MemoryStore.verify(path, all_commits=True).ok
    assert format_of(path) == FORMAT


def contents(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_only_a_writer_raises_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unpacked(tmp_path, 1, "plain")
    before = contents(path)
    with MemoryStore.open(path) as store:
        check(store, HELD[-1])
        assert store.info().disk.format == 1  # type: ignore[union-attr]
        store.copy_to(tmp_path / "copy")
    assert format_of(tmp_path / "copy") == FORMAT
    assert MemoryStore.repair(path).ok
    with pytest.raises(FingerprintError):
        MemoryStore.open(path, mode="r+", fingerprint="others")
    assert before.items() <= contents(path).items()
    with monkeypatch.context() as patch:
        patch.setattr(layout, "replace_file", _no_room)
        with pytest.raises(StoreWriteError, match="No space left"):
            MemoryStore.open(path, mode="r+")
    assert format_of(path) == 1
    reader = MemoryStore.open(path)
    with MemoryStore.open(path, mode="r+") as store:
        assert format_of(path) == FORMAT
        assert store.info().disk.format == FORMAT  # type: ignore[union-attr]
        assert store.compact(compression="zstd").rows == 2 * (8 + 3)
        check(store, HELD[-1])
    check(reader, HELD[-1])
    for commit, held in zip(reader.commits(), [*HELD, HELD[-1]], strict=True):
        with MemoryStore.open(path, commit=commit) as store:
            check(store, held)
    assert MemoryStore.verify(path, all_commits=True).ok


@pytest.mark.parametrize("name", ["plain", "scored"])
def test_a_store_that_was_uploaded_is_raised_by_a_writer(
    tmp_path: Path, quick_bucket: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, url = unpacked(tmp_path, 1, name), S3Path.from_url(f"{quick_bucket}/store")
    for file in path.rglob("*"):
        if file.is_file():
            (url / file.relative_to(path).as_posix()).write_bytes(file.read_bytes())
    metadata = (url / "zarr.json").read_bytes()
    with MemoryStore.open(url) as store:
        check(store, HELD[-1])
        assert store.info().disk.format == 1  # type: ignore[union-attr]
        store.copy_to(f"{quick_bucket}/copy")
    with MemoryStore.open(f"{quick_bucket}/copy") as store:
        check(store, HELD[-1])
        assert store.info().disk.format == FORMAT  # type: ignore[union-attr]
    with pytest.raises(FingerprintError):
        MemoryStore.open(url, mode="r+", fingerprint="others")
    with monkeypatch.context() as patch:
        patch.setattr(S3Path, "write_bytes", _no_room)
        with pytest.raises(StoreWriteError, match="No space left"):
            MemoryStore.open(url, mode="r+")
    assert (url / "zarr.json").read_bytes() == metadata
    reader = MemoryStore.open(url)
    with MemoryStore.open(url, mode="r+") as store:
        assert (url / "zarr.json").read_bytes() != metadata
        assert store.info().disk.format == FORMAT  # type: ignore[union-attr]
        check(store, HELD[-1])
        store.commit()
    check(reader, HELD[-1])
    assert MemoryStore.verify(url, all_commits=True).ok


def _no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_repair_that_writes_a_commit_raises_the_format(tmp_path: Path) -> None:
    path = unpacked(tmp_path, 1, "plain")
    file = path / "layer-1.stream-0.rows" / "c.1.0"
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    [loss] = MemoryStore.repair(path).losses
    assert loss.kept == (5, 13)
    assert format_of(path) == FORMAT
    assert MemoryStore.verify(path).ok


if __name__ == "__main__":
    # Inner chunks of 3 rows.
    shards._INNER_BYTES = 3 * 3 * 4
    with tarfile.open(sys.argv[1], "w:xz") as archive, tempfile.TemporaryDirectory() as folder:
        for name, dtype in ((name, dtype) for (number, name), dtype in STORES.items() if number == FORMAT):
            make(Path(folder) / name, dtype, scored=name == "scored")
            archive.add(Path(folder) / name, name)
