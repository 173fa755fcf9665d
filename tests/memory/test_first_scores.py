"""Scores and keys that a row keeps from the first call that found it, whatever tokens come later."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import MemoryStore
from xlroute.memory.routing_keys import routing_keys

HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.3}
DIM = 6
ROW = DIM * 8
SIZES: dict[str, Any] = {"layers": 1, "streams": 2, "dim": DIM, "dtype": torch.float64}
# A budget of five rows on the device.
PLACES: dict[str, dict[str, Any]] = {
    "memory": {"path": None},
    "disk": {"path": "s"},
    "host and device": {"path": None, "device_bytes": 20 * ROW},
    "disk and device": {"path": "s", "device_bytes": 20 * ROW},
}


class Model:
    """What each row of a stream got first, scores [r] and keys [r, e], and how many rows had come by then."""

    def __init__(self) -> None:
        self.streams: list[list[dict[str, Any]]] = [[], []]
        self.appended = [0, 0]

    def copy(self) -> Model:
        copy = Model()
        copy.streams = [[dict(row) for row in rows] for rows in self.streams]
        copy.appended = list(self.appended)
        return copy

    def append(self, stream: int, rows: Tensor, capacity: int) -> None:
        self.streams[stream] = [*self.streams[stream], *({"row": row} for row in rows)][-capacity:]
        self.appended[stream] += len(rows)

    def check(self, store: MemoryStore, tokens: Tensor, projection: Tensor) -> None:
        layer = store.layer(0)
        found_scores = layer.scores(tokens, keep="first", **HOW)
        found_keys = layer.keys(projection, keep="first")
        indices = torch.arange(layer.shape[1]).expand(2, -1).masked_fill(~layer.mask, -1)[..., None]
        ages = [layer.score_ages(indices, kind)[..., 0] for kind in ("first scores", "first keys")]
        for stream, rows in enumerate(self.streams):
            assert len(rows) == layer.lengths[stream]
            for i, row in enumerate(rows):
                if "scores" not in row:
                    row["scores"] = row_scores(row["row"][None], tokens, **HOW)[:, 0]
                    row["keys"] = routing_keys(row["row"], projection)
                    row["appended"] = self.appended[stream]
                assert torch.equal(found_scores[stream, :, i], row["scores"])
                torch.testing.assert_close(found_keys.of_stream(stream)[:, i], row["keys"])
                assert all(each[stream, i] == self.appended[stream] - row["appended"] for each in ages)
            assert all((each[stream, len(rows) :] == -1).all() for each in ages)


@pytest.mark.parametrize("place", PLACES)
def test_a_row_keeps_what_it_got_first(place: str, tmp_path: Path) -> None:
    options = {**PLACES[place]}
    if options["path"] is not None:
        options["path"] = tmp_path / options["path"]
    store, model = MemoryStore.create(**SIZES, **options, capacity=13), Model()
    forks: list[tuple[MemoryStore, Model]] = []
    tokens, projection = torch.randn(2, DIM).double(), torch.randn(2, 4, DIM).double()
    for step in range(25):
        states = torch.randn(1, 2, 6, DIM, dtype=torch.float64)
        lengths = [random.randint(0, 6), random.randint(0, 6)]
        for each, known in [(store, model), *forks]:
            each.append(states, lengths)
            for stream, length in enumerate(lengths):
                known.append(stream, states[0, stream, :length], 13)
            # Rows may wait for more than one append.
            if random.random() < 0.7:
                known.check(each, tokens + step, projection - step)
            states = states + 1  # forks go on with other rows
        if step % 9 == 5:
            store.reset([step % 2])
            model.streams[step % 2], model.appended[step % 2] = [], 0
        if step % 9 == 8:
            # Rows that were not scored before both go on are scored by each for itself.
            model.check(store, tokens + step, projection - step)
            forks = [*forks[-1:], (store.fork(), model.copy())]
    # Scores of the tokens of now stand beside them.
    layer = store.layer(0)
    rows, mask = store.rows(0)
    expected = row_scores(rows, tokens, **HOW).masked_fill(~mask[:, None], 0)
    assert torch.equal(layer.scores(tokens, **HOW), expected)
    model.check(store, tokens, projection)


@pytest.mark.parametrize("place", ["memory", "disk", "disk and device"])
def test_whoever_opens_a_store_scores_all_rows_anew_and_once(
    place: str, tmp_path: Path, scored: list[int]
) -> None:
    budget = {name: value for name, value in PLACES[place].items() if name != "path"}
    first, later = torch.randn(2, 3, DIM, dtype=torch.float64)
    store = MemoryStore.create(tmp_path / "s", **SIZES, **budget)
    store.append(torch.randn(1, 2, 9, DIM))
    store.layer(0).scores(first, keep="first", **HOW)
    store.commit()
    store.close()
    with MemoryStore.open(tmp_path / "s", mode="r+", **budget) as store:
        scored.clear()
        held = store.layer(0).scores(later, keep="first", **HOW)
        rows, _ = store.rows(0)
        assert torch.equal(held, row_scores(rows, later, **HOW))
        store.append(torch.randn(1, 2, 4, DIM))
        assert torch.equal(store.layer(0).scores(first, keep="first", **HOW)[:, :, :9], held)
        assert scored == [18, 8]  # what is new of both streams at once


def test_rows_as_they_stood_before_have_the_same() -> None:
    store = MemoryStore.create(**SIZES, capacity=9)
    store.append(torch.randn(1, 2, 9, DIM))
    first, later = torch.randn(2, 3, DIM, dtype=torch.float64)
    before = store.layer(0)
    held = before.scores(first, keep="first", **HOW)
    store.append(torch.randn(1, 2, 2, DIM))
    now = store.layer(0).scores(later, keep="first", **HOW)
    assert torch.equal(now[:, :, :7], held[:, :, 2:])
    assert torch.equal(before.scores(later, keep="first", **HOW), held)
    assert torch.equal(store.layer(0).scores(first, keep="first", **HOW), now)


def test_they_can_be_let_go_of(scored: list[int]) -> None:
    store = MemoryStore.create(**SIZES)
    store.append(torch.randn(1, 2, 9, DIM))
    first, later, now = torch.randn(3, 2, DIM, dtype=torch.float64)
    store.layer(0).scores(first, keep="first", **HOW)
    kept = store.layer(0).scores(now, **HOW)
    store.forget_first_scores()
    scored.clear()
    anew = store.layer(0).scores(later, keep="first", **HOW)
    assert torch.equal(store.layer(0).scores(now, **HOW), kept)
    assert scored == [18]
    assert torch.equal(anew, row_scores(store.rows(0)[0], later, **HOW))


@pytest.mark.parametrize("policy", [{"eviction": "every_nth", "keep_every": 3}, {"eviction": "lowest_score"}])
def test_rows_that_are_written_anew_are_scored_anew(policy: dict[str, Any]) -> None:
    """Before that, by their first scores the lowest leave."""
    store = MemoryStore.create(**{**SIZES, "streams": 1}, capacity=12, **policy)
    for _ in range(4):
        store.append(torch.randn(1, 1, 3, DIM))
        first = store.layer(0).scores(torch.randn(2, DIM).double(), keep="first", **HOW)[0].amax(0)
    before = store.rows(0)[0][0]
    store.append(torch.randn(1, 1, 1, DIM))
    after, now = store.rows(0)[0], torch.randn(2, DIM).double()
    layer = store.layer(0)
    assert torch.equal(layer.scores(now, keep="first", **HOW), row_scores(after, now, **HOW))
    assert (layer.score_ages(torch.arange(10)[None], "first scores") == 0).all()
    stays = (before[:, None] == after).all(-1).any(1)
    if policy["eviction"] == "lowest_score":
        assert sorted(first[~stays].tolist()) == sorted(first.tolist())[:3]
    else:
        assert (~stays).nonzero()[:, 0].tolist() == [1, 2, 4]


def test_first_scores_carry_no_gradient() -> None:
    store = MemoryStore.create(**SIZES)
    store.append(torch.randn(1, 2, 9, DIM))
    tokens = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    assert not store.layer(0).scores(tokens, keep="first", **HOW).requires_grad
