"""A full disk: the error says so, the last commit stands, and the store goes on when there is room."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import Eviction, MemoryStore, StoreExistsError, StoreWriteError, shards

HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.5}
DIM = 3
NAMES = ("open", "pwrite", "ftruncate", "fsync", "replace", "rename", "mkdir")


class NoRoom:
    """Stands for the calls that need room on a disk, which is full after some more of them.

    Attributes:
        refused: what call was refused, if any.
    """

    def __init__(self, calls: int, patch: pytest.MonkeyPatch) -> None:
        self.refused: str | None = None
        self._left = calls
        self._half = False
        for name in NAMES:
            patch.setattr(os, name, self._limited(name, getattr(os, name)))
        patch.setattr(Path, "write_bytes", self._limited("write_bytes", Path.write_bytes))

    def _limited(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self._left -= 1
            if self._left < 0:
                # It stays full.
                self.refused = self.refused or name
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if name == "pwrite":
                file, data, offset = arguments
                self._half = not self._half
                # Every other time a part of the data, as the operating system may.
                return real(file, data[: len(data) // 2] if self._half else data, offset)
            return real(*arguments, **options)

        return call


@contextmanager
def no_room(calls: int) -> Iterator[NoRoom]:
    with pytest.MonkeyPatch.context() as patch:
        yield NoRoom(calls, patch)


def check(path: Path, held: Tensor, tokens: Tensor) -> None:
    """The last commit holds these rows [1, 1, m, d], and no file is damaged."""
    assert MemoryStore.verify(path, all_commits=True).ok
    with MemoryStore.open(path) as store:
        assert torch.equal(store.layer(0).scores(tokens, **HOW), row_scores(held[0], tokens, **HOW))
        assert torch.equal(store.rows(0)[0], held[0])


@contextmanager
def may_be_refused(path: Path) -> Iterator[list[StoreWriteError]]:
    """Notes that what is inside was refused, if it was: by the name of the store, and saying why."""
    found: list[StoreWriteError] = []
    try:
        yield found
    except StoreWriteError as error:
        found.append(error)
    for error in found:
        assert error.errno == errno.ENOSPC
        assert f"{path}: expected to write, got No space left on device; the last commit stands" in str(error)


@pytest.fixture
def original(tmp_path: Path) -> tuple[Path, Tensor]:
    """A store with scores that drops its first commit when it next commits, and what it holds."""
    path, states = tmp_path / "original", torch.randn(1, 1, 6, DIM)
    # Chunk files of 4 rows.
    with MemoryStore.create(
        path, layers=1, streams=1, dim=DIM, chunk_bytes=4 * 4 * DIM, keep_commits=1
    ) as store:
        store.append(states)
        store.layer(0).scores(torch.randn(2, DIM), **HOW)
        store.commit(durable=True)
    return path, states


@pytest.mark.parametrize("durable", [False, True])
def test_wherever_a_writer_finds_no_room_the_last_commit_stands_and_it_goes_on(
    original: tuple[Path, Tensor], tmp_path: Path, durable: bool
) -> None:
    states, tokens = torch.randn(1, 1, 9, DIM), torch.randn(2, DIM)
    held = torch.cat([original[1], states], dim=2)
    operations: list[Callable[[MemoryStore], object]] = [
        lambda store: store.append(states),
        lambda store: store.layer(0).scores(tokens, **HOW),
        lambda store: store.commit(durable=durable),
    ]
    refused: set[str | None] = set()
    calls = 0
    while None not in refused:
        path = shutil.copytree(original[0], tmp_path / str(calls))
        store: MemoryStore | None = None
        done = 0
        with no_room(calls) as disk, may_be_refused(path) as refusal:
            store = MemoryStore.open(path, mode="r+")
            for operation in operations:
                before = store.version, store.rows(0)[0], store.commits()
                operation(store)
                done += 1
        refused.add(disk.refused)
        if refusal:
            assert not [*path.glob("commits/tmp-*")]
            check(path, original[1], tokens)
            if store is not None:
                assert store.version == before[0]
                assert torch.equal(store.rows(0)[0], before[1])
                assert store.commits() == before[2]
        with store or MemoryStore.open(path, mode="r+") as store:
            for operation in operations[done:]:
                operation(store)
        check(path, held, tokens)
        shutil.rmtree(path)
        calls += 1
    assert refused == {*NAMES, "write_bytes", None}


def test_wherever_compact_finds_no_room_the_last_commit_stands_and_it_goes_on(
    original: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two shards, of one chunk each.
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1)
    tokens = torch.randn(2, DIM)
    more = torch.randn(1, 1, 5, DIM)
    held = torch.cat([original[1], more], dim=2)
    refused: set[str | None] = set()
    calls = 0
    while None not in refused:
        path = shutil.copytree(original[0], tmp_path / str(calls))
        with MemoryStore.open(path, mode="r+") as store:
            store.append(more)
            last = store.commit()
            with no_room(calls) as disk, may_be_refused(path) as refusal:
                store.compact(compression="zstd" if calls % 2 else None)
            refused.add(disk.refused)
            if refusal:
                assert store.commits()[-1] == last
                # What was written before it was refused takes no room.
                assert {file.name for file in path.glob("shards/*")} <= {"zarr.json"}
                assert not [*path.glob("commits/tmp-*")]
                check(path, held, tokens)
            assert (store.compact().commit is None) == (not refusal)
        check(path, held, tokens)
        shutil.rmtree(path)
        calls += 1
    assert refused == {*NAMES, "write_bytes", None} - {"ftruncate", "rename"}


def make_full(path: Path, eviction: Eviction) -> Tensor:
    """A full store with scores, of which rows have left from between others; returns its tokens."""
    tokens = torch.randn(2, DIM)
    with MemoryStore.create(
        path,
        layers=2,
        streams=1,
        dim=DIM,
        chunk_bytes=16 * 4 * DIM,
        keep_commits=1,
        capacity=8,
        eviction=eviction,
        keep_every=2 if eviction == "every_nth" else None,
    ) as store:
        for count in (8, 2):
            states = torch.randn(2, 1, count, DIM)
            if count == 8:
                states[:, :, 0] = tokens[tokens.norm(dim=1).argmax()]  # no row scores higher: it stays
            store.append(states)
            for layer in range(2):
                store.layer(layer).scores(tokens, **HOW)
        store.commit(durable=True)
    return tokens


def held_by(store: MemoryStore) -> list[list[Any]]:
    """Everything that a store holds, and what it would evict next."""
    fork = store.fork()
    parts = []
    for _ in range(2):
        parts.append([log.positions().tolist() for log in fork.logs])
        parts += [rows.tolist() for rows in (fork.rows(layer)[0] for layer in range(2))]
        fork.append(torch.ones(2, 1, 3, DIM))
    return parts


@pytest.mark.parametrize("eviction", ["every_nth", "lowest_score"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["rows in memory", "rows on disk"])
def test_wherever_eviction_finds_no_room_nothing_has_left(
    tmp_path: Path, eviction: Eviction, on_disk: bool
) -> None:
    tokens = make_full(tmp_path / "original", eviction)
    with MemoryStore.open(tmp_path / "original") as store:
        committed = held_by(store)
        fork = store.fork()
    states = torch.randn(2, 1, 5, DIM)
    fork.append(states)
    after = held_by(fork)
    assert any(log.surviving for log in fork.logs)
    refused: set[str | None] = set()
    calls = 0
    while None not in refused:
        path = shutil.copytree(tmp_path / "original", tmp_path / str(calls))
        with MemoryStore.open(path, mode="r+") as store:
            if not on_disk:
                store.layer(0).views()
                store.layer(1).views()
            before = store.version
            with no_room(calls) as disk, may_be_refused(path) as refusal:
                store.append(states)
                store.commit()
            refused.add(disk.refused)
            appended = store.version > before
            assert held_by(store) == (after if appended else committed)
            if refusal:
                assert MemoryStore.verify(path, all_commits=True).ok
                with MemoryStore.open(path) as reader:
                    assert held_by(reader) == committed
                if not appended:
                    store.append(states)
                store.commit()
            for layer in range(2):
                rows, _ = store.rows(layer)
                assert torch.equal(store.layer(layer).scores(tokens, **HOW), row_scores(rows, tokens, **HOW))
            assert held_by(store)[:3] == after[:3]
        report = MemoryStore.verify(path)
        assert report.ok
        # What was to be written and is not needed goes with the next commit.
        assert not [left for left in report.leftovers if left.parent.name == "positions"]
        with MemoryStore.open(path) as reader:
            assert [log.positions().tolist() for log in reader.logs] == after[0]
            assert [reader.rows(layer)[0].tolist() for layer in range(2)] == after[1:3]
        shutil.rmtree(path)
        calls += random.randint(1, 2)
    assert calls > 20


@pytest.mark.parametrize("durable", [False, True])
def test_wherever_a_copy_finds_no_room_there_is_none(
    original: tuple[Path, Tensor], tmp_path: Path, durable: bool
) -> None:
    tokens = torch.randn(2, DIM)
    path = tmp_path / "copies" / "s"
    with MemoryStore.open(original[0]) as store:
        store.layer(0).scores(tokens, **HOW)
        calls = 0
        while True:
            with no_room(calls) as disk, may_be_refused(path) as refusal:
                store.copy_to(path, durable=durable)
            if not refusal:
                break
            assert not path.parent.exists() or not [*path.parent.iterdir()], disk.refused
            calls += 1
    assert disk.refused is None
    assert calls > 20
    check(path, original[1], tokens)
    with pytest.raises(StoreExistsError):
        MemoryStore.create(path, layers=1, streams=1, dim=DIM)


def test_wherever_a_new_store_finds_no_room_it_is_whole_or_not_there(tmp_path: Path) -> None:
    calls = 0
    while True:
        path = tmp_path / str(calls) / "s"
        with no_room(calls) as disk, may_be_refused(path) as refusal:
            MemoryStore.create(path, layers=1, streams=1, dim=DIM).close()
        if disk.refused is None:
            break
        assert refusal
        if path.exists():
            assert MemoryStore.open(path).lengths.tolist() == [0]
        assert not path.parent.exists() or {*path.parent.iterdir()} <= {path}
        calls += 1
    assert calls > 10
