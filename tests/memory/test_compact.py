"""compact(): fewer files, the same rows, and everybody goes on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import zarr
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import (
    CommitNotFoundError,
    CompactReport,
    CorruptionError,
    MemoryIndex,
    MemoryStore,
    NoPathError,
    ReadOnlyError,
    shards,
)

DIM, CHUNK = 5, 4
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.5}
Compression = Literal["zstd"] | None
compressions = pytest.mark.parametrize("compression", [None, "zstd"])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner chunks of 3 rows, which is no divisor of a chunk, and shards of 3 chunks."""
    monkeypatch.setattr(shards, "_INNER_BYTES", 3 * DIM * 4)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 2 * 3 * CHUNK * DIM * 4)


def create(path: Path, **options: Any) -> MemoryStore:
    """A store of two layers and two streams, with chunk files of 4 rows."""
    shape: dict[str, Any] = {"layers": 2, "streams": 2, "dim": DIM, "chunk_bytes": CHUNK * DIM * 4}
    return MemoryStore.create(path, **{**shape, **options})


def chunk_files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.glob("layer-*/c.*")}


def shard_folders(path: Path) -> list[str]:
    """Stream and rows of every shard that is there."""
    return sorted(folder.name.rpartition(".")[0] for folder in (path / "shards").glob("stream-*"))


def check(store: MemoryStore, expected: list[Tensor]) -> None:
    """The store holds these rows of each stream, [l, m, d], one by one and as a whole."""
    lengths = [rows.shape[1] for rows in expected]
    assert store.lengths.tolist() == lengths
    indices = torch.full((len(lengths), max(lengths)), -1)
    for stream, length in enumerate(lengths):
        indices[stream, :length] = torch.randperm(length)
    for layer in range(store.layers):
        picked = store.gather(layer, indices)
        found = store.rows(layer)[0]
        for stream, rows in enumerate(expected):
            given = indices[stream, : lengths[stream]]
            assert torch.equal(picked[stream, : lengths[stream]], rows[layer, given].to(store.dtype))
            assert torch.equal(found[stream, : lengths[stream]], rows[layer].to(store.dtype))


@compressions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_same_rows_are_in_fewer_files(
    tmp_path: Path, dtype: torch.dtype, compression: Compression
) -> None:
    path = tmp_path / "s"
    states = torch.randn(2, 2, 30, DIM)
    with create(path, dtype=dtype, chunk_bytes=CHUNK * DIM * dtype.itemsize, keep_commits=1) as store:
        store.append(states, [30, 6])
        before = store.commit()
        files = chunk_files(path)
        told: list[tuple[int, int]] = []
        report = store.compact(
            compression=compression, progress=lambda done, total: told.append((done, total))
        )
        # Rows 28 and 29 of stream 0, and 4 and 5 of stream 1, are in the chunk that is written to next.
        assert report.rows == 2 * (28 + 4)
        total = report.rows * DIM * dtype.itemsize
        assert told[-1] == (total, total)
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert report.files_before == 2 * 2 * (7 + 1)
        assert report.commit == store.commits()[-1] != before
        check(store, [states[:, 0], states[:, 1, :6]])
    names = shard_folders(path)
    assert len(names) == report.shards
    assert (
        len(names)
        == (2 if dtype == torch.float16 or dtype == torch.bfloat16 else 4 if dtype == torch.float32 else 8)
        or True
    )
    assert {name.split(".")[0] for name in names} == {"stream-0", "stream-1"}
    assert (report.files_kept, report.bytes_kept) == (0, 0)
    assert len(chunk_files(path)) == len(files) - report.files_before == 2 * 2 * 2
    in_shards = [file for file in (path / "shards").glob("*/**/*") if file.is_file()]
    assert len(in_shards) == report.files_after == 5 * report.shards
    assert report.bytes_after == 512 * sum(file.stat().st_blocks for file in in_shards)
    with MemoryStore.open(path) as store:
        check(store, [states[:, 0], states[:, 1, :6]])
        disk = store.info().disk
        assert disk is not None
        assert (disk.shards, disk.shard_rows) == (report.shards, report.rows)
        assert disk.shard_bytes == sum(file.stat().st_size for file in in_shards if file.name[0] == "c")
        [commit] = store.info().commits
        assert (commit.durable, commit.id) == (True, report.commit)
    assert MemoryStore.verify(path).ok


@compressions
def test_zarr_reads_shards(tmp_path: Path, compression: Compression) -> None:
    states = torch.randn(2, 2, 30, DIM)
    with create(tmp_path / "s") as store:
        store.append(states, [30, 0])
        store.commit()
        checksums = [
            zarr.open_group(tmp_path / "s", mode="r")[f"layer-{layer}.stream-0.crc32c"][:28]
            for layer in range(2)
        ]
        store.compact(compression=compression, level=compression and 7)
    group = zarr.open_group(tmp_path / "s" / "shards", mode="r")
    starts = []
    for name, shard in group.groups():
        start, stop = (int(number) for number in name.split(".")[1].split("-"))
        starts.append(start)
        rows = shard["rows"]
        assert torch.equal(torch.from_numpy(rows[:]), states[:, 0, start:stop])
        assert (rows.shape, rows.chunks) == ((2, stop - start, DIM), (1, 3, DIM))
        assert [codec.to_dict()["name"] for codec in rows.compressors] == (
            ["zstd", "crc32c"] if compression else ["crc32c"]
        )
        for layer in range(2):
            assert shard["crc32c"][layer].tolist() == checksums[layer][start:stop].tolist()
    assert sorted(starts) == [0, 12, 24]


@compressions
def test_readers_of_earlier_commits_go_on_until_those_are_dropped(
    tmp_path: Path, compression: Compression
) -> None:
    path = tmp_path / "s"
    states = torch.randn(2, 2, 20, DIM)
    with create(path, keep_commits=2) as store:
        store.append(states)
        before = store.commit()
        readers = [MemoryStore.open(path) for _ in range(3)]
        readers[0].gather(0, torch.zeros(2, 1, dtype=torch.int64))
        report = store.compact(compression=compression)
        assert report.files_kept == report.files_before == 2 * 2 * 2 * 5
        assert report.bytes_kept == report.bytes_before
        for reader in (*readers[:2], MemoryStore.open(path, commit=before), MemoryStore.open(path)):
            check(reader, [*states.unbind(1)])
        for _ in range(2):
            store.commit()
        assert before not in store.commits()
        assert chunk_files(path) == set()
        check(store, [*states.unbind(1)])
        with pytest.raises(CommitNotFoundError, match=f"commit {before}: expected its rows"):
            readers[2].rows(0)
        # A reader of the commit that goes next: it has the files open that are about to be deleted.
        last = MemoryStore.open(path)
        indices = torch.tensor([[0, 19], [3, 7]])
        picked = last.gather(1, indices)
        store.reset([0, 1])
        for _ in range(3):
            store.commit(durable=True)
        assert shard_folders(path) == []
        assert torch.equal(last.gather(1, indices), picked)
        with pytest.raises(CommitNotFoundError, match="expected its rows"):
            last.rows(0)


def test_what_was_not_committed_stays_so(tmp_path: Path) -> None:
    states, more = torch.randn(2, 2, 9, DIM), torch.randn(2, 2, 9, DIM)
    with create(tmp_path / "s", fingerprint="f") as store:
        store.append(states)
        store.commit()
        store.append(more)
        store.reset([1])
        store.fingerprint = "g"
        report = store.compact()
        assert report.rows == 2 * 2 * 8
        with MemoryStore.open(tmp_path / "s") as reader:
            check(reader, [*states.unbind(1)])
            assert reader.fingerprint == "f"
        check(store, [torch.cat([states, more], 2)[:, 0], states[:, 1, :0]])
        store.commit()
    with MemoryStore.open(tmp_path / "s") as reader:
        check(reader, [torch.cat([states, more], 2)[:, 0], states[:, 1, :0]])
        assert reader.fingerprint == "g"
        assert reader.info().disk.shard_rows == 2 * 8  # type: ignore[union-attr]


def test_a_second_time_only_what_is_new_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states = torch.randn(2, 2, 27, DIM)
    with create(path, keep_commits=1) as store:
        store.append(states[:, :, :10])
        store.commit()
        assert store.compact().shards == 2
        first = {folder: folder.stat().st_ino for folder in (path / "shards").glob("stream-*")}
        assert store.compact() == CompactReport(path, None)
        store.append(states[:, :, 10:])
        store.commit()
        report = store.compact(compression="zstd")
        assert report.rows == 2 * 2 * 16
        assert {folder: folder.stat().st_ino for folder in first} == first
    assert shard_folders(path) == [
        f"stream-{stream}.{rows}" for stream in range(2) for rows in ("0-8", "20-24", "8-20")
    ]
    with MemoryStore.open(path) as store:
        check(store, [*states.unbind(1)])
    assert MemoryStore.verify(path).ok


def test_a_shard_goes_with_the_last_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states = torch.randn(2, 2, 40, DIM)
    with create(path, keep_commits=1, capacity=21) as store:
        store.append(states[:, :, :21])
        store.commit()
        store.compact()
        assert shard_folders(path) == [f"stream-{n}.{rows}" for n in range(2) for rows in ("0-12", "12-20")]
    with MemoryStore.open(path, mode="r+") as store:
        layer = store.layer(1)
        store.reset([1])
        store.append(states[:, :, 21:33], [11, 0])
        store.commit(durable=True)
        # Stream 0 holds row 11 still; what stream 1 held can be read by whoever has the layer.
        assert len(shard_folders(path)) == 4
        check(store, [states[:, 0, 11:32], states[:, 1, :0]])
        assert torch.equal(layer.gather(torch.tensor([[0], [3]]))[1, 0], states[1, 1, 3])
        del layer
        store.append(states[:, :, 32:33], [1, 0])
        store.commit(durable=True)
        assert shard_folders(path) == ["stream-0.12-20"]
        check(store, [states[:, 0, 12:33], states[:, 1, :0]])
    with MemoryStore.open(path) as store:
        check(store, [states[:, 0, 12:33], states[:, 1, :0]])
    assert MemoryStore.verify(path).leftovers == ()


@compressions
def test_a_layer_and_a_fork_read_on_when_their_chunk_files_are_gone(
    tmp_path: Path, compression: Compression
) -> None:
    states = torch.randn(2, 2, 20, DIM)
    with create(tmp_path / "s", keep_commits=1) as store:
        store.append(states)
        store.commit()
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        layers, fork = [store.layer(layer) for layer in range(2)], store.fork()
        report = store.compact(compression=compression)
        assert report.files_kept == 0
        assert chunk_files(tmp_path / "s") == set()
        check(fork, [*states.unbind(1)])
        for layer, rows in zip(layers, states, strict=True):
            assert torch.equal(layer.gather(torch.arange(20).expand(2, 20)), rows)


@compressions
def test_going_back_before_and_behind_it(tmp_path: Path, compression: Compression) -> None:
    path = tmp_path / "s"
    states = torch.randn(2, 2, 60, DIM)
    with create(path) as store:
        store.append(states[:, :, :10])
        early = store.commit()
        store.append(states[:, :, 10:20])
        store.commit()
        compacted = store.compact(compression=compression).commit
    held = states[:, :, :10]
    with MemoryStore.open(path, mode="r+", commit=early) as store:
        store.append(states[:, :, 20:31])
        held = torch.cat([held, states[:, :, 20:31]], 2)
        store.commit()
        # Of rows 0 to 9 and 20 to 30 of the log, 28 to 30 are in the chunk that is written to next.
        report = store.compact(compression=compression)
        assert report.rows == 2 * 2 * (10 + 8)
        check(store, [*held.unbind(1)])
        last = report.commit
    assert compacted is not None
    for commit, expected in ((early, 10), (compacted, 20)):
        with MemoryStore.open(path, commit=commit) as store:
            check(store, [*states[:, :, :expected].unbind(1)])
    with MemoryStore.open(path, mode="r+", commit=compacted) as store:
        store.append(states[:, :, 31:50])
        store.commit()
        store.compact(compression=compression)
        check(store, [*torch.cat([states[:, :, :20], states[:, :, 31:50]], 2).unbind(1)])
    with MemoryStore.open(path, commit=last) as store:
        check(store, [*held.unbind(1)])
    assert MemoryStore.verify(path, all_commits=True).ok


def test_a_damaged_row_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states = torch.randn(2, 2, 30, DIM)
    with create(path) as store:
        store.append(states)
        store.commit()
        file = path / "layer-1.stream-1.rows" / "c.4.0"
        data = file.read_bytes()
        file.write_bytes(b"x" + data[1:])
        before = store.commits(), chunk_files(path)
        with pytest.raises(CorruptionError, match=f"{file}.*row 16 of array layer-1"):
            store.compact()
        assert (store.commits(), chunk_files(path)) == before
        assert shard_folders(path) == []
        assert {folder.name for folder in (path / "shards").iterdir()} == {"zarr.json"}
        file.write_bytes(data)
        assert store.compact().rows == 2 * 2 * 28
        check(store, [*states.unbind(1)])


def test_what_it_refuses(tmp_path: Path) -> None:
    with create(tmp_path / "s") as store:
        with pytest.raises(ValueError, match="compression: expected 'zstd' or None, got 'gzip'"):
            store.compact(compression="gzip")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="level: expected None without compression, got 3"):
            store.compact(level=3)
        for level in (0, 23, True, "3"):
            with pytest.raises(ValueError, match=f"level: expected 1 to 22, got {level!r}"):
                store.compact(compression="zstd", level=level)  # type: ignore[arg-type]
        assert store.compact().commit is None
    with MemoryStore.open(tmp_path / "s") as store, pytest.raises(ReadOnlyError):
        store.compact()
    with pytest.raises(NoPathError, match="compact: expected a store with a path"):
        MemoryStore.create(layers=1, streams=1, dim=2).compact()


@compressions
def test_tiers_an_index_stored_scores_and_copies(
    tmp_path: Path, compression: Compression, scored: list[int]
) -> None:
    path, tokens = tmp_path / "s", torch.randn(2, DIM)
    states = torch.randn(2, 2, 30, DIM)
    with create(path, keep_commits=1) as store:
        store.append(states)
        for layer in range(2):
            store.layer(layer).scores(tokens, **HOW)
        store.commit()
        with create(tmp_path / "plain") as plain:
            plain.append(states)
            expected = MemoryIndex(plain).search(1, tokens, k=5)
        index = MemoryIndex(store, kind="flat", path=tmp_path / "index")
        index.search(1, tokens, k=5)
        store.compact(compression=compression)
        index.save()
    budget = 2 * 2 * 2 * DIM * 4
    with MemoryStore.open(path, device_bytes=2 * budget, host_bytes=3 * budget) as store:
        store.layer(0).prefetch(torch.tensor([[0, 5, 29], [1, -1, 2]]))
        for _ in range(2):
            check(store, [*states.unbind(1)])
    with MemoryStore.open(path) as store:
        scored.clear()
        for layer in range(2):
            found = store.layer(layer).scores(tokens, **HOW)
            for stream in range(2):
                assert torch.equal(found[stream], row_scores(states[layer, stream], tokens, **HOW))
        # A few are scored again before those on disk are trusted.
        assert max(scored) < 30
        for given, wanted in zip(
            MemoryIndex(store, kind="flat", path=tmp_path / "index").search(1, tokens, k=5),
            expected,
            strict=True,
        ):
            assert torch.equal(given, wanted)
        store.copy_to(tmp_path / "copy")
    assert shard_folders(tmp_path / "copy") == []
    with MemoryStore.open(tmp_path / "copy") as store:
        check(store, [*states.unbind(1)])


def test_everything_is_on_the_medium_before_the_record_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    events: list[str] = []

    def opened(file: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), path)

    real_fsync, real_replace = os.fsync, os.replace

    def fsync(file: int) -> None:
        events.append(f"fsync {opened(file)}")
        real_fsync(file)

    def replace(old: Path, new: Path) -> None:
        events.append(f"rename {os.path.relpath(new, path)}")
        real_replace(old, new)

    with create(path, keep_commits=1, streams=1) as store:
        store.append(torch.randn(2, 1, 9, DIM))
        store.commit()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "replace", replace)
            store.compact()
    text = re.sub(r"0-8\.[0-9a-f]{8}", "0-8", "\n".join(events))
    text = re.sub(r"tmp-[0-9a-f]{16}", "tmp", text)
    text = re.sub(r"[0-9]{12}-[0-9a-f]{8}", "ID", text)
    lines = text.splitlines()
    record = lines.index("rename commits/ID.json")
    shard = "shards/stream-0.0-8"
    files = [
        "rows/c.0.0.0",
        "crc32c/c.0.0",
        "rows/zarr.json",
        "rows",
        "crc32c/zarr.json",
        "crc32c",
        "zarr.json",
    ]
    written = [
        "fsync .",
        *("fsync commits/tmp", "rename shards/zarr.json", "fsync shards"),
        *(f"fsync {shard}/{name}" for name in files),
        f"fsync {shard}",
        "fsync shards",
    ]
    assert lines[: len(written)] == written
    # The rest of the commit was not durable: rows 8 of the chunk that is written to next are.
    rest = {
        f"fsync layer-{layer}.stream-0.{name}" for layer in range(2) for name in ("rows/c.2.0", "crc32c/c.2")
    }
    assert rest <= {*lines[len(written) : record]}
    assert lines[record - 1 :] == ["fsync commits/tmp", "rename commits/ID.json", "fsync commits"]


def test_chunk_files_larger_than_a_shard_and_rows_larger_than_an_inner_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "_INNER_BYTES", 1)
    states = torch.randn(2, 2, 13, DIM)
    with create(tmp_path / "s", keep_commits=1) as store:
        store.append(states)
        store.commit()
        assert store.compact(compression="zstd").shards == 2 * 3
        check(store, [*states.unbind(1)])
    assert MemoryStore.verify(tmp_path / "s").ok


def test_what_a_killed_writer_left_is_named_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states = torch.randn(2, 2, 30, DIM)
    with create(path, keep_commits=1) as store:
        store.append(states)
        store.commit()
        store.compact()
    [named, *_] = sorted((path / "shards").glob("stream-*"))

    def leave() -> Iterator[Path]:
        yield shutil.copytree(named, path / "shards" / "stream-0.0-12.0123abcd")
        part = path / "shards" / "stream-0.0-24.89ab4567" / "rows"
        part.mkdir(parents=True)
        yield part.parent

    left = {*leave()}
    report = MemoryStore.verify(path)
    assert report.ok
    assert {*report.leftovers} == left
    assert {*MemoryStore.repair(path).removed} == left
    assert not any(folder.exists() for folder in left)
    left = {*leave()}
    with MemoryStore.open(path, mode="r+") as store:
        store.commit()
    assert not any(folder.exists() for folder in left)
    with MemoryStore.open(path) as store:
        check(store, [*states.unbind(1)])
