"""Shards in an object store: made in a folder or there, read in parts, and refused by name where damaged."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import zarr
import zarr.storage
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import (
    CommitNotFoundError,
    CompactReport,
    CorruptionError,
    MemoryIndex,
    MemoryStore,
    MemoryStoreError,
    S3Path,
    scores,
    shard_objects,
    shards,
)
from xlroute.memory.command_line import main

DIM, CHUNK, INNER = 3, 4, 3
ROW = DIM * 4
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.5}
Compression = Literal["zstd"] | None
compressions = pytest.mark.parametrize("compression", [None, "zstd"])
# On a server, and in this process, which is quicker.
places = pytest.mark.parametrize(("place", "compression"), [("bucket", "zstd"), ("quick_bucket", None)])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner chunks of 3 rows, which is no divisor of a chunk, and shards of 3 chunks."""
    monkeypatch.setattr(shards, "_INNER_BYTES", INNER * ROW)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 2 * 3 * CHUNK * ROW)


def create(path: str | Path, **options: Any) -> MemoryStore:
    """A store of two layers and two streams, with chunk files of 4 rows."""
    shape: dict[str, Any] = {"layers": 2, "streams": 2, "dim": DIM, "chunk_bytes": CHUNK * ROW}
    return MemoryStore.create(path, **{**shape, **options})


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
            assert torch.equal(picked[stream, : lengths[stream]], rows[layer, given])
            assert torch.equal(found[stream, : lengths[stream]], rows[layer])


def objects(url: str) -> dict[str, bytes]:
    """Everything in a folder, by name."""
    folder = S3Path.from_url(url)
    return {name: (folder / name).read_bytes() for name in folder.sizes()}


def upload(folder: Path, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (S3Path.from_url(url) / str(file.relative_to(folder))).write_bytes(file.read_bytes())


def download(url: str, folder: Path) -> None:
    for name, data in objects(url).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def chunks_of(url: str) -> list[str]:
    return sorted(name for name in objects(url) if name.startswith("layer-") and "/c." in name)


def shards_of(url: str) -> list[str]:
    """Stream and rows of every shard that is there."""
    return sorted({name.split("/")[0].rpartition(".")[0] for name in objects(f"{url}/shards")} - {"zarr"})


@places
def test_what_was_compacted_in_a_folder_is_read_there(
    place: str,
    compression: Compression,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"{request.getfixturevalue(place)}/a folder/store"
    states, more = torch.randn(2, 2, 14, DIM), torch.randn(2, 2, 9, DIM)
    with create(tmp_path / "s", capacity=11) as store:
        store.append(states, [14, 6])
        before = store.commit()
        report = store.compact(compression=compression)
        assert report.commit is not None
    upload(tmp_path / "s", url)
    held = [states[:, 0, 3:], states[:, 1, :6]]
    for commit in (None, before):
        with MemoryStore.open(url, commit=commit) as store:
            check(store, held)
            fork = store.fork()
            fork.append(more[:, :, :1], [1, 0])
            check(fork, [torch.cat([held[0][:, 1:], more[:, 0, :1]], 1), held[1]])
    with MemoryStore.open(url) as store:
        disk = store.info().disk
        assert disk is not None
        assert (disk.shards, disk.shard_rows) == (report.shards, report.rows)
        assert disk.shard_bytes == sum(
            len(data) for name, data in objects(f"{url}/shards").items() if "/c." in name
        )
        for path in (f"{url} 2", tmp_path / "copy"):
            store.copy_to(path)
            with MemoryStore.open(path) as copy:
                check(copy, held)
                assert copy.info().disk.shards == 0  # type: ignore[union-attr]
    assert MemoryStore.verify(url, all_commits=True).ok
    assert main(["export", url, str(tmp_path / "rows.npz")]) == 0
    with np.load(tmp_path / "rows.npz") as file:
        assert np.array_equal(file["layer-1.stream-0.rows"], held[0][1].numpy())
    assert main(["info", url]) == 0
    assert f"\nshards       {report.shards}, with {report.rows} rows of all layers" in capsys.readouterr().out
    # A writer goes on, there and after that in a folder again.
    with MemoryStore.open(url, mode="r+") as store:
        store.append(more, [9, 0])
        store.reset([1])
        store.commit()
        held = [torch.cat([states[:, 0], more[:, 0]], 1)[:, -11:], states[:, 1, :0]]
        check(store, held)
    download(url, tmp_path / "d")
    with MemoryStore.open(tmp_path / "d", mode="r+") as store:
        check(store, held)
        store.compact(compression=compression)
        check(store, held)
    assert MemoryStore.verify(tmp_path / "d", all_commits=True).ok


@places
def test_what_is_compacted_there_is_read_in_a_folder(
    place: str,
    compression: Compression,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"{request.getfixturevalue(place)}/store"
    states = torch.randn(2, 2, 18, DIM)
    with create(url, keep_commits=1) as store:
        store.append(states, [18, 6])
        store.commit()
    sizes = [
        len(objects(url)[name]) for name in chunks_of(url) if re.search(r"0\.\w+/c\.[0-3]\b|/c\.0\b", name)
    ]
    arguments = ["compact", url, "--json"] + (["--zstd", "7"] if compression else [])
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == url
    assert (report["rows"], report["files_kept"]) == (2 * (16 + 4), 0)
    assert (report["files_before"], report["bytes_before"]) == (len(sizes), sum(sizes))
    in_shards = objects(f"{url}/shards")
    assert report["files_after"] == len(in_shards) - 1 == 5 * report["shards"]
    assert report["bytes_after"] == sum(map(len, in_shards.values())) - len(in_shards["zarr.json"])
    assert shards_of(url) == ["stream-0.0-12", "stream-0.12-16", "stream-1.0-4"]
    # Of each stream the chunk that is written to next.
    assert len(chunks_of(url)) == 2 * 2 * 2
    assert main(["compact", url]) == 0
    assert "nothing to rewrite" in capsys.readouterr().out
    download(url, tmp_path / "d")
    held = [states[:, 0], states[:, 1, :6]]
    for path in (url, tmp_path / "d"):
        with MemoryStore.open(path) as store:
            check(store, held)
        assert MemoryStore.verify(path).ok
    there = zarr.storage.ObjectStore(S3Path.from_url(url)._store, read_only=True)
    found = 0
    for name, shard in zarr.open_group(there, path="store/shards", mode="r").groups():
        stream, first, stop = map(int, re.findall(r"\d+", name)[:3])
        assert torch.equal(torch.from_numpy(shard["rows"][:]), states[:, stream, first:stop])
        found += stop - first
    assert found == 16 + 4


def test_a_shard_is_put_in_parts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_INNER_BYTES", 2**17)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 2**25)
    parts: list[int] = []
    with MemoryStore.create(f"{bucket}/store", layers=2, streams=1, dim=256, chunk_bytes=2**20) as store:
        states = torch.randn(2, 1, 9 * 1024 + 5, 256)
        store.append(states)
        store.commit()
        real = S3Path.writing

        @contextmanager
        def writing(path: S3Path) -> Iterator[Callable[[bytes], None]]:
            with real(path) as write:
                yield lambda data: (parts.append(len(data)), write(data))[1]

        monkeypatch.setattr(S3Path, "writing", writing)
        assert store.compact().shards == 1
    # The writer never has more than a little of it.
    assert sum(parts) > 18 * 2**20 > 100 * max(parts)
    with MemoryStore.open(f"{bucket}/store") as store:
        assert store.info().disk.shard_bytes == sum(parts)  # type: ignore[union-attr]
        for layer in range(2):
            assert torch.equal(store.rows(layer)[0][0], states[layer, 0])


@compressions
def test_no_more_is_asked_for_than_rows_and_inner_chunks(
    quick_bucket: str, monkeypatch: pytest.MonkeyPatch, compression: Compression
) -> None:
    url = f"{quick_bucket}/store"
    states = torch.randn(2, 2, 14, DIM)
    with create(url, keep_commits=1) as store:
        store.append(states, [14, 0])
        store.commit()
        store.compact(compression=compression)
    asked: list[tuple[str, int]] = []
    real = S3Path.read_ranges

    def read_ranges(path: S3Path, starts: list[int], lengths: list[int]) -> list[bytes]:
        kind = str(path).split("/")[-2]
        asked.append((kind, sum(lengths)))
        return real(path, starts, lengths)

    monkeypatch.setattr(S3Path, "read_ranges", read_ranges)

    def gathered(rows: list[int]) -> list[tuple[str, int]]:
        asked.clear()
        found = store.gather(1, torch.tensor([rows, [-1] * len(rows)]))
        assert torch.equal(found[0], states[1, 0, rows])
        return sorted(asked)

    with MemoryStore.open(url) as store:
        # The index of a shard is read once, where rows cannot be found without it.
        assert asked == ([] if compression is None else [("rows", 2 * 4 * 16 + 4)])
        if compression is None:
            assert gathered([1, 8, 2]) == [("crc32c", 3 * 4), ("rows", 3 * ROW)]
            assert gathered([1]) == [("crc32c", 4), ("rows", ROW)]
        else:
            assert [kind for kind, _ in gathered([1, 8, 2])] == ["crc32c", "rows"]
            # Row 0 is in the inner chunk of rows 1 and 2, which is kept; row 3 is in the next one.
            assert gathered([0]) == [("crc32c", 4)]
            assert [kind for kind, _ in gathered([0, 3])] == ["crc32c", "rows"]
            monkeypatch.setattr(shard_objects, "_CACHE_BYTES", INNER * ROW)
            gathered([9])
            assert [kind for kind, _ in gathered([0])] == ["crc32c", "rows"]


@compressions
def test_readers_of_earlier_commits_go_on_until_those_are_dropped(
    quick_bucket: str, compression: Compression
) -> None:
    url = f"{quick_bucket}/store"
    states = torch.randn(2, 2, 20, DIM)
    with create(url, keep_commits=2) as store:
        store.append(states)
        before = store.commit()
        readers = [MemoryStore.open(url) for _ in range(2)]
        layer, fork = store.layer(1), store.fork()

        def look(done: int, total: int) -> None:
            check(readers[0].fork(), [*states.unbind(1)])

        report = store.compact(compression=compression, progress=look)
        assert report.files_kept == report.files_before == 2 * 2 * 2 * 5
        for reader in (readers[0], MemoryStore.open(url, commit=before), MemoryStore.open(url)):
            check(reader, [*states.unbind(1)])
        last = MemoryStore.open(url)
        for _ in range(2):
            store.commit()
        assert before not in store.commits()
        assert chunks_of(url) == []
        check(store, [*states.unbind(1)])
        check(fork, [*states.unbind(1)])
        assert torch.equal(layer.gather(torch.arange(20).expand(2, 20)), states[1])
        with pytest.raises(CommitNotFoundError, match=f"commit {before}: expected its rows"):
            readers[1].rows(0)
        del layer, fork
        store.reset([0, 1])
        for _ in range(3):
            store.commit(durable=True)
        assert shards_of(url) == []
        with pytest.raises(CommitNotFoundError, match="expected its rows"):
            last.rows(0)
        assert MemoryStore.verify(url, all_commits=True).leftovers == ()


@compressions
def test_tiers_an_index_and_stored_scores(
    quick_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compression: Compression,
    scored: list[int],
) -> None:
    monkeypatch.setattr(scores, "_SAMPLES", 1)
    url, tokens = f"{quick_bucket}/store", torch.randn(2, DIM)
    states = torch.randn(2, 2, 30, DIM)
    with create(url, keep_commits=1) as store:
        store.append(states[:, :, :26])
        index = MemoryIndex(store, kind="flat", path=tmp_path / "index")
        index.search(1, tokens, k=5)
        store.layer(1).scores(tokens, **HOW)
        store.commit()
        assert store.compact(compression=compression) != CompactReport(store.path, None)  # type: ignore[arg-type]
        index.save()
    budget = 2 * 2 * 2 * ROW
    with MemoryStore.open(url, mode="r+", device_bytes=2 * budget, host_bytes=3 * budget) as store:
        store.layer(0).prefetch(torch.tensor([[0, 5, 25], [1, -1, 2]]))
        scored.clear()
        found = store.layer(1).scores(tokens, **HOW)
        # One of each stream is scored again before those there are trusted.
        assert scored == [1, 1]
        for stream in range(2):
            assert torch.equal(found[stream], row_scores(states[1, stream, :26], tokens, **HOW))
        store.append(states[:, :, 26:])
        for _ in range(2):
            check(store, [*states.unbind(1)])
        index = MemoryIndex(store, kind="flat", path=tmp_path / "index")
        given, wanted = (each.search(1, tokens, k=5)[1] for each in (index, MemoryIndex(store)))
        assert torch.equal(given, wanted)
        store.commit()
        store.compact(compression=compression)
        check(store, [*states.unbind(1)])
    assert MemoryStore.verify(url, all_commits=True).ok


def test_a_damaged_row_is_refused_and_nothing_has_changed(quick_bucket: str) -> None:
    url = f"{quick_bucket}/store"
    states = torch.randn(2, 2, 30, DIM)
    with create(url) as store:
        store.append(states)
        store.commit()
        path = S3Path.from_url(f"{url}/layer-1.stream-1.rows/c.4.0")
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        before = store.commits(), chunks_of(url)
        with pytest.raises(CorruptionError, match=f"{path}.*row 16 of array layer-1"):
            store.compact()
        assert (store.commits(), chunks_of(url)) == before
        assert shards_of(url) == []
        path.write_bytes(data)
        assert store.compact().rows == 2 * 2 * 28
        check(store, [*states.unbind(1)])


@pytest.fixture(params=[None, "zstd"])
def damaged(request: pytest.FixtureRequest, quick_bucket: str) -> tuple[str, list[Tensor]]:
    """A store whose only commit holds rows 3 to 21 and 0 to 5, all but the last ones in shards."""
    url = f"{quick_bucket}/store"
    states = torch.randint(3, (2, 2, 22, DIM)).float()
    with create(url, keep_commits=1, capacity=19) as store:
        store.append(states, [22, 6])
        store.commit()
        store.compact(compression=request.param)
    return url, [states[:, 0, 3:], states[:, 1, :6]]


def refusal_of(place: str | MemoryStore, expected: list[Tensor]) -> MemoryStoreError | None:
    """What reading is refused with; if it is not, the rows are those that they must be."""
    try:
        with MemoryStore.open(place) if isinstance(place, str) else place as store:
            check(store, expected)
    except MemoryStoreError as error:
        return error
    return None


def check_reported(url: str, path: S3Path, refused: bool) -> None:
    """What is reported is the object, and rows where any are refused."""
    report = MemoryStore.verify(url)
    assert all(str(path) in f"{each.path} {each.problem}" for each in report.damage), report.damage
    assert any(each.rows for each in report.damage) == refused
    assert all(each.commits == report.commits for each in report.damage)


def test_a_flipped_byte_in_any_object_is_named_or_harmless(damaged: tuple[str, list[Tensor]]) -> None:
    url, expected = damaged
    counts = {False: 0, True: 0}
    for name, data in objects(f"{url}/shards").items():
        path = S3Path.from_url(f"{url}/shards") / name
        for offset in random.sample(range(len(data)), 1 if name.endswith("zarr.json") else 6):
            path.write_bytes(
                data[:offset] + bytes([data[offset] ^ random.randrange(1, 256)]) + data[offset + 1 :]
            )
            refusal = refusal_of(url, expected)
            counts[refusal is not None] += 1
            assert refusal is None or str(path) in str(refusal)
            if name != "zarr.json":
                check_reported(url, path, refusal is not None)
            path.write_bytes(data)
    assert min(counts.values()) > 3
    assert refusal_of(url, expected) is None


@pytest.mark.parametrize("kind", ["empty", "half", "longer", "missing"])
def test_a_truncated_or_missing_object_is_named_or_harmless(
    damaged: tuple[str, list[Tensor]], kind: str
) -> None:
    url, expected = damaged
    for name, data in objects(f"{url}/shards").items():
        path = S3Path.from_url(f"{url}/shards") / name
        with MemoryStore.open(url) as opened:
            if kind == "missing":
                path.unlink()
            else:
                path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "longer": data + b"x"}[kind])
            is_data = "/c." in name
            refusal = refusal_of(url, expected)
            assert (refusal is not None) == is_data
            assert refusal is None or str(path) in str(refusal)
            if name != "zarr.json":
                check_reported(url, path, refusal is not None)
            # Who has opened the store before is told when he reads what is not there.
            told = refusal_of(opened, expected)
            assert told is None or str(path) in str(told)
            assert told is not None or not is_data or kind in ("half", "longer")
        path.write_bytes(data)
    assert refusal_of(url, expected) is None


def test_what_a_killed_writer_left_is_named_and_removed(quick_bucket: str) -> None:
    url = f"{quick_bucket}/store"
    states = torch.randn(2, 2, 30, DIM)
    with create(url, keep_commits=1) as store:
        store.append(states)
        store.commit()
        store.compact()
    left = {"stream-0.0-12.0123abcd/rows/c.0.0.0", "stream-1.0-24.89ab4567/zarr.json", "a note"}
    folder = S3Path.from_url(f"{url}/shards")
    for name in left:
        (folder / name).write_bytes(b"x")
    report = MemoryStore.verify(url)
    assert report.ok
    assert {path.name for path in report.leftovers} == {"stream-0.0-12.0123abcd", "stream-1.0-24.89ab4567"}
    with MemoryStore.open(url, mode="r+") as store:
        store.commit()
        assert {*objects(str(folder))} & left == {"a note"}
        check(store, [*states.unbind(1)])
    assert MemoryStore.verify(url).leftovers == ()
