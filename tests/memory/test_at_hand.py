"""The rows of a layer by tensors alone: what a layer says of them, index by index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import row_places
from xlroute.kernels.arguments import HAS_TRITON
from xlroute.memory import MemoryLayer, MemoryStore
from xlroute.memory.at_hand import RowsAtHand

DIM = 4
DEVICE = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device


def make(streams: int, **options: Any) -> MemoryStore:
    return MemoryStore.create(layers=1, streams=streams, dim=DIM, **{"device": DEVICE.type, **options})


def append(store: MemoryStore, *counts: int) -> None:
    store.append(torch.randn(1, len(counts), max(counts), DIM, device=DEVICE), counts)


def one_stream(store: MemoryStore) -> None:
    append(store, 5)
    append(store, 3)


def one_stream_anew(store: MemoryStore) -> None:
    append(store, 5)
    store.reset(torch.tensor([True]))
    append(store, 2)


def one_empty_stream(store: MemoryStore) -> None:
    """Nothing is there."""


def even(store: MemoryStore) -> None:
    append(store, 5, 5, 5)
    append(store, 3, 3, 3)


def after_a_reset(store: MemoryStore) -> None:
    append(store, 5, 5, 5)
    store.reset(torch.tensor([False, True, False]))
    append(store, 3, 3, 3)


def an_empty_one(store: MemoryStore) -> None:
    append(store, 5, 5, 5)
    append(store, 4, 4, 4)
    store.reset(torch.tensor([True, False, False]))


def nothing(store: MemoryStore) -> None:
    append(store, 5, 5, 5)
    store.reset(torch.tensor([True, True, True]))


def evicted(store: MemoryStore) -> None:
    for _ in range(4):
        append(store, 3, 3, 3)


def evicted_after_a_reset(store: MemoryStore) -> None:
    append(store, 5, 5, 5)
    store.reset(torch.tensor([False, False, True]))
    append(store, 4, 4, 4)


Fill = Callable[[MemoryStore], None]
FILLS: list[tuple[int, Fill, dict[str, Any], bool]] = [
    (1, one_stream, {}, True),
    (1, one_stream, {"capacity": 6}, True),
    (1, one_stream_anew, {}, True),
    (1, one_empty_stream, {}, False),
    (3, even, {}, True),
    (3, after_a_reset, {}, False),
    (3, an_empty_one, {}, False),
    (3, nothing, {}, False),
    (3, evicted, {"capacity": 7}, True),
    (3, evicted_after_a_reset, {"capacity": 6}, False),
]
FILLED = pytest.mark.parametrize(
    ("streams", "fill", "options", "is_even"),
    FILLS,
    ids=[fill.__name__ + ("" if not options else ", capacity") for _, fill, options, _ in FILLS],
)


def indices_of(layer: MemoryLayer, *shape: int) -> Tensor:
    """Rows of each stream, the oldest, the newest and none among them."""
    chosen = []
    for n in layer.lengths.tolist():
        each = torch.randint(-1, n, shape).flatten()
        each[:3] = torch.tensor([-1, min(0, n - 1), n - 1])
        chosen.append(each.view(shape))
    return torch.stack(chosen).to(DEVICE)


def check(hand: RowsAtHand, layer: MemoryLayer, newer: Tensor) -> None:
    """They say of any rows what the layer says, to the bit, and what its rows say themselves."""
    assert hand.device == layer.device == DEVICE
    assert (hand.dim, hand.dtype, hand.even) == (DIM, layer.dtype, layer.even)
    views = layer.views()
    for shape in ((4,), (2, 3), (2, 2, 2)):
        indices = indices_of(layer, *shape)
        taken, followers, ages = hand.take(indices), hand.followers(indices), hand.ages(indices)
        assert taken.shape == (*indices.shape, DIM)
        assert taken.dtype == layer.dtype
        assert not taken.requires_grad
        assert torch.equal(taken, layer.take(indices))
        assert torch.equal(followers, layer.followers(indices))
        came = newer.to(DEVICE).view(-1, *[1] * len(shape))
        assert torch.equal(ages[indices >= 0], (layer.ages(indices) + came)[indices >= 0])
        for stream, rows in enumerate(views):
            count = len(rows) + int(newer[stream])
            for index, row, follower, age in zip(
                *(each[stream].flatten(0, len(shape) - 1) for each in (indices, taken, followers, ages)),
                strict=True,
            ):
                i = int(index)
                expected = rows[i] if i >= 0 else torch.zeros_like(row)
                assert torch.equal(row, expected)
                assert int(follower) == (i + 1 if 0 <= i < len(rows) - 1 else -1)
                assert int(age) == count - i if i >= 0 else int(age) > count


@FILLED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_they_are_those_of_the_layer(
    streams: int, fill: Fill, options: dict[str, Any], is_even: bool, dtype: torch.dtype
) -> None:
    store = make(streams, dtype=dtype, **options)
    fill(store)
    layer, newer = store.layer(0), torch.randint(5, (streams,))
    hand = layer.at_hand(newer)
    assert hand is not None
    assert hand.even is is_even
    check(hand, layer, newer)
    assert (hand.rows is None) == (DEVICE.type == "cuda")


def by_address(layer: MemoryLayer, newer: Tensor, is_even: bool) -> RowsAtHand:
    """The rows of a layer as a GPU knows them."""
    places = row_places([rows.data_ptr() for rows in layer.views()], layer.lengths.tolist(), DEVICE)
    assert places is not None
    begins, lengths, newer = (each.to(DEVICE) for each in (torch.tensor(places), layer.lengths, newer))
    return RowsAtHand(None, begins, lengths, newer, DIM, layer.dtype, is_even)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@FILLED
def test_they_are_known_by_where_they_are(
    streams: int, fill: Fill, options: dict[str, Any], is_even: bool
) -> None:
    """As on a GPU, of streams in one block or not."""
    store = make(streams, **options)
    fill(store)
    layer, newer = store.layer(0), torch.randint(5, (streams,))
    check(by_address(layer, newer, is_even), layer, newer)


def test_they_stay_what_they_are() -> None:
    """Whatever becomes of the store; and they come from inference mode as they do from outside."""
    store = make(3)
    even(store)
    layer, newer = store.layer(0), torch.tensor([1, 0, 2])
    with torch.inference_mode():
        hand = layer.at_hand(newer)
    assert hand is not None
    assert not hand.begins.is_inference()
    expected = [rows.clone() for rows in layer.views()]
    where = by_address(layer, newer.clone(), True)
    newer += 1
    for _ in range(5):
        append(store, 9, 9, 9)
    store.reset(torch.tensor([True, False, True]))
    check(hand, layer, torch.tensor([1, 0, 2]))
    for each in (hand, where) if HAS_TRITON else (hand,):
        assert torch.equal(each.take(torch.arange(8, device=DEVICE).expand(3, 8)), torch.stack(expected))


def test_a_fork_has_its_own() -> None:
    store = make(2)
    append(store, 4, 4)
    other = store.fork()
    for each in (store, other):
        append(each, 3, 3)
        layer = each.layer(0)
        hand = layer.at_hand(torch.zeros(2, dtype=torch.int64))
        if hand is not None:  # a fork whose place is taken goes on elsewhere
            check(hand, layer, torch.zeros(2, dtype=torch.int64))
    assert store.layer(0).at_hand(torch.zeros(2, dtype=torch.int64)) is not None


# ---- Where there are none ----


@pytest.mark.parametrize("streams", [1, 2])
def test_not_where_the_store_counts_routes(streams: int) -> None:
    store, none = make(streams), torch.zeros(streams, dtype=torch.int64)
    append(store, *[4] * streams)
    counts = store.record_routes()
    assert store.layer(0).at_hand(none) is None
    counts.recording = False
    assert store.layer(0).at_hand(none) is not None


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("options", [{}, {"device_bytes": 300}], ids=str)
@pytest.mark.parametrize("on_disk", [True, False])
def test_not_where_rows_are_elsewhere(
    streams: int, options: dict[str, Any], on_disk: bool, tmp_path: Path
) -> None:
    if not (on_disk or options):
        pytest.skip("all are at hand")
    path = tmp_path / "store" if on_disk else None
    store = make(streams, path=path, **options)
    append(store, *[40] * streams)
    if path is not None:
        store.commit()
        store.close()
        store = MemoryStore.open(path, mode="r")
    assert store.layer(0).at_hand(torch.zeros(streams, dtype=torch.int64)) is None


def test_not_where_rows_have_positions_of_their_own() -> None:
    """Whose followers may have left."""
    store, none = make(1, capacity=8, eviction="every_nth", keep_every=2), torch.tensor([0])
    append(store, 8)
    assert store.layer(0).at_hand(none) is not None
    append(store, 1)
    assert store.layer(0).at_hand(none) is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="rows on a GPU are known by where they are")
def test_not_where_streams_of_a_cpu_lie_apart() -> None:
    store = make(2)
    append(store, 4, 3)
    layer = store.layer(0)
    assert layer.at_hand(torch.zeros(2, dtype=torch.int64)) is None
