"""Eviction by a policy: which rows stay, and that they are what they were, at the positions that they had."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import Tensor

from xlroute import RoutedTransformerXL
from xlroute.kernels import row_scores
from xlroute.memory import MemoryIndex, MemoryStore, scores
from xlroute.memory.cold import ColdRows

LAYERS, STREAMS, DIM = 2, 2, 6
ROW = DIM * 4
SHARE = 2 * LAYERS * STREAMS * ROW  # bytes for one row of each layer and stream
HOW: dict[str, Any] = {"normalize": None, "scale": 0.5}
POLICIES: dict[str, dict[str, Any]] = {
    "every_nth": {"eviction": "every_nth", "keep_every": 3},
    "lowest_score": {"eviction": "lowest_score"},
}
PLACES: dict[str, dict[str, Any]] = {
    "memory": {"path": None},
    "disk": {"path": "s"},
    "host and device": {"path": None, "device_bytes": 5 * SHARE},
    "disk and device": {"path": "s", "device_bytes": 5 * SHARE},
    "disk, host and device": {"path": "s", "device_bytes": 3 * SHARE, "host_bytes": 9 * SHARE},
}

each_policy = pytest.mark.parametrize("policy", POLICIES)


def create(folder: Path, place: str = "memory", **options: Any) -> MemoryStore:
    shape = {"layers": LAYERS, "streams": STREAMS, "dim": DIM, "chunk_bytes": 8 * ROW}
    given = {**shape, **PLACES[place], **options}
    path = given.pop("path")
    return MemoryStore.create(None if path is None else folder / path, **given)


def states(count: int) -> Tensor:
    return torch.randn(LAYERS, STREAMS, count, DIM)


@dataclass
class Row:
    """A row of a stream, [l, d], and the highest score that it has in each layer that has scored it."""

    position: int
    row: Tensor
    scores: dict[int, float] = field(default_factory=dict)


class Reference:
    """What a store must hold: for every stream its rows one by one, and the layers that were scored."""

    def __init__(self, capacity: int, policy: str) -> None:
        self.capacity = capacity
        self.policy = policy
        self.rows: list[list[Row]] = [[] for _ in range(STREAMS)]
        self.appended = [0] * STREAMS
        self.scored: list[set[int]] = [set() for _ in range(STREAMS)]

    def copy(self) -> Reference:
        other = Reference(self.capacity, self.policy)
        other.rows = [
            [Row(row.position, row.row, dict(row.scores)) for row in stream] for stream in self.rows
        ]
        other.appended = [*self.appended]
        other.scored = [{*layers} for layers in self.scored]
        return other

    def append(self, new: Tensor, lengths: list[int]) -> None:
        for stream, length in enumerate(lengths):
            for row in new[:, stream, :length].unbind(1):
                if len(self.rows[stream]) == self.capacity:
                    self._evict(stream)
                self.rows[stream].append(Row(self.appended[stream], row))
                self.appended[stream] += 1

    def reset(self, stream: int) -> None:
        self.rows[stream], self.appended[stream], self.scored[stream] = [], 0, set()

    def score(self, layer: int, tokens: Tensor) -> None:
        for stream, rows in enumerate(self.rows):
            self.scored[stream].add(layer)
            values = [row.row[layer] for row in rows]
            found = row_scores(torch.stack(values), tokens, **HOW).amax(0).tolist() if rows else []
            for row, value in zip(rows, found, strict=True):
                row.scores[layer] = value

    def _evict(self, stream: int) -> None:
        rows = self.rows[stream]
        layers = self.scored[stream]

        def worth(row: Row) -> float:
            if self.policy == "every_nth":
                return float(row.position % POLICIES["every_nth"]["keep_every"] == 0)
            known = [each for each in rows if layers <= each.scores.keys()]
            if not layers or row not in known:
                return float("inf")
            return sum(sum(each.scores[layer] < row.scores[layer] for each in known) for layer in layers)

        leaving = sorted(rows, key=lambda row: (worth(row), row.position))[: max(1, self.capacity // 4)]
        self.rows[stream] = [row for row in rows if row not in leaving]

    def check(self, store: MemoryStore) -> None:
        """All that can be read of the store is what it must hold, bit for bit."""
        lengths = [len(rows) for rows in self.rows]
        assert store.lengths.tolist() == lengths
        assert max(lengths) <= self.capacity
        longest = max(lengths)
        indices = torch.full((STREAMS, longest + 1), -1)
        positions = torch.full((STREAMS, longest + 1), -1)
        followers = torch.full((STREAMS, longest + 1), -1)
        for stream, rows in enumerate(self.rows):
            indices[stream, : len(rows)] = torch.arange(len(rows))
            positions[stream, : len(rows)] = torch.tensor([row.position for row in rows])
            for index, (row, after) in enumerate(itertools.pairwise(rows)):
                if after.position == row.position + 1:
                    followers[stream, index] = index + 1
        shuffled = torch.randperm(longest + 1)
        assert torch.equal(store.positions(indices[:, shuffled]), positions[:, shuffled])
        for layer in range(LAYERS):
            held = store.layer(layer)
            assert torch.equal(held.positions(indices[:, None]), positions[:, None])
            ages = torch.tensor(self.appended)[:, None] - positions
            assert torch.equal(held.ages(indices[:, shuffled]), ages[:, shuffled])
            assert torch.equal(held.followers(indices[:, shuffled]), followers[:, shuffled])
            picked = store.gather(layer, indices)
            found, mask = store.rows(layer)
            assert mask.sum(1).tolist() == lengths
            for stream, rows in enumerate(self.rows):
                expected = torch.stack([row.row[layer] for row in rows]) if rows else torch.empty(0, DIM)
                assert torch.equal(found[stream, : len(rows)], expected)
                assert torch.equal(picked[stream, : len(rows)], expected)


def score(store: MemoryStore, reference: Reference | None, layer: int, tokens: Tensor) -> None:
    """Scores a layer as routing does; the scores are those of its rows."""
    found = store.layer(layer).scores(tokens, **HOW).detach()
    rows, mask = store.fork().rows(layer)
    assert torch.equal(found, row_scores(rows, tokens.detach(), **HOW).masked_fill(~mask[:, None], 0))
    if reference is not None:
        reference.score(layer, tokens.detach())


@each_policy
@pytest.mark.parametrize("place", PLACES)
def test_a_store_agrees_with_a_list_of_rows(
    place: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_SAMPLES", 2)
    capacity = random.choice([1, 3, *range(14, 20)])
    store = create(tmp_path, place, capacity=capacity, **POLICIES[policy])
    reference = Reference(capacity, policy)
    tokens = torch.randn(2, DIM)
    forks: list[tuple[MemoryStore, Reference]] = []
    commits: dict[str, Reference] = {}
    for step in range(24):
        count = random.choice([1, 2, 4, 7, 40])
        new, lengths = states(count), [count, random.randint(0, count)]
        for given, expected in ((store, reference), *forks):
            given.append(new, lengths)
            expected.append(new, lengths)
            expected.check(given)
        if step % 9 == 5:
            store.reset([step % STREAMS])
            reference.reset(step % STREAMS)
        if step == 15:
            tokens = torch.randn(3, DIM)
        for layer in range(LAYERS):
            if random.random() < 0.7:
                score(store, reference, layer, tokens)
        if step % 11 == 4:
            forks = [(store.fork(), reference.copy())]
        if store.path is not None and step % 3 == 1:
            commits[store.commit(durable=step % 2 == 0)] = reference.copy()
        if store.path is not None and step % 8 == 7:
            commits[store.commit()] = reference.copy()
            store.close()
            forks = []  # what they have not read is there for as long as a commit holds it
            budgets = {name: PLACES[place].get(name) for name in ("device_bytes", "host_bytes")}
            store = MemoryStore.open(tmp_path / "s", mode="r+", **budgets)
            reference.check(store)
            for layer in range(LAYERS):
                score(store, reference, layer, tokens)
    if store.path is not None:
        assert MemoryStore.verify(store.path, all_commits=True).ok
        for commit in store.commits()[1:]:
            with MemoryStore.open(store.path, commit=commit) as reader:
                commits[commit].check(reader)
    store.copy_to(tmp_path / "copy", durable=True)
    assert MemoryStore.verify(tmp_path / "copy").ok
    with MemoryStore.open(tmp_path / "copy") as copied:
        assert (copied.eviction, copied.keep_every) == (policy, POLICIES[policy].get("keep_every"))
        reference.check(copied)


def test_a_store_whose_oldest_rows_leave_is_written_as_it_was_before_there_was_a_choice(
    tmp_path: Path,
) -> None:
    with create(tmp_path, "disk", capacity=5) as store:
        store.append(states(9))
        store.commit()
        assert (store.eviction, store.keep_every) == ("oldest", None)
    group = json.loads((tmp_path / "s" / "zarr.json").read_text())["attributes"]["xlroute_memory"]
    shape = {"layers", "streams", "dim", "dtype", "capacity", "chunk_rows", "keep_commits"}
    assert group.keys() == {"format"} | shape
    record = json.loads(max(tmp_path.glob("s/commits/0*.json")).read_text())
    assert all(stream.keys() == {"extents", "appended", "end"} for stream in record["streams"])
    assert not (tmp_path / "s" / "positions").exists()


@each_policy
def test_it_makes_no_difference_how_rows_are_cut(policy: str, tmp_path: Path) -> None:
    total = random.randint(8, 15)  # so few that not all of the scored rows leave
    new, tokens = states(15 + total), torch.randn(2, DIM)
    held = []
    for cuts in ([total], [1] * total, [3, 1, total - 4]):
        store = create(tmp_path, capacity=20, **POLICIES[policy])
        store.append(new[:, :, :15])
        score(store, None, 0, tokens)
        for part in new[:, :, 15:].split(cuts, dim=2):
            store.append(part)
        held.append([positions_held(store, stream) for stream in range(STREAMS)])
    assert held[0] == held[1] == held[2]
    assert any(each[-1] - each[0] >= len(each) for each in held[0])


def positions_held(store: MemoryStore, stream: int = 0) -> list[int]:
    indices = torch.full((store.streams, int(store.lengths[stream])), -1)
    indices[stream] = torch.arange(indices.shape[1])
    return store.positions(indices)[stream].tolist()


def one_by_value(*values: float) -> Tensor:
    """Rows [1, 1, n, 1] whose score is their value."""
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None]


def scored_by_value(capacity: int, *values: float) -> MemoryStore:
    store = MemoryStore.create(layers=1, streams=1, dim=1, capacity=capacity, eviction="lowest_score")
    store.append(one_by_value(*values))
    store.layer(0).scores(torch.ones(1, 1), normalize=None, scale=1.0)
    return store


def test_the_far_past_is_sampled_and_the_recent_past_is_dense() -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=1, capacity=8, eviction="every_nth", keep_every=4)
    store.append(torch.zeros(1, 1, 8, 1))
    assert positions_held(store) == [*range(8)]
    store.append(torch.zeros(1, 1, 1, 1))  # a quarter leaves: 1 and 2
    assert positions_held(store) == [0, 3, 4, 5, 6, 7, 8]
    store.append(torch.zeros(1, 1, 6, 1))
    assert positions_held(store) == [0, 4, 8, 11, 12, 13, 14]
    store.append(torch.zeros(1, 1, 40, 1))  # multiples fill the memory, and begin to leave
    assert positions_held(store) == [32, 36, 40, 44, 48, 52, 54]


def test_the_lowest_scores_leave_first_and_the_oldest_of_equal_ones() -> None:
    store = scored_by_value(8, 5, 1, 4, 1, 3, 1, 2, 6)
    store.append(one_by_value(0))
    assert positions_held(store) == [0, 2, 4, 5, 6, 7, 8]
    # 0 is the score of no row: those that came later have none yet.
    store.append(one_by_value(9, 9))
    assert positions_held(store) == [0, 2, 4, 7, 8, 9, 10]
    store.layer(0).scores(torch.ones(1, 1), normalize=None, scale=1.0)
    store.append(one_by_value(0, 0))
    assert positions_held(store) == [0, 2, 7, 9, 10, 11, 12]


def test_the_highest_score_of_all_tokens_counts_and_nan_is_the_lowest() -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=2, capacity=4, eviction="lowest_score")
    store.append(torch.tensor([[9.0, 0], [0, 5], [float("nan"), 0], [6, 6]])[None, None])
    store.layer(0).scores(torch.eye(2), normalize=None, scale=1.0)
    store.append(torch.zeros(1, 1, 1, 2))
    assert positions_held(store) == [0, 1, 3, 4]
    store.append(torch.zeros(1, 1, 1, 2))
    assert positions_held(store) == [0, 3, 4, 5]


def test_a_layer_counts_as_much_as_any_other_whatever_its_scale() -> None:
    new = torch.randn(3, 1, 40, DIM)
    tokens = torch.randn(3, 2, DIM)
    held = []
    for scale in (1e-4, 1.0, 1e4):
        store = MemoryStore.create(layers=3, streams=1, dim=DIM, capacity=40, eviction="lowest_score")
        store.append(new)
        for layer in (0, 2):  # one has no scores at all
            store.layer(layer).scores(tokens[layer], normalize=None, scale=scale if layer else 1.0)
        store.append(new[:, :, :1])
        held.append(positions_held(store))
    assert held[0] == held[1] == held[2] != [*range(10, 41)]


def test_without_scores_the_oldest_leave() -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=1, capacity=8, eviction="lowest_score")
    for count in (5, 3, 1, 2, 30):
        store.append(torch.randn(1, 1, count, 1))
        stop = int(store.positions(store.lengths[:, None] - 1)) + 1
        assert positions_held(store) == [*range(stop - int(store.lengths), stop)]
    assert stop == 41


def test_scores_that_carry_gradient_decide_as_well() -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=1, capacity=4, eviction="lowest_score")
    store.append(one_by_value(3, 1, 2, 4))
    found = store.layer(0).scores(torch.ones(1, 1, requires_grad=True), normalize=None, scale=1.0)
    store.append(one_by_value(0))
    assert positions_held(store) == [0, 2, 3, 4]
    found.sum().backward()


def test_only_the_scores_of_what_is_held_now_decide() -> None:
    store = scored_by_value(4, 3, 1, 2, 4)
    fork, snapshot = store.fork(), store.layer(0)
    store.append(one_by_value(0))
    snapshot.scores(-torch.ones(1, 1), normalize=None, scale=1.0)
    fork.append(one_by_value(0))
    assert positions_held(store) == positions_held(fork) == [0, 2, 3, 4]
    fork.layer(0).scores(-torch.ones(1, 1), normalize=None, scale=1.0)
    store.append(one_by_value(0))
    fork.append(one_by_value(0))
    assert positions_held(store) == [0, 3, 4, 5]
    assert positions_held(fork) == [0, 2, 4, 5]


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_scores_on_disk_decide_after_opening(tmp_path: Path, mode: Any) -> None:
    new, tokens = states(20), torch.randn(2, DIM)
    store = create(tmp_path, "disk", capacity=20, eviction="lowest_score")
    store.append(new)
    for layer in range(LAYERS):
        score(store, None, layer, tokens)
    store.commit()
    fork = store.fork()
    store.close()
    fork.append(new[:, :, :3])
    with MemoryStore.open(tmp_path / "s", mode=mode) as opened:
        given = opened if mode == "r+" else opened.fork()
        given.append(new[:, :, :3])
        for stream in range(STREAMS):
            assert positions_held(given, stream) == positions_held(fork, stream) != [*range(5, 23)]


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_stay_are_not_scored_again(place: str, scored: list[int], tmp_path: Path) -> None:
    store = create(tmp_path, place, streams=1, capacity=200, eviction="lowest_score")
    tokens = torch.randn(2, DIM)
    store.append(torch.randn(LAYERS, 1, 200, DIM))
    for layer in range(LAYERS):
        store.layer(layer).scores(tokens, **HOW)
    store.append(torch.randn(LAYERS, 1, 5, DIM))
    assert store.lengths.tolist() == [155]
    scored.clear()
    for layer in range(LAYERS):
        found = store.layer(layer).scores(tokens, **HOW)
        assert torch.equal(found[0], row_scores(store.rows(layer)[0][0], tokens, **HOW))
    assert sorted(scored) == [5, 5, 16, 16]  # the new ones, and some to see whether scores can be trusted
    if store.path is not None:
        store.commit()
        scored.clear()
        with MemoryStore.open(store.path) as reader:
            reader.layer(1).scores(tokens, **HOW)
        assert scored == [16]


def test_scores_that_were_carried_are_committed_even_if_nobody_asks(
    tmp_path: Path, scored: list[int]
) -> None:
    store = create(tmp_path, "disk", streams=1, capacity=100, eviction="lowest_score")
    tokens = torch.randn(2, DIM)
    store.append(torch.randn(LAYERS, 1, 100, DIM))
    store.layer(0).scores(tokens, **HOW)
    store.append(torch.randn(LAYERS, 1, 1, DIM))
    store.commit()
    scored.clear()
    with MemoryStore.open(store.path or "") as reader:
        reader.layer(0).scores(tokens, **HOW)
    assert sorted(scored) == [1, 16]


@each_policy
def test_an_index_finds_no_row_that_has_left(policy: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    store = create(tmp_path, capacity=40, **POLICIES[policy])
    index, exact = MemoryIndex(store, "flat"), MemoryIndex(store)
    tokens = torch.randn(2, DIM)
    for _ in range(12):
        store.append(states(9))
        score(store, None, 0, tokens)
        given, expected = (each.search(0, tokens, 10) for each in (index, exact))
        assert torch.equal(given[1], expected[1])
        torch.testing.assert_close(given[0], expected[0])


@each_policy
@pytest.mark.parametrize("kind", ["disk and device", "disk, host and device"])
def test_memory_is_bounded_and_rows_on_disk_are_read_in_blocks(
    policy: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlroute.memory.store._BLOCK_BYTES", 7 * LAYERS * ROW)
    asked: list[int] = []
    gather = ColdRows.gather

    def counting(self: ColdRows, index: Tensor) -> Tensor:
        asked.append(len(index))
        return gather(self, index)

    monkeypatch.setattr(ColdRows, "gather", counting)
    store = create(tmp_path, kind, capacity=60, **POLICIES[policy])
    bound = sum(PLACES[kind].get(name, 0) for name in ("device_bytes", "host_bytes"))
    tokens = torch.randn(1, DIM)
    for _ in range(12):
        store.append(states(13))
        positions = sum(8 * (log.survivors.stop - log.survivors.start) for log in store.logs if log.survivors)
        assert store.info().memory_bytes <= bound + positions + 2 * 60 * LAYERS * STREAMS * 4 * 3
        store.layer(0).scores(tokens, **HOW)
    assert len(asked) > 10
    assert max(asked) <= 7


@each_policy
def test_files_of_positions_go_with_the_commits_that_name_them(policy: str, tmp_path: Path) -> None:
    store = create(tmp_path, "disk", capacity=12, keep_commits=2, **POLICIES[policy])
    folder = tmp_path / "s" / "positions"
    tokens = torch.randn(1, DIM)
    seen = set()
    for _ in range(20):
        store.append(states(5))
        store.layer(0).scores(tokens, **HOW)
        store.commit()
        files = {path.name for path in folder.glob("stream-*")} if folder.exists() else set()
        named = set()
        for commit in store.commits():
            with MemoryStore.open(tmp_path / "s", commit=commit) as reader:
                for stream, log in enumerate(reader.logs):
                    if log.survivors is not None:
                        start, stop, crc32c = log.survivors.start, log.survivors.stop, log.survivors.crc32c
                        named.add(f"stream-{stream}.{start}-{stop}.{crc32c}")
        assert files == named
        seen |= files
    assert len(seen) > 10 > len(files)
    report = MemoryStore.verify(tmp_path / "s", all_commits=True)
    assert (report.ok, report.leftovers) == (True, ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(tmp_path / "s", mode="r")
        assert {name for name, _ in group.members()} >= {"positions", "commits"}
    left = folder / "stream-1.7-9.0123abcd"  # of a writer that was killed before it committed
    left.write_bytes(b"")
    assert MemoryStore.verify(tmp_path / "s").leftovers == (left,)
    store.close()
    assert MemoryStore.repair(tmp_path / "s").removed == (left,)
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        store.reset([0, 1])
        for _ in range(3):
            store.commit(durable=True)
    assert not [*folder.glob("stream-*")]


@each_policy
def test_going_back_to_a_commit_with_survivors(policy: str, tmp_path: Path) -> None:
    reference = Reference(12, policy)
    held: dict[str, Reference] = {}
    with create(tmp_path, "disk", capacity=12, keep_commits=20, **POLICIES[policy]) as store:
        for _ in range(4):
            new = states(7)
            store.append(new)
            reference.append(new, [7, 7])
            score(store, reference, 1, torch.randn(2, DIM))
            held[store.commit()] = reference.copy()
    for commit in random.sample([*held], 3):
        with MemoryStore.open(tmp_path / "s", mode="r+", commit=commit) as store:
            held[commit].check(store)
            reference, new = held[commit].copy(), states(9)
            tokens = torch.randn(2, DIM)
            score(store, reference, 1, tokens)
            store.append(new)
            reference.append(new, [9, 9])
            reference.check(store)
            store.commit(durable=True)
        for name, each in held.items():
            with MemoryStore.open(tmp_path / "s", commit=name) as reader:
                each.check(reader)
        with MemoryStore.open(tmp_path / "s") as reader:
            reference.check(reader)


# ---- Capacity ----


def test_a_capacity_in_bytes_is_shared_by_all_streams_and_layers(tmp_path: Path) -> None:
    one = LAYERS * STREAMS * ROW
    for given, rows in ((one, 1), (2 * one - 1, 1), (11 * one + 5, 11)):
        with create(tmp_path, capacity_bytes=given) as store:
            assert store.capacity == rows
            store.append(states(30))
            info = store.info()
            assert store.lengths.tolist() == [rows, rows]
            assert (info.capacity, info.capacity_bytes) == (rows, rows * one)
            assert info.rows_bytes == rows * one <= given
    assert create(tmp_path, capacity=7, capacity_bytes=11 * one).capacity == 7
    assert create(tmp_path, capacity=12, capacity_bytes=11 * one).capacity == 11
    with create(tmp_path, "disk", capacity_bytes=11 * one):
        assert MemoryStore.open(tmp_path / "s").capacity == 11


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity_bytes": 95}, ValueError, "capacity_bytes: expected at least 96, a row of each .* got 95"),
        ({"capacity_bytes": 0}, ValueError, "capacity_bytes: expected at least 1, got 0"),
        ({"capacity_bytes": 1e9}, TypeError, "capacity_bytes: expected an integer, got float"),
        ({"capacity_bytes": 999, "capacity": 0}, ValueError, "capacity: expected at least 1, got 0"),
        ({"eviction": "newest", "capacity": 5}, ValueError, "eviction: expected one of oldest, .* 'newest'"),
        ({"eviction": [1], "capacity": 5}, ValueError, r"eviction: expected one of oldest, .* got \[1\]"),
        ({"eviction": "lowest_score"}, ValueError, "capacity: expected one beside eviction='lowest_score'"),
        (
            {"eviction": "every_nth", "capacity": 5},
            TypeError,
            "keep_every: expected an integer, got NoneType",
        ),
        ({"eviction": "every_nth", "capacity": 5, "keep_every": 1}, ValueError, "keep_every: .* got 1"),
        ({"eviction": "every_nth", "capacity": 5, "keep_every": 0}, ValueError, "keep_every: .* got 0"),
        ({"keep_every": 2, "capacity": 5}, ValueError, "keep_every: expected None with eviction='oldest'"),
        ({"layers": 0, "capacity_bytes": 999}, ValueError, "layers: expected at least 1, got 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_bad_capacities_and_policies_are_refused(
    place: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        create(tmp_path, place, **{"streams": 1, "dim": 12, "layers": 2, **options})
    assert not [*tmp_path.iterdir()]


# ---- The model ----


@each_policy
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_model_reads_on_as_if_it_had_never_stopped(
    build_model: Callable[..., RoutedTransformerXL], policy: str, on_disk: bool, tmp_path: Path
) -> None:
    model = build_model(dtype=torch.float32)
    tokens = torch.randint(50, (2, 60))
    options = {"capacity": 14, **POLICIES[policy]}
    plain = model.initial_state(streams=2, memory=model.create_memory(streams=2, **options))
    path = tmp_path / "memory" if on_disk else None
    state = model.initial_state(streams=2, memory=model.create_memory(path, streams=2, **options))
    held = set()
    with torch.no_grad():
        for number, piece in enumerate(tokens.split(5, dim=1)):
            if number % 4 == 3:
                # A segment is left open, and enters the memory before anything is routed again.
                _, plain = model.generate(piece[:, :3], 1, plain, temperature=0)
                _, state = model.generate(piece[:, :3], 1, state, temperature=0)
            if number % 3 == 0:
                state.save(tmp_path / "state")
                assert state.memory is not None
                state.memory.close()
                state = model.load_state(tmp_path / "state", "r+" if on_disk else "r")
            expected, plain = model(piece, plain)
            given, state = model(piece, state)
            assert torch.equal(given, expected)
            assert plain.memory is not None
            assert state.memory is not None
            for stream in range(2):
                found = positions_held(state.memory, stream)
                assert found == positions_held(plain.memory, stream)
                held.add(tuple(found) != tuple(range(found[0], found[0] + len(found))) if found else False)
    assert held == {False, True}
    state.memory.close()


def test_a_model_reads_no_row_that_follows_only_because_others_have_left(
    build_model: Callable[..., RoutedTransformerXL],
) -> None:
    model = build_model()
    memory = model.create_memory(streams=1, capacity=8, eviction="every_nth", keep_every=4)
    memory.append(torch.randn(2, 1, 15, 16, dtype=torch.float64))
    assert positions_held(memory) == [0, 4, 8, 11, 12, 13, 14]
    indices = torch.tensor([[[0, 2, 3, 4, 6, -1]]])
    rows = memory.rows(0)[0][0]
    expected = torch.stack([*torch.zeros(2, 16), rows[4], rows[5], *torch.zeros(2, 16)])
    layer = memory.layer(0)
    assert torch.equal(layer.take(layer.followers(indices))[0, 0], expected.to(rows.dtype))
