"""What the writers of benchmarks/crash.py do, step by step, and what a store must hold after each step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import Eviction, MemoryStore, scores, shards

LAYERS, STREAMS, DIM, CAPACITY, CHUNK_ROWS = 2, 2, 4, 40, 16
KEEP_EVERY = 3
MOST = 9  # rows that a stream appends at once
HOW: dict[str, Any] = {"normalize": "rms", "scale": 0.5}
# Few enough for their scores to be dropped, and written again, again and again.
TOKENS = [torch.randn(2, DIM, generator=torch.Generator().manual_seed(number)) for number in range(3)]


@dataclass(frozen=True)
class Step:
    """What is done to a store between two numbers; it follows from the first number alone.

    Attributes:
        reset: streams whose documents have ended.
        states: rows, [l, b, n, d].
        lengths: how many of them each stream appends.
        scored: which of `TOKENS` all layers are scored with, or None.
        commits: whether a commit ends the step.
        durable: whether that one is durable.
        compacts: how the last commit is compacted at the end: "plain", "zstd", or not.
    """

    reset: list[int]
    states: Tensor
    lengths: list[int]
    scored: int | None
    commits: bool
    durable: bool
    compacts: Literal["plain", "zstd"] | None

    @classmethod
    def of(cls, seed: int, number: int) -> Step:
        """The step that follows on the number."""
        chance = random.Random(seed << 40 | number)
        states = torch.randn(
            LAYERS, STREAMS, MOST, DIM, generator=torch.Generator().manual_seed(chance.getrandbits(60))
        )
        return cls(
            reset=[stream for stream in range(STREAMS) if chance.random() < 0.15],
            states=states,
            lengths=[chance.randint(0, MOST) for _ in range(STREAMS)],
            scored=tokens_of(number) if chance.random() < 0.7 else None,
            commits=chance.random() < 0.4,
            durable=chance.random() < 0.3,
            compacts=chance.choice(["plain", "zstd"]) if chance.random() < 0.15 else None,
        )

    def take(self, store: MemoryStore, number: int) -> Iterator[Made]:
        """Does it to a store that stands at the number, bit by bit; tells of each commit that was made."""
        if self.reset:
            store.reset(self.reset)
        if store.eviction == "lowest_score":
            # As a model does. What was scored before the store was opened need not be on disk.
            scores_of(store, tokens_of(number))
        store.append(self.states, self.lengths)
        if self.scored is not None:
            scores_of(store, self.scored)
        if self.commits:
            store.fingerprint = str(number + 1)
            yield Made(store.commit(durable=self.durable), number + 1, self.durable)
        if self.compacts is not None:
            report = store.compact(compression=None if self.compacts == "plain" else "zstd")
            if report.commit is not None:
                # It holds what the commit before it holds, wherever the store stands.
                yield Made(report.commit, number_of(store), durable=True)


class Made(NamedTuple):
    """A commit that was made: its id, the number that it is at, and whether it is durable."""

    commit: str
    number: int
    durable: bool


def create(path: Path, *, keep_commits: int, eviction: Eviction = "oldest") -> str:
    """Makes the store that the steps are for, at number 0; returns the id of its commit."""
    with MemoryStore.create(
        path,
        layers=LAYERS,
        streams=STREAMS,
        dim=DIM,
        capacity=CAPACITY,
        fingerprint="0",
        chunk_bytes=CHUNK_ROWS * DIM * 4,
        keep_commits=keep_commits,
        eviction=eviction,
        keep_every=KEEP_EVERY if eviction == "every_nth" else None,
    ) as store:
        return store.commits()[0]


def prepare() -> None:
    """Readies this process, and those that it forks, for steps and checks."""
    # So few rows would nearly all be scored again, before the scores on disk are used.
    scores._SAMPLES = 1
    # Inner chunks of 7 rows and shards of two chunks.
    shards._INNER_BYTES = 7 * DIM * 4
    shards._SHARD_BYTES = 2 * LAYERS * CHUNK_ROWS * DIM * 4
    # Imports what the first score needs, so that no forked process does it for itself.
    row_scores(torch.ones(1, DIM), TOKENS[0], **HOW)


def tokens_of(number: int) -> int:
    """Which of `TOKENS` the step that follows on the number scores with, if it does."""
    return number // 5 % len(TOKENS)


def number_of(store: MemoryStore) -> int:
    """The number that a store stands at."""
    return int(store.fingerprint or 0)


def scores_of(store: MemoryStore, tokens: int) -> list[Tensor]:
    """The scores of all layers against one of `TOKENS`."""
    with torch.no_grad():
        return [store.layer(layer).scores(TOKENS[tokens], **HOW) for layer in range(store.layers)]


@dataclass(frozen=True)
class Contents:
    """What a store holds at a number.

    Attributes:
        number: the number.
        eviction: which rows leave first.
        rows: for every stream its rows, [l, m, d], oldest first.
        positions: their positions.
        appended: how many rows each stream has appended since its reset.
    """

    number: int = 0
    eviction: Eviction = "oldest"
    rows: list[Tensor] = field(default_factory=lambda: [torch.empty(LAYERS, 0, DIM)] * STREAMS)
    positions: list[list[int]] = field(default_factory=lambda: [[]] * STREAMS)
    appended: list[int] = field(default_factory=lambda: [0] * STREAMS)

    def after(self, step: Step) -> Contents:
        """What it holds after a step."""
        contents = replace(
            self,
            number=self.number + 1,
            rows=[*self.rows],
            positions=[*self.positions],
            appended=[*self.appended],
        )
        for stream in range(STREAMS):
            contents._take(step, stream)
        return contents

    def _take(self, step: Step, stream: int) -> None:
        """Does to a stream what a step does, row by row, in place."""
        rows, positions, appended = self.rows[stream], self.positions[stream], self.appended[stream]
        if stream in step.reset:
            rows, positions, appended = rows[:, :0], [], 0
        tokens = TOKENS[tokens_of(self.number - 1)]
        scored = [row_scores(each, tokens, **HOW).amax(0).tolist() for each in rows]
        for row in step.states[:, stream, : step.lengths[stream]].unbind(1):
            if len(positions) == CAPACITY:
                left = self._left(positions, scored)
                rows, positions = rows[:, left], [positions[index] for index in left]
                scored = [[each[index] for index in left if index < len(each)] for each in scored]
            rows, positions = torch.cat([rows, row[:, None]], dim=1), [*positions, appended]
            appended += 1
        self.rows[stream], self.positions[stream], self.appended[stream] = rows, positions, appended

    def _left(self, positions: list[int], scored: list[list[float]]) -> list[int]:
        """Which rows of a full stream are left when another one comes."""

        def worth(index: int) -> tuple[int, int]:
            if self.eviction == "every_nth":
                return positions[index] % KEEP_EVERY == 0, index
            if self.eviction == "oldest" or index >= len(scored[0]):
                return LAYERS * CAPACITY, index
            return sum(sum(each < of[index] for each in of) for of in scored), index

        leaving = 1 if self.eviction == "oldest" else CAPACITY // 4
        return sorted(sorted(range(len(positions)), key=worth)[leaving:])

    def check(self, store: MemoryStore) -> None:
        """Compares everything that can be read of a store with it.

        Raises:
            WrongError: It holds something else.
        """
        for check in self.checks(store):
            check()

    def checks(self, store: MemoryStore) -> list[Callable[[], None]]:
        """The comparisons one by one: what is held, then of each layer single rows, scores, and all rows."""
        calls: list[Callable[[], None]] = [lambda: self._check_positions(store)]
        for layer in range(LAYERS):
            calls += [
                # Before all rows are in memory: from there on nothing is read from disk.
                partial(self._check_picked, store, layer),
                partial(self._check_scores, store, layer),
                partial(self._check_rows, store, layer),
            ]
        return calls

    def _lengths(self) -> list[int]:
        return [rows.shape[1] for rows in self.rows]

    def _indices(self) -> Tensor:
        """All rows, from the newest to the oldest, and one that does not exist."""
        lengths = self._lengths()
        indices = torch.full((STREAMS, max(lengths) + 1), -1)
        for stream, length in enumerate(lengths):
            indices[stream, :length] = torch.arange(length).flip(0)
        return indices

    def _check_positions(self, store: MemoryStore) -> None:
        indices = self._indices()
        expect("lengths", store.lengths, torch.tensor(self._lengths()), self.number)
        positions = torch.full_like(indices, -1)
        for stream, held in enumerate(self.positions):
            positions[stream, : len(held)] = torch.tensor(held, dtype=torch.int64).flip(0)
        expect("positions", store.positions(indices), positions, self.number)

    def _check_picked(self, store: MemoryStore, layer: int) -> None:
        picked = store.gather(layer, self._indices())
        for stream, rows in enumerate(self.rows):
            expected = rows[layer].flip(0)
            given = picked[stream, : len(expected)]
            expect(f"picked rows of layer {layer}, stream {stream}", given, expected, self.number)

    def _check_rows(self, store: MemoryStore, layer: int) -> None:
        found = store.rows(layer)[0]
        for stream, rows in enumerate(self.rows):
            given = found[stream, : rows.shape[1]]
            expect(f"rows of layer {layer}, stream {stream}", given, rows[layer], self.number)

    def _check_scores(self, store: MemoryStore, layer: int) -> None:
        """Scores of the tokens that a commit at this number most likely has on disk."""
        tokens = TOKENS[tokens_of(self.number - 1)]
        with torch.no_grad():
            found = store.layer(layer).scores(tokens, **HOW)
            for stream, rows in enumerate(self.rows):
                given = found[stream, :, : rows.shape[1]]
                expected = row_scores(rows[layer], tokens, **HOW)
                expect(f"scores of layer {layer}, stream {stream}", given, expected, self.number)

    def check_some(self, store: MemoryStore) -> None:
        """Compares the rows that a repair has left with those that were held at their positions.

        Raises:
            WrongError: Others are held.
        """
        for stream, length in enumerate(store.lengths.tolist()):
            if not length:
                continue
            indices = torch.full((STREAMS, length), -1)
            indices[stream] = torch.arange(length)
            positions = store.positions(indices)[stream].tolist()
            if not {*positions} <= {*self.positions[stream]}:
                raise WrongError(
                    f"positions left of stream {stream} at number {self.number}: expected some of "
                    f"{self.positions[stream]}, got {positions}"
                )
            held = [self.positions[stream].index(position) for position in positions]
            for layer in range(LAYERS):
                given = store.rows(layer)[0][stream, :length]
                expected = self.rows[stream][layer, held]
                expect(f"rows left of layer {layer}, stream {stream}", given, expected, self.number)


class WrongError(Exception):
    """A store is not what it must be."""


def expect(what: str, given: Tensor, expected: Tensor, number: int) -> None:
    """Raises WrongError unless both are the same, bit for bit."""
    if not torch.equal(given, expected):
        raise WrongError(f"{what} at number {number}: expected {expected}, got {given}")


class History:
    """What a store holds at any number, computed step by step and kept from some number on."""

    def __init__(self, seed: int, eviction: Eviction = "oldest") -> None:
        self._seed = seed
        self._known = {0: Contents(eviction=eviction)}

    def at(self, number: int) -> Contents:
        """What a store holds at the number."""
        last = max(self._known)
        while last < number:
            self._known[last + 1] = self._known[last].after(Step.of(self._seed, last))
            last += 1
        return self._known[number]

    def forget(self, number: int) -> None:
        """Forgets what is before the number."""
        self._known = {each: held for each, held in self._known.items() if each >= number}
