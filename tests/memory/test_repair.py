"""Repair: what is whole is kept, at its position; what was lost is said; the store can be used again."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.memory import (
    CorruptionError,
    Eviction,
    FormatError,
    MemoryStore,
    RepairReport,
    StoreLockedError,
    StoreNotFoundError,
    StoreWriteError,
    StreamLoss,
)

CHUNK = 4
DIM = 3
ROW_BYTES = 4 * DIM


def make(path: Path, lengths: Iterable[int], **options: Any) -> tuple[Tensor, list[str]]:
    """A store of 2 layers and 2 streams with as many rows appended; returns the rows, and its commits."""
    counts = torch.tensor([*lengths])
    states = torch.randn(2, 2, int(counts.max()), DIM)
    with MemoryStore.create(
        path, layers=2, streams=2, dim=DIM, chunk_bytes=CHUNK * ROW_BYTES, fingerprint="f", **options
    ) as store:
        half = counts // 2
        store.append(states, half)
        store.commit()
        rest = torch.zeros_like(states)
        for stream, (start, stop) in enumerate(zip(half.tolist(), counts.tolist(), strict=True)):
            rest[:, stream, : stop - start] = states[:, stream, start:stop]
        store.append(rest, counts - half)
        store.commit(durable=True)
        return states, store.commits()


def flip(path: Path, layer: int, stream: int, row: int, kind: str = "rows") -> Path:
    """Damages a row or its checksum; returns the file."""
    chunk, local = divmod(row, CHUNK)
    name, size = (f"c.{chunk}.0", ROW_BYTES) if kind == "rows" else (f"c.{chunk}", 4)
    file = path / f"layer-{layer}.stream-{stream}.{kind}" / name
    data = bytearray(file.read_bytes())
    data[local * size + random.randrange(size)] ^= random.randrange(1, 256)
    file.write_bytes(data)
    return file


def check_kept(path: Path, states: Tensor, kept: list[tuple[int, int]]) -> None:
    """The store holds exactly these positions of the rows, and can be written and read again."""
    more = torch.randn(2, 2, 6, DIM)
    for _ in range(2):
        with MemoryStore.open(path) as store:
            assert MemoryStore.verify(path).ok
            assert store.lengths.tolist() == [stop - start for start, stop in kept]
            for stream, (start, stop) in enumerate(kept):
                indices = torch.full((2, stop - start), -1)
                indices[stream] = torch.arange(stop - start)
                assert store.positions(indices)[stream].tolist() == [*range(start, stop)]
                for layer in range(2):
                    expected = states[layer, stream, start:stop]
                    assert torch.equal(store.gather(layer, indices)[stream], expected)
                    assert torch.equal(store.rows(layer)[0][stream, : stop - start], expected)
        # What is appended takes the positions that follow.
        with MemoryStore.open(path, mode="r+", fingerprint="f") as store:
            store.append(more)
            store.commit()
        grown = torch.zeros(2, 2, max(stop for _, stop in kept) + 6, DIM)
        for stream, (start, stop) in enumerate(kept):
            grown[:, stream, start:stop] = states[:, stream, start:stop]
            grown[:, stream, stop : stop + 6] = more[:, stream]
        states, kept = grown, [(start, stop + 6) for start, stop in kept]


def repaired(path: Path) -> RepairReport:
    report = MemoryStore.repair(path)
    again = MemoryStore.repair(path)
    assert again.ok
    assert (again.commit, again.losses, again.restored) == (None, (), ())
    assert (again.removed, again.derived) == ((), ())
    assert again.base == (report.commit or report.base)
    return report


def test_a_whole_store_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    _, commits = make(path, (11, 2))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    told: list[tuple[int, int]] = []
    report = MemoryStore.repair(path, progress=lambda done, total: told.append((done, total)))
    assert report == RepairReport(path, commits[-1], None, (), (), (), (), (), ())
    assert report.ok
    assert told[-1] == (26 * ROW_BYTES, 26 * ROW_BYTES)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        ([(0, 3)], (4, 11)),  # the newer run is longer
        ([(1, 8)], (0, 8)),  # the older run is longer
        ([(0, 5)], (6, 11)),  # both hold five rows
        ([(0, 2), (1, 6)], (7, 11)),  # in different layers
        ([(0, 4), (1, 4), (0, 5), (1, 7)], (0, 4)),
        ([(0, 0), (1, 10)], (1, 10)),
        ([(row % 2, row) for row in range(11)], (11, 11)),  # nothing is left
        ([(0, row) for row in range(1, 11, 2)], (10, 11)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["rows", "crc32c"])
def test_the_longest_run_is_kept_at_its_position(
    tmp_path: Path, damaged: list[tuple[int, int]], kept: tuple[int, int], kind: str
) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2))
    for layer, row in damaged:
        flip(path, layer, 0, row, kind)
    report = repaired(path)
    assert not report.ok
    assert (report.base, report.set_aside, report.restored) == (commits[-1], (), ())
    [loss] = report.losses
    assert (loss.stream, loss.held, loss.kept) == (0, (0, 11), kept)
    assert {row for start, stop in loss.damaged for row in range(start, stop)} == {row for _, row in damaged}
    gone = {*range(11)} - {*range(*kept)}
    assert {row for start, stop in loss.lost for row in range(start, stop)} == gone
    found = [
        (int(each.path.parent.name[6]), row)
        for each in report.damage
        for start, stop in each.rows
        for row in range(start, stop)
    ]
    assert sorted(found) == sorted(damaged)
    check_kept(path, states, [kept, (0, 2)])


@pytest.mark.parametrize("row", [4, 6, 10])
def test_positions_after_eviction_and_reset(tmp_path: Path, row: int) -> None:
    path = tmp_path / "s"
    states, _ = make(path, (11, 9), capacity=7)
    with MemoryStore.open(path, mode="r+") as store:
        store.reset([1])
        store.append(states[:, :, :3], [0, 3])
        store.commit()
    flip(path, 1, 0, row)
    flip(path, 0, 1, 9 + 1)  # the log goes on after a reset
    report = repaired(path)
    kept = (row + 1, 11) if row < 7 else (4, row)
    assert [(loss.held, loss.damaged, loss.kept) for loss in report.losses] == [
        ((4, 11), ((row, row + 1),), kept),
        ((0, 3), ((1, 2),), (2, 3)),
    ]
    with MemoryStore.open(path) as store:
        assert store.lengths.tolist() == [kept[1] - kept[0], 1]
        assert store.positions(torch.tensor([[0], [0]])).tolist() == [[kept[0]], [2]]
        assert torch.equal(store.rows(0)[0][0, : kept[1] - kept[0]], states[0, 0, kept[0] : kept[1]])
        assert torch.equal(store.rows(1)[0][1, 0], states[1, 1, 2])
    with MemoryStore.open(path, mode="r+") as store:  # and up to the capacity again
        store.append(states[:, :, :9])
        store.commit()
        assert store.lengths.tolist() == [7, 7]


@pytest.mark.parametrize("kind", ["rows", "crc32c"])
def test_a_truncated_file_loses_only_what_it_lacks(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    states, _ = make(path, (11, 2))
    file = path / f"layer-1.stream-0.{kind}" / ("c.2.0" if kind == "rows" else "c.2")
    size = file.stat().st_size
    os.truncate(file, 2 * (ROW_BYTES if kind == "rows" else 4) + 3)
    report = repaired(path)
    assert report.restored == (file,)
    assert file.stat().st_size == size
    assert report.losses == (StreamLoss(0, (0, 11), ((10, 11),), (0, 10)),)
    check_kept(path, states, [(0, 10), (0, 2)])


def test_a_file_that_is_too_long_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2))
    file = path / "layer-1.stream-0.rows" / "c.1.0"
    with file.open("ab") as opened:
        opened.write(b"more")
    report = repaired(path)
    assert (report.restored, report.losses, report.commit) == ((file,), (), None)
    assert MemoryStore.open(path).commits() == commits
    check_kept(path, states, [(0, 11), (0, 2)])


@pytest.mark.parametrize(("chunk", "kept"), [(0, (4, 11)), (1, (0, 4)), (2, (0, 8))])
def test_a_missing_file_loses_its_rows(tmp_path: Path, chunk: int, kept: tuple[int, int]) -> None:
    path = tmp_path / "s"
    states, _ = make(path, (11, 2))
    (path / "layer-0.stream-0.rows" / f"c.{chunk}.0").unlink()
    [loss] = repaired(path).losses
    assert loss.kept == kept
    check_kept(path, states, [kept, (0, 2)])


def test_a_missing_array_loses_its_stream_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, _ = make(path, (11, 2))
    shutil.rmtree(path / "layer-1.stream-0.crc32c")
    report = repaired(path)
    assert report.restored == (path / "layer-1.stream-0.crc32c" / "zarr.json",)
    assert report.losses == (StreamLoss(0, (0, 11), ((0, 11),), (11, 11)),)
    assert report.losses[0].lost == ((0, 11),)
    check_kept(path, states, [(11, 11), (0, 2)])


def test_metadata_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2))
    array, folder = path / "layer-0.stream-0.rows" / "zarr.json", path / "commits" / "zarr.json"
    before = array.read_bytes(), folder.read_bytes()
    array.write_text("[]")
    folder.unlink()
    report = repaired(path)
    assert {*report.restored} == {array, folder}
    assert (report.commit, report.losses) == (None, ())
    assert (array.read_bytes(), folder.read_bytes()) == before
    assert MemoryStore.open(path).commits() == commits
    check_kept(path, states, [(0, 11), (0, 2)])


def test_behind_a_damaged_last_record_the_commit_before_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2))
    record = path / "commits" / f"{commits[-1]}.json"
    data = record.read_bytes()
    record.write_bytes(data[:100])
    report = MemoryStore.repair(path)
    aside = record.with_name(record.name + ".damaged")
    assert (report.base, report.set_aside, report.losses) == (commits[-2], (aside,), ())
    assert aside.read_bytes() == data[:100]
    assert not record.exists()
    assert report.commit is not None
    assert report.commit[:12] > commits[-1][:12]
    with MemoryStore.open(path, mode="r+") as store:
        assert store.commits() == [*commits[:-1], report.commit]
        # Nothing is written over rows that the damaged record may refer to.
        store.append(torch.randn(2, 2, 1, DIM))
    record.write_bytes(data)
    with MemoryStore.open(path, commit=commits[-1]) as store:
        assert torch.equal(store.rows(1)[0][0], states[1, 0])
    record.unlink()
    check_kept(path, states, [(0, 5), (0, 1)])


def test_an_older_damaged_record_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2))
    record = path / "commits" / f"{commits[1]}.json"
    record.write_text("{}")
    report = repaired(path)
    assert report.set_aside == (record.with_name(record.name + ".damaged"),)
    assert (report.base, report.commit) == (commits[-1], None)
    check_kept(path, states, [(0, 11), (0, 2)])


def test_what_an_earlier_commit_refers_to_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2), keep_commits=1)
    file = path / "layer-0.stream-0.rows" / "c.0.0"
    whole = file.read_bytes()
    flip(path, 0, 0, 0)
    flip(path, 0, 0, 7)
    report = MemoryStore.repair(path)
    assert report.losses[0].kept == (1, 7)
    assert MemoryStore.open(path).commits() == [*commits, report.commit]
    file.write_bytes(whole)  # from a copy
    indices = torch.tensor([[0, 6, 8, 9, 10], [0, 1, -1, -1, -1]])
    with MemoryStore.open(path, commit=commits[-1]) as store:
        assert torch.equal(store.gather(0, indices)[0], states[0, 0, indices[0]])


def test_the_next_rows_do_not_go_into_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make(path, (11, 2))
    with MemoryStore.open(path, mode="r+") as store:
        store.reset([0])
        store.commit()
    file = path / "layer-1.stream-0.crc32c" / "c.2"
    file.unlink()
    [damage] = MemoryStore.verify(path).damage
    assert (damage.path, damage.problem) == (file, "expected a chunk file, got no such file")
    assert [each.path for each in MemoryStore.verify(path, all_commits=True).damage] == [file]
    with MemoryStore.open(path, mode="r+") as store, pytest.raises(CorruptionError, match=str(file)):
        store.append(torch.randn(2, 2, 1, DIM))
    report = repaired(path)
    assert (report.damage, report.losses) == ((damage,), ())
    with MemoryStore.open(path, mode="r+") as store:
        store.append(torch.randn(2, 2, 3, DIM))
        store.commit()
        assert store.lengths.tolist() == [3, 5]
    assert MemoryStore.verify(path).ok


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2))
    killed = MemoryStore.open(path, mode="r+")
    killed.append(torch.randn(2, 2, 9, DIM))
    killed.close()
    (path / "commits" / "tmp-0123456789abcdef").write_text("x")
    creating = tmp_path / ".s.0123abcd.creating"
    creating.mkdir()
    (creating / "zarr.json").write_text("x")
    leftovers = MemoryStore.verify(path).leftovers
    assert len(leftovers) == 2 + 2 * 2 * 2 * 2
    report = repaired(path)
    assert report.ok
    assert report.removed == leftovers
    assert not [file for file in leftovers if file.exists()]
    assert MemoryStore.open(path).commits() == commits
    check_kept(path, states, [(0, 11), (0, 2)])


def test_random_damage_leaves_the_longest_run(tmp_path: Path) -> None:
    for round_ in range(12):
        path = tmp_path / f"s{round_}"
        states, commits = make(path, (40, 17), capacity=random.choice([None, 30, 12]))
        record = json.loads((path / "commits" / f"{commits[-1]}.json").read_text())
        with MemoryStore.open(path) as store:
            held = store.lengths.tolist()
        kept = []
        for stream, appended in enumerate((40, 17)):
            first = appended - held[stream]
            bad = {random.randrange(first, appended) for _ in range(random.randrange(5))}
            for position in bad:
                # Rows that were evicted before they were written are not in the log.
                row = position - appended + record["streams"][stream]["end"]
                flip(path, random.randrange(2), stream, row, random.choice(["rows", "crc32c"]))
            runs = [
                (start, stop)
                for start in range(first, appended + 1)
                for stop in range(start, appended + 1)
                if not bad & {*range(start, stop)}
            ]
            kept.append(max(runs, key=lambda run: (run[1] - run[0], run[1])))
        report = repaired(path)
        assert {loss.stream: loss.kept for loss in report.losses} == {
            stream: run for stream, run in enumerate(kept) if run[1] - run[0] < held[stream]
        }
        with MemoryStore.open(path) as store:
            rows, _ = store.rows(1)
            for stream, (start, stop) in enumerate(kept):
                assert torch.equal(rows[stream, : stop - start], states[1, stream, start:stop])


@pytest.mark.parametrize("eviction", ["every_nth", "lowest_score"])
def test_random_damage_among_survivors_leaves_the_longest_run_of_rows_held(
    tmp_path: Path, eviction: Eviction
) -> None:
    keep_every = 2 if eviction == "every_nth" else None
    for round_ in range(12):
        path = tmp_path / f"s{round_}"
        with MemoryStore.create(
            path,
            layers=2,
            streams=2,
            dim=DIM,
            chunk_bytes=CHUNK * ROW_BYTES,
            capacity=16,
            eviction=eviction,
            keep_every=keep_every,
        ) as store:
            for count in (16, 9, random.randrange(3)):
                states = torch.randn(2, 2, count, DIM)
                if count == 16:
                    states[:, :, 0] = 100.0  # no row scores higher: it stays
                store.append(states, [count, count // 2])
                store.layer(0).scores(torch.ones(1, DIM), normalize=None, scale=1.0)
            store.commit()
            held = [log.positions().tolist() for log in store.logs]
            [extent] = store.logs[0].extents
            surviving = store.logs[0].surviving
            rows = [store.rows(layer)[0][0] for layer in range(2)]
        assert surviving
        bad = sorted(random.sample(range(len(held[0])), random.randint(1, 4)))
        if round_ < 2:  # nothing but survivors is whole, or no survivor
            bad = [*range(surviving, len(held[0]))] if round_ == 0 else [*range(surviving)]
        for index in bad:
            flip(path, random.randrange(2), 0, extent.start + index, random.choice(["rows", "crc32c"]))
        starts, stops = [0, *(index + 1 for index in bad)], [*bad, len(held[0])]
        low, high = max(zip(starts, stops, strict=True), key=lambda run: (run[1] - run[0], run[0]))
        kept = held[0][low:high]
        after = kept[-1] + 1 if kept else held[0][-1] + 1
        assert (high <= surviving, low >= surviving) == (round_ == 0, round_ == 1) or round_ > 1

        [loss] = repaired(path).losses
        assert (loss.stream, loss.held) == (0, (held[0][0], held[0][-1] + 1))
        assert loss.kept == (kept[0] if kept else after, after)
        found = {row for start, stop in loss.damaged for row in range(start, stop)}
        assert found & {*held[0]} == {held[0][index] for index in bad}
        gone = {row for start, stop in loss.lost for row in range(start, stop)}
        assert gone & {*held[0]} == {*held[0]} - {*kept}
        new = torch.randn(2, 2, 3, DIM)
        for _ in range(2):
            with MemoryStore.open(path, mode="r+") as store:
                assert [log.positions().tolist() for log in store.logs] == [kept, held[1]]
                for layer in range(2):
                    assert torch.equal(store.rows(layer)[0][0, : high - low], rows[layer][low:high])
        with MemoryStore.open(path, mode="r+") as store:
            for _ in range(3):
                store.append(new, [3, 0])
                store.commit(durable=True)
                following = [*kept, *range(after, int(store.info().appended[0]))]
                if len(following) <= 16:
                    assert store.logs[0].positions().tolist() == following
            found_rows = store.rows(1)[0][0, : int(store.lengths[0])]
            assert torch.equal(found_rows[-1], new[1, 0, -1])
        assert MemoryStore.verify(path).ok


def test_a_repair_that_cannot_write_leaves_the_last_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    states, commits = make(path, (11, 2))
    flip(path, 0, 0, 3)
    os.truncate(path / "layer-1.stream-0.rows" / "c.2.0", ROW_BYTES)
    (path / "layer-0.stream-1.rows" / "zarr.json").unlink()
    real, left = os.pwrite, 0

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    # The lock's note, the metadata, the commit; the metadata is restored by the third attempt.
    for allowed in (0, 1, 2, 1):
        left = allowed
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            with pytest.raises(StoreWriteError, match=f"{path}: expected to read and write, got No"):
                MemoryStore.repair(path)
        assert sorted(file.stem for file in path.glob("commits/0*")) == commits
        assert not list(path.glob("commits/tmp-*"))
    report = MemoryStore.repair(path)
    assert report.losses[0].kept == (4, 9)
    check_kept(path, states, [(4, 9), (0, 2)])


def test_what_cannot_be_read_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    states, _ = make(path, (11, 2))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "its name")

    for owner, name in ((os, "preadv"), (Path, "read_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            # The metadata of the group is read before anything else.
            with pytest.raises(OSError, match="Permission denied"):
                MemoryStore.repair(path)
            with pytest.raises(PermissionError):
                MemoryStore.verify(path)
    assert {file: file.read_bytes() for file in before} == before
    check_kept(path, states, [(0, 11), (0, 2)])


def test_a_link_out_of_the_store_is_not_followed_to_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, _ = make(path, (11, 2))
    mine = tmp_path / "mine"
    mine.write_text("mine")
    file = path / "layer-1.stream-0.rows" / "c.0.0"
    file.unlink()
    file.symlink_to(mine)
    report = repaired(path)
    assert [loss.kept for loss in report.losses] == [(4, 11)]
    assert mine.read_text() == "mine"
    check_kept(path, states, [(4, 11), (0, 2)])


def test_what_cannot_be_repaired_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        MemoryStore.repair(tmp_path / "missing")
    with pytest.raises(FormatError):
        MemoryStore.repair(tmp_path)
    path = tmp_path / "s"
    make(path, (11, 2))
    flip(path, 0, 0, 3)
    with MemoryStore.open(path, mode="r+"), pytest.raises(StoreLockedError, match=f"process {os.getpid()}"):
        MemoryStore.repair(path)

    for array in sorted(path.glob("layer-*"))[:5]:
        array.rename(tmp_path / array.name)
    with pytest.raises(CorruptionError, match="expected 8 arrays beside it, got 3"):
        MemoryStore.repair(path)
    for array in tmp_path.glob("layer-*"):
        array.rename(path / array.name)
    (path / "layer-9.stream-0.rows").mkdir()
    with pytest.raises(CorruptionError, match="expected 8 arrays beside it, got 9"):
        MemoryStore.repair(path)
    (path / "layer-9.stream-0.rows").rmdir()
    for record in path.glob("commits/0*.json"):
        record.write_text("{}")
    with pytest.raises(CorruptionError, match="commits: expected the record of a commit that can be read"):
        MemoryStore.repair(path)
    shutil.rmtree(path / "commits")
    with pytest.raises(CorruptionError, match="commits: expected the folder of the commits, got none"):
        MemoryStore.repair(path)
    with MemoryStore.create(tmp_path / "t", layers=1, streams=1, dim=2):
        pass
    (tmp_path / "t" / "zarr.json").write_text("[]")
    with pytest.raises(CorruptionError, match="zarr"):
        MemoryStore.repair(tmp_path / "t")
