"""Damage: refused by an error that names the file, or without any effect on what is read."""

import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from xlroute.memory import CommitNotFoundError, CorruptionError, FormatError, MemoryStore, MemoryStoreError
from xlroute.memory.commits import Commit, write_commit
from xlroute.memory.layout import read_layout
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.sealed import checksum, encode

Contents = list[Tensor]


def contents(path: Path, commit: str | None) -> Contents:
    """All that can be read of a commit, by row and as a whole."""
    with MemoryStore.open(path, commit=commit) as store:
        lengths = store.lengths
        longest = int(lengths.max())
        indices = torch.arange(longest).expand(store.streams, longest)
        indices = torch.where(indices < lengths[:, None], indices, -1)
        picked = store.gather(0, indices)
        return [lengths, store.positions(indices), picked, store.rows(0)[0]]


def make(path: Path, appended: list[list[int]], **options: Any) -> tuple[Path, dict[str, Contents]]:
    with MemoryStore.create(
        path,
        layers=1,
        streams=2,
        dim=3,
        dtype=torch.float16,
        capacity=7,
        chunk_bytes=18,
        fingerprint="f",
        **options,
    ) as store:
        for lengths in appended:
            store.append(torch.randn(1, 2, 6, 3), lengths)
            store.commit()
        store.pin(store.commits()[1])
        commits = store.commits()
    return path, {commit: contents(path, commit) for commit in commits}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Contents]]:
    """A small store and what its commits hold."""
    return make(tmp_path_factory.mktemp("original") / "store", [[5, 2], [3, 0], [1, 6]])


@pytest.fixture
def path(original: tuple[Path, dict[str, Contents]], tmp_path: Path) -> Path:
    """A copy of the store to damage."""
    return shutil.copytree(original[0], tmp_path / "store")


def check(path: Path, file: Path, expected: dict[str, Contents]) -> int:
    """Opens every commit of a damaged store; returns how many were refused, each time naming the file."""
    refused = 0
    for commit, rows in expected.items():
        refusal: MemoryStoreError | None = None
        try:
            found = contents(path, commit)
        except (CommitNotFoundError, CorruptionError, FormatError) as error:
            refusal = error
        if refusal is None:
            assert all(map(torch.equal, found, rows)), file
            continue
        refused += 1
        if isinstance(refusal, CommitNotFoundError):
            assert not (path / "commits" / f"{commit}.json").exists()
        else:
            assert str(file) in str(refusal)
    return refused


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_a_flipped_byte_in_any_file_is_named_or_harmless(
    original: tuple[Path, dict[str, Contents]], path: Path
) -> None:
    refused = 0
    for file in files_of(path):
        data = file.read_bytes()
        for offset in random.sample(range(len(data)), min(len(data), 6)):
            damaged = bytearray(data)
            damaged[offset] ^= random.randrange(1, 256)
            file.write_bytes(damaged)
            refused += check(path, file, original[1]) > 0
        file.write_bytes(data)
    assert refused > 100
    assert check(path, path, original[1]) == 0


@pytest.mark.parametrize("kind", ["empty", "half", "longer", "missing"])
def test_a_truncated_or_missing_file_is_named_or_harmless(
    original: tuple[Path, dict[str, Contents]], path: Path, kind: str
) -> None:
    for file in files_of(path):
        data = file.read_bytes()
        if kind == "missing":
            file.unlink()
        else:
            file.write_bytes({"empty": b"", "half": data[: len(data) // 2], "longer": data + b"x"}[kind])
        refused = check(path, file, original[1])
        if file.name.startswith("c.") or (file.name == "zarr.json" and file.parent.name != "commits"):
            assert refused, file
        file.write_bytes(data)


def test_damaged_positions_are_named_and_cost_the_rows_that_have_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eviction": "every_nth", "keep_every": 3}
    path, expected = make(tmp_path / "store", [[6, 2], [4, 0], [2, 6], [5, 0]], **options)
    *_, last = expected
    assert expected[last][1][0].tolist() == [0, 3, 6, 9, 12, 15, 16]
    files = [file for file in files_of(path) if file.name.startswith("stream-")]
    [newest] = [file for file in files if file.name.startswith("stream-0.") and file.stat().st_size == 5 * 8]
    assert len(files) > 2
    for file in files:
        data = file.read_bytes()
        damaged = bytearray(data)
        damaged[random.randrange(len(data))] ^= random.randrange(1, 256)
        for kind, text in (
            (bytes(damaged), "checksum"),
            (data[:-8], "bytes, got"),
            (data + data, "bytes, got"),
            (None, "no such file"),
        ):
            if kind is None:
                file.unlink()
            else:
                file.write_bytes(kind)
            assert check(path, file, expected) > 0
            report = MemoryStore.verify(path, all_commits=True)
            [damage] = report.damage
            assert (damage.path, damage.array, damage.stream) == (file, None, int(file.name[7]))
            assert text in damage.problem
            assert f"{damage.rows[0][0]}-{damage.rows[0][1]}" in file.name
            assert damage.commits
        file.write_bytes(data)
    assert check(path, path, expected) == 0

    newest.unlink()
    with pytest.raises(CorruptionError, match=f"{newest}: expected the positions of 5 rows, got no such"):
        MemoryStore.open(path, mode="r+")
    report = MemoryStore.repair(path)
    [loss] = report.losses
    assert (loss.stream, loss.held, loss.damaged, loss.kept) == (0, (0, 17), ((0, 15),), (15, 17))
    assert MemoryStore.verify(path).ok
    with MemoryStore.open(path, mode="r+") as store:
        assert store.positions(torch.tensor([[0, 1], [-1, -1]]))[0].tolist() == [15, 16]
        assert torch.equal(store.rows(0)[0][0, :2], expected[last][3][0, 5:7])
        store.append(torch.randn(1, 2, 6, 3), [6, 0])
        store.commit()
    assert MemoryStore.verify(path).ok


def test_positions_that_no_writer_can_have_written_are_refused(tmp_path: Path) -> None:
    path, expected = make(tmp_path / "store", [[6, 2], [6, 0]], eviction="every_nth", keep_every=3)
    *_, rows = expected.values()
    assert rows[1][0].tolist() == [0, 3, 6, 8, 9, 10, 11]
    last = max(path.glob("commits/0*.json"))
    start, stop, crc32c = json.loads(last.read_text())["streams"][0]["survivors"]
    for wrong in ([3, 0, 6], [0, 0, 3], [-1, 0, 3], [0, 3, 8], [0, 3, 1 << 40]):
        data = np.array(wrong, "<i8").tobytes()
        seal = f"{google_crc32c.value(data):08x}"
        (path / "positions" / f"stream-0.{start}-{stop}.{seal}").write_bytes(data)

        def change(document: dict[str, Any], seal: str = seal) -> None:
            document["streams"][0]["survivors"] = [start, stop, seal]

        name = recorded(path, change)
        with pytest.raises(CorruptionError, match=f"stream-0.{start}-{stop}.{seal}: expected positions"):
            MemoryStore.open(path, commit=name)
        (path / "commits" / f"{name}.json").unlink()
    for impossible in (
        [start],
        [start, start, crc32c],
        [start, 1 << 40, crc32c],
        [start + 1, stop, crc32c],
        [start, stop, "../../../x"],
        [start, stop, None],
        [1.0, stop, crc32c],
        [-1, stop, crc32c],
        "abc",
        None,
        {},
    ):

        def impose(document: dict[str, Any], impossible: object = impossible) -> None:
            document["streams"][0]["survivors"] = impossible

        name = recorded(path, impose)
        for mode in ("r", "r+"):
            with pytest.raises(CorruptionError, match=f"{name}.json"):
                MemoryStore.open(path, mode=mode, commit=name)  # type: ignore[arg-type]
        (path / "commits" / f"{name}.json").unlink()
    assert check(path, path, expected) == 0


def test_rows_swapped_with_their_checksums_are_noticed(path: Path) -> None:
    one, two = path / "layer-0.stream-0.rows" / "c.1.0", path / "layer-0.stream-0.crc32c" / "c.1"
    for file, size in ((one, 6), (two, 4)):
        data = file.read_bytes()
        file.write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])
    with pytest.raises(CorruptionError, match=r"row 3 of array layer-0\.stream-0\.rows"):
        MemoryStore.open(path).rows(0)


def test_arrays_swapped_as_a_whole_are_noticed(path: Path) -> None:
    for kind in ("rows", "crc32c"):
        first, second = (path / f"layer-0.stream-{stream}.{kind}" for stream in range(2))
        first.rename(path / "third")
        second.rename(first)
        (path / "third").rename(second)
    with pytest.raises(CorruptionError, match=r"layer-0\.stream-0"):
        MemoryStore.open(path).rows(0)


def test_a_damaged_last_commit_is_refused_and_an_earlier_one_can_be_gone_back_to(
    original: tuple[Path, dict[str, Contents]], path: Path
) -> None:
    *_, earlier, last = original[1]
    record = path / "commits" / f"{last}.json"
    record.write_text(record.read_text().replace('"f"', '"g"'))
    for mode in ("r", "r+"):
        with pytest.raises(CorruptionError, match=f"{last}.json: .* earlier commits can be opened"):
            MemoryStore.open(path, mode=mode)  # type: ignore[arg-type]
    with MemoryStore.open(path, mode="r+", commit=earlier) as store:
        assert last not in store.commits()
        store.append(torch.randn(1, 2, 1, 3))
        store.commit()
    assert MemoryStore.open(path).lengths.tolist() == [7, 3]
    assert all(map(torch.equal, contents(path, earlier), original[1][earlier]))


def test_a_writer_does_not_write_into_a_damaged_file(path: Path) -> None:
    states = torch.randn(1, 2, 1, 3)
    before = MemoryStore.open(path).lengths
    for name in ("rows/c.2.0", "crc32c/c.2"):
        file = path / f"layer-0.stream-1.{name}"
        data = file.read_bytes()
        for damage in (lambda file=file: file.write_bytes(b""), file.unlink):
            with MemoryStore.open(path, mode="r+") as store:
                damage()
                with pytest.raises(CorruptionError, match=f"{file}: expected a chunk file"):
                    store.append(states)
            with pytest.raises(CorruptionError, match=f"{file}: expected a chunk file"):
                MemoryStore.open(path, mode="r+")
            file.write_bytes(data)
    assert torch.equal(MemoryStore.open(path).lengths, before)


def test_a_newer_format_is_refused(path: Path) -> None:
    file = path / "zarr.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    for mode in ("r", "r+"):
        with pytest.raises(
            FormatError, match=f"{file}: expected a memory store of format 1 or 2, got format 3"
        ):
            MemoryStore.open(path, mode=mode)  # type: ignore[arg-type]


def test_what_is_no_memory_store_is_refused(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "group", mode="w").create_array("a", shape=(2,), dtype="float32")
    zarr.create_array(tmp_path / "array", shape=(2,), dtype="float32")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "zarr.json").write_text("[]")
    for name in ("group", "array", "folder", "file", "list"):
        for mode in ("r", "r+"):
            with pytest.raises((FormatError, CorruptionError), match=name):
                MemoryStore.open(tmp_path / name, mode=mode)  # type: ignore[arg-type]


def resealed(path: Path, **changes: Any) -> None:
    """Rewrites the metadata of the group with other numbers and the checksum that belongs to them."""
    document = read_layout(path).group_document()
    document["attributes"]["xlroute_memory"].update(changes)
    del document["attributes"]["crc32c"]
    document["attributes"]["crc32c"] = checksum(document)
    (path / "zarr.json").write_bytes(encode(document))


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


def claim_streams(path: Path) -> None:
    resealed(path, streams=1 << 40)


def claim_layers(path: Path) -> None:
    resealed(path, layers=1 << 40)


def claim_dim(path: Path) -> None:
    resealed(path, dim=1 << 40)


def claim_chunks(path: Path) -> None:
    resealed(path, chunk_rows=1 << 40)


def claim_rows(path: Path) -> None:
    resealed(path, capacity=None)
    log = StreamLog((Extent(0, 1 << 40, 0),), 1 << 40, 1 << 40)
    write_commit(path, Commit(1000, None, None, False, (log, log)))


@pytest.mark.parametrize(
    "claim", [claim_streams, claim_layers, claim_dim, claim_chunks, claim_rows], ids=lambda f: f.__name__
)
def test_enormous_claims_are_refused_and_nothing_is_allocated(
    path: Path, claim: Callable[[Path], None]
) -> None:
    claim(path)
    for mode in ("r", "r+"):
        with (
            little_memory(),
            pytest.raises(MemoryStoreError, match=str(path)),
            MemoryStore.open(path, mode=mode) as store,  # type: ignore[arg-type]
        ):
            store.rows(0)


def test_enormous_room_is_not_taken_for_rows(original: tuple[Path, dict[str, Contents]], path: Path) -> None:
    layout = read_layout(path)
    room = layout.room_for(1 << 40)
    assert room > 1 << 40
    for stream in range(2):
        for kind in ("rows", "crc32c"):
            file = path / layout.array_name(0, stream, kind) / "zarr.json"
            file.write_bytes(encode(layout.array_document(kind, room)))
    with little_memory():
        assert check(path, path, original[1]) == 0
        assert MemoryStore.verify(path, all_commits=True).ok
        with MemoryStore.open(path, mode="r+") as store:
            store.append(torch.ones(1, 2, 1, 3))
            store.commit()
        assert torch.equal(MemoryStore.open(path).rows(0)[0][:, -1], torch.ones(2, 3, dtype=torch.float16))


def test_an_array_of_another_shape_is_refused(path: Path) -> None:
    for name, key in (("rows", "shape"), ("crc32c", "shape"), ("rows", "data_type")):
        file = path / f"layer-0.stream-0.{name}" / "zarr.json"
        text = file.read_text()
        document = json.loads(text)
        document[key] = [1 << 40, *document[key][1:]] if key == "shape" else "float64"
        file.write_text(json.dumps(document))
        with pytest.raises(CorruptionError, match=str(file)):
            MemoryStore.open(path).rows(0)
        file.write_text(text)


def recorded(path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Writes the last record once more, changed and with the checksum that belongs to it; returns its id."""
    last = max((path / "commits").glob("*-*.json"))
    document = json.loads(last.read_text())
    del document["crc32c"]
    document["generation"] = 1000
    change(document)
    seal = checksum(document)
    name = f"000000001000-{seal}"
    (path / "commits" / f"{name}.json").write_bytes(encode({**document, "crc32c": seal}))
    return name


NUMBERS = ("generation", "appended", "end", "start", "stop", "writer")
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(NUMBERS, (1.0, True, -1, 1 << 70, "1", None, [1])),
    "durable": (0, 1, 0.0, None, "true"),
    "parent": (0, False, []),
    "fingerprint": (0, 1.5, {}),
}
IMPOSSIBLE = [(key, value) for key, values in VALUES.items() for value in values]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE, ids=repr)
def test_a_record_with_impossible_numbers_is_refused(path: Path, key: str, value: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        stream = document["streams"][0]
        if key in document:
            document[key] = value
        elif key in stream:
            stream[key] = value
        else:
            stream["extents"][0][("start", "stop", "writer").index(key)] = value

    name = recorded(path, change)
    for mode in ("r", "r+"):
        with pytest.raises(CorruptionError, match=f"{name}.json"):
            MemoryStore.open(path, mode=mode, commit=name)


def test_a_record_that_claims_rows_without_files_is_refused_before_going_back_to_it(path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        stream = document["streams"][0]
        stream["extents"] = [[1 << 40, (1 << 40) + 7, 0]]
        stream["end"] = stream["appended"] = (1 << 40) + 7

    name = recorded(path, change)
    before = sorted((path / "commits").iterdir())
    for mode in ("r", "r+"):
        with pytest.raises(CorruptionError, match="expected a chunk file, got no such file"):
            MemoryStore.open(path, mode=mode, commit=name)
    assert {*(path / "commits").iterdir()} <= {*before, path / "commits" / "writer.lock"}


def first(path: Path) -> str:
    return min((path / "commits").glob("*-*.json")).stem


def test_a_stream_at_the_end_of_its_numbers_is_not_written_to(path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["streams"][0].update(extents=[], appended=0, end=1 << 48)

    recorded(path, change)
    with MemoryStore.open(path, mode="r+") as store, pytest.raises(CorruptionError, match="at most"):
        store.append(torch.randn(1, 2, 1, 3))


@pytest.mark.parametrize(
    ("name", "value"), [("dim", 1 << 31), ("dim", 1 << 70), ("chunk_bytes", 1 << 46)], ids=str
)
def test_enormous_shapes_are_refused(tmp_path: Path, name: str, value: int) -> None:
    sizes: dict[str, Any] = {"dim": 4, "chunk_bytes": 64, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        MemoryStore.create(tmp_path / "s", layers=1, streams=1, **sizes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pinned", [True, False])
def test_rows_of_a_damaged_record_stay_until_it_is_restored(tmp_path: Path, pinned: bool) -> None:
    path = tmp_path / "s"
    with MemoryStore.create(
        path, layers=1, streams=1, dim=4, chunk_bytes=32, keep_commits=1 if pinned else 8
    ) as store:
        [empty] = store.commits()
        store.append(torch.randn(1, 1, 5, 4))
        commit, rows = store.commit(), store.rows(0)[0]
        if pinned:
            store.pin(commit)
            store.reset([0])
            store.append(torch.randn(1, 1, 4, 4))
            store.commit()
    record = path / "commits" / f"{commit}.json"
    data = record.read_bytes()
    record.write_bytes(b"x" + data[1:])
    with MemoryStore.open(path, mode="r+", commit=None if pinned else empty) as store:
        for _ in range(3):
            store.append(torch.randn(1, 1, 4, 4))
            store.commit()
            store.reset([0])
    record.write_bytes(data)
    assert torch.equal(MemoryStore.open(path, commit=commit).rows(0)[0], rows)


def test_nothing_is_read_for_no_row(path: Path) -> None:
    for chunk in path.glob("layer-0.stream-*.rows/c.*"):
        chunk.write_bytes(b"\xff" * chunk.stat().st_size)
    with MemoryStore.open(path) as store:
        assert not store.gather(0, torch.full((2, 3), -1)).any()
        with pytest.raises(CorruptionError, match="checksum"):
            store.gather(0, torch.tensor([[-1, 3], [-1, -1]]))


def test_missing_folders_and_folders_in_place_of_files_are_named(path: Path) -> None:
    commit = first(path)
    shutil.copytree(path, path.parent / "other")
    metadata = path.parent / "other" / "zarr.json"
    metadata.unlink()
    metadata.mkdir()
    record = path / "commits" / f"{commit}.json"
    record.unlink()
    record.mkdir()
    for mode in ("r", "r+"):
        with pytest.raises(CorruptionError, match=f"{metadata}: expected a file, got a folder"):
            MemoryStore.open(metadata.parent, mode=mode)
        with pytest.raises(CorruptionError, match=f"{record}: expected a file, got a folder"):
            MemoryStore.open(path, mode=mode, commit=commit)
    shutil.rmtree(path / "commits")
    for given in (None, commit):
        with pytest.raises(CorruptionError, match="commits: expected the folder of the commits"):
            MemoryStore.open(path, commit=given)
