"""The rows of all streams of a layer in one block, so that one operation serves them all.

Shapes: b streams, d dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xlroute.kernels import gather_rows
from xlroute.memory.buffer import Block, Buffer, Rows, RowSpan
from xlroute.memory.to_device import to_device

# Bytes of a block: for moments there are two of them, and streams by themselves move singly.
_LARGEST = 4 << 30


class SideBySide:
    """The rows of all streams of a layer in one block.

    Args:
        block: Theirs.
        starts: The place of each stream's oldest row.
        stops: The place behind its newest.
    """

    def __init__(self, block: Block, starts: list[int], stops: list[int]) -> None:
        self._block = block
        self._starts = starts
        self._stops = stops

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
        return cls(block, [each.start for each in spans], [each.stop for each in spans])

    @property
    def columns(self) -> Tensor:
        """All places that hold rows of some stream, [b, c, d], without a copy.

        In those where a stream has no row there is one that it had, or zeros.
        """
        return self._block.data[:, min(self._starts) : max(self._stops)]

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
        return self._block.data[:, self._stops[0] - counts[0] : self._stops[0]]

    def take(self, indices: Tensor) -> Tensor | None:
        """Copies of the rows at indices [b, ...], each in [-1, m_i), [b, ..., d]; zeros where it is -1.

        None while a CUDA graph is captured that could not learn where streams begin that do so apart.
        """
        data, starts = self._block.data, self._starts
        if len({*starts}) == 1:
            return gather_rows(data[:, starts[0] :], indices)
        if indices.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        begins = to_device(torch.tensor(starts), indices.device).view(-1, *[1] * (indices.ndim - 1))
        return gather_rows(data, torch.where(indices < 0, indices, indices + begins))


def grown(streams: Sequence[Rows], rows: Tensor, counts: Sequence[int]) -> list[Rows] | None:
    """All streams of a layer, followed by the first of the rows [b, n, d], as many as `counts` says of each.

    They are in one block from when the first of them needs a new place on, each stream's newest in the same
    place. Streams that hold nothing go along with the others.

    Returns:
        The streams; None if they go on by themselves, since they are not in memory of their own, or not of
        like lengths, or large.
    """
    spans = _spans(streams)
    if spans is None or len(spans) == 1 or spans[0].buffer.block.pinned:
        return None
    n = max(counts)
    if any(count not in (0, n) for count in counts):
        return None
    rows = rows[:, :n]
    at = _common_place(spans, n, counts)
    if at is None:
        if all(span.has_room(count) for span, count in zip(spans, counts, strict=True) if count):
            return None
        moved = _moved(spans, n, counts)
        if moved is None:
            return None
        spans, at = moved
    block, going = spans[0].buffer.block, [i for i, count in enumerate(counts) if count]
    with torch.no_grad():
        if len(going) == len(spans):
            block.target[:, at : at + n].copy_(rows)
        else:
            chosen = to_device(torch.tensor(going), rows.device)
            block.target[chosen, at : at + n] = rows[chosen]
    result: list[Rows] = []
    for span, count in zip(spans, counts, strict=True):
        buffer = span.buffer
        if not len(span):
            span = RowSpan(buffer, at, at)
        if count:
            end = buffer.number + at
            buffer.scores = buffer.scores.extended(end, end + count)
            buffer.used = at + count
            span = RowSpan(buffer, span.start, at + count)
        result.append(span)
    return result


def bytes_left_behind(streams: Sequence[Rows]) -> int:
    """Bytes of blocks that streams are in, in the places of others that are in them no more."""
    buffers = [rows.buffer for rows in streams if isinstance(rows, RowSpan)]
    blocks = {id(buffer.block): buffer.block.data for buffer in buffers}
    return sum(data.nbytes for data in blocks.values()) - sum(buffer.data.nbytes for buffer in buffers)


def _spans(streams: Sequence[Rows]) -> list[RowSpan] | None:
    spans = [rows for rows in streams if isinstance(rows, RowSpan)]
    return spans if len(spans) == len(streams) else None


def _common_place(spans: Sequence[RowSpan], n: int, counts: Sequence[int]) -> int | None:
    """Where in their block the next n rows go, of streams that get some; None if there is no such place."""
    if SideBySide.of(spans) is None:
        return None
    at = max(span.stop for span in spans)
    if at + n > spans[0].buffer.block.data.shape[1]:
        return None
    for span, count in zip(spans, counts, strict=True):
        follows = span.stop == at or not len(span)
        if count and not (follows and span.buffer.used <= at):
            return None
    return at


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
            buffer.used = live
            result.append(RowSpan(buffer, start, live))
    return result, live
