"""Damage to shards: refused by name or without any effect on rows, reported, and repaired."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from torch import Tensor

from xlroute.memory import (
    CommitNotFoundError,
    CorruptionError,
    Damage,
    MemoryStore,
    MemoryStoreError,
    shards,
)
from xlroute.memory.commits import Commit, read_commit, write_commit
from xlroute.memory.layout import read_layout
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.sealed import checksum, encode
from xlroute.memory.shards import Shard

DIM, CHUNK, INNER = 5, 4, 3
ROW_BYTES = 4 * DIM
# Of stream 0, rows 0 to 19 are in a shard: so many inner chunks of a layer, and bytes of the index.
INNERS = 7
INDEX = 2 * INNERS * 16 + 4
Made = tuple[Path, Tensor]


@pytest.fixture(params=[None, "zstd"], scope="module")
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store whose only commit holds rows 3 to 21 and 0 to 5, all but the last ones in shards."""
    compression: Literal["zstd"] | None = request.param
    path = tmp_path_factory.mktemp("original") / "s"
    # Numbers of which zstd makes less.
    states = torch.randint(3, (2, 2, 22, DIM)).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_INNER_BYTES", INNER * ROW_BYTES)
        with MemoryStore.create(
            path, layers=2, streams=2, dim=DIM, chunk_bytes=CHUNK * ROW_BYTES, keep_commits=1, capacity=19
        ) as store:
            store.append(states[:, :, :10], [10, 6])
            store.append(states[:, :, 10:], [12, 0])
            store.commit()
            store.compact(compression=compression)
    return path, states


@pytest.fixture
def path(original: Made, tmp_path: Path) -> Path:
    """A copy of the store to damage."""
    return shutil.copytree(original[0], tmp_path / "s")


def contents(path: Path) -> list[Tensor]:
    """All that can be read, by row and as a whole."""
    with MemoryStore.open(path) as store:
        indices = torch.stack([torch.arange(19), torch.tensor([*range(6), *[-1] * 13])])
        picked = [store.gather(layer, indices) for layer in range(2)]
        return [*picked, *(store.rows(layer)[0] for layer in range(2))]


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in (path / "shards").rglob("*") if file.is_file())


def folder_of(path: Path, stream: int = 0) -> Path:
    [folder] = (path / "shards").glob(f"stream-{stream}.*")
    return folder


def index_of(file: Path) -> NDArray[np.uint64]:
    """What the index of a file of stream 0 says."""
    return np.frombuffer(file.read_bytes()[-INDEX:-4], "<u8").reshape(2 * INNERS, 2).copy()


def is_compressed(path: Path) -> bool:
    return "zstd" in (folder_of(path) / "rows" / "zarr.json").read_text()


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= random.randrange(1, 256)
    file.write_bytes(data)


def refusal_of(path: Path, expected: list[Tensor]) -> MemoryStoreError | None:
    """What reading is refused with; if it is not, the rows are those that they must be."""
    try:
        found = contents(path)
    except MemoryStoreError as error:
        return error
    assert all(map(torch.equal, found, expected))
    return None


def check_reported(path: Path, file: Path, refused: bool) -> tuple[Damage, ...]:
    """What is reported is the file, and rows where any are refused."""
    report = MemoryStore.verify(path)
    assert all(str(file) in f"{each.path} {each.problem}" for each in report.damage), report.damage
    assert any(each.rows for each in report.damage) == refused
    assert all(each.commits == report.commits for each in report.damage)
    return report.damage


def check_repaired(path: Path, states: Tensor, lost: bool | None) -> None:
    """A repair keeps rows that were held, at their positions; all of them if none was lost (None: either)."""
    report = MemoryStore.repair(path)
    assert lost is None or lost == bool(report.losses)
    assert MemoryStore.verify(path).ok
    again = MemoryStore.repair(path)
    assert again.ok, again
    with MemoryStore.open(path) as store:
        for stream, (first, stop) in enumerate(((3, 22), (0, 6))):
            kept = [loss.kept for loss in report.losses if loss.stream == stream]
            first, stop = kept[0] if kept else (first, stop)
            assert store.lengths[stream] == stop - first
            for layer in range(2):
                expected = states[layer, stream, first:stop]
                assert torch.equal(store.rows(layer)[0][stream, : stop - first], expected)
    if not report.losses:
        # Zarr reads what is held as well.
        for stream, first in enumerate((3, 0)):
            for kind in ("rows", "crc32c"):
                zarr.open_array(folder_of(path, stream) / kind, mode="r")[:, first:]
    with MemoryStore.open(path, mode="r+") as store:
        more = torch.randn(2, 2, 3, DIM)
        store.append(more)
        store.commit()
        assert torch.equal(store.rows(1)[0][0, int(store.lengths[0]) - 3 : int(store.lengths[0])], more[1, 0])


def test_a_flipped_byte_in_any_file_is_named_or_harmless(original: Made, path: Path, tmp_path: Path) -> None:
    expected = contents(path)
    counts = {False: 0, True: 0}
    for file in files_of(path):
        data = file.read_bytes()
        for offset in random.sample(range(len(data)), 3 if file.name == "zarr.json" else 12):
            flip(file, offset)
            refusal = refusal_of(path, expected)
            counts[refusal is not None] += 1
            assert refusal is None or str(file) in str(refusal)
            if file.parent.name != "shards":
                check_reported(path, file, refusal is not None)
                if random.random() < 0.3:
                    copy = shutil.copytree(path, tmp_path / "copy")
                    check_repaired(copy, original[1], refusal is not None)
                    shutil.rmtree(copy)
            file.write_bytes(data)
    assert min(counts.values()) > 5
    assert refusal_of(path, expected) is None


@pytest.mark.parametrize("kind", ["empty", "half", "longer", "missing"])
def test_a_truncated_or_missing_file_is_named_or_harmless(
    original: Made, path: Path, tmp_path: Path, kind: str
) -> None:
    expected = contents(path)
    metadata = [file for file in files_of(path) if file.name == "zarr.json"]
    for file in {*files_of(path)} - {*random.sample(metadata, len(metadata) - 2)}:
        data = file.read_bytes()
        if kind == "missing":
            file.unlink()
        else:
            file.write_bytes({"empty": b"", "half": data[: len(data) // 2], "longer": data + b"x"}[kind])
        refusal = refusal_of(path, expected)
        assert (refusal is not None) == file.name.startswith("c.")
        assert refusal is None or str(file) in str(refusal)
        if file.parent.name != "shards":
            assert check_reported(path, file, refusal is not None)
            copy = shutil.copytree(path, tmp_path / "copy")
            # Cut off again, a longer file has all of its rows; a shorter one may lack its index alone.
            lost = refusal is not None and kind != "longer"
            check_repaired(copy, original[1], None if lost and kind == "half" else lost)
            shutil.rmtree(copy)
        file.write_bytes(data)


def test_the_inner_chunk_and_the_rows_are_named(path: Path) -> None:
    folder = folder_of(path)
    assert folder.name.startswith("stream-0.0-20.")
    name = folder.relative_to(path).as_posix()
    rows, checksums = folder / "rows" / "c.0.0.0", folder / "crc32c" / "c.0.0"
    places = index_of(rows)
    # In layer 1 the end of inner chunk 2, of rows 6 to 8; in layer 0 the checksum of row 4, in inner chunk 1.
    flip(rows, int(places[INNERS + 2].sum()) - 5)
    flip(checksums, 1 * (INNER * 4 + 4) + 4)
    one, two = MemoryStore.verify(path).damage
    assert (one.path, one.array, one.stream, one.chunk) == (rows, f"{name}/rows", 0, 1)
    assert (one.rows, two.path, two.chunk) == (((4, 5),), rows, INNERS + 2)
    assert str(checksums) in one.problem
    # A whole inner chunk may be lost where it is compressed.
    assert two.rows in (((8, 9),), ((7, 9),), ((6, 9),))
    assert is_compressed(path) or two.rows == ((8, 9),)
    with MemoryStore.open(path) as store, pytest.raises(CorruptionError) as refusal:
        store.gather(0, torch.tensor([[4 - 3], [0]]))
    for text in (rows, checksums, "row 4 of the files (row 4 of array layer-0.stream-0.rows)"):
        assert str(text) in str(refusal.value)
    report = MemoryStore.repair(path)
    [loss] = report.losses
    assert loss.kept == (9, 22)
    assert MemoryStore.verify(path).ok


@pytest.mark.parametrize("what", ["index", "inner", "metadata", "filling"])
def test_what_zarr_alone_needs_is_written_anew(original: Made, path: Path, what: str) -> None:
    folder = folder_of(path)
    file = folder / ("rows/c.0.0.0" if not is_compressed(path) else "crc32c/c.0.0")
    array = zarr.open_array(file.parent, mode="r")
    whole, data = array[:], file.read_bytes()
    if what == "metadata":
        file = file.with_name("zarr.json")
        data = file.read_bytes()
        flip(file, data.index(b"uint32" if is_compressed(path) else b"float32"))
    elif what == "filling":
        # The last inner chunk of layer 0 has two rows and, before its checksum, room for a third.
        flip(file, INNERS * (len(data) - INDEX) // (2 * INNERS) - 5)
    else:
        # Inner chunk 1 is the first with a row that is held.
        flip(file, -20 if what == "index" else 2 * (len(data) - INDEX) // (2 * INNERS) - 1)
    with pytest.raises((ValueError, KeyError, RuntimeError, MemoryError)):
        zarr.open_array(file.parent, mode="r")[:]
    assert refusal_of(path, contents(original[0])) is None
    [damage] = check_reported(path, file, refused=False)
    assert damage.path == file
    report = MemoryStore.repair(path)
    assert (report.commit, report.losses, report.damage, report.restored) == (None, (), (), (file,))
    assert np.array_equal(zarr.open_array(file.parent, mode="r")[:], whole)
    if what != "filling":
        assert file.read_bytes() == data
    assert MemoryStore.verify(path).ok


def test_a_medium_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder_of(path, 1) / "rows" / "c.0.0.0"
    index = folder_of(path, 0) / "rows" / "c.0.0.0"
    failing = {(str(file), 0), (str(index), index.stat().st_size - INDEX)}
    real = os.pread

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        if (os.readlink(f"/proc/self/fd/{descriptor}"), offset) in failing:
            raise OSError(5, "Input/output error")
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    of_index, of_rows = MemoryStore.verify(path).damage
    assert (of_rows.path, of_rows.rows, of_rows.chunk) == (file, ((0, 3),), 0)
    assert of_rows.problem == "expected a file that can be read, got Input/output error"
    assert (of_index.path, of_index.rows) == (index, ((3, 20),) if is_compressed(path) else ())
    losses = {loss.stream: loss.kept for loss in MemoryStore.repair(path).losses}
    assert losses == ({0: (20, 22), 1: (3, 6)} if is_compressed(path) else {1: (3, 6)})


def test_a_shard_that_is_dropped_meanwhile_is_not_called_damaged(path: Path) -> None:
    [record] = (path / "commits").glob("0*.json")
    reader = MemoryStore.open(path)

    def drop(done: int, total: int) -> None:
        record.unlink(missing_ok=True)
        shutil.rmtree(path / "shards", ignore_errors=True)

    with MemoryStore.open(path, mode="r+") as store:
        store.append(torch.zeros(2, 2, 1, DIM))
        store.reset([0, 1])
        store.pin(record.stem)
        last = store.commit()
    data, folders = record.read_bytes(), shutil.copytree(path / "shards", path.parent / "shards")
    # Damage that costs no row, in a shard of the commit that goes.
    flip(folder_of(path, 1) / "rows" / "zarr.json", 20)
    report = MemoryStore.verify(path, all_commits=True, progress=drop)
    assert (report.damage, report.commits) == ((), (last,))
    record.write_bytes(data)
    shutil.copytree(folders, path / "shards")
    with pytest.raises(CommitNotFoundError, match=f"commit {record.stem}: expected its rows"):
        MemoryStore.verify(path, commit=record.stem, progress=drop)
    with pytest.raises(CommitNotFoundError, match=f"commit {record.stem}: expected its rows"):
        reader.rows(0)


@contextmanager
def little_memory() -> Iterator[None]:
    """Refuses this process more than a quarter of a GiB beyond what it has, used or not."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 28), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def claim_rows(path: Path, shard: Shard) -> None:
    """A shard of rows that nobody can count, some of them held."""
    stop = 1 << 46
    log = StreamLog((Extent(0, stop, 0),), stop, stop)
    for inner_rows in (shard.inner_rows, 1 << 20):
        count = 2 * -(-stop // inner_rows)
        size = count * (inner_rows * ROW_BYTES + 4 + 16) + 4
        claimed = shard._replace(stop=stop, inner_rows=inner_rows, size=size)
        resealed(path, capacity=None)
        write_commit(path, Commit(1000, None, None, False, (log, log), shards=((claimed,), ())))


def claim_inner_rows(path: Path, shard: Shard) -> None:
    last = read_commit(path, max((path / "commits").glob("0*.json")).stem, read_layout(path))
    claimed = shard._replace(inner_rows=1 << 40, size=2 * ((1 << 40) * ROW_BYTES + 4 + 16) + 4)
    write_commit(path, Commit(1000, None, None, False, last.logs, shards=((claimed,), last.shards[1])))


def claim_offset(path: Path, shard: Shard) -> None:
    claim_in_index(path, 5, 0, 1 << 40)


def claim_length(path: Path, shard: Shard) -> None:
    claim_in_index(path, 5, 1, 1 << 40)


def claim_overflow(path: Path, shard: Shard) -> None:
    claim_in_index(path, 0, 1, (1 << 64) - 8)


def claim_in_index(path: Path, inner: int, column: int, value: int) -> None:
    """Writes a number into the index of compressed rows, with the checksum that belongs to it."""
    file = folder_of(path) / "rows" / "c.0.0.0"
    index = index_of(file)
    index[inner, column] = value
    file.write_bytes(file.read_bytes()[:-INDEX] + sealed(index.tobytes()))


def sealed(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def claim_decompressed(path: Path, shard: Shard) -> None:
    """An inner chunk of which zstd would make a GiB."""
    file = folder_of(path) / "rows" / "c.0.0.0"
    data, index = file.read_bytes(), index_of(file)
    # A row of inner chunk 1 is held.
    start, stop = int(index[1, 0]), int(index[2, 0])
    large = sealed(Zstd(19).encode(np.zeros(1 << 30, np.uint8)))
    index[2:, 0] += np.uint64(len(large)) - index[1, 1]
    index[1, 1] = len(large)
    whole = data[:start] + large + data[stop:-INDEX] + sealed(index.tobytes())
    file.write_bytes(whole)
    last = read_commit(path, max((path / "commits").glob("0*.json")).stem, read_layout(path))
    claimed = shard._replace(size=len(whole))
    write_commit(path, Commit(1000, None, None, False, last.logs, shards=((claimed,), last.shards[1])))


def resealed(path: Path, **changes: Any) -> None:
    """Rewrites the metadata of the group with other numbers."""
    (path / "zarr.json").write_bytes(encode(replace(read_layout(path), **changes).group_document()))


@pytest.mark.parametrize(
    "claim",
    [claim_rows, claim_inner_rows, claim_offset, claim_length, claim_overflow, claim_decompressed],
    ids=lambda f: f.__name__,
)
def test_enormous_claims_are_refused_and_nothing_is_allocated(
    original: Made, path: Path, claim: Callable[[Path, Shard], None]
) -> None:
    [record] = (path / "commits").glob("0*.json")
    [[shard], _] = read_commit(path, record.stem, read_layout(path)).shards
    if not is_compressed(path) and claim not in (claim_rows, claim_inner_rows):
        # Nobody but zarr looks at such an index.
        if claim is not claim_decompressed:
            claim(path, shard)
            with little_memory():
                assert refusal_of(path, contents(original[0])) is None
                assert len(MemoryStore.verify(path).damage) == 1
        return
    claim(path, shard)
    for mode in ("r", "r+"):
        with (
            little_memory(),
            pytest.raises(MemoryStoreError, match=str(path)),
            MemoryStore.open(path, mode=mode) as store,  # type: ignore[arg-type]
        ):
            store.rows(0)
    with little_memory():
        assert not MemoryStore.verify(path).ok


IMPOSSIBLE: list[tuple[str, Any]] = [
    ("rows", [0, 15]),
    ("rows", [4, 0]),
    ("rows", [0, 24]),
    ("rows", [0]),
    ("rows", [0, 16.0]),
    ("name", "../../ab"),
    ("name", 7),
    ("inner_rows", 0),
    ("inner_rows", True),
    ("zstd", 0),
    ("zstd", 23),
    ("zstd", "3"),
    ("bytes", 5),
    ("bytes", 1 << 70),
    ("more", 1),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE, ids=repr)
def test_a_record_with_impossible_shards_is_refused(path: Path, key: str, value: Any) -> None:
    [record] = (path / "commits").glob("0*.json")
    document = json.loads(record.read_text())
    del document["crc32c"]
    document["generation"] = 1000
    document["shards"][0][0][key] = value
    seal = checksum(document)
    name = f"000000001000-{seal}"
    (path / "commits" / f"{name}.json").write_bytes(encode({**document, "crc32c": seal}))
    for mode in ("r", "r+"):
        with pytest.raises(CorruptionError, match=f"{name}.json"):
            MemoryStore.open(path, mode=mode)  # type: ignore[arg-type]
