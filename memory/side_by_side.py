"""The rows of all streams of a layer in one block, so that one operation serves them all.

Shapes: b streams, d dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from xlroute.kernels import gather_rows
from xlroute.memory.buffer import Block, Buffer, Rows, RowSpan
from xlroute.memory.to_device import integers

# Bytes of a block: for moments there are two of them, and streams by themselves move singly.
_LARGEST = 4 << 30


class SideBySide:
    """The rows of all streams of a layer in one block.

    Args:
        spans: Theirs, in the order of their places in the block.
    """

    def __init__(self, spans: list[RowSpan]) -> None:
        self.spans = spans
        self._block = spans[0].buffer.block
        self._starts = [each.start for each in spans]
        self._stops = [each.stop for each in spans]

    @classmethod
    def of(cls, streams: Sequence[Rows]) -> SideBySide | None:
        """The rows of streams; None where they are not in one block."""
        spans = _spans(streams)
        if spans is None or len(spans) == 1:
            return None
        block = spans[0].buffer.block
        if block.pinned or any(
            each.buffer.block is not block or each.buffer.place != i for i, each in enumerate(spans)
        ):
            return None
        return cls(spans)

    @property
    def columns(self) -> Tensor:
        """All places that hold rows of some stream, [b, c, d], without a copy.

        In those where a stream has no row there is one that it had, or zeros.
        """
        first = min(self._starts)
        return self._block.data.narrow(1, first, max(self._stops) - first)

    @property
    def begins(self) -> list[int]:
        """The column of each stream's oldest row."""
        first = min(self._starts)
        return [start - first for start in self._starts]

    def addresses(self) -> list[int]:
        """Where the oldest row of each stream is in memory."""
        data = self._block.data
        stream, row = (data.itemsize * data.stride(i) for i in range(2))
        return [data.data_ptr() + i * stream + start * row for i, start in enumerate(self._starts)]

    def newest(self, counts: Sequence[int]) -> Tensor | None:
        """The newest rows of all streams, [b, n, d], without a copy; None if they are not side by side."""
        if len({*self._stops}) > 1 or len({*counts}) > 1:
            return None
        return self._block.data.narrow(1, self._stops[0] - counts[0], counts[0])

    def next_place(self, n: int, counts: Sequence[int], excess: Sequence[int]) -> int | None:
        """Where in the block the next n rows go, of streams that get some; None if there is no such place.

        Args:
            n: How many.
            counts: How many each stream gets.
            excess: How many of its oldest rows each stream drops before.
        """
        at, used = max(self._stops), self._block.used
        if at + n > self._block.data.shape[1]:
            return None
        if min(self._stops) == at and max(used) <= at:
            return at
        for i, (start, stop) in enumerate(zip(self._starts, self._stops, strict=True)):
            if counts[i] and (used[i] > at or (stop != at and start + excess[i] != stop)):
                return None
        return at

    def take(self, indices: Tensor) -> Tensor | None:
        """Copies of the rows at indices [b, ...], each in [-1, m_i), [b, ..., d]; zeros where it is -1.

        None while a CUDA graph is captured that could not learn where streams begin that do so apart.
        """
        data, starts = self._block.data, self._starts
        if len({*starts}) == 1:
            return gather_rows(data[:, starts[0] :], indices)
        if indices.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        begins = integers(starts, indices.device).view(-1, *[1] * (indices.ndim - 1))
        return gather_rows(data, torch.where(indices < 0, indices, indices + begins))


class Streams(tuple[Rows, ...]):
    """The rows of each stream of a layer, at one moment."""

    @cached_property
    def side_by_side(self) -> SideBySide | None:
        """The rows of all streams, where they are in one block."""
        return SideBySide.of(self)


def grown(streams: Streams, rows: Tensor, counts: Sequence[int], excess: Sequence[int]) -> Streams | None:
    """All streams of a layer without their oldest rows, followed by the first of the rows [b, n, d].

    They are in one block from when the first of them needs a new place on, each stream's newest in the same
    place. Streams that hold nothing go along with the others.

    Args:
        streams: They.
        rows: What follows, without gradient, in any type.
        counts: How many of these rows each stream gets.
        excess: How many of its oldest rows each of them drops.

    Returns:
        The streams; None if they go on by themselves, since they are not in memory of their own, or not of
        like lengths, or large.
    """
    together, n = streams.side_by_side, max(counts)
    spans = _spans(streams) if together is None else together.spans
    if spans is None or len(spans) == 1 or spans[0].buffer.block.pinned:
        return None
    if not {*counts} <= {0, n}:
        return None
    at = None if together is None else together.next_place(n, counts, excess)
    if at is None:
        spans = [span.dropped(left) if left else span for span, left in zip(spans, excess, strict=True)]
        if all(span.has_room(count) for span, count in zip(spans, counts, strict=True) if count):
            return None
        moved = _moved(spans, n, counts)
        if moved is None:
            return None
        spans, at = moved
        excess = [0] * len(spans)
    block = spans[0].buffer.block
    target = block.target.narrow(1, at, n)
    if n < rows.shape[1]:
        rows = rows[:, :n]
    if all(counts):
        target.copy_(rows)
    else:
        chosen = integers([i for i, count in enumerate(counts) if count], rows.device)
        target[chosen] = rows[chosen].to(target.dtype)
    result = []
    for span, count, left in zip(spans, counts, excess, strict=True):
        buffer, start, stop = span.buffer, span.start + left, span.stop
        if start == stop:
            start = stop = at
        if count:
            end = buffer.number + at
            buffer.scores = buffer.scores.extended(end, end + count)
            stop = at + count
            block.used[buffer.place] = stop
        result.append(RowSpan(buffer, start, stop))
    after = Streams(result)
    after.side_by_side = SideBySide(result)
    return after


def bytes_left_behind(streams: Sequence[Rows]) -> int:
    """Bytes of blocks that streams are in, in the places of others that are in them no more."""
    buffers = [rows.buffer for rows in streams if isinstance(rows, RowSpan)]
    blocks = {id(buffer.block): buffer.block.data for buffer in buffers}
    return sum(data.nbytes for data in blocks.values()) - sum(buffer.data.nbytes for buffer in buffers)


def _spans(streams: Sequence[Rows]) -> list[RowSpan] | None:
    spans = [rows for rows in streams if isinstance(rows, RowSpan)]
    return spans if len(spans) == len(streams) else None


def _moved(spans: Sequence[RowSpan], n: int, counts: Sequence[int]) -> tuple[list[RowSpan], int] | None:
    """The streams in a new block with twice the room that the longest needs, and where all of them stop.

    None if the block were too large, or more than twice as large as what streams need by themselves.
    """
    b, live, old = len(spans), max(map(len, spans)), spans[0].buffer.data
    size = 2 * (live + n)
    wasted = b * (live + n) > 2 * (sum(map(len, spans)) + sum(counts))
    if wasted or b * size * old.shape[1] * old.dtype.itemsize > _LARGEST:
        return None
    block = Block(b, size, old.shape[1], old.dtype, old.device)
    result = []
    with torch.no_grad():
        for i, span in enumerate(spans):
            start = live - len(span)
            number = span.buffer.number + span.stop - live
            buffer = Buffer(block, i, span.buffer.scores, number)
            buffer.target[start:live].copy_(span.view())
            block.used[i] = live
            result.append(RowSpan(buffer, start, live))
    return result, live
