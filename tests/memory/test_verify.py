"""Looking for damage: all of it is reported, with files and rows, and nothing is changed."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xlroute.memory import (
    CommitNotFoundError,
    CorruptionError,
    Damage,
    FormatError,
    MemoryStore,
    MemoryStoreError,
    StoreNotFoundError,
    verify,
)
from xlroute.memory.commits import Commit, write_commit
from xlroute.memory.layout import KINDS, read_layout
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.sealed import encode

ROW_BYTES = 6


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """2 layers and 2 streams with 4 rows a chunk file, and commits of (0, 0), (5, 2) and (11, 2) rows."""
    with MemoryStore.create(
        tmp_path / "store", layers=2, streams=2, dim=3, dtype=torch.float16, chunk_bytes=4 * ROW_BYTES
    ) as store:
        for lengths in ([5, 2], [6, 0]):
            store.append(torch.randn(2, 2, 6, 3), lengths)
            store.commit()
    return tmp_path / "store"


def commits(path: Path) -> list[str]:
    return sorted(file.stem for file in (path / "commits").glob("0*.json"))


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and times of all files, and the times of all folders."""
    return {
        str(file): (b"" if file.is_dir() else file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(path.parent.rglob("*"))
    }


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= random.randrange(1, 256)
    file.write_bytes(data)


def damage_of(path: Path, **options: bool | str) -> list[Damage]:
    before = snapshot(path)
    report = MemoryStore.verify(path, **options)  # type: ignore[arg-type]
    assert snapshot(path) == before
    assert report.ok is not bool(report.damage)
    return list(report.damage)


def test_a_whole_store_is_fine(path: Path) -> None:
    told: list[tuple[int, int]] = []
    before = snapshot(path)
    report = MemoryStore.verify(path, progress=lambda done, total: told.append((done, total)))
    assert snapshot(path) == before
    assert report.ok
    assert (report.path, report.damage, report.leftovers, report.writer) == (path, (), (), None)
    assert report.commits == (commits(path)[-1],)
    assert report.rows == 2 * (11 + 2)
    assert told[-1] == (26 * ROW_BYTES, 26 * ROW_BYTES)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert MemoryStore.verify(path, all_commits=True).commits == tuple(commits(path))
    assert MemoryStore.verify(path, all_commits=True).rows == 26
    assert MemoryStore.verify(path, commit=commits(path)[1]).rows == 2 * (5 + 2)
    assert MemoryStore.verify(path, commit=commits(path)[0]).rows == 0


def test_all_damage_is_reported_at_once(path: Path) -> None:
    first, second, last = commits(path)
    # Rows 1 and 2, in chunk 0; the checksum of row 6, in chunk 1.
    rows = path / "layer-1.stream-0.rows"
    for offset in (ROW_BYTES, 3 * ROW_BYTES - 1):
        flip(rows / "c.0.0", offset)
    flip(path / "layer-1.stream-0.crc32c" / "c.1", 2 * 4)
    (rows / "c.2.0").write_bytes((rows / "c.2.0").read_bytes()[:7])
    (path / "layer-0.stream-1.crc32c" / "c.0").unlink()
    flip(path / "commits" / f"{second}.json", 40)
    (path / "layer-0.stream-0.rows" / "zarr.json").write_text("[]")
    (path / "commits" / "zarr.json").unlink()

    found = damage_of(path)
    assert [
        (each.path.relative_to(path).as_posix(), each.stream, each.chunk, each.rows) for each in found
    ] == [
        ("commits/zarr.json", None, None, ()),
        ("layer-0.stream-0.rows/zarr.json", 0, None, ((0, 11),)),
        (f"commits/{second}.json", None, None, ()),
        ("layer-1.stream-0.rows/c.0.0", 0, 0, ((1, 3),)),
        ("layer-1.stream-0.rows/c.1.0", 0, 1, ((6, 7),)),
        ("layer-1.stream-0.rows/c.2.0", 0, 2, ((8, 11),)),
        ("layer-0.stream-1.crc32c/c.0", 1, 0, ((0, 2),)),
    ]
    problems = [each.problem for each in found]
    assert problems[0] == "expected the metadata of a group, got no such file"
    assert problems[1] == "expected a JSON object, got list"
    assert problems[2].startswith("expected")
    checksums = path / "layer-1.stream-0.crc32c"
    for chunk in range(2):
        assert problems[3 + chunk] == (
            "expected every row to have its checksum, got others: it or "
            f"{checksums / f'c.{chunk}'} is damaged"
        )
    assert problems[5] == "expected a chunk file of 24 bytes, got 7"
    assert problems[6] == "expected a chunk file, got no such file"
    assert found[3].array == "layer-1.stream-0.rows"
    assert found[6].array == "layer-0.stream-1.rows"
    assert {each.commits for each in found} == {(), (last,)}
    assert first not in {each.path.stem for each in found}


def test_damage_names_the_commits_that_hold_the_rows(path: Path) -> None:
    first, second, last = commits(path)
    flip(path / "layer-0.stream-0.rows" / "c.0.0", 0)
    flip(path / "layer-0.stream-0.rows" / "c.1.0", 3 * ROW_BYTES)
    old, new = damage_of(path, all_commits=True)
    assert (old.rows, old.commits) == (((0, 1),), (second, last))
    assert (new.rows, new.commits) == (((7, 8),), (last,))
    [old] = damage_of(path, commit=second)
    assert (old.rows, old.commits) == (((0, 1),), (second,))
    assert damage_of(path, commit=first) == []


def test_behind_a_damaged_last_record_the_commit_before_is_examined(path: Path) -> None:
    _, second, last = commits(path)
    flip(path / "commits" / f"{last}.json", 40)
    flip(path / "layer-0.stream-0.rows" / "c.0.0", 0)
    record, rows = damage_of(path)
    assert record.path == path / "commits" / f"{last}.json"
    assert rows.commits == (second,)
    [record] = damage_of(path, commit=last)
    assert record.path.stem == last
    for name in commits(path):
        (path / "commits" / f"{name}.json").write_text("{}")
    assert [each.path.stem for each in damage_of(path)] == commits(path)
    for name in commits(path):
        (path / "commits" / f"{name}.json").unlink()
    [none] = damage_of(path)
    assert (none.path, none.problem) == (path / "commits", "expected the record of a commit, got none")
    shutil.rmtree(path / "commits")
    assert {each.path for each in damage_of(path, commit=last)} == {
        path / "commits" / "zarr.json",
        path / "commits",
    }


def test_every_flipped_byte_that_a_reader_refuses_is_reported(path: Path) -> None:
    whole = {commit: _contents(path, commit) for commit in commits(path)}
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        data = file.read_bytes()
        for offset in random.sample(range(len(data)), min(len(data), 4)):
            flip(file, offset)
            try:
                refused = {commit: _contents(path, commit) for commit in whole} != whole
            except MemoryStoreError:
                refused = True
            try:
                reported = damage_of(path, all_commits=True)
            except FormatError:
                assert file == path / "zarr.json"
                assert refused
            else:
                assert reported or not refused
                assert all(file == each.path or str(file) in each.problem for each in reported)
            file.write_bytes(data)
    assert damage_of(path, all_commits=True) == []


def _contents(path: Path, commit: str) -> list[object]:
    with MemoryStore.open(path, commit=commit) as store:
        return [store.lengths.tolist(), *(store.rows(layer)[0].tolist() for layer in range(2))]


def test_damaged_metadata_of_the_store_is_all_that_can_be_said(path: Path) -> None:
    file = path / "zarr.json"
    file.write_text(file.read_text().replace('"dim": 3', '"dim": 4'))
    [damage] = damage_of(path)
    assert damage.path == file
    assert damage.problem.startswith("expected checksum ")


def test_a_missing_array_and_one_too_many(path: Path) -> None:
    last = commits(path)[-1]
    shutil.rmtree(path / "layer-1.stream-0.rows")
    count, metadata, rows = damage_of(path)
    assert (count.path, count.problem) == (path / "zarr.json", "expected 8 arrays beside it, got 7")
    assert metadata.path == path / "layer-1.stream-0.rows" / "zarr.json"
    assert (rows.rows, rows.chunk, rows.commits) == (((0, 11),), 0, (last,))
    assert rows.problem.startswith("expected a chunk file, got neither it nor ")
    assert rows.problem.endswith(" nor any up to chunk 2")
    (path / "layer-1.stream-0.rows").mkdir()
    (path / "layer-2.stream-0.rows").mkdir()
    assert "expected 8 arrays beside it, got 9" in [each.problem for each in damage_of(path)]


def test_a_folder_in_place_of_a_file_and_files_that_cannot_be_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = path / "layer-0.stream-0.rows" / "c.1.0"
    file.unlink()
    file.mkdir()
    assert [(each.path, each.rows) for each in damage_of(path)] == [(file, ((4, 8),))]
    array = path / "layer-0.stream-1.rows"
    array.rename(path.parent / "array")
    array.write_text("")
    assert [(each.path, each.rows) for each in damage_of(path)] == [
        (array / "zarr.json", ((0, 2),)),
        (file, ((4, 8),)),
        (array / "c.0.0", ((0, 2),)),
    ]
    array.unlink()
    (path.parent / "array").rename(array)
    file.rmdir()
    shutil.copy(path / "layer-0.stream-0.rows" / "c.0.0", file)
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(file):
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert [(each.path, each.rows, each.problem) for each in damage_of(path)] == [
        (file, ((4, 8),), "expected a file that can be read, got Input/output error")
    ]


def claim_layers(path: Path) -> None:
    document = replace(read_layout(path), layers=1 << 40).group_document()
    (path / "zarr.json").write_bytes(encode(document))


def claim_rows(path: Path) -> None:
    log = StreamLog((Extent(0, 1 << 40, 0),), 1 << 40, 1 << 40)
    write_commit(path, Commit(1000, None, None, False, (log, log)))


def claim_room(path: Path) -> None:
    layout = read_layout(path)
    for kind in KINDS:
        for array in path.glob(f"layer-*.{kind}"):
            (array / "zarr.json").write_bytes(encode(layout.array_document(kind, layout.room_for(1 << 40))))
    claim_rows(path)


def test_enormous_claims_come_to_an_end(path: Path) -> None:
    for claim in (claim_rows, claim_room):
        claim(path)
        found = damage_of(path)
        assert max(each.rows[-1][1] for each in found) == 1 << 40
        assert len(found) < 30
    claim_layers(path)
    [damage] = damage_of(path, all_commits=True)
    assert damage.problem == f"expected {4 << 40} arrays beside it, got 8"
    assert MemoryStore.verify(path, all_commits=True).rows == 0


def test_leftovers_are_listed_and_are_no_damage(path: Path) -> None:
    temporary = path / "commits" / "tmp-0123456789abcdef"
    temporary.write_text("x")
    creating = path.parent / ".store.0123abcd.creating"
    creating.mkdir()
    (path.parent / ".store.other.creating").mkdir()
    (path.parent / ".stores.0123abcd.creating").mkdir()
    killed = MemoryStore.open(path, mode="r+")
    killed.append(torch.randn(2, 2, 6, 3), [6, 1])
    beyond = [
        path / f"layer-{layer}.stream-0.{name}" for layer in range(2) for name in ("rows/c.4.0", "crc32c/c.4")
    ]
    also = [
        path / f"layer-{layer}.stream-0.{name}" for layer in range(2) for name in ("rows/c.3.0", "crc32c/c.3")
    ]
    report = MemoryStore.verify(path)
    assert report.writer is not None
    assert report.writer.startswith(f"process {os.getpid()} on")
    assert report.ok
    # Opening for writing has removed the temporary file. Row 11 goes into chunk 2, which is no leftover.
    assert {*report.leftovers} == {creating, *beyond, *also}
    killed.close()
    temporary.write_text("x")
    assert {*MemoryStore.verify(path).leftovers} == {temporary, creating, *beyond, *also}
    # Nobody knows what a damaged record refers to.
    (path / "commits" / f"{commits(path)[1]}.json").write_text("{}")
    assert {*MemoryStore.verify(path).leftovers} == {temporary, creating}


def test_a_commit_that_is_dropped_meanwhile_is_not_called_damaged(path: Path) -> None:
    *_, second, last = commits(path)
    record = path / "commits" / f"{last}.json"
    data = record.read_bytes()
    flip(path / "layer-0.stream-0.rows" / "c.0.0", 0)
    flip(path / "layer-0.stream-0.rows" / "c.1.0", 3 * ROW_BYTES)

    def drop(done: int, total: int) -> None:
        record.unlink(missing_ok=True)

    with pytest.raises(CommitNotFoundError, match=f"commit {last}: expected its rows, got a store that has"):
        MemoryStore.verify(path, progress=drop)
    record.write_bytes(data)
    report = MemoryStore.verify(path, all_commits=True, progress=drop)
    assert last not in report.commits
    assert [(each.rows, each.commits) for each in report.damage] == [(((0, 1),), (second,))]


def test_a_writer_that_goes_on_meanwhile_is_no_damage(tmp_path: Path) -> None:
    with MemoryStore.create(
        tmp_path / "store", layers=1, streams=2, dim=3, chunk_bytes=4 * 12, keep_commits=1
    ) as store:
        store.append(torch.randn(1, 2, 11, 3), [11, 2])
        store.reset([0])
        last = store.commit()
        went_on = 0

        def go_on(done: int, total: int) -> None:
            nonlocal went_on
            went_on += 1
            store.append(torch.randn(1, 2, 2, 3), [2, 0])
            store.reset([0])
            store.commit()

        report = MemoryStore.verify(tmp_path / "store", progress=go_on)
        assert went_on
        # The file that rows after row 10 went to is gone by now, and so is the commit that was examined.
        assert not (tmp_path / "store" / "layer-0.stream-0.rows" / "c.2.0").exists()
        assert (report.damage, report.commits) == ((), (last,))
        assert last not in store.commits()


def test_a_writer_that_drops_what_was_just_listed_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore.create(tmp_path / "store", layers=1, streams=1, dim=3, keep_commits=1) as store:
        real, calls = verify.read_commit, 0

        def read_commit(*arguments: Any) -> Commit:
            nonlocal calls
            calls += 1
            if calls == 1:
                store.commit()
            return real(*arguments)

        monkeypatch.setattr(verify, "read_commit", read_commit)
        report = MemoryStore.verify(tmp_path / "store")
        assert calls == 2
        assert (report.damage, report.commits) == ((), tuple(store.commits()))


def test_what_cannot_be_examined_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="missing: expected a memory store, got nothing"):
        MemoryStore.verify(tmp_path / "missing")
    with pytest.raises(FormatError, match="expected the metadata of a memory store, got no such file"):
        MemoryStore.verify(tmp_path)
    with pytest.raises(ValueError, match="commit: expected an id like"):
        MemoryStore.verify(path, commit="x")
    with pytest.raises(ValueError, match="commit: expected None together with all_commits=True"):
        MemoryStore.verify(path, commit=commits(path)[0], all_commits=True)
    with pytest.raises(CommitNotFoundError, match="got 000000000009-01234567"):
        MemoryStore.verify(path, commit="000000000009-01234567")
    file = path / "zarr.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(FormatError, match="expected a memory store of format 1 or 2, got format 3"):
        MemoryStore.verify(path)


def test_what_it_calls_fine_can_be_read(path: Path) -> None:
    flip(path / "layer-1.stream-1.rows" / "c.0.0", ROW_BYTES)
    [damage] = damage_of(path)
    with MemoryStore.open(path) as store:
        store.rows(0)
        store.gather(1, torch.tensor([[*range(11)], [0, *[-1] * 10]]))
        with pytest.raises(CorruptionError, match=str(damage.path)):
            store.gather(1, torch.tensor([[-1], [1]]))


def test_damaged_scores_are_told_and_count_as_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with MemoryStore.create(path, layers=2, streams=2, dim=3) as store:
        store.append(torch.randn(2, 2, 9, 3))
        for layer in range(2):
            store.layer(layer).scores(torch.randn(2, 3), normalize="rms", scale=1.0)
        store.commit()
    assert MemoryStore.verify(path).scores == ()
    [folder] = (path / "scores").glob("layer-1.*")
    file = folder / "layer-0.stream-1.rows" / "c.0.0"
    with file.open("r+b") as opened:
        opened.seek(3 * 8)
        opened.write(b"\xff")
    report = MemoryStore.verify(path)
    assert report.ok
    [damage] = report.scores
    assert (damage.path, damage.rows) == (file, ((3, 4),))
    metadata = file.parent / "zarr.json"
    metadata.write_text(metadata.read_text().replace("float32", "float16"))
    report = MemoryStore.verify(path)
    assert report.ok
    assert [each.path for each in report.scores] == [metadata, file]
    shutil.rmtree(folder)
    assert MemoryStore.verify(path).scores == ()
