"""The rows of all streams in one block: what a store does with them all at once is what streams do alone."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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
from xlroute.memory import MemoryLayer, MemoryStore, side_by_side
from xlroute.memory import store as memory_store
from xlroute.memory.routing_keys import routing_keys
from xlroute.memory.side_by_side import SideBySide, Streams

LAYERS, STREAMS, DIM = 2, 3, 4
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.5}


def make(streams: int, **options: Any) -> MemoryStore:
    return MemoryStore.create(layers=1, streams=streams, dim=DIM, **options)


def append(store: MemoryStore, *counts: int) -> None:
    store.append(torch.randn(1, len(counts), max(counts), DIM), counts)


def block(store: MemoryStore) -> SideBySide | None:
    """The block of all rows, if they are in one."""
    layer = store.layer(0)
    return SideBySide.of([layer.of_stream(i) for i in range(store.streams)])


class Model:
    """What a store should hold: the rows of each stream, [l, m_i, d]."""

    def __init__(self, rows: Sequence[Tensor], capacity: int | None) -> None:
        self.rows = list(rows)
        self.capacity = capacity

    def copy(self) -> Model:
        return Model(self.rows, self.capacity)

    def append(self, states: Tensor, counts: Sequence[int]) -> None:
        for stream, count in enumerate(counts):
            rows = torch.cat(
                [self.rows[stream], states[:, stream, :count].to(self.rows[stream].dtype)], dim=1
            )
            left = 0 if self.capacity is None else max(0, rows.shape[1] - self.capacity)
            self.rows[stream] = rows[:, left:]

    def reset(self, streams: Sequence[int]) -> None:
        for stream in streams:
            self.rows[stream] = self.rows[stream][:, :0]


def check(layer: MemoryLayer, rows: Sequence[Tensor], choices: Tensor) -> None:
    """A layer holds rows b [m_i, d], and says of them what stores of one stream each say, to the bit.

    It is asked with any of the tokens [2, r, d], and for first scores with the first ones.
    """
    tokens = choices[random.randrange(2)]
    lengths = [len(each) for each in rows]
    assert layer.lengths.tolist() == lengths
    for view, each in zip(layer.views(), rows, strict=True):
        assert torch.equal(view, each)
    indices = torch.tensor([[random.randrange(-1, n) for _ in range(6)] for n in lengths]).view(-1, 3, 2)
    for picked, index, each in zip(layer.gather(indices), indices, rows, strict=True):
        expected = torch.cat([each, torch.zeros(1, DIM, dtype=layer.dtype)])  # -1 is the last one
        assert torch.equal(picked, expected[index])
    learned = tokens.clone().requires_grad_()
    of_streams = tokens * torch.rand(len(rows), 1, 1, dtype=tokens.dtype)
    scores = {
        "kept": layer.scores(tokens, **HOW),
        "not kept": layer.scores(tokens, keep=False, **HOW),
        "learned": layer.scores(learned, **HOW).detach(),
        "first": layer.scores(choices[0], keep="first", **HOW),
        "of streams": layer.scores(of_streams, keep=False, **HOW),
    }
    projection = tokens[:, None]
    keys = layer.keys(projection, keep=True)
    at_once = layer.keys(projection, keep=False)
    queries = torch.randn(len(rows), len(tokens), 2, 1, dtype=layer.dtype)
    found = at_once.search(queries, 2)[1]
    for i, (each, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = MemoryStore.create(layers=1, streams=1, dim=DIM, dtype=layer.dtype)
        alone.append(each[None, None])
        for name, given in scores.items():
            used = {"of streams": of_streams[i], "first": choices[0]}.get(name, tokens)
            assert torch.equal(given[i, :, :length], alone.layer(0).scores(used, **HOW)[0])
            assert (given[i, :, length:] == 0).all()
        assert torch.equal(keys.of_stream(i), alone.layer(0).keys(projection, keep=True).of_stream(0))
        expected = routing_keys(each, projection).transpose(0, 1).to(layer.dtype)
        torch.testing.assert_close(at_once.of_stream(i), expected)
        assert ((found[i] >= 0).sum(-1) == min(2, length)).all()
        assert (found[i] < length).all()


class Machine(RuleBasedStateMachine):
    """Random operations on a store and its forks, which all go on, and on their models."""

    folder: Path

    @initialize(
        capacity=st.sampled_from([None, 5, 12]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        on_disk=st.booleans(),
    )
    def create(self, capacity: int | None, dtype: torch.dtype, on_disk: bool) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.tokens = torch.randn(2, 2, DIM, generator=self.random).to(
            torch.promote_types(dtype, torch.float32)
        )
        store = MemoryStore.create(
            tempfile.mkdtemp(dir=self.folder) if on_disk else None,
            layers=LAYERS,
            streams=STREAMS,
            dim=DIM,
            dtype=dtype,
            capacity=capacity,
        )
        model = Model([torch.empty(LAYERS, 0, DIM, dtype=dtype)] * STREAMS, capacity)
        if on_disk:
            with store:
                self._append(store, model, [3] * STREAMS)
                store.layer(0).scores(self.tokens[0], **HOW)
                store.commit()
                store = store.fork()
        self.stores = [(store, model)]
        self.snapshots: list[tuple[MemoryLayer, list[Tensor]]] = []

    def teardown(self) -> None:
        for number, (store, model) in enumerate(getattr(self, "stores", [])):
            self.keep_layer(number)
            assert store.lengths.tolist() == [rows.shape[1] for rows in model.rows]
        for layer, rows in getattr(self, "snapshots", []):
            check(layer, rows, self.tokens)

    def _append(self, store: MemoryStore, model: Model, counts: list[int]) -> None:
        states = torch.randn(LAYERS, STREAMS, max(counts) + 1, DIM, generator=self.random)
        store.append(states, counts)
        model.append(states, counts)

    def _chosen(self, number: int) -> tuple[MemoryStore, Model]:
        return self.stores[number % len(self.stores)]

    numbers = st.integers(0, 2)
    some = st.lists(st.booleans(), min_size=STREAMS, max_size=STREAMS)
    most = some | st.just([True] * STREAMS)

    @rule(number=numbers, n=st.integers(1, 4), going=most, inference=st.booleans())
    def append(self, number: int, n: int, going: list[bool], inference: bool) -> None:
        with torch.inference_mode(inference):
            self._append(*self._chosen(number), [n * each for each in going])

    @rule(number=numbers, counts=st.lists(st.integers(0, 3), min_size=STREAMS, max_size=STREAMS))
    def append_unlike(self, number: int, counts: list[int]) -> None:
        self._append(*self._chosen(number), counts)

    @rule(number=numbers, mask=some)
    def reset(self, number: int, mask: list[bool]) -> None:
        store, model = self._chosen(number)
        streams = [stream for stream, chosen in enumerate(mask) if chosen]
        store.reset(streams)
        model.reset(streams)

    @rule(number=numbers, n=st.integers(1, 4))
    @precondition(lambda self: len(self.stores) < 3)
    def fork(self, number: int, n: int) -> None:
        number %= len(self.stores)
        store, model = self.stores[number]
        both = number, len(self.stores)
        self.stores.append((store.fork(), model.copy()))
        for each in both:
            self._append(*self._chosen(each), [n] * STREAMS)
            self.look(each, False)
        for each in both:
            self.look(each, False)

    @rule(number=numbers)
    def keep_layer(self, number: int) -> None:
        store, model = self._chosen(number)
        for layer in range(LAYERS):
            self.snapshots.append((store.layer(layer), [rows[layer] for rows in model.rows]))

    @rule(number=numbers, inference=st.booleans())
    def look(self, number: int, inference: bool) -> None:
        store, model = self._chosen(number)
        for layer in range(LAYERS):
            with torch.inference_mode(inference):
                check(store.layer(layer), [rows[layer] for rows in model.rows], self.tokens)

    @rule(data=st.data())
    @precondition(lambda self: self.snapshots)
    def look_back(self, data: st.DataObject) -> None:
        layer, rows = data.draw(st.sampled_from(self.snapshots))
        check(layer, rows, self.tokens)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Places that hold no rows hold NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned")
def test_streams_side_by_side_are_what_they_are_alone(tmp_path: Path) -> None:
    machine = type("Case", (Machine,), {"folder": tmp_path})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("counts", [(2, 2), (2, 0), (2, 1)])
@pytest.mark.parametrize("what", ["rows", "scores", "scores of rows", "keys"])
def test_what_is_saved_for_backward_outlives_later_appends(what: str, counts: tuple[int, ...]) -> None:
    tokens = torch.randn(2, DIM)
    weights = torch.randn(2, DIM, requires_grad=True)

    def result(layer: MemoryLayer) -> Tensor:
        if what == "rows":
            return layer.views()[0] @ weights[0]
        if what == "scores of rows":
            return layer.scores(weights, **HOW)
        if what == "scores":
            return layer.scores(tokens, **HOW) * weights[0, 0]
        return layer.keys(tokens[None], keep=True).keys * weights[0, 0]

    store = make(2)
    append(store, 8, 8)
    [before] = {view.untyped_storage().data_ptr() for view in store.layer(0).views()}
    early = result(store.layer(0)).square().sum()
    [expected] = torch.autograd.grad(early, weights, retain_graph=True)
    append(store, *counts)
    [after] = {view.untyped_storage().data_ptr() for view in store.layer(0).views()}
    assert after == before
    result(store.layer(0))
    early.backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, expected)


def test_streams_that_take_turns_beside_an_empty_one_stay_where_they_are() -> None:
    store = make(3)
    append(store, 20, 20, 20)
    store.reset([2])
    places = []
    for step in range(16):
        append(store, step % 2, 1 - step % 2, 0)
        places.append(store.layer(0).views()[0].untyped_storage().data_ptr())
    assert len({*places}) == 1


def test_streams_that_grow_alike_are_in_one_block() -> None:
    store = make(3)
    for step in range(12):
        states = torch.randn(1, 3, 4, DIM)
        store.append(states)
        found = block(store)
        assert found is not None
        assert found.begins == [0, 0, 0]
        assert torch.equal(found.columns, store.rows(0)[0])
        newest = found.newest([4] * 3)
        assert newest is not None
        assert torch.equal(newest, states[0])
        if step in (4, 9):
            # Rows begin apart, and the newest stay side by side.
            store.reset([1])
            append(store, 4, 0, 4)
            states = torch.randn(1, 3, 3, DIM)
            store.append(states)
            assert torch.equal(store.layer(0).views()[1], states[0, 1])
            found = block(store)
            assert found is not None
            assert found.begins[1] > found.begins[0] == found.begins[2] == 0
            newest = found.newest([3] * 3)
            assert newest is not None
            assert torch.equal(newest, states[0])
            store.reset([0, 1, 2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", [(2, 0, 2), (0, 2, 2)])
def test_streams_of_one_block_that_end_apart(counts: tuple[int, ...]) -> None:
    store = make(3)
    append(store, 8, 8, 8)
    append(store, *counts)
    assert block(store) is not None
    check(store.layer(0), store.layer(0).views(), torch.randn(2, 2, DIM))


@pytest.mark.usefixtures("poisoned")
def test_rows_come_together_again_before_what_is_kept_of_them() -> None:
    store = make(3)
    tokens = torch.randn(1, 2, DIM).expand(2, -1, -1)
    append(store, 40, 40, 40)
    check(store.layer(0), store.layer(0).views(), tokens)
    store.reset([0])
    append(store, 3, 0, 0)
    check(store.layer(0), store.layer(0).views(), tokens)
    fork = store.fork()
    for each in (store, fork):
        append(each, 1, 1, 1)
    found = block(fork)
    assert found is not None
    assert found.newest([1, 1, 1]) is not None
    check(fork.layer(0), fork.layer(0).views(), tokens)


@pytest.mark.parametrize("ends", ["raises", "goes on singly"])
def test_an_append_that_ends_between_layers_leaves_all_rows_right(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore.create(layers=2, streams=2, dim=DIM)
    expected = torch.randn(2, 2, 6, DIM)
    store.append(expected)
    tokens = torch.randn(2, DIM)
    store.layer(0).scores(tokens, **HOW)
    calls = []

    def grown(*arguments: Any) -> Streams | None:
        calls.append(arguments)
        if len(calls) < 2:
            return side_by_side.grown(*arguments)
        if ends == "raises":
            raise MemoryError
        return None

    states = torch.randn(2, 2, 2, DIM)
    with monkeypatch.context() as context:
        context.setattr(memory_store, "grown", grown)
        with pytest.raises(MemoryError) if ends == "raises" else nullcontext():
            store.append(states)
            expected = torch.cat([expected, states], dim=2)
    assert len(calls) == 2
    for _ in range(3):
        for layer, rows in enumerate(expected):
            assert torch.equal(store.rows(layer)[0], rows)
            assert torch.equal(store.layer(layer).scores(tokens, **HOW), row_scores(rows, tokens, **HOW))
        states = torch.randn(2, 2, 2, DIM)
        store.append(states)
        expected = torch.cat([expected, states], dim=2)


@pytest.mark.parametrize("counts", [(50, 0, 0), (50, 1, 1)])
def test_one_long_stream_gives_the_others_no_room_that_they_do_not_need(counts: tuple[int, ...]) -> None:
    store = make(3)
    append(store, *counts)
    for _ in range(3):
        append(store, 1, 1, 1)
    append(store, *counts)
    assert block(store) is None
    assert store.info().memory_bytes <= 2 * 4 * DIM * sum(map(len, store.layer(0).views()))


def test_blocks_are_no_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_LARGEST", 2 * 16 * DIM * 4)
    store = make(2)
    append(store, 8, 8)
    assert block(store) is not None
    append(store, 8, 8)
    assert block(store) is not None
    append(store, 1, 1)
    assert block(store) is None
    append(store, 1, 1)
    assert [len(view) for view in store.layer(0).views()] == [18, 18]


def test_a_copy_has_the_scores_of_all_streams(tmp_path: Path, scored: list[int]) -> None:
    store = make(2)
    append(store, 40, 40)
    append(store, 2, 0)
    tokens = torch.randn(2, DIM)
    expected = store.layer(0).scores(tokens, **HOW)
    store.copy_to(tmp_path / "copy")
    scored.clear()
    with MemoryStore.open(tmp_path / "copy") as copy:
        assert torch.equal(copy.layer(0).scores(tokens, **HOW), expected)
    assert scored == [16, 16]  # samples, to compare


def test_scores_that_were_handed_out_may_be_written_to() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=4)
    store.append(torch.randn(1, 2, 6, 4))
    tokens = torch.randn(3, 4)
    for keep in (True, "first"):
        first = store.layer(0).scores(tokens, normalize=None, scale=1.0, keep=keep)
        expected = first.clone()
        first.zero_()
        assert torch.equal(store.layer(0).scores(tokens, normalize=None, scale=1.0, keep=keep), expected)


def test_gradient_of_scores_of_streams_that_begin_apart() -> None:
    store = MemoryStore.create(layers=1, streams=3, dim=DIM, dtype=torch.float64)
    store.append(torch.randn(1, 3, 5, DIM))
    store.reset([1])
    append(store, 4, 0, 4)
    store.append(torch.randn(1, 3, 4, DIM))
    layer = store.layer(0)
    assert block(store) is not None
    assert len({*layer.lengths.tolist()}) > 1
    tokens = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    scores = layer.scores(tokens, **HOW)
    cotangent = torch.randn_like(scores)
    expected = torch.zeros_like(tokens)
    for i, rows in enumerate(layer.views()):
        alone = row_scores(rows, tokens, **HOW)
        assert torch.equal(scores[i, :, : len(rows)], alone)
        assert not scores[i, :, len(rows) :].any()
        (gradient,) = torch.autograd.grad(alone, tokens, cotangent[i, :, : len(rows)])
        expected += gradient
    (gradient,) = torch.autograd.grad(scores, tokens, cotangent)
    torch.testing.assert_close(gradient, expected)
