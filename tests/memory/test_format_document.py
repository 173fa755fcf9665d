"""docs/memory-format.md: its program reads what the store holds, and what it says of the files is so."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from numcodecs.zstd import Zstd

from xlroute.memory import MemoryStore, shards

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "memory-format.md"
Compacted = Literal["no", "plain", "zstd"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), flags=re.MULTILINE | re.DOTALL)


def run(layer: int = 0, stream: int = 0) -> dict[str, Any]:
    """Runs all blocks for one layer and stream; returns their names."""
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks()):
        chosen = block.replace('Path("memory"), 0, 0', f'Path("memory"), {layer}, {stream}')
        assert number or chosen != block or (layer, stream) == (0, 0)
        exec(compile(chosen, f"memory-format.md block {number}", "exec"), names)
    return names


def make(dtype: torch.dtype, *, compacted: Compacted = "no", **options: Any) -> None:
    """A store in the folder `memory`: three writers, two documents in stream 1, nothing in stream 2.

    What the first two have written may be in shards, but for one chunk of stream 0, and the last few rows.
    """
    MemoryStore.create(
        "memory", layers=2, streams=3, dim=5, dtype=dtype, chunk_bytes=7 * 5 * dtype.itemsize, **options
    ).close()
    for lengths in ([20, 9, 0], [4, 9, 0], [11, 3, 0]):
        with MemoryStore.open("memory", mode="r+") as store:
            if lengths[1] == 3:
                store.reset([1])
            store.append(torch.randn(2, 3, 20, 5), lengths)
            store.commit()
            if compacted != "no" and lengths[1] == 9:
                store.compact(compression=None if compacted == "plain" else "zstd")


@pytest.mark.parametrize("compacted", get_args(Compacted))
@pytest.mark.parametrize("capacity", [None, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_program_reads_the_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    capacity: int | None,
    compacted: Compacted,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "_INNER_BYTES", 3 * 5 * dtype.itemsize)
    make(dtype, capacity=capacity, compacted=compacted)
    with MemoryStore.open("memory") as store:
        assert store.lengths.tolist() == [35 if capacity is None else 17, 3, 0]
        assert bool(store.info().disk.shards) is (compacted != "no")  # type: ignore[union-attr]
        for layer in range(2):
            rows, mask = store.rows(layer)
            for stream in range(3):
                names = run(layer, stream)
                found = torch.from_numpy(names["rows"].copy())
                expected = rows[stream, : int(mask[stream].sum())]
                assert torch.equal(found, expected.float() if dtype == torch.bfloat16 else expected)
                indices = torch.full((3, len(expected)), -1)
                indices[stream] = torch.arange(len(expected))
                assert names["positions"].tolist() == store.positions(indices)[stream].tolist()


@pytest.mark.parametrize("eviction", ["every_nth", "lowest_score"])
def test_the_program_finds_the_positions_of_survivors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eviction: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"capacity": 17, "eviction": eviction, "keep_every": 3 if eviction == "every_nth" else None}
    MemoryStore.create("memory", layers=1, streams=2, dim=2, chunk_bytes=7 * 8, **options).close()
    gaps = set()
    for _ in range(6):
        with MemoryStore.open("memory", mode="r+") as store:
            store.append(torch.randn(1, 2, 9, 2), [9, 4])
            store.layer(0).scores(torch.ones(1, 2), normalize=None, scale=1.0)
            store.commit()
            expected = [log.positions().tolist() for log in store.logs]
        for stream in range(2):
            found = run(0, stream)["positions"].tolist()
            assert found == expected[stream]
            gaps.add(found[-1] - found[0] >= len(found))
    assert gaps == {False, True}
    for file in Path("memory/positions").glob("stream-0.*"):
        file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(AssertionError):
        run()


def test_the_program_finds_how_often_rows_were_routed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(torch.float32, capacity=17, eviction="every_nth", keep_every=3)
    with MemoryStore.open("memory", mode="r+") as store:
        counts = store.record_routes()
        for _ in range(3):
            for layer in range(2):
                held = store.layer(layer)
                held.take_routed(torch.stack([torch.randint(-1, n, (9,)) for n in held.lengths.tolist()]))
            store.append(torch.randn(2, 3, 2, 5), [2, 0, 0])
        store.commit()
        for layer in range(2):
            for stream, log in enumerate(store.logs):
                expected = dict(zip(*(each.tolist() for each in counts.of(layer, stream)), strict=True))
                found = run(layer, stream)["times"].tolist()
                assert found == [expected.get(position, 0) for position in log.positions().tolist()]
        assert run(0, 0)["times"].any()
    for file in Path("memory/routes").glob("stream-0.*"):
        file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(AssertionError, match="the counts are damaged"):
        run()


@pytest.mark.parametrize("name", ["rows/c.4.0", "crc32c/c.4"])
def test_the_program_notices_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    make(torch.float32)
    file = Path("memory") / f"layer-0.stream-0.{name}"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError, match="row 28 is damaged"):
        run()
    record = max(Path("memory/commits").glob("0*.json"))
    record.write_text(record.read_text().replace('"durable": false', '"durable": true'))
    with pytest.raises(AssertionError):
        run()


def test_the_files_are_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(torch.float32, capacity=17, eviction="every_nth", keep_every=3)
    with MemoryStore.open("memory", mode="r+") as store:
        store.compact()
        store.record_routes()
        store.layer(0).take_routed(torch.tensor([[0], [0], [-1]]))
        store.pin(store.commit())
        files = {str(file.relative_to("memory")) for file in Path("memory").rglob("*") if file.is_file()}
    table = DOCUMENT.read_text().split("## Files")[1].split("**Sealed JSON.**")[0]
    for text in files:
        folder, _, name = text.rpartition("/")
        pattern = re.sub(r"\d{12}-[0-9a-f]{8}", "<id>", text)
        if folder.startswith("shards/"):
            shard, _, rest = text.removeprefix("shards/stream-").partition("/")
            assert re.fullmatch(r"\d+\.\d+-\d+\.[0-9a-f]{8}", shard)
            [row] = [line for line in table.splitlines() if "`shards/stream-<j>." in line]
            assert f"`{rest}`" in row
        elif folder.startswith("layer-"):
            array = re.sub(r"layer-\d+\.stream-\d+", "layer-<i>.stream-<j>", folder)
            [row] = [line for line in table.splitlines() if f"`{array}/`" in line]
            assert f"`{re.sub(r'c[.][0-9]+', 'c.<n>', name)}`" in row
        elif folder == "routes" and name != "zarr.json":
            assert re.fullmatch(r"stream-[01][.]1[.][0-9a-f]{8}", name)
            assert "`routes/stream-<j>.<routes>.<8 hex digits>`" in table
        elif name.startswith("stream-"):
            assert re.fullmatch(r"stream-[01][.]\d+-\d+[.][0-9a-f]{8}", name)
            assert f"`{folder}/stream-<j>.<start>-<stop>.<8 hex digits>`" in table
        else:
            assert f"`{re.sub(r'[.][0-9a-f]{8}$', '.<8 hex digits>', pattern)}`" in table
    group = json.loads(Path("memory/zarr.json").read_text())["attributes"]["xlroute_memory"]
    record = json.loads(max(Path("memory/commits").glob("0*.json")).read_text())
    assert {"eviction", "keep_every"} <= {*group}
    assert "survivors" in record["streams"][0]
    assert "routes" in record
    for key in (*group, *record, *record["streams"][0], *record["shards"][0][0]):
        assert f"`{key}`" in DOCUMENT.read_text(), key


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_shard_lies_in_its_file_as_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Literal["zstd"] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "_INNER_BYTES", 3 * 5 * 4)
    make(torch.float32, compacted="plain" if compression is None else "zstd")
    record = json.loads(max(Path("memory/commits").glob("0*.json")).read_text())
    [shard, *_] = record["shards"][0]
    assert (shard["zstd"], shard["inner_rows"], shard["rows"]) == (compression and 3, 3, [0, 14])
    [folder] = Path("memory/shards").glob(f"stream-0.0-14.{shard['name']}")
    for kind, width, compressed in (("rows", 5, compression is not None), ("crc32c", 1, False)):
        [file] = (folder / kind).glob("c.*")
        data = file.read_bytes()
        assert len(data) == shard["bytes"] or kind == "crc32c"
        index = np.frombuffer(data[-164:-4], "<u8").reshape(10, 2)
        assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[-164:-4])
        values = zarr.open_array(folder / kind, mode="r")
        expected = np.zeros((2, 15, width), values.dtype)
        expected[:, :14] = values[:].reshape(2, 14, width)
        end = 0
        for number, (start, length) in enumerate(index.tolist()):
            assert start == end == (end if compressed else number * (3 * width * 4 + 4))
            end += length
            body = data[start : end - 4]
            assert int.from_bytes(data[end - 4 : end], "little") == google_crc32c.value(body)
            body = Zstd().decode(body) if compressed else body
            assert body == expected.reshape(10, 3, width)[number].tobytes()
        assert end == len(data) - 164


@pytest.mark.parametrize("durable", [False, True])
def test_a_commit_is_written_in_the_order_that_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[str] = []

    def noted(name: str, real: Callable[..., Any], describe: Callable[..., object]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            text = re.sub(r"tmp-[0-9a-f]{16}", "tmp", str(describe(*arguments)))
            events.append(f"{name} {re.sub(r'[0-9]{12}-[0-9a-f]{8}', 'ID', text)}")
            return real(*arguments, **options)

        return call

    def opened(file: int, *_: object) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), tmp_path / "memory")

    def relative(path: Path, *_: object) -> str:
        return os.path.relpath(path, tmp_path / "memory")

    with MemoryStore.create("memory", layers=1, streams=1, dim=2, chunk_bytes=4 * 8, keep_commits=1) as store:
        store.append(torch.randn(1, 1, 4, 2))
        store.commit(durable=True)
        store.reset([0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", noted("write", os.pwrite, opened))
            patch.setattr(os, "ftruncate", noted("length", os.ftruncate, opened))
            patch.setattr(os, "fsync", noted("fsync", os.fsync, opened))
            patch.setattr(os, "replace", noted("rename", os.replace, lambda _, new: relative(new)))
            patch.setattr(Path, "unlink", noted("delete", Path.unlink, relative))
            store.append(torch.randn(1, 1, 3, 2))
            appended, events[:] = [*events], []
            store.commit(durable=durable)
    rows, checksums = "layer-0.stream-0.rows", "layer-0.stream-0.crc32c"
    room = [
        f"{event} {folder}{name}".replace(f"{folder}commits", "commits")
        for folder in (rows, checksums)
        for event, name in (
            ("write", "commits/tmp"),
            ("fsync", "commits/tmp"),
            ("rename", "/zarr.json"),
            ("fsync", ""),
        )
    ]
    assert appended == [
        *room,
        *(
            f"{event} {file}"
            for file in (f"{rows}/c.1.0", f"{checksums}/c.1")
            for event in ("length", "write")
        ),
    ]
    synced = ["fsync commits/tmp"] if durable else []
    commit = ["write commits/tmp", *synced, "rename commits/ID.json", *(["fsync commits"] if durable else [])]
    first = events.index("write commits/tmp")
    assert events[first : first + len(commit)] == commit
    before = [f"fsync {checksums}", f"fsync {checksums}/c.1", f"fsync {rows}", f"fsync {rows}/c.1.0"]
    assert events[:first] == (before if durable else [])
    after = events[first + len(commit) :]
    # Without durable the commit before stays: it is the last durable one.
    dropped = ["delete commits/ID.json", f"delete {rows}/c.0.0", f"delete {checksums}/c.0"]
    assert after == (dropped if durable else [])
