"""Routing keys of a layer's rows: kept in one buffer or projected anew, searched where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xlroute.kernels import unit_projections
from xlroute.memory import MemoryStore, kept_values
from xlroute.memory.layer import Keep
from xlroute.memory.routing_keys import RoutingKeys, routing_keys

DIM, SETS, WIDTH = 16, 2, 8


def projected() -> Tensor:
    return torch.randn(SETS, WIDTH, DIM)


def check(store: MemoryStore, projection: Tensor) -> RoutingKeys:
    """Keys are those that a store has which gets all rows at once, to the bit; so is what is found."""
    found = store.layer(0).keys(projection, keep=True)
    rows, mask = store.rows(0)
    lengths = mask.sum(1)
    queries = torch.nn.functional.normalize(torch.randn(len(rows), SETS, 3, WIDTH), dim=-1)
    scores, indices = found.search(queries, 4)
    assert scores.shape == indices.shape == (len(rows), SETS, 3, min(4, rows.shape[1]))
    for stream, length in enumerate(lengths.tolist()):
        other = MemoryStore.create(layers=1, streams=1, dim=DIM)
        other.append(rows[None, stream : stream + 1, :length])
        keys = found.of_stream(stream)
        assert torch.equal(keys, other.layer(0).keys(projection, keep=True).of_stream(0))
        expected = routing_keys(rows[stream, :length], projection).transpose(0, 1)
        torch.testing.assert_close(keys, expected)
        best = (queries[stream] @ keys.mT).topk(min(4, length))
        torch.testing.assert_close(scores[stream, :, :, :length], best.values)
        assert torch.equal(indices[stream, :, :, :length], best.indices)
        assert (indices[stream, :, :, length:] == -1).all()
    return found


def append(store: MemoryStore, *counts: int) -> None:
    store.append(torch.randn(1, len(counts), max(counts), DIM), counts)


@pytest.mark.parametrize("together", [1 << 16, 12])
def test_rows_that_come_leave_and_begin_again(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether few enough are new to be projected together, or not."""
    monkeypatch.setattr(kept_values, "_MOST_TOGETHER", together)
    store = MemoryStore.create(layers=1, streams=3, dim=DIM, capacity=30)
    projection = projected()
    for step in range(14):
        append(store, 7, step % 4, 7)
        if step in (4, 9):
            store.reset([step % 2])
        if step == 7:
            append(store, 0, 0, 40)  # all of its rows are new
        check(store, projection)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_row_has_the_same_key_however_many_come_with_it(streams: int) -> None:
    """A few rows, or a single one, are summed in the order in which many are."""
    projection = torch.randn(SETS, 64, DIM)
    keeps: tuple[Keep, ...] = (True, "first")
    for keep in keeps:
        rows = torch.randn(1, streams, 40, DIM)
        at_once, by_and_by = (MemoryStore.create(layers=1, streams=streams, dim=DIM) for _ in range(2))
        at_once.append(rows)
        for part in torch.split(rows, [1] * 20 + [2, 3] * 4, dim=2):
            by_and_by.append(part)
            keys = by_and_by.layer(0).keys(projection, keep=keep)
        expected = at_once.layer(0).keys(projection, keep=keep)
        for stream in range(streams):
            assert torch.equal(keys.of_stream(stream), expected.of_stream(stream))


def test_what_was_handed_out_does_not_change() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=DIM, capacity=12)
    projection = projected()
    handed_out: list[tuple[Tensor, Tensor]] = []
    for step in range(12):
        append(store, 3, step % 4)
        if step % 5 == 4:
            store.reset([step % 2])
        keys = store.layer(0).keys(projection, keep=True)
        handed_out += [(keys.of_stream(i), keys.of_stream(i).clone()) for i in range(2)]
    assert all(torch.equal(keys, before) for keys, before in handed_out)


def test_forks_do_not_write_over_each_other() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=DIM)
    projection = projected()
    append(store, 9, 5)
    check(store, projection)
    append(store, 1, 1)
    forks = [store.fork(), store.fork()]
    for _ in range(3):
        for each in (store, *forks):
            append(each, 2, 3)
            check(each, projection)


def test_keys_are_searched_where_they_are(scored: list[int]) -> None:
    """Appending and evicting as many rows moves nothing, until the room is used up."""
    store = MemoryStore.create(layers=1, streams=2, dim=DIM, capacity=40)
    projection = projected()
    append(store, 40, 40)
    store.layer(0).keys(projection, keep=True)
    scored.clear()
    places = set()
    for step in range(5):
        append(store, 2, 2)
        keys = store.layer(0).keys(projection, keep=True).keys
        assert keys.shape == (2, SETS, 40, WIDTH)
        assert keys.flatten(0, 1).data_ptr() == keys.data_ptr()
        places.add(keys.untyped_storage().data_ptr())
        assert scored == [4] * (step + 1)  # what is new of both streams at once
    assert len(places) == 1


def test_full_streams_and_forks_project_only_new_rows(scored: list[int]) -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=DIM, capacity=20)
    projection = projected()
    for _ in range(30):
        append(store, 3)
        store.layer(0).keys(projection, keep=True)
    fork = store.fork()
    for each in (store, fork):
        append(each, 4)
        store.layer(0).keys(projection, keep=True)
        each.layer(0).keys(projection, keep=True)
    assert scored == [3] * 30 + [4] * 2


def change_in_place(projection: Tensor) -> Tensor:
    projection.data[0, 0, 0] += 1  # leaves the tensor's version as it was
    return projection


@pytest.mark.parametrize(
    "change",
    [change_in_place, lambda p: p[:1], lambda p: p.view(WIDTH, SETS, DIM), lambda p: p.clone().neg()],
    ids=["in place", "fewer", "other widths", "others"],
)
def test_another_projection_projects_all_rows_again(
    scored: list[int], change: Callable[[Tensor], Tensor]
) -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=DIM)
    append(store, 20)
    projection = projected()
    store.layer(0).keys(projection, keep=True)
    changed = change(projection)
    keys = store.layer(0).keys(changed, keep=True).of_stream(0)
    torch.testing.assert_close(keys, routing_keys(store.rows(0)[0][0], changed).transpose(0, 1))
    assert scored == [20, 20]


def test_inference_mode_leaves_keys_that_others_can_use() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=DIM)
    projection = projected()
    for _ in range(3):
        append(store, 5, 2)
        with torch.inference_mode():
            check(store, projection)
        check(store, projection)


@pytest.mark.parametrize("compared", ["scores", "keys"])
def test_weights_are_compared_once_for_all_streams(compared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for a GPU each time."""
    store = MemoryStore.create(layers=1, streams=4, dim=DIM)
    weights = torch.nn.Parameter(projected()[0] if compared == "scores" else projected())
    calls: list[bool] = []
    equal = torch.equal

    def counting(a: Tensor, b: Tensor) -> bool:
        calls.append(equal(a, b))
        return calls[-1]

    def read() -> list[bool]:
        calls.clear()
        append(store, 3, 1, 0, 2)
        with torch.no_grad():
            if compared == "scores":
                store.layer(0).scores(weights, normalize="rms", scale=1.0)
            else:
                store.layer(0).keys(weights, keep=True)
        return list(calls)

    read()
    monkeypatch.setattr(torch, "equal", counting)
    assert read() == [True]
    weights.data.neg_()
    assert read() == [False]
    store.reset([1])
    read()  # what a stream of its own begins anew is a copy of its own, until here
    assert read() == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_keys_of_a_moment_are_rounded_as_the_rows_are(dtype: torch.dtype) -> None:
    """Within four roundings of bfloat16, and one in types whose products are float32 or float64."""
    rows = 300 * torch.randn(200, DIM, dtype=torch.float64).to(dtype)
    projection = torch.randn(SETS, WIDTH, DIM, dtype=torch.promote_types(dtype, torch.float32))
    out = torch.full((SETS, 200, WIDTH), torch.nan, dtype=dtype)
    unit_projections(rows[None], projection, out[None])
    exact = routing_keys(rows.double(), projection.double()).transpose(0, 1)
    error = (out.double() - exact).norm(dim=-1).max().item()
    roundings = 4 if dtype == torch.bfloat16 else 1
    floor = 50 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert error <= max(roundings * torch.finfo(dtype).eps, floor)
    unit_projections(torch.zeros_like(rows)[None], projection, out[None])
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_of_zeros_have_keys_of_zeros_and_no_gradient(dtype: torch.dtype) -> None:
    rows = torch.zeros(3, DIM, dtype=dtype)
    rows[1] = 1
    rows.requires_grad_()
    projection = torch.randn(SETS, 64, DIM, requires_grad=True)
    keys = routing_keys(rows, projection)
    assert (keys[[0, 2]] == 0).all()
    keys[[0, 2]].sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert (rows.grad[1] == 0).all()
    assert projection.grad is not None
    assert (projection.grad == 0).all()


def test_bytes_of_keys_are_counted() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=DIM)
    append(store, 20, 20)
    before = store.info().memory_bytes
    store.layer(0).keys(projected(), keep=True)
    taken = store.info().memory_bytes - before
    assert 2 * SETS * 20 * WIDTH * 4 <= taken <= 2 * SETS * 30 * WIDTH * 4
