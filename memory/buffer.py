"""The rows of one layer and stream in memory: spans that never change, over a buffer that grows.

A `RowSpan` is a value. Appending and dropping return another span and leave the old one, and every view
taken from it, as they were. That makes snapshots and forks of a store free, and it is what autograd needs: it
may have saved a view of the rows for backward, long before the next rows come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from xlroute.kernels import gather_pinned_rows, gather_rows
from xlroute.memory.log import StreamLog
from xlroute.memory.scores import KeptScores, Scoring, StoredScores

_BLOCK_ROWS = 1 << 16  # of rows in memory that are handed on at once


def on_device(blocks: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Blocks [k, d] copied to a device; a GPU copies, and works on, one while the host reads the next."""
    for block in blocks:
        if device.type == "cuda" and block.device.type == "cpu":
            # Memory that PyTorch keeps for this, and hands out again once the copy is done.
            block = block.pin_memory()
        yield block.to(device, non_blocking=True)


class Rows(Protocol):
    """The rows that one stream holds in one layer, oldest first, wherever they are."""

    def __len__(self) -> int:
        """The number of rows."""

    @property
    def nbytes(self) -> int:
        """Bytes that they keep in memory."""

    def span(self) -> RowSpan:
        """All rows, in memory."""

    def at_hand(self) -> Tensor | None:
        """All rows, [m, d], without a copy; None if some are not on the store's device."""

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows `start` to `stop` in blocks [k, d], for reading only."""

    def gather(self, index: Tensor) -> Tensor:
        """Copies of the rows at `index` (int64 [k], each in [-1, len)), [k, d] on the store's device.

        Where the index is -1 the result is zeros.
        """

    def prefetch(self, index: Tensor) -> None:
        """Begins to fetch rows that will be gathered soon, where they are not in memory."""

    def dropped(self, count: int) -> Rows:
        """The rows without the `count` oldest ones."""

    def anew(self, log: StreamLog, room: int, stored: StoredScores) -> Rows:
        """No rows yet, in the same places, for those that are written anew.

        Args:
            log: What the stream holds: nothing.
            room: How many rows will come, where that has to be known.
            stored: Their scores, in the numbers of the log.
        """

    def scores(self, scoring: Scoring, keep: bool = True) -> Tensor:
        """Scores against routing tokens, [r, m], as from `row_scores`.

        Where no gradient is asked for they are kept, and only rows that are new since the last call are read;
        unless they are not to be kept.
        """

    def kept_scores(self) -> KeptScores | None:
        """The scores that are kept, if there are any."""


class Block:
    """Room for the rows of some streams side by side, [b, size, d]."""

    def __init__(
        self,
        streams: int,
        size: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        self.pinned = pinned
        # A tensor made in inference mode could not be saved for backward later.
        with torch.inference_mode(False):
            # Whatever reads all streams at once also reads places where some have no row.
            make = torch.empty if streams == 1 else torch.zeros
            self.data = make(streams, size, dim, dtype=dtype, device=device, pin_memory=pinned)
            # An alias with a version counter of its own. Writing through `data`, or through `data.detach()`,
            # would raise the counter that all views of `data` share, and autograd would then refuse to run
            # backward over rows that it saved, although the write is beyond all of them.
            self.target = self.data.data
        # Of each stream, the first so many places belong to some span and are never written again.
        self.used = [0] * streams


class Buffer:
    """Room for rows, [size, d]: the place of a stream in a block."""

    def __init__(self, block: Block, place: int, scores: StoredScores, number: int = 0) -> None:
        self.block = block
        self.place = place
        with torch.inference_mode(False):
            self.data = block.data[place]
            self.target = block.target[place]
        self.scores = scores
        self.number = number  # of the first row, as the scores count


class RowSpan:
    """Rows `start` to `stop` of a buffer: immutable, and cheap to keep."""

    def __init__(self, buffer: Buffer, start: int, stop: int) -> None:
        self.buffer = buffer
        self.start = start
        self.stop = stop

    @classmethod
    def empty(
        cls, dim: int, dtype: torch.dtype, device: torch.device, *, room: int = 0, pinned: bool = False
    ) -> RowSpan:
        """A span of no rows, with room for `room` rows to come; in memory that a GPU reads fast if pinned."""
        block = Block(1, room, dim, dtype, device, pinned)
        return cls(Buffer(block, 0, StoredScores(dtype, device)), 0, 0)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, with its room for rows to come, and of the scores beside it."""
        return self.buffer.data.nbytes + self.buffer.scores.nbytes

    def span(self) -> RowSpan:
        """The span itself."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.buffer.data.device

    def alike(self, room: int) -> RowSpan:
        """A span of no rows of the same kind, with room for `room` rows to come."""
        data = self.buffer.data
        return RowSpan.empty(
            data.shape[1], data.dtype, data.device, room=room, pinned=self.buffer.block.pinned
        )

    def anew(self, log: StreamLog, room: int, stored: StoredScores) -> RowSpan:
        """See `Rows`."""
        span = self.alike(room)
        span.buffer.scores, span.buffer.number = stored, log.end
        return span

    def at_hand(self) -> Tensor | None:
        """See `Rows`."""
        return None if self.buffer.block.pinned else self.view()

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """See `Rows`."""
        for first in range(start, stop, _BLOCK_ROWS):
            yield self.view()[first : min(stop, first + _BLOCK_ROWS)]

    def view(self) -> Tensor:
        """The rows, [m, d], without a copy. Reading only: the memory is shared."""
        return self.buffer.data[self.start : self.stop]

    def gather(self, index: Tensor) -> Tensor:
        """Copies of the rows at `index` (int64 [k]), [k, d]; zeros where it is -1.

        Of rows in pinned memory, they are on the device of the index.
        """
        if self.buffer.block.pinned and index.is_cuda:
            return gather_pinned_rows(self.view(), index)
        return gather_rows(self.view()[None], index.to(self.device)[None])[0]

    def prefetch(self, index: Tensor) -> None:
        """They are there."""

    def scores(self, scoring: Scoring, keep: bool = True) -> Tensor:
        """See `Rows`."""
        if not keep or scoring.differentiated:
            return scoring.of(self.view())
        rows, number = self.buffer.target, self.buffer.number

        def read(start: int, stop: int) -> tuple[Tensor]:
            return (rows[start - number : stop - number],)

        return self.buffer.scores.of(number + self.start, number + self.stop, scoring, read)

    def kept_scores(self) -> KeptScores | None:
        """See `Rows`."""
        number = self.buffer.number
        return self.buffer.scores.kept(number + self.start, number + self.stop)

    def dropped(self, count: int) -> RowSpan:
        """The span without its `count` oldest rows."""
        return RowSpan(self.buffer, self.start + count, self.stop)

    def has_room(self, count: int) -> bool:
        """Whether as many rows fit in behind the span, and no fork has taken their place."""
        block, place = self.buffer.block, self.buffer.place
        return block.used[place] <= self.stop <= block.data.shape[1] - count

    def appended(self, rows: Tensor) -> RowSpan:
        """The span followed by `rows` [n, d].

        The rows go into the same buffer where this span is the last to have written there and they fit;
        otherwise (the buffer is full, or a fork has taken the place) into a new one twice as large as needed,
        so that a row is copied a constant number of times on average. Scores stay, whichever it is.
        """
        count = rows.shape[0]
        buffer, start, stop = self.buffer, self.start, self.stop
        end = buffer.number + stop
        stored = buffer.scores.extended(end, end + count)
        if not self.has_room(count):
            live = len(self)
            old = buffer.data[start:stop]
            size, pinned = 2 * (live + count), buffer.block.pinned
            block = Block(1, size, old.shape[1], old.dtype, old.device, pinned)
            buffer = Buffer(block, 0, stored, end - live)
            start, stop = 0, live
            with torch.no_grad():
                buffer.target[:live].copy_(old)
        with torch.no_grad():
            buffer.target[stop : stop + count].copy_(rows)
        buffer.block.used[buffer.place] = stop + count
        buffer.scores = stored
        return RowSpan(buffer, start, stop + count)
