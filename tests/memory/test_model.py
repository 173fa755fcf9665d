"""The store against a model of it: lists of rows, in any order of operations."""

import copy
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import Eviction, MemoryLayer, MemoryStore, scores, shards
from xlroute.memory.layout import EVICTIONS

LAYERS, STREAMS, DIM, KEEP_EVERY = 2, 3, 3, 3
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.5}
# Two that take turns: the scores of one are dropped while those of the other are kept.
TOKENS = torch.randn(2, 2, DIM, generator=torch.Generator().manual_seed(0))


class Model:
    """What a store should hold: for every stream its rows [l, d], their positions and their scores."""

    def __init__(self, capacity: int | None, eviction: Eviction, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self.eviction = eviction
        self.dtype = dtype
        self.rows: list[list[Tensor]] = [[] for _ in range(STREAMS)]
        self.positions: list[list[int]] = [[] for _ in range(STREAMS)]
        self.appended = [0] * STREAMS
        # Of each layer that was scored, the scores of the oldest rows.
        self.scores: list[dict[int, list[float]]] = [{} for _ in range(STREAMS)]

    def append(self, states: Tensor, lengths: list[int]) -> None:
        for stream, length in enumerate(lengths):
            for row in states[:, stream, :length].to(self.dtype).unbind(1):
                if len(self.rows[stream]) == self.capacity:
                    self.evict(stream)
                self.rows[stream].append(row)
                self.positions[stream].append(self.appended[stream])
                self.appended[stream] += 1

    def evict(self, stream: int) -> None:
        assert self.capacity is not None
        positions, scores = self.positions[stream], self.scores[stream].values()
        scored = min(map(len, scores), default=0)
        worth = [0.0] * len(positions)
        if self.eviction == "every_nth":
            worth = [float(position % KEEP_EVERY == 0) for position in positions]
        elif self.eviction == "lowest_score":
            worth = [float(len(positions) * LAYERS)] * len(positions)
            for index in range(scored):
                worth[index] = sum(sum(each < of[index] for each in of[:scored]) for of in scores)
        count = 1 if self.eviction == "oldest" else max(1, self.capacity // 4)
        leaving = sorted(range(len(positions)), key=lambda index: (worth[index], index))[:count]
        for each in (self.rows[stream], positions, *scores):
            each[:] = [value for index, value in enumerate(each) if index not in leaving]  # type: ignore[index]

    def score(self, layer: int, tokens: int) -> None:
        for stream, rows in enumerate(self.layer(layer)):
            found = row_scores(rows, TOKENS[tokens], **HOW).amax(0)
            self.scores[stream][layer] = found.tolist()

    def reset(self, streams: list[int]) -> None:
        for stream in streams:
            self.rows[stream] = []
            self.positions[stream] = []
            self.appended[stream] = 0
            self.scores[stream] = {}

    def layer(self, layer: int) -> list[Tensor]:
        empty = torch.empty(0, DIM, dtype=self.dtype)
        return [torch.stack([row[layer] for row in rows]) if rows else empty for rows in self.rows]

    def check(self, store: MemoryStore) -> None:
        """All that the store says agrees with the model."""
        lengths = [len(rows) for rows in self.rows]
        assert store.lengths.tolist() == lengths
        longest = max(lengths)
        indices = torch.tensor(
            [[*range(length), *[-1] * (longest + 1 - length)] for length in lengths], dtype=torch.int64
        )
        positions = store.positions(indices)
        for stream, length in enumerate(lengths):
            assert positions[stream, :length].tolist() == self.positions[stream]
            assert (positions[stream, length:] == -1).all()
        for layer in range(LAYERS):
            # Picked rows come first: reading all of them would bring them into memory.
            picked = store.gather(layer, indices)
            rows, mask = store.rows(layer)
            assert mask.sum(1).tolist() == lengths
            for stream, expected in enumerate(self.layer(layer)):
                assert torch.equal(picked[stream, : lengths[stream]], expected)
                assert torch.equal(rows[stream, : lengths[stream]], expected)
                assert (picked[stream, lengths[stream] :] == 0).all()
                assert (rows[stream, lengths[stream] :] == 0).all()


def check_scores(layer: MemoryLayer, rows: list[Tensor], tokens: int) -> None:
    """The scores of a layer are those of all of its rows, scored at once."""
    found = layer.scores(TOKENS[tokens], **HOW)
    for given, expected in zip(found, rows, strict=True):
        assert torch.equal(given[:, : len(expected)], row_scores(expected, TOKENS[tokens], **HOW))


class Machine(RuleBasedStateMachine):
    """Random operations on a store and on its model."""

    place: str  # "memory", "disk", or the url of a bucket
    dtype: torch.dtype
    budgets: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.names = (f"{self.folder.name}-{number}" for number in itertools.count())
        self.path = self.new_path()
        self.layers: list[tuple[int, int, MemoryStore, MemoryLayer, list[Tensor]]] = []
        self.committed: dict[str, Model] = {}
        self.pins: dict[str, str] = {}
        self.random = torch.Generator().manual_seed(0)

    @property
    def on_disk(self) -> bool:
        return self.place != "memory"

    def new_path(self) -> str | Path:
        name = next(self.names)
        return f"{self.place}/{name}" if self.place.startswith("s3:") else self.folder / name

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.model.check(self.store)
            self.store.close()
        for *_, layer, expected in self.layers:
            for view, rows in zip(layer.views(), expected, strict=True):
                assert torch.equal(view, rows)
        shutil.rmtree(self.folder)

    @initialize(
        capacity=st.sampled_from([None, 1, 4, 9]),
        eviction=st.sampled_from(EVICTIONS),
        chunk_rows=st.integers(1, 8),
        keep_commits=st.integers(1, 3),
    )
    def create(self, capacity: int | None, eviction: Eviction, chunk_rows: int, keep_commits: int) -> None:
        eviction = "oldest" if capacity is None else eviction
        self.model = Model(capacity, eviction, self.dtype)
        self.store = MemoryStore.create(
            self.path if self.on_disk else None,
            layers=LAYERS,
            streams=STREAMS,
            dim=DIM,
            dtype=self.dtype,
            capacity=capacity,
            chunk_bytes=chunk_rows * DIM * self.dtype.itemsize,
            keep_commits=keep_commits,
            eviction=eviction,
            keep_every=KEEP_EVERY if eviction == "every_nth" else None,
            **self.budgets,
        )
        self.keep_commits = keep_commits
        for commit in self.store.commits():
            self.committed[commit] = copy.deepcopy(self.model)

    @rule(lengths=st.lists(st.integers(0, 6), min_size=STREAMS, max_size=STREAMS), spare=st.integers(0, 2))
    def append(self, lengths: list[int], spare: int) -> None:
        states = torch.randn(LAYERS, STREAMS, max(lengths) + spare, DIM, generator=self.random)
        version = self.store.version
        self.store.append(states, lengths)
        self.model.append(states, lengths)
        assert self.store.version > version

    @rule(mask=st.lists(st.booleans(), min_size=STREAMS, max_size=STREAMS), as_mask=st.booleans())
    def reset(self, mask: list[bool], as_mask: bool) -> None:
        numbers = [stream for stream, chosen in enumerate(mask) if chosen]
        self.store.reset(torch.tensor(mask) if as_mask else numbers)
        self.model.reset(numbers)

    @rule()
    def look(self) -> None:
        self.model.check(self.store)

    @rule(layer=st.integers(0, LAYERS - 1))
    def keep_layer(self, layer: int) -> None:
        held = self.store.layer(layer), self.model.layer(layer)
        self.layers.append((layer, self.store.version, self.store, *held))

    @rule(tokens=st.integers(0, 1))
    def score(self, tokens: int) -> None:
        for layer in range(LAYERS):
            check_scores(self.store.layer(layer), self.model.layer(layer), tokens)
            self.model.score(layer, tokens)

    @rule(data=st.data(), tokens=st.integers(0, 1))
    @precondition(lambda self: self.layers)
    def score_a_kept_layer(self, data: st.DataObject, tokens: int) -> None:
        number, version, store, layer, rows = data.draw(st.sampled_from(self.layers))
        check_scores(layer, rows, tokens)
        if store is self.store and version == self.store.version:
            # Nothing has changed since then, and the layer is the store's own.
            self.model.score(number, tokens)

    @rule(take_fork=st.booleans())
    def fork(self, take_fork: bool) -> None:
        fork, model = self.store.fork(), copy.deepcopy(self.model)
        states = torch.randn(LAYERS, STREAMS, 2, DIM, generator=self.random)
        fork.append(states, [2, 0, 1])
        model.append(states, [2, 0, 1])
        fork.reset([2])
        model.reset([2])
        model.check(fork)
        assert fork.path is None
        if take_fork and not self.on_disk:
            self.store, self.model = fork, model

    @rule(durable=st.booleans())
    @precondition(lambda self: self.on_disk)
    def commit(self, durable: bool) -> None:
        self.committed[self.store.commit(durable)] = copy.deepcopy(self.model)
        readable = self.store.commits()
        recent = list(self.committed)[-self.keep_commits :]
        assert readable[-len(recent) :] == recent
        pinned = {*self.pins.values()}
        assert pinned <= {*readable}
        # One more at most: the last durable one.
        assert len({*readable} - pinned) <= self.keep_commits + 1
        self.committed = {commit: self.committed[commit] for commit in readable}

    @rule(tokens=st.integers(0, 1), segments=st.integers(1, 3))
    @precondition(lambda self: self.on_disk)
    def read_on(self, tokens: int, segments: int) -> None:
        """As a model does, which leaves scores of some rows on disk that those of others are added to."""
        for _ in range(segments):
            self.append([2, 0, 1], 0)
            self.score(tokens)
            self.commit(False)
        self.read_every_commit()

    @rule(compression=st.sampled_from([None, "zstd"]))
    @precondition(lambda self: self.on_disk)
    def compact(self, compression: Literal["zstd"] | None) -> None:
        last = list(self.committed)[-1]
        report = self.store.compact(compression=compression)
        if report.commit is not None:
            # What the last commit holds, whatever was appended or reset since then.
            self.committed[report.commit] = self.committed[last]
        self.committed = {commit: self.committed[commit] for commit in self.store.commits()}
        assert self.store.compact(compression=compression).commit is None
        assert MemoryStore.verify(self.path, all_commits=True).ok

    @rule(data=st.data())
    @precondition(lambda self: self.on_disk)
    def pin(self, data: st.DataObject) -> None:
        commit = data.draw(st.sampled_from([*self.committed]))
        self.pins[self.store.pin(commit)] = commit
        assert self.store.pins() == self.pins

    @rule(data=st.data())
    @precondition(lambda self: self.pins)
    def unpin(self, data: st.DataObject) -> None:
        pin = data.draw(st.sampled_from([*self.pins]))
        self.store.unpin(pin)
        del self.pins[pin]
        assert self.store.pins() == self.pins

    @rule()
    @precondition(lambda self: self.on_disk)
    def read_every_commit(self) -> None:
        for commit, model in self.committed.items():
            for tokens in range(len(TOKENS)):
                # Whichever of them the commit has scores of, they are asked for before rows are read.
                with MemoryStore.open(self.path, commit=commit) as reader:
                    for layer in range(LAYERS):
                        check_scores(reader.layer(layer), model.layer(layer), tokens)
                    model.check(reader)

    @rule(data=st.data(), tokens=st.integers(0, 1))
    @precondition(lambda self: self.on_disk)
    def reopen(self, data: st.DataObject, tokens: int) -> None:
        # What a layer has not read goes when the next writer drops the commit; one in tiers keeps little.
        if self.budgets:
            self.layers.clear()
        for *_, layer, _ in self.layers:
            layer.views()
        self.store.close()
        last = list(self.committed)[-1]
        commit = data.draw(st.sampled_from([None, *self.committed]))
        self.store = MemoryStore.open(self.path, mode="r+", commit=commit, **self.budgets)
        self.model = copy.deepcopy(self.committed[commit or last])
        if commit not in (None, last):
            [new] = set(self.store.commits()) - set(self.committed)
            self.committed[new] = copy.deepcopy(self.model)
            self.committed = {commit: self.committed[commit] for commit in self.store.commits()}
        # What was scored is known again once it is scored again; some of it may be known from disk.
        self.score(tokens)

    @rule(tokens=st.integers(0, 1))
    def copy_to(self, tokens: int) -> None:
        path = self.new_path()
        commit = self.store.copy_to(path)
        with MemoryStore.open(path) as store:
            check_scores(store.layer(0), self.model.layer(0), tokens)
            self.model.check(store)
            assert store.commits() == [commit]


ROW = DIM * 4
SHARE = 2 * LAYERS * STREAMS * ROW  # bytes for one row of each layer and stream
TIERS = {"device_bytes": 2 * SHARE, "host_bytes": 5 * SHARE}


def run(place: str, dtype: torch.dtype, budgets: dict[str, int], examples: int, steps: int) -> None:
    machine = type("Case", (Machine,), {"place": place, "dtype": dtype, "budgets": budgets})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few rows would all be scored again, before the scores on disk are used.
    monkeypatch.setattr(scores, "_SAMPLES", 1)
    # Inner chunks of two or three rows, and shards of one chunk or a few.
    monkeypatch.setattr(shards, "_INNER_BYTES", 2 * DIM * 4)
    monkeypatch.setattr(shards, "_SHARD_BYTES", LAYERS * 6 * DIM * 4)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_store_agrees_with_lists_of_rows(place: str, dtype: torch.dtype) -> None:
    run(place, dtype, {}, examples=15, steps=30)


@pytest.mark.parametrize("kind", ["memory and device", "disk, host and device"])
def test_a_store_in_tiers_agrees_with_lists_of_rows(kind: str) -> None:
    place = kind.split()[0].rstrip(",")
    budgets = TIERS if place == "disk" else {"device_bytes": TIERS["device_bytes"]}
    run(place, torch.float32, budgets, examples=4, steps=15)


@pytest.mark.parametrize("budgets", [{}, TIERS], ids=["plain", "tiers"])
def test_a_store_in_a_bucket_agrees_with_lists_of_rows(quick_bucket: str, budgets: dict[str, int]) -> None:
    run(quick_bucket, torch.float32, budgets, examples=8, steps=20)


def test_a_store_on_a_server_agrees_with_lists_of_rows(bucket: str) -> None:
    run(bucket, torch.float32, {}, examples=3, steps=10)
