"""The writer: what an interrupted commit, a fork or a power cut leaves, and what it refuses up front."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xlroute.memory import (
    CommitNotFoundError,
    CorruptionError,
    MemoryStore,
    StoreLockedError,
    StoreWriteError,
    commits,
    disk,
    sealed,
)


def create(path: Path, **options: Any) -> MemoryStore:
    """A store of one layer and one stream, with chunk files of 4 rows."""
    return MemoryStore.create(path, layers=1, streams=1, dim=3, chunk_bytes=48, **options)


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """The files and folders that were brought to the medium: names by inode."""
    found: dict[int, str] = {}
    real = os.fsync

    def fsync(file: int) -> None:
        found[os.fstat(file).st_ino] = os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), tmp_path)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_growing_an_array_keeps_what_a_durable_commit_needs(tmp_path: Path, synced: dict[int, str]) -> None:
    with create(tmp_path / "s") as store:
        store.append(torch.randn(1, 1, 3, 3))
        store.commit(durable=True)
        store.append(torch.randn(1, 1, 30, 3))
        metadata = [*tmp_path.glob("s/layer-*/zarr.json")]
        assert len(metadata) == 2
        assert all(file.stat().st_ino in synced for file in metadata)
        assert all(file.parent.stat().st_ino in synced for file in metadata)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_commit_that_fails_after_its_record_got_its_name_did_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, durable: bool
) -> None:
    with create(tmp_path / "s") as store:
        [first] = store.commits()
        store.append(torch.randn(1, 1, 3, 3))
        real = os.replace

        def replace(source: Path, target: Path) -> None:
            real(source, target)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises((StoreWriteError, KeyboardInterrupt)):
                store.commit(durable=durable)
        assert store.commits() == [first]
        store.append(torch.randn(1, 1, 4, 3))
        # The medium may still have the record that was taken back: its generation is used up.
        assert store.commit(durable=durable).startswith("000000000003-")
        rows = store.rows(0)[0]
    assert torch.equal(MemoryStore.open(tmp_path / "s").rows(0)[0], rows)


def test_a_record_that_cannot_be_taken_back_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(tmp_path / "s", keep_commits=2) as store:
        store.append(torch.randn(1, 1, 9, 3))
        rows = store.rows(0)[0]

        def sync(path: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def unlink(path: Path, missing_ok: bool = False) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        with monkeypatch.context() as patch:
            patch.setattr(sealed, "sync", sync)
            patch.setattr(Path, "unlink", unlink)
            with pytest.raises(StoreWriteError):
                store.commit(durable=True)
        *_, stuck = store.commits()
        store.reset([0])
        store.append(torch.randn(1, 1, 9, 3))
        last = store.commit()
        assert store.commits() == [stuck, last]
        assert torch.equal(MemoryStore.open(tmp_path / "s", commit=stuck).rows(0)[0], rows)


def test_the_last_generation_is_refused_by_name(tmp_path: Path) -> None:
    with create(tmp_path / "s") as store:
        [first] = store.commits()
    (tmp_path / "s" / "commits" / f"{commits.MAX_GENERATION}-00000000.json").write_text("{}")
    with pytest.raises(CorruptionError, match="commits: expected generations below"):
        MemoryStore.open(tmp_path / "s", mode="r+", commit=first)


# Python 3.12 warns of every fork beside threads; this child starts none, and uses none.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_of_the_process_is_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = create(path)
    states = torch.ones(1, 1, 3, 3)
    store.append(states)
    last = store.commit()
    opened = store._disk
    assert opened is not None
    child = os.fork()
    if child == 0:
        code = 1
        try:
            calls: list[Callable[[], object]] = [
                lambda: store.append(states),
                lambda: store.reset([0]),
                store.commit,
                lambda: opened.write(0, opened.logs[0], states[:, 0], 3),
                lambda: opened.commit(opened.logs, None, [[None]], [], durable=False),
            ]
            refused = 0
            for call in calls:
                try:
                    call()
                except StoreLockedError as error:
                    refused += f"expected the process that opened it, {os.getppid()}, got" in str(error)
            read = bool((store.rows(0)[0] == 1).all())
            store.close()
            code = 0 if refused == len(calls) and read else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    # The child's `close` let nobody in.
    with pytest.raises(StoreLockedError, match=f"process {os.getpid()} on"):
        MemoryStore.open(path, mode="r+")
    assert store.commits()[-1] == last
    store.append(states)
    store.commit()
    store.close()
    with MemoryStore.open(path, mode="r+") as store:
        assert store.lengths.tolist() == [6]


@pytest.mark.parametrize(
    ("device", "error"), [("nonsense", ValueError), ("cuda:99", ValueError), (1.5, TypeError)]
)
def test_a_device_is_refused_before_anything_is_written(
    tmp_path: Path, device: Any, error: type[Exception]
) -> None:
    for path in (None, tmp_path / "new"):
        with pytest.raises(error, match="device: expected"):
            MemoryStore.create(path, layers=1, streams=1, dim=3, device=device)
    assert not list(tmp_path.iterdir())
    with create(tmp_path / "s") as store:
        [first] = store.commits()
        store.commit()
        listed = store.commits()
    with pytest.raises(error, match="device: expected"):
        MemoryStore.open(tmp_path / "s", mode="r+", device=device, commit=first)
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        assert store.commits() == listed


def test_a_store_that_cannot_be_made_of_the_disk_lets_the_next_writer_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(tmp_path / "s") as store:
        store.append(torch.randn(1, 1, 3, 3))
        store.commit()

    def cold(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(disk.Disk, "cold", cold)
        with pytest.raises(MemoryError) as caught:
            MemoryStore.open(tmp_path / "s", mode="r+")
    MemoryStore.open(tmp_path / "s", mode="r+").close()
    assert caught.tb is not None


def test_the_folders_made_on_the_way_survive_a_power_cut(tmp_path: Path, synced: dict[int, str]) -> None:
    with create(tmp_path / "a" / "b" / "s") as store:
        store.append(torch.randn(1, 1, 3, 3))
        store.commit(durable=True)
        assert {".", "a", "a/b"} <= {*synced.values()}
        store.copy_to(tmp_path / "c" / "d" / "s", durable=True)
        assert {"c", "c/d"} <= {*synced.values()}
    with pytest.raises(StoreWriteError, match="Not a directory"):
        create(tmp_path / "a" / "b" / "s" / "zarr.json" / "c" / "s")


def test_a_durable_record_is_made_durable_again_before_it_is_relied_on(
    tmp_path: Path, synced: dict[int, str]
) -> None:
    with create(tmp_path / "s") as store:
        store.commit(durable=True)
    synced.clear()
    MemoryStore.open(tmp_path / "s").close()
    assert not synced
    MemoryStore.open(tmp_path / "s", mode="r+").close()
    assert "s/commits" in synced.values()


def test_listing_outlasts_a_writer_that_drops_what_was_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(tmp_path / "s", keep_commits=1) as store, MemoryStore.open(tmp_path / "s") as reader:
        real, calls = commits.read_commit, 0

        def read_commit(*arguments: Any) -> commits.Commit:
            nonlocal calls
            calls += 1
            if calls == 1:
                store.commit()
                raise CommitNotFoundError
            return real(*arguments)

        monkeypatch.setattr(disk, "read_commit", read_commit)
        assert len(reader.commits()) == 1
        assert calls == 2


def test_pins_are_listed_and_readers_remove_them(tmp_path: Path) -> None:
    with create(tmp_path / "s") as store, MemoryStore.open(tmp_path / "s") as reader:
        [first] = store.commits()
        assert store.pins() == {}
        pins = [store.pin(first), reader.pin(first)]
        assert store.pins() == reader.pins() == dict.fromkeys(pins, first)
        reader.unpin(pins[0])
        assert store.pins() == {pins[1]: first}
    assert MemoryStore.create(layers=1, streams=1, dim=3).pins() == {}
