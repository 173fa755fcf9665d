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


class _Buffer:
    """Room for rows, [size, d]; the first `used` of them belong to some span and are never written again."""

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype, device: torch.device, pinned: bool = False
    ) -> None:
        self.pinned = pinned
        # A tensor made in inference mode could not be saved for backward later.
        with torch.inference_mode(False):
            self.data = torch.empty(size, dim, dtype=dtype, device=device, pin_memory=pinned)
            # An alias with a version counter of its own. Writing through `data`, or through `data.detach()`,
            # would raise the counter that all views of `data` share, and autograd would then refuse to run
            # backward over rows that it saved, although the write is beyond all of them.
            self.target = self.data.data
        self.used = 0
        self.scores = StoredScores(dtype, device)
        self.number = 0  # of the first row, as the scores count


class RowSpan:
    """Rows `start` to `stop` of a buffer: immutable, and cheap to keep."""

    def __init__(self, buffer: _Buffer, start: int, stop: int) -> None:
        self._buffer = buffer
        self._start = start
        self._stop = stop

    @classmethod
    def empty(
        cls, dim: int, dtype: torch.dtype, device: torch.device, *, room: int = 0, pinned: bool = False
    ) -> RowSpan:
        """A span of no rows, with room for `room` rows to come; in memory that a GPU reads fast if pinned."""
        return cls(_Buffer(room, dim, dtype, device, pinned), 0, 0)

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, with its room for rows to come, and of the scores beside it."""
        return self._buffer.data.nbytes + self._buffer.scores.nbytes

    def span(self) -> RowSpan:
        """The span itself."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._buffer.data.device

    def alike(self, room: int) -> RowSpan:
        """A span of no rows of the same kind, with room for `room` rows to come."""
        data = self._buffer.data
        return RowSpan.empty(data.shape[1], data.dtype, data.device, room=room, pinned=self._buffer.pinned)

    def anew(self, log: StreamLog, room: int, stored: StoredScores) -> RowSpan:
        """See `Rows`."""
        span = self.alike(room)
        span._buffer.scores, span._buffer.number = stored, log.end
        return span

    def at_hand(self) -> Tensor | None:
        """See `Rows`."""
        return None if self._buffer.pinned else self.view()

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """See `Rows`."""
        for first in range(start, stop, _BLOCK_ROWS):
            yield self.view()[first : min(stop, first + _BLOCK_ROWS)]

    def view(self) -> Tensor:
        """The rows, [m, d], without a copy. Reading only: the memory is shared."""
        return self._buffer.data[self._start : self._stop]

    def gather(self, index: Tensor) -> Tensor:
        """Copies of the rows at `index` (int64 [k]), [k, d]; zeros where it is -1.

        Of rows in pinned memory, they are on the device of the index.
        """
        if self._buffer.pinned and index.is_cuda:
            return gather_pinned_rows(self.view(), index)
        return gather_rows(self.view()[None], index.to(self.device)[None])[0]

    def prefetch(self, index: Tensor) -> None:
        """They are there."""

    def scores(self, scoring: Scoring, keep: bool = True) -> Tensor:
        """See `Rows`."""
        if not keep or scoring.differentiated:
            return scoring.of(self.view())
        rows, number = self._buffer.target, self._buffer.number

        def read(start: int, stop: int) -> tuple[Tensor]:
            return (rows[start - number : stop - number],)

        return self._buffer.scores.of(number + self._start, number + self._stop, scoring, read)

    def kept_scores(self) -> KeptScores | None:
        """See `Rows`."""
        number = self._buffer.number
        return self._buffer.scores.kept(number + self._start, number + self._stop)

    def dropped(self, count: int) -> RowSpan:
        """The span without its `count` oldest rows."""
        return RowSpan(self._buffer, self._start + count, self._stop)

    def appended(self, rows: Tensor) -> RowSpan:
        """The span followed by `rows` [n, d].

        The rows go into the same buffer where this span is the last to have written there and they fit;
        otherwise (the buffer is full, or a fork has taken the place) into a new one twice as large as needed,
        so that a row is copied a constant number of times on average. Scores stay, whichever it is.
        """
        count = rows.shape[0]
        buffer, start, stop = self._buffer, self._start, self._stop
        end = buffer.number + stop
        stored = buffer.scores.extended(end, end + count)
        if buffer.used != stop or stop + count > buffer.data.shape[0]:
            live = len(self)
            old = buffer.data[start:stop]
            buffer = _Buffer(2 * (live + count), old.shape[1], old.dtype, old.device, buffer.pinned)
            buffer.number = end - live
            start, stop = 0, live
            with torch.no_grad():
                buffer.target[:live].copy_(old)
        with torch.no_grad():
            buffer.target[stop : stop + count].copy_(rows)
        buffer.used = stop + count
        buffer.scores = stored
        return RowSpan(buffer, start, stop + count)
