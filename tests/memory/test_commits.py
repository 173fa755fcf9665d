"""Commits: which stay readable, who may write, and what durable adds."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from xlroute.memory import (
    CommitNotFoundError,
    CorruptionError,
    MemoryStore,
    StoreLockedError,
    lock,
)
from xlroute.memory.lock import pin_lock


def create(path: Path, **options: Any) -> MemoryStore:
    """A store of one layer and two streams, with chunk files of 4 rows."""
    return MemoryStore.create(path, **{"layers": 1, "streams": 2, "dim": 3, "chunk_bytes": 48, **options})


def chunk_files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.glob("layer-*/c.*")}


def test_the_last_commits_and_the_pinned_ones_stay_readable(tmp_path: Path) -> None:
    held = {}
    with create(tmp_path / "s", keep_commits=3) as store:
        [first] = store.commits()
        for step in range(8):
            store.reset([0])
            store.append(torch.randn(1, 2, 5, 3))
            commit = store.commit()
            held[commit] = store.rows(0)[0]
            if step == 1:
                pinned, pins = commit, [store.pin(commit), store.pin(commit)]
        last = list(held)[-3:]
        assert store.commits() == [pinned, *last]
        with pytest.raises(CommitNotFoundError, match=f"expected one of {pinned}, .* got {first}"):
            MemoryStore.open(tmp_path / "s", commit=first)
        store.unpin(pins[0])
        store.commit()
        for commit in (pinned, *last[1:]):
            assert torch.equal(MemoryStore.open(tmp_path / "s", commit=commit).rows(0)[0], held[commit])
        before = chunk_files(tmp_path / "s")
        store.unpin(pins[1])
        assert pinned in store.commits()
        store.append(torch.randn(1, 2, 1, 3))
        store.reset([0, 1])
        for _ in range(3):
            store.commit()
        assert pinned not in store.commits()
        # What is left is the chunk of each stream that is written to next: its rows and their checksums.
        assert len(chunk_files(tmp_path / "s")) == 4 < len(before)
        with pytest.raises(CommitNotFoundError, match="pin: expected one that is in the store"):
            store.unpin(pins[1])
    for wrong in ("../../zarr.json", "", "x"):
        with MemoryStore.open(tmp_path / "s") as reader:
            with pytest.raises(ValueError, match="pin: expected an id"):
                reader.unpin(wrong)
            with pytest.raises(ValueError, match="commit: expected an id"):
                reader.pin(wrong)
        with pytest.raises(ValueError, match="commit: expected an id"):
            MemoryStore.open(tmp_path / "s", commit=wrong)


def test_a_reader_pins_for_the_writer_to_see(tmp_path: Path) -> None:
    with create(tmp_path / "s", keep_commits=1) as store, MemoryStore.open(tmp_path / "s") as reader:
        [first] = reader.commits()
        reader.pin(first)
        store.commit()
        assert first in store.commits()


def test_whoever_pins_waits_for_the_lock_and_a_commit_stands_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with create(path, keep_commits=1) as store:
        [first] = store.commits()
        with pin_lock(path), monkeypatch.context() as patch:
            patch.setattr(lock, "_PIN_SECONDS", 0.03)
            with pytest.raises(StoreLockedError, match="expected the lock of the pins, got none in time"):
                store.pin(first)
            second = store.commit()
            assert store.commits() == [first, second]
        with ThreadPoolExecutor(1) as pool:
            with pin_lock(path):
                pin = pool.submit(store.pin, first)
                assert not wait([pin], timeout=0.1).done
                assert store.pins() == {}
            assert {pin.result(): first} == store.pins()
        third = store.commit()
        assert store.commits() == [first, third]


def test_going_back_overwrites_nothing_that_a_commit_refers_to(tmp_path: Path) -> None:
    with create(tmp_path / "s") as store:
        store.append(torch.randn(1, 2, 3, 3))
        early, early_rows = store.commit(), store.rows(0)[0]
        store.append(torch.randn(1, 2, 6, 3))
        late, late_rows = store.commit(), store.rows(0)[0]
    for _ in range(2):
        with MemoryStore.open(tmp_path / "s", mode="r+", commit=early) as store:
            assert MemoryStore.open(tmp_path / "s").lengths.tolist() == [3, 3]
            store.append(torch.randn(1, 2, 4, 3))
            store.commit()
            assert store.lengths.tolist() == [7, 7]
        assert torch.equal(MemoryStore.open(tmp_path / "s", commit=early).rows(0)[0], early_rows)
        assert torch.equal(MemoryStore.open(tmp_path / "s", commit=late).rows(0)[0], late_rows)
        assert MemoryStore.open(tmp_path / "s").lengths.tolist() == [7, 7]


def test_a_reader_of_a_dropped_commit_is_told_so(tmp_path: Path) -> None:
    indices = torch.tensor([[0, 7], [0, 7]])
    with create(tmp_path / "s", keep_commits=1) as store:
        states = torch.randn(1, 2, 8, 3)
        store.append(states)
        commit = store.commit()
        reader, mapped = MemoryStore.open(tmp_path / "s"), MemoryStore.open(tmp_path / "s")
        mapped.gather(0, indices)
        store.reset([0, 1])
        store.append(-states)
        store.commit()
        store.commit()
        for call in (lambda: reader.rows(0), lambda: reader.gather(0, indices), lambda: mapped.rows(0)):
            with pytest.raises(CommitNotFoundError, match=f"commit {commit}: expected its rows"):
                call()
        assert torch.equal(mapped.gather(0, indices), states[0][:, [0, 7]])


def test_what_outlives_a_closed_writer_is_told_when_the_next_one_drops_its_commit(tmp_path: Path) -> None:
    states = torch.randn(1, 2, 8, 3)
    with create(tmp_path / "s", keep_commits=1) as store:
        store.append(states)
        commit = store.commit()
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        layers, fork = [store.layer(0), store.layer(0)], store.fork()
    assert torch.equal(layers[0].gather(torch.tensor([[7], [0]]))[0, 0], states[0, 0, 7])
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        store.reset([0, 1])
        store.commit()
    for call in (layers[1].views, lambda: fork.rows(0)):
        with pytest.raises(CommitNotFoundError, match=f"commit {commit}: expected its rows"):
            call()


def test_rows_that_were_never_committed_are_not_mistaken_for_those_that_replaced_them(tmp_path: Path) -> None:
    with create(tmp_path / "s") as store:
        store.append(torch.randn(1, 2, 2, 3))
        store.commit()
    store = MemoryStore.open(tmp_path / "s", mode="r+")
    store.append(torch.randn(1, 2, 4, 3))
    fork = store.fork()
    store.close()
    with MemoryStore.open(tmp_path / "s", mode="r+") as other:
        other.append(torch.randn(1, 2, 4, 3))
        other.commit()
        with pytest.raises(CorruptionError, match="checksum"):
            fork.rows(0)


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    create(path).close()
    program = (
        "import sys\nfrom xlroute.memory import MemoryStore\n"
        f"store = MemoryStore.open({str(path)!r}, mode='r+')\nprint('open', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(
            StoreLockedError, match=rf"no other writer, got process {first.pid} on \S+, which"
        ):
            MemoryStore.open(path, mode="r+")
        assert MemoryStore.open(path).lengths.tolist() == [0, 0]
        first.kill()
        first.wait()
        with (
            MemoryStore.open(path, mode="r+"),
            pytest.raises(StoreLockedError, match=f"process {os.getpid()}"),
        ):
            MemoryStore.open(path, mode="r+")
    with MemoryStore.open(path, mode="r+"):
        pass


def test_durable_waits_for_everything_that_the_commit_refers_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(file: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), tmp_path / "s"))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with create(tmp_path / "s") as store:
        store.append(torch.randn(1, 2, 6, 3))
        store.commit()
    # Growing an array replaces metadata that earlier commits need; nothing else waits for the medium.
    assert {name for name in synced if not name.startswith("commits/tmp-")} == {
        f"layer-0.stream-{stream}.{kind}" for stream in range(2) for kind in ("rows", "crc32c")
    }
    synced.clear()
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        store.append(torch.randn(1, 2, 6, 3))
        store.commit(durable=True)
        files = {str(file.relative_to(tmp_path / "s")) for file in (tmp_path / "s").glob("layer-*/*")}
        assert {*files, "zarr.json", ".", "commits", "layer-0.stream-1.rows"} <= {*synced}
        assert synced[-2].startswith("commits/tmp-")
        assert synced[-1] == "commits"
        synced.clear()
        store.append(torch.randn(1, 2, 1, 3))
        store.commit(durable=True)
        assert {name for name in synced if "/c." in name} == {
            f"layer-0.stream-{stream}.{name}" for stream in range(2) for name in ("rows/c.3.0", "crc32c/c.3")
        }


def test_the_last_durable_commit_stays_until_the_next_one(tmp_path: Path) -> None:
    with create(tmp_path / "s", keep_commits=1) as store:
        states = torch.randn(1, 2, 9, 3)
        store.append(states)
        durable = store.commit(durable=True)
        for _ in range(3):
            store.reset([0, 1])
            store.append(torch.randn(1, 2, 9, 3))
            last = store.commit()
        assert store.commits() == [durable, last]
        assert torch.equal(MemoryStore.open(tmp_path / "s", commit=durable).rows(0)[0], states[0])
        last = store.commit(durable=True)
        assert store.commits() == [last]


CRASHES = """
import os, random, signal, sys, time
import torch
from xlroute.memory import MemoryStore

path, rounds = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
LAYERS, STREAMS, DIM, CAPACITY = 2, 2, 3, 40


def step(store, number):
    # What a step does follows from its number alone.
    if number % 7 == 3:
        store.reset([number % STREAMS])
    states = torch.arange(LAYERS * STREAMS * 9 * DIM, dtype=torch.float32).reshape(LAYERS, STREAMS, 9, DIM)
    store.append(states + number, [number % 9 + 1, (number * 5) % 10])


def work(store, number, pipe):
    while True:
        step(store, number)
        number += 1
        if number % 3 == 0:
            store.fingerprint = str(number)
            store.commit()
            os.write(pipe, number.to_bytes(8, "little"))


MemoryStore.create(
    path,
    layers=LAYERS,
    streams=STREAMS,
    dim=DIM,
    capacity=CAPACITY,
    fingerprint="0",
    chunk_bytes=96,
    keep_commits=2,
).close()
expected, done = MemoryStore.create(layers=LAYERS, streams=STREAMS, dim=DIM, capacity=CAPACITY), 0
for _ in range(rounds):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with MemoryStore.open(path, mode="r+") as store:
            work(store, int(store.fingerprint), writing)
    os.close(writing)
    os.read(reading, 8)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = 0
    while number := os.read(reading, 8):
        acknowledged = int.from_bytes(number, "little")
    os.close(reading)
    with MemoryStore.open(path) as store:
        committed = int(store.fingerprint)
        assert committed >= max(acknowledged, done), (committed, acknowledged)
        while done < committed:
            step(expected, done)
            done += 1
        assert store.lengths.tolist() == expected.lengths.tolist()
        for layer in range(LAYERS):
            assert torch.equal(store.rows(layer)[0], expected.rows(layer)[0])
        indices = torch.zeros(STREAMS, 1, dtype=torch.long) - (store.lengths == 0).long()[:, None]
        assert torch.equal(store.positions(indices), expected.positions(indices))
print("steps", done)
"""


def test_a_killed_writer_leaves_exactly_its_last_commit(tmp_path: Path) -> None:
    # A process of its own forks the writers: it has one thread, and torch is imported only once.
    result = subprocess.run(
        [sys.executable, "-P", "-c", CRASHES, str(tmp_path / "s"), "20"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    # Every round commits at least once, after three steps.
    assert int(result.stdout.removeprefix("steps ")) >= 60
    with MemoryStore.open(tmp_path / "s", mode="r+"):
        assert not list(tmp_path.glob("s/commits/tmp-*"))
