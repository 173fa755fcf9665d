"""A store in an object store: what it holds, what it shares with one in a folder, and what goes wrong."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import obstore.exceptions
import pytest
import torch
import zarr
import zarr.storage
from torch import Tensor

from xlroute import RoutedTransformerXL
from xlroute.kernels import row_scores
from xlroute.memory import (
    CommitNotFoundError,
    CorruptionError,
    FingerprintError,
    FormatError,
    MemoryIndex,
    MemoryStore,
    S3Path,
    StoreExistsError,
    StoreNotFoundError,
    StoreWriteError,
    s3,
    scores,
)
from xlroute.memory.command_line import main
from xlroute.memory.sealed import checksum, encode

DIM = 3
ROW = DIM * 4
SHAPE: dict[str, Any] = {"layers": 2, "streams": 1, "dim": DIM}
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.3}


def create(path: str | Path, **options: Any) -> MemoryStore:
    """A store with chunk files of 4 rows."""
    return MemoryStore.create(path, **{**SHAPE, "chunk_bytes": 4 * ROW, **options})


def append(store: MemoryStore, count: int) -> Tensor:
    states = torch.randn(store.layers, store.streams, count, store.dim)
    store.append(states)
    return states


def rows(path: str | Path, **options: Any) -> list[Tensor]:
    """All rows of a store, by layer."""
    with MemoryStore.open(path, **options) as store:
        return [store.rows(layer)[0] for layer in range(store.layers)]


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


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/a folder/store"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fail are not tried again."""
    monkeypatch.setattr(s3, "_RETRIES", {"max_retries": 0})


def test_a_store_tells_where_it_is(url: str) -> None:
    with create(url, fingerprint="abc") as store:
        append(store, 5)
        commit = store.commit(durable=True)
        info = store.info()
        assert str(store.path) == str(info.path) == url
        assert info.rows == info.appended == (5,)
        assert info.disk is not None
        sizes = {name: len(data) for name, data in objects(url).items()}
        assert info.disk.apparent_bytes == info.disk.allocated_bytes == sum(sizes.values())
        assert info.disk.chunk_files == 2 * 2 * 2
        [_, last] = info.commits
        assert (last.id, last.durable, last.fingerprint) == (commit, True, "abc")
    assert store.path is not None
    with MemoryStore.open(store.path, fingerprint="abc") as again:
        assert again.commits()[-1] == commit
    with pytest.raises(FingerprintError, match=re.escape(url)):
        MemoryStore.open(url, fingerprint="other")


def test_chunks_are_small_by_default(url: str, tmp_path: Path) -> None:
    for path, size in ((url, 4 * 2**20), (tmp_path / "s", 64 * 2**20)):
        with MemoryStore.create(path, layers=1, streams=1, dim=256) as store:
            info = store.info()
            assert info.disk is not None
            assert info.disk.chunk_rows == size // 1024
    with MemoryStore.open(tmp_path / "s") as store:
        store.copy_to(f"{url} 2")
    with MemoryStore.open(f"{url} 2") as store:
        copied = store.info().disk
        assert copied is not None
        assert copied.chunk_rows == 4096


def test_only_full_chunks_are_put_before_a_commit(url: str) -> None:
    with create(url) as store:
        before = {*objects(url)}
        append(store, 3)
        assert {*objects(url)} == before
        first = append(store, 2)
        chunks = objects(url).keys() - before
        assert {name.rpartition("/")[2] for name in chunks} == {"c.0", "c.0.0"}
        assert len(chunks) == 4
        store.commit()
        assert torch.equal(store.rows(0)[0][:, 3:], first[0])
        assert len(objects(f"{url}/layer-1.stream-0.rows")["c.1.0"]) == 4 * ROW


def test_no_more_is_kept_in_memory_than_the_last_chunks(url: str) -> None:
    with create(url) as store:
        append(store, 4 * 50 + 1)
        assert store._disk is not None
        files: Any = store._disk.files
        assert {key[2] for key in files._chunks} == {50}
        store.commit()
        append(store, 3)
        assert not files._chunks


def test_rows_that_are_near_are_read_in_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(url, streams=2, chunk_bytes=64 * ROW) as store:
        states = append(store, 200)
        store.commit()
    with MemoryStore.open(url) as store:
        asked: list[tuple[str, int]] = []
        real = S3Path.read_ranges

        def read_ranges(path: S3Path, starts: list[int], lengths: list[int]) -> list[bytes]:
            asked.append((str(path), sum(lengths)))
            return real(path, starts, lengths)

        monkeypatch.setattr(S3Path, "read_ranges", read_ranges)
        indices = torch.tensor([[3, 70, -1, 3, 199], [-1, -1, -1, -1, -1]])
        found = store.gather(1, indices)
        assert torch.equal(found[0, [0, 1, 3, 4]], states[1, 0][[3, 70, 3, 199]])
        assert not found[0, 2].any()
        assert not found[1].any()
        # Three chunks of rows and of checksums, each row once, and no byte of them that was not asked for.
        assert len(asked) == 6
        assert sum(size for _, size in asked) == 3 * (ROW + 4)


def test_a_store_goes_both_ways(url: str, tmp_path: Path) -> None:
    tokens = torch.randn(2, DIM)
    with create(tmp_path / "s", capacity=6) as store:
        append(store, 7)
        store.layer(0).scores(tokens, **HOW)
        store.commit()
        expected = [store.rows(layer)[0] for layer in range(2)]
    upload(tmp_path / "s", url)
    assert all(map(torch.equal, rows(url), expected))
    with MemoryStore.open(url, mode="r+") as store:
        append(store, 4)
        store.layer(0).scores(tokens, **HOW)
        last = store.commit()
        expected = [store.rows(layer)[0] for layer in range(2)]
    assert MemoryStore.verify(url, all_commits=True).ok

    download(url, tmp_path / "d")
    assert all(map(torch.equal, rows(tmp_path / "d"), expected))
    report = MemoryStore.verify(tmp_path / "d", all_commits=True)
    assert (report.ok, report.leftovers, report.writer) == (True, (), None)
    with MemoryStore.open(tmp_path / "d", mode="r+") as store:
        assert store.commits()[-1] == last
        append(store, 5)
        store.reset([0])
        append(store, 2)
        last = store.commit()
        expected = [store.rows(layer)[0] for layer in range(2)]
    upload(tmp_path / "d", f"{url} 2")
    with MemoryStore.open(f"{url} 2", mode="r+") as store:
        assert store.commits()[-1] == last
        assert all(torch.equal(store.rows(layer)[0], expected[layer]) for layer in range(2))


POLICIES: dict[str, dict[str, Any]] = {
    "every_nth": {"eviction": "every_nth", "keep_every": 3, "capacity": 9},
    "lowest_score": {"eviction": "lowest_score", "capacity": 9},
}


def same(store: MemoryStore, other: MemoryStore) -> None:
    """Both hold the same rows at the same positions."""
    assert torch.equal(store.lengths, other.lengths)
    indices = torch.arange(int(other.lengths.max()))[None]
    assert torch.equal(store.positions(indices), other.positions(indices))
    for layer in range(store.layers):
        assert torch.equal(store.rows(layer)[0], other.rows(layer)[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_leave_as_the_policy_has_it(url: str, tmp_path: Path, policy: str) -> None:
    tokens = torch.randn(2, DIM)
    with create(url, **POLICIES[policy], keep_commits=1) as store:
        twin = store.fork()
        for count in (8, 5, 1, 7):
            states = torch.randn(2, 1, count, DIM)
            if count == 8:
                states[:, :, 0] = tokens[tokens.norm(dim=1).argmax()]  # no row scores higher: it stays
            store.append(states)
            twin.append(states)
            for each in (store, twin):
                for layer in range(2):
                    each.layer(layer).scores(tokens, **HOW)
            last = store.commit()
        same(store, twin)
        with MemoryStore.open(url) as reader:
            same(reader, twin)
        # Nothing but what the one commit names; by chance, scores may have left no gaps.
        [entry] = json.loads(objects(url)[f"commits/{last}.json"])["streams"]
        assert "survivors" in entry or policy == "lowest_score"
        named = {"stream-0.{}-{}.{}".format(*entry["survivors"])} if "survivors" in entry else set()
        assert objects(f"{url}/positions").keys() - {"zarr.json"} == named
    report = MemoryStore.verify(url, all_commits=True)
    assert (report.ok, report.leftovers) == (True, ())
    # Down, on, and up again: what leaves there is what would have left here.
    download(url, tmp_path / "d")
    new = torch.randn(2, 1, 6, DIM)
    twin.append(new)
    with MemoryStore.open(tmp_path / "d", mode="r+") as store:
        store.append(new)
        store.commit()
        store.copy_to(f"{url} 2")
        same(store, twin)
    upload(tmp_path / "d", f"{url} 3")
    for place in (f"{url} 2", f"{url} 3"):
        with MemoryStore.open(place, mode="r+") as store, twin.fork() as other:
            same(store, other)
            if policy == "every_nth":
                states = append(store, 8)
                other.append(states)
                store.commit()
            same(store, other)
        assert MemoryStore.verify(place).ok


def test_damaged_positions_are_named_and_never_read(url: str) -> None:
    with create(url, **POLICIES["every_nth"]) as store:
        for count in (9, 4):
            append(store, count)
            first, last = store.commits()[0], store.commit()
    folder = S3Path.from_url(f"{url}/positions")
    [name] = {*folder.names()} - {"zarr.json"}
    data = (folder / name).read_bytes()
    position = random.randrange(len(data))
    flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
    for damaged in (flipped, data[:-8], b"", None):
        (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
        for mode in ("r", "r+"):
            with pytest.raises(CorruptionError, match=re.escape(str(folder / name))):
                MemoryStore.open(url, mode=mode)
        [damage] = MemoryStore.verify(url).damage
        assert (damage.path, damage.commits) == (folder / name, (last,))
        assert not rows(url, commit=first)[0].numel()
        (folder / name).write_bytes(data)
    assert MemoryStore.verify(url, all_commits=True).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_zarr_reads_the_rows(url: str, dtype: torch.dtype) -> None:
    from obstore.store import S3Store

    with create(url, dtype=dtype, chunk_bytes=4 * DIM * dtype.itemsize) as store:
        states = append(store, 10).to(dtype)
        store.commit()
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    place = zarr.storage.ObjectStore(S3Store(bucket, prefix=prefix), read_only=True)
    array = zarr.open_group(place, mode="r")["layer-1.stream-0.rows"]
    assert isinstance(array, zarr.Array)
    found = torch.from_numpy(np.asarray(array[:10]).copy()).view(dtype)
    assert torch.equal(found, states[1, 0])


def test_commits_pins_and_going_back(url: str) -> None:
    with create(url, keep_commits=2) as store:
        kept = []
        for count in (3, 6, 2, 5):
            append(store, count)
            kept.append((store.commit(), store.rows(1)[0]))
            if len(kept) == 1:
                pin = store.pin(kept[0][0])
        assert store.commits() == [kept[0][0], kept[2][0], kept[3][0]]
        with pytest.raises(CommitNotFoundError):
            MemoryStore.open(url, commit=kept[1][0])
        with pytest.raises(CommitNotFoundError):
            store.pin(kept[1][0])
        for commit, expected in (kept[0], kept[2], kept[3]):
            assert torch.equal(rows(url, commit=commit)[1], expected)
    reader = MemoryStore.open(url, commit=kept[0][0])
    with MemoryStore.open(url, mode="r+", commit=kept[0][0]) as store:
        assert torch.equal(store.rows(1)[0], kept[0][1])
        append(store, 9)
        store.commit()
        store.commit()
        # The pin goes, and with the commit its record; not the rows, which the later commits hold too.
        reader.unpin(pin)
        assert store.pins() == {}
        with pytest.raises(CommitNotFoundError):
            reader.unpin(pin)
        store.reset([0])
        store.commit()
        store.commit()
        assert not [name for name in objects(url) if "c.0" in name and name.startswith("layer")]
    with pytest.raises(CommitNotFoundError, match=kept[0][0]):
        reader.rows(0)


def test_a_commit_that_is_dropped_while_it_is_pinned_is_not_pinned(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(url, keep_commits=1) as store, MemoryStore.open(url) as reader:
        [first] = store.commits()
        real = S3Path.write_bytes

        def write_bytes(path: S3Path, data: bytes) -> None:
            if "/pins/" in str(path):
                monkeypatch.setattr(S3Path, "write_bytes", real)
                if late:
                    real(path, data)
                # The writer has looked for pins, and drops the commit: too late, or just in time.
                store.commit()
            real(path, data)

        late = True
        monkeypatch.setattr(S3Path, "write_bytes", write_bytes)
        pin = reader.pin(first)
        assert store.commits()[0] == first
        reader.unpin(pin)
        late = False
        monkeypatch.setattr(S3Path, "write_bytes", write_bytes)
        with pytest.raises(CommitNotFoundError):
            reader.pin(first)
        assert store.pins() == {}


def test_a_fork_and_an_index_follow_a_remote_store(url: str, tmp_path: Path) -> None:
    with create(url) as store:
        append(store, 11)
        store.commit()
    tokens = torch.randn(1, DIM)
    with MemoryStore.open(url) as store:
        fork = store.fork()
        fork.append(torch.randn(2, 1, 3, DIM))
        assert fork.lengths.tolist() == [14]
        assert torch.equal(fork.rows(0)[0][:, :11], store.rows(0)[0])
        index = MemoryIndex(store, kind="flat", path=tmp_path / "index")
        found = index.search(0, tokens, 3)[1]
        index.save()
        exact = MemoryIndex(store).search(0, tokens, 3)[1]
        assert torch.equal(found, exact)
        again = MemoryIndex(store, kind="flat", path=tmp_path / "index")
        assert torch.equal(again.search(0, tokens, 3)[1], exact)


def test_scores_are_kept_with_the_store(url: str, scored: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_SAMPLES", 1)
    tokens = torch.randn(2, DIM)
    with create(url, keep_commits=1) as store:
        for _ in range(2):
            append(store, 5)
            store.layer(1).scores(tokens, **HOW)
            store.commit()
        expected = row_scores(store.rows(1)[0][0], tokens, **HOW)
    scored.clear()
    with MemoryStore.open(url, mode="r+") as store:
        assert torch.equal(store.layer(1).scores(tokens, **HOW)[0], expected)
        assert scored == [1]
        append(store, 2)
        store.layer(1).scores(torch.randn(2, DIM), **HOW)
        store.commit()
        [name] = {name.split("/")[0] for name in objects(f"{url}/scores")} - {"zarr.json"}
        assert name.startswith("layer-1.")
    # Damage to scores is mended, and does no harm.
    for name in objects(f"{url}/scores"):
        if "/c." in name:
            (S3Path.from_url(f"{url}/scores") / name).write_bytes(b"")
    report = MemoryStore.verify(url)
    assert report.ok
    assert report.scores


def test_a_state_is_saved_and_loaded(
    url: str, tmp_path: Path, build_model: Callable[..., RoutedTransformerXL]
) -> None:
    model = build_model()
    tokens = torch.randint(50, (2, 23))
    with torch.no_grad():
        state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
        for part in tokens.split(15, dim=1):
            expected, state = model(part, state)
        with model.create_memory(url, streams=2) as store:
            _, state = model(tokens[:, :15], model.initial_state(streams=2, memory=store))
            state.save(tmp_path / "state")
            state.save(tmp_path / "state")
            assert len(store.pins()) == 1
        for mode in ("r", "r+"):
            state = model.load_state(tmp_path / "state", mode=mode)
            assert torch.equal(model(tokens[:, 15:], state)[0], expected)
            assert state.memory is not None
            state.memory.close()


def test_the_command_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = create(url)
    append(store, 6)
    commit = store.commit()
    expected = store.rows(1)[0]
    assert main(["info", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == url
    assert main(["info", url]) == 0
    assert main(["verify", url]) == 0
    capsys.readouterr()
    assert main(["export", url, str(tmp_path / "rows.npz")]) == 0
    assert commit in capsys.readouterr().out
    with np.load(tmp_path / "rows.npz") as file:
        assert np.array_equal(file["layer-1.stream-0.rows"], expected[0].numpy())
    assert main(["plot", url, str(tmp_path / "rows.png")]) == 0
    assert main(["repair", url]) == 2
    assert "download" in capsys.readouterr().err
    assert main(["unlock", url]) == 0
    assert f"was held by process {os.getpid()} on " in capsys.readouterr().out
    assert main(["unlock", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"writer": None}
    for path in (f"{url} 2", str(tmp_path)):
        assert main(["unlock", path]) == 2
    store.close()


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "gone"])
def test_damage_is_named_and_never_read(url: str, damage: str) -> None:
    with create(url, layers=1) as store:
        append(store, 6)
        store.commit()
    folder = S3Path.from_url(url)
    kept = objects(url)
    for name in (name for name in kept if not name.startswith("commits/") or name == max(kept)):
        path, data = folder / name, kept[name]
        if damage == "gone":
            path.unlink()
        elif damage == "flipped":
            # Of 4 rows in a chunk, the last one holds 2.
            position = random.randrange(len(data) // 2)
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "short" else b"")
        with pytest.raises((CorruptionError, FormatError)) as caught:
            rows(url)
        assert str(path) in str(caught.value)
        if name.startswith("layer-"):
            found = MemoryStore.verify(url).damage
            assert any(str(path) in f"{each.path} {each.problem}" for each in found)
        path.write_bytes(data)
    assert MemoryStore.verify(url, all_commits=True).ok


def test_what_is_cut_off_while_it_is_read_is_named(url: str) -> None:
    with create(url, layers=1, chunk_bytes=64 * ROW) as store:
        states = append(store, 60)
        store.commit()
    path = S3Path.from_url(f"{url}/layer-0.stream-0.rows/c.0.0")
    with MemoryStore.open(url) as reader:
        path.write_bytes(path.read_bytes()[: 10 * ROW])
        assert torch.equal(reader.gather(0, torch.tensor([[9, 3]])), states[0, :, [9, 3]])
        for index in ([3, 9, 40, 59], [9, 10], [10], [12, 3]):
            with pytest.raises(CorruptionError, match=re.escape(str(path))):
                reader.gather(0, torch.tensor([index]))


def test_a_record_that_claims_rows_without_objects_is_refused(url: str) -> None:
    with create(url) as store:
        append(store, 2)
        commit = store.commit()
    folder = S3Path.from_url(f"{url}/commits")
    document = json.loads((folder / f"{commit}.json").read_bytes())
    del document["crc32c"]
    document["generation"] = 9
    document["streams"][0].update(extents=[[1 << 40, 1 << 41, 0]], end=1 << 41, appended=1 << 41)
    seal = checksum(document)
    (folder / f"000000000009-{seal}.json").write_bytes(encode({**document, "crc32c": seal}))
    for mode in ("r", "r+"):
        with pytest.raises(CorruptionError, match="expected a chunk file, got no such file"):
            MemoryStore.open(url, mode=mode)
        MemoryStore.open(url, commit=commit).close()


def test_what_a_crash_has_left_is_listed(url: str) -> None:
    with create(url) as store:
        append(store, 3)
        store.commit()
        append(store, 4)
        report = MemoryStore.verify(url)
        assert report.ok
        assert str(os.getpid()) in str(report.writer)
        assert not report.leftovers
        append(store, 4)
        left = {str(path).rpartition("/")[2] for path in MemoryStore.verify(url).leftovers}
        assert left == {"c.1", "c.1.0"}


def test_places_that_are_none(url: str, bucket: str, tmp_path: Path) -> None:
    for wrong in ("gs://a/b", "s3://", "s3:///a", "s3://a//b", "s3://a/../b", "file:///tmp/a"):
        with pytest.raises(ValueError, match="path: expected"):
            MemoryStore.open(wrong)
        with pytest.raises(ValueError, match="path: expected"):
            create(wrong)
    with pytest.raises(StoreNotFoundError, match=re.escape(url)):
        MemoryStore.open(url)
    with pytest.raises(StoreNotFoundError, match=re.escape(url)):
        MemoryStore.open(url, mode="r+")
    (S3Path.from_url(url) / "note").write_bytes(b"x")
    with pytest.raises(FormatError, match=re.escape(url)):
        MemoryStore.open(url)
    with pytest.raises(StoreExistsError, match=re.escape(url)):
        create(url)
    with create(tmp_path / "s") as store, pytest.raises(StoreExistsError, match=re.escape(url)):
        store.copy_to(url)
    assert objects(url) == {"note": b"x"}
    with pytest.raises(OSError, match=re.escape(f"{bucket}-none")):
        MemoryStore.open(f"{bucket}-none/s")
    with pytest.raises(StoreWriteError, match=re.escape(f"{bucket}-none")):
        create(f"{bucket}-none/s")
    with pytest.raises(ValueError, match="repair it there"):
        MemoryStore.repair(url)
    with pytest.raises(ValueError, match="path: expected a url"):
        MemoryStore.unlock(tmp_path / "s")


def test_what_is_not_allowed_is_no_damage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create(url).close()

    def get(*arguments: Any) -> None:
        raise obstore.exceptions.PermissionDeniedError("403 Forbidden\nand more")

    monkeypatch.setattr(obstore, "get", get)
    for look in (MemoryStore.open, MemoryStore.verify):
        with pytest.raises(PermissionError, match=f"{re.escape(url)}/zarr.json: 403 Forbidden$"):
            look(url)
    with pytest.raises(PermissionError):
        MemoryStore.open(url, mode="r+")


def test_a_bucket_is_a_place(bucket: str) -> None:
    with create(bucket) as store:
        states = append(store, 3)
        store.commit()
    assert torch.equal(rows(bucket)[1], states[1])


def test_obstore_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ImportError, match=r'pip install "xlroute\[s3\]"'):
        MemoryStore.open("s3://bucket/store")


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_gone_loses_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(url) as store:
        append(store, 3)
        first = store.commit()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(OSError, match=re.escape(url)) as caught:
            MemoryStore.open(url)
        assert "\n" not in str(caught.value)
        with pytest.raises(StoreWriteError, match=re.escape(url)):
            create(f"{url} 2")
    assert rows(url, commit=first)


# Python 3.12 warns of every fork beside threads; this child asks nothing of any of them.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_of_the_process_is_told(url: str) -> None:
    store = create(url)
    append(store, 6)
    store.commit()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            reads = [lambda: MemoryStore.open(url), lambda: rows(url)]
            refused = 0
            for read in reads:
                try:
                    read()
                except OSError as error:
                    refused += "spawn" in str(error)
            store.close()
            code = 0 if refused == len(reads) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    append(store, 1)
    store.commit()
    store.close()
