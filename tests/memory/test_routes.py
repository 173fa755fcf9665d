"""Counts of what was routed: exact, by position, kept with commits, and lost without harm."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import CoordinateDescentRouter
from xlroute.memory import CorruptionError, MemoryLayer, MemoryStore, S3Path, routes
from xlroute.memory.commits import record_path
from xlroute.memory.routes import RoutedRows
from xlroute.memory.sealed import checksum
from xlroute.memory.side_files import SideFiles

LAYERS, STREAMS, DIM = 2, 3, 4
SHAPE: dict[str, Any] = {"layers": LAYERS, "streams": STREAMS, "dim": DIM, "chunk_bytes": 20 * DIM * 4}
# By layer and stream, how often the row at a position was routed.
Expected = list[list[Counter[int]]]


def nothing() -> Expected:
    return [[Counter() for _ in range(STREAMS)] for _ in range(LAYERS)]


def append(store: MemoryStore, lengths: list[int]) -> None:
    store.append(torch.randn(LAYERS, STREAMS, max(lengths), DIM), lengths)


def draw(layer: MemoryLayer) -> Tensor:
    """Indices of rows that are held, and of none, [b, r, k]."""
    parts = [torch.randint(-1, length, (2, 5)) for length in layer.lengths.tolist()]
    return torch.stack(parts)


def route(store: MemoryStore, layer: int, expected: Expected) -> None:
    held = store.layer(layer)
    indices = draw(held)
    assert torch.equal(held.take_routed(indices), held.gather(indices))
    for counter, positions in zip(expected[layer], held.positions(indices), strict=True):
        counter.update(positions[positions >= 0].tolist())


def check(store: MemoryStore, expected: Expected) -> None:
    assert store.routes is not None
    for layer, streams in enumerate(expected):
        for stream, counter in enumerate(streams):
            positions, counts = store.routes.of(layer, stream)
            assert dict(zip(positions.tolist(), counts.tolist(), strict=True)) == counter
            assert positions.tolist() == sorted(counter)
    totals = tuple(sum(each[stream].total() for each in expected) for stream in range(STREAMS))
    assert store.routes.totals == store.info().routed == totals


@pytest.mark.parametrize(
    ("bound", "options"),
    [
        (1, {}),
        (3000, {"path": "s", "capacity": 9}),
        (6000, {"path": "s", "capacity": 9, "eviction": "every_nth", "keep_every": 3, "device_bytes": 300}),
        (1 << 23, {"capacity": 9, "eviction": "lowest_score", "device_bytes": 300}),
    ],
    ids=["memory", "oldest", "every_nth", "lowest_score"],
)
def test_counts_are_those_of_the_rows_at_their_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(routes, "_MOST_WAITING", bound)
    store = MemoryStore.create(**SHAPE | options)
    counts = store.record_routes()
    expected = nothing()
    for step in range(20):
        append(store, [random.randint(0, 4) for _ in range(STREAMS)])
        for layer in range(LAYERS):
            route(store, layer, expected)
            store.layer(layer).scores(torch.randn(1, DIM), normalize=None, scale=1.0)
        assert len(counts._waiting) <= bound // (8 * 30 + routes._CALL_BYTES)
        assert counts.nbytes >= len(counts._waiting) * 8 * 30
        if step % 8 == 5:
            stream = random.randrange(STREAMS)
            store.reset([stream])
            for streams in expected:
                streams[stream].clear()
        if step % 6 == 3:
            check(store, expected)
        if step % 5 == 4 and store.path is not None:
            store.commit(durable=step == 9)
            store.close()
            store = MemoryStore.open("s", mode="r+", device_bytes=options.get("device_bytes"))
            check(store, expected)
            counts = store.record_routes()
    check(store, expected)
    assert any(
        counter and min(counter) < log.first for counter, log in zip(expected[0], store.logs, strict=True)
    ) == (store.capacity is not None)


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    with MemoryStore.create(tmp_path / "s", **SHAPE) as store:
        append(store, [5, 2, 0])
        before = store.layer(0)
        before.take_routed(draw(before))
        commit = store.commit()
        assert (store.routes, store.info().routed) == (None, None)
        counts = store.record_routes()
        assert store.record_routes() is store.routes is counts
        before.take_routed(draw(before))  # a layer of before
        check(store, nothing())
        layer = store.layer(0)
        for call in (layer.gather, layer.take, layer.prefetch, layer.positions, layer.followers):
            call(draw(layer))
        check(store, nothing())
        record = record_path(tmp_path / "s", commit).read_text()
        assert '"routes"' not in record
        assert not (tmp_path / "s" / "routes").exists()
        for layer_number, stream in ((-1, 0), (LAYERS, 0), (0, -1), (0, STREAMS)):
            with pytest.raises(IndexError, match=r"expected 0 to [12], got"):
                counts.of(layer_number, stream)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "options", [{}, {"n_iters": 5}, {"route_block_size": 8}, {"num_routing_tokens": 1}], ids=str
)
def test_a_router_is_counted(options: dict[str, Any], mode: Callable[[], Any]) -> None:
    store = MemoryStore.create(**SHAPE)
    append(store, [30, 3, 0])
    counts = store.record_routes()
    router = CoordinateDescentRouter(DIM, **{"num_routing_tokens": 2, **options})
    expected = nothing()
    for num_tokens in (4, 0.2):
        with mode():
            out = router(store.layer(1), num_tokens=num_tokens, random_route=num_tokens == 4)
        for counter, indices in zip(expected[1], out.indices, strict=True):
            counter.update(indices[indices >= 0].tolist())
    assert [counter.total() > 0 for counter in expected[1]] == [True, True, False]
    check(store, expected)
    with torch.inference_mode():
        assert counts.of(1, 1)[1].sum() == expected[1][1].total()
    route(store, 0, expected)
    check(store, expected)


def test_indices_are_counted_as_they_were() -> None:
    store = MemoryStore.create(**SHAPE)
    append(store, [5, 5, 5])
    store.record_routes()
    indices = torch.full((STREAMS, 1), 2)
    store.layer(0).take_routed(indices)
    indices.fill_(4)
    expected = nothing()
    for counter in expected[0]:
        counter.update([2])
    check(store, expected)


def test_a_document_that_has_ended_is_counted_no_more() -> None:
    store = MemoryStore.create(**SHAPE)
    append(store, [5, 5, 5])
    store.record_routes()
    expected = nothing()
    route(store, 0, expected)
    layer = store.layer(0)
    store.reset([1])
    append(store, [3, 3, 3])
    expected[0][1].clear()
    indices = torch.full((STREAMS, 1), 1)
    layer.take_routed(indices)
    for stream in (0, 2):
        expected[0][stream].update([1])
    check(store, expected)


def test_commits_have_their_own_counts_and_drop_them(tmp_path: Path) -> None:
    path = tmp_path / "s"
    seen: dict[str, Expected] = {}
    with MemoryStore.create(path, **SHAPE, keep_commits=2) as store:
        append(store, [9, 9, 0])
        store.record_routes()
        expected = nothing()
        for step in range(4):
            route(store, step % 2, expected)
            seen[store.commit()] = [[counter.copy() for counter in each] for each in expected]
        files = {file.name for file in (path / "routes").iterdir()}
        assert len(files - {"zarr.json"}) == 2 * 2  # of two streams in two commits
        unchanged = store.commit()
        seen[unchanged] = seen[[*seen][-1]]
        assert {file.name for file in (path / "routes").iterdir()} < files
        with MemoryStore.open(path) as reader:
            check(reader, expected)
    for commit in [*seen][-2:]:
        with MemoryStore.open(path, commit=commit) as store:
            check(store, seen[commit])
            # A reader can go on counting, for itself.
            store.record_routes()
            own = [[counter.copy() for counter in each] for each in seen[commit]]
            route(store, 0, own)
            check(store, own)
    with MemoryStore.open(path, mode="r+") as store:
        for _ in range(3):
            store.reset(range(STREAMS))
            store.commit()
        assert [file.name for file in (path / "routes").iterdir()] == ["zarr.json"]


def test_a_writer_that_does_not_record_keeps_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with MemoryStore.create(path, **SHAPE) as store:
        append(store, [40, 9, 9])
        store.record_routes()
        expected = nothing()
        route(store, 0, expected)
        early = store.commit()
    with MemoryStore.open(path, mode="r+") as store:
        append(store, [3, 3, 3])
        store.layer(0).take_routed(torch.zeros(STREAMS, 1, dtype=torch.int64))
        store.commit(durable=True)
        assert store.compact().shards
    with MemoryStore.open(path, mode="r+", commit=early) as store:  # goes back
        check(store, expected)
        store.reset([2])
        store.commit()
    with MemoryStore.open(path) as store:
        expected[0][2].clear()
        check(store, expected)
    assert MemoryStore.verify(path, all_commits=True).routes == ()


def test_forks_and_copies_go_on_by_themselves(tmp_path: Path) -> None:
    store = MemoryStore.create(**SHAPE)
    append(store, [5, 5, 0])
    store.record_routes()
    expected = nothing()
    route(store, 0, expected)
    fork = store.fork()
    own = [[counter.copy() for counter in each] for each in expected]
    route(fork, 1, own)
    route(store, 0, expected)
    check(fork, own)
    check(store, expected)
    store.copy_to(tmp_path / "copy", durable=True)
    with MemoryStore.open(tmp_path / "copy", mode="r+") as copy:
        check(copy, expected)
        assert not copy.fork().routes.recording  # type: ignore[union-attr]
        copy.copy_to(tmp_path / "again")
    with MemoryStore.open(tmp_path / "again") as again:
        check(again, expected)


@pytest.fixture
def counted(tmp_path: Path) -> tuple[Path, Expected]:
    """A store whose streams 0 and 1 have counts, and these."""
    path = tmp_path / "s"
    expected = nothing()
    with MemoryStore.create(path, **SHAPE) as store:
        append(store, [20, 20, 0])
        store.record_routes()
        for _ in range(4):
            route(store, 0, expected)
            route(store, 1, expected)
        store.commit()
    return path, expected


def harm(file: Path, kind: str) -> None:
    data = bytearray(file.read_bytes())
    if kind == "flip":
        data[random.randrange(len(data))] ^= random.randrange(1, 256)
        file.write_bytes(data)
    elif kind == "truncate":
        file.write_bytes(data[: random.randrange(len(data))])
    else:
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("kind", ["flip", "truncate", "folder"])
def test_damaged_counts_are_lost_and_nothing_else(counted: tuple[Path, Expected], kind: str) -> None:
    path, expected = counted
    [file] = (path / "routes").glob("stream-1.*")
    harm(file, kind)
    for streams in expected:
        streams[1].clear()
    with MemoryStore.open(path) as store:
        with pytest.warns(UserWarning, match=f"the counts of what was routed are lost: {file}: "):
            check(store, expected)
        check(store, expected)
    report = MemoryStore.verify(path)
    assert report.ok
    assert [(each.path, each.stream) for each in report.routes] == [(file, 1)]
    with MemoryStore.open(path, mode="r+") as store:
        store.record_routes()
        route(store, 0, expected)
        with pytest.warns(UserWarning, match="the counts of what was routed are lost"):
            store.commit()
    assert MemoryStore.verify(path).routes == ()
    with MemoryStore.open(path) as store:
        check(store, expected)


def test_repair_removes_damaged_counts_and_scores(counted: tuple[Path, Expected]) -> None:
    path, expected = counted
    with MemoryStore.open(path, mode="r+") as store:
        for layer in range(LAYERS):
            store.layer(layer).scores(torch.randn(2, DIM), normalize=None, scale=1.0)
        last = store.commit()
    [file] = (path / "routes").glob("stream-0.*")
    [folder] = (path / "scores").glob("layer-1.*")
    harm(file, "flip")
    harm(folder / "layer-0.stream-1.rows" / "c.0.0", "truncate")
    before = {each for each in path.rglob("*") if each.is_file()}
    report = MemoryStore.repair(path)
    assert (report.ok, report.commit, report.base) == (True, None, last)
    assert report.derived == (file, folder)
    assert before - {each for each in path.rglob("*") if each.is_file()} == {
        each for each in before if folder in each.parents or each == file
    }
    assert MemoryStore.repair(path).derived == ()
    after = MemoryStore.verify(path)
    assert (after.ok, after.scores, after.routes) == (True, (), ())
    for streams in expected:
        streams[0].clear()
    with MemoryStore.open(path, mode="r+") as store:  # what is gone is no reason for a warning
        check(store, expected)
        store.layer(1).scores(torch.randn(2, DIM), normalize=None, scale=1.0)
        store.record_routes()
        route(store, 0, expected)
        store.commit()
    with MemoryStore.open(path) as store:
        check(store, expected)


def test_repair_keeps_the_counts_of_streams_that_lost_nothing(counted: tuple[Path, Expected]) -> None:
    path, expected = counted
    harm(path / "layer-0.stream-0.rows" / "c.0.0", "flip")
    assert [loss.stream for loss in MemoryStore.repair(path).losses] == [0]
    for streams in expected:
        streams[0].clear()
    with MemoryStore.open(path) as store:
        check(store, expected)


@pytest.mark.parametrize("refused", ["write_named", "sync"])
def test_what_cannot_be_written_is_no_reason_for_a_commit_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    path = tmp_path / "s"
    with MemoryStore.create(path, **SHAPE) as store:
        append(store, [5, 5, 0])
        store.record_routes()
        expected = nothing()
        route(store, 0, expected)
        real = getattr(SideFiles, refused)

        def refuse(files: SideFiles, *arguments: Any) -> None:
            if files._folder.name == "routes":
                raise OSError(28, "No space left on device")
            real(files, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(SideFiles, refused, refuse)
            commit = store.commit(durable=True)
        assert ("routes" in json.loads(record_path(path, commit).read_text())) is (refused == "sync")
        store.commit(durable=True)
    with MemoryStore.open(path) as store:
        check(store, expected)


@pytest.mark.parametrize("survived", range(5))
def test_a_commit_that_is_interrupted_has_all_counts_or_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """The files of two streams, metadata, and the record get their names: so many of them, and no more."""
    path = tmp_path / "s"
    expected, real = nothing(), os.replace
    with MemoryStore.create(path, **SHAPE) as store:
        append(store, [9, 9, 0])
        store.commit()
        store.record_routes()
        route(store, 0, expected)
        renamed: list[Path] = []

        def replace(source: Path, target: Path) -> None:
            if len(renamed) == survived:
                raise KeyboardInterrupt
            real(source, target)
            renamed.append(target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
            with pytest.raises(KeyboardInterrupt) if survived < 4 else nullcontext():
                store.commit()
    with MemoryStore.open(path, mode="r+") as store:
        assert store.info().routed == (None if survived < 4 else store.routes.totals)  # type: ignore[union-attr]
        if survived < 4:
            expected = nothing()
        store.record_routes()
        check(store, expected)
        route(store, 1, expected)
        store.commit()
        check(store, expected)
    assert len([*(path / "routes").iterdir()]) == 1 + 2 * (1 if survived < 4 else 2)
    assert MemoryStore.verify(path).routes == ()


def test_durable_waits_for_what_an_earlier_commit_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with MemoryStore.create(path, **SHAPE) as store:
        append(store, [5, 0, 0])
        store.record_routes()
        route(store, 0, nothing())
        store.commit()
    synced: list[str] = []
    real = os.fsync

    def fsync(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        real(file)

    with MemoryStore.open(path, mode="r+") as store:
        monkeypatch.setattr(os, "fsync", fsync)
        store.commit(durable=True)
    [file] = (path / "routes").glob("stream-0.*")
    assert {str(file), str(path / "routes")} <= {*synced}


def test_counts_on_disk_stop_at_the_most_that_they_can_say(tmp_path: Path) -> None:
    with MemoryStore.create(tmp_path / "s", **SHAPE) as store:
        append(store, [2, 0, 0])
        [document, *_] = store.record_routes().documents
        document.rows[1] = RoutedRows(*torch.tensor([[0, 1], [2**32 + 5, 2**31]]).numpy())
        store.commit()
    with MemoryStore.open(tmp_path / "s") as store:
        assert store.routes is not None
        assert store.routes.totals == (2**32 - 1 + 2**31, 0, 0)
        assert store.routes.of(1, 0)[1].tolist() == [2**32 - 1, 2**31]


def test_an_object_store_keeps_them_too(quick_bucket: str, tmp_path: Path) -> None:
    url = f"{quick_bucket}/s"
    expected = nothing()
    with MemoryStore.create(url, **SHAPE, keep_commits=1) as store:
        append(store, [5, 5, 0])
        store.record_routes()
        for _ in range(3):
            route(store, 0, expected)
            store.commit()
    with MemoryStore.open(url, mode="r+") as store:
        check(store, expected)
        store.record_routes()
        route(store, 1, expected)
        store.commit()
        check(store, expected)
        store.copy_to(f"{quick_bucket}/copy")
    names = [*(S3Path.from_url(url) / "routes").names()]
    assert len(names) == 3  # of two streams, and metadata
    for other in (url, f"{quick_bucket}/copy"):
        with MemoryStore.open(other) as store:
            check(store, expected)
    name = next(name for name in names if name.startswith("stream-0."))
    (S3Path.from_url(url) / "routes" / name).write_bytes(b"")
    assert [each.stream for each in MemoryStore.verify(url).routes] == [0]
    (S3Path.from_url(url) / "routes" / name).unlink()
    assert MemoryStore.verify(url).routes == ()


@pytest.mark.parametrize(
    "entry",
    [[0, "00000000"], [True, "00000000"], [1, "0000000x"], [1], "1", [-1, "00000000"], [2**63, "00000000"]],
    ids=str,
)
def test_impossible_records_are_refused(counted: tuple[Path, Expected], entry: Any) -> None:
    path, _ = counted
    record = max((path / "commits").glob("0*.json"))
    document = json.loads(record.read_text())
    document["routes"][0] = entry
    del document["crc32c"]
    crc = checksum(document)
    record.unlink()
    record.with_name(f"{record.name[:12]}-{crc}.json").write_text(json.dumps(document | {"crc32c": crc}))
    with pytest.raises(CorruptionError, match="expected a commit record, got another document"):
        MemoryStore.open(path)


def test_counts_of_another_document_are_noticed(counted: tuple[Path, Expected]) -> None:
    """Whole files under a name and a checksum that fit, of positions that the stream has never had."""
    path, _ = counted
    with MemoryStore.open(path, mode="r+") as store:
        store.reset([0])
        append(store, [3, 0, 0])
        commit = store.commit()
    [old] = (path / "routes").glob("stream-0.*")
    document = json.loads(record_path(path, commit).read_text())
    _, total, crc = old.name.split(".")
    document["routes"][0] = [int(total), crc]
    del document["crc32c"]
    seal = checksum(document)
    record_path(path, commit).unlink()
    other = record_path(path, f"{commit[:12]}-{seal}")
    assert isinstance(other, Path)
    other.write_text(json.dumps(document | {"crc32c": seal}))
    with MemoryStore.open(path) as store:
        assert store.routes is not None
        with pytest.warns(UserWarning, match="expected positions that ascend from 0 to below 3"):
            assert store.routes.of(0, 0)[0].tolist() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_on_a_gpu_nothing_waits_and_graphs_are_not_counted() -> None:
    store = MemoryStore.create(**SHAPE, device="cuda")
    append(store, [9, 9, 9])
    store.record_routes()
    layer = store.layer(0)
    indices = torch.tensor([[[0, 1, 1]], [[8, 8, 8]], [[-1, -1, 2]]], device="cuda")
    layer.take_routed(indices)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            layer.take_routed(indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.take_routed(indices)
    graph.replay()
    expected = nothing()
    for counter, own in zip(expected[0], indices.tolist(), strict=True):
        counter.update([index for index in own[0] * 6 if index >= 0])
    check(store, expected)
