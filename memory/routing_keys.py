"""Routing keys: what a query is compared with to find a row, of all rows of a layer side by side.

Shapes: b streams, m rows of the longest, n queries, d dim, r sets of keys, e width of a key.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels import Backend, search_topk
from xlroute.kernels.arguments import compute_dtype
from xlroute.memory.buffer import Rows
from xlroute.memory.scores import Scoring
from xlroute.memory.to_device import to_device

_ROOM = 4  # in a buffer of keys, room for those to come: one for so many that there are
_SHORTEST = 1e-12  # a projection shorter than this has a key shorter than 1, as by F.normalize


def routing_keys(rows: Tensor, projection: Tensor) -> Tensor:
    """Projections of rows, of unit length; differentiable in both.

    Products are those of the rows' type, float32 for float16: for rows in bfloat16, the projection is rounded
    to that, and so are they, as keys that are kept.

    Args:
        rows: [..., d].
        projection: [r, e, d].

    Returns:
        [..., r, e], float32 unless the rows are float64, under autocast too.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(_products(rows, projection).to(compute_dtype(rows.dtype)), dim=-1)


def project(rows: Tensor, projection: Tensor, out: Tensor) -> None:
    """Writes the keys that `routing_keys` gives of rows [m, d] to `out` [r, m, e], without gradient."""
    with torch.autocast(rows.device.type, enabled=False):
        products = _products(rows, projection)
        lengths = torch.linalg.vector_norm(products, dim=-1, keepdim=True, dtype=compute_dtype(rows.dtype))
        torch.div(products, lengths.clamp_(min=_SHORTEST), out=out.transpose(0, 1))


def _products(rows: Tensor, projection: Tensor) -> Tensor:
    """Projections of rows, [..., r, e]."""
    if rows.dtype == torch.float16:
        rows = rows.float()  # the products of which could overflow
    # Their lengths will be 1: there is no need to divide rows by their root mean square.
    products = rows @ projection.flatten(0, 1).to(rows.dtype).mT
    return torch.unflatten(products, -1, projection.shape[:2])


class RoutingKeys:
    """The routing keys of all rows of a layer, for the search of the best.

    Args:
        keys: [b, r, c, e], out of a longer buffer or not. Those of a stream stand side by side in some of the
            c columns; the others mean nothing.
        begins: The column of each stream's oldest row.
        lengths: How many rows each stream holds.
    """

    def __init__(self, keys: Tensor, begins: Sequence[int], lengths: Sequence[int]) -> None:
        self.keys = keys
        self._begins = begins
        self._lengths = lengths

    def of_stream(self, stream: int) -> Tensor:
        """Those of one stream, [r, m_i, e], without a copy."""
        return self.keys[stream].narrow(1, self._begins[stream], self._lengths[stream])

    def search(self, queries: Tensor, k: int, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
        """The rows whose keys have the highest inner product with each query; see `search_topk`.

        Args:
            queries: [b, r, n, e], rounded to the type of the keys.
            k: How many.
            backend: As for `search_topk`.

        Returns:
            Scores [b, r, n, min(k, m)], and rows, int64; -inf and -1 where a stream has no more.
        """
        b, r = queries.shape[:2]
        k = min(k, max(self._lengths))
        scores, found = search_topk(
            queries.to(self.keys.dtype).flatten(0, 1),
            self.keys.flatten(0, 1),
            k,
            mask=self._mask,
            backend=backend,
        )
        scores, found = (torch.unflatten(t, 0, (b, r)) for t in (scores, found))
        if any(self._begins):
            found = torch.where(found < 0, -1, found - self._spans[0].view(-1, 1, 1, 1))
        return scores, found

    @cached_property
    def _spans(self) -> Tensor:
        """The columns of each stream, from the first to behind the last, int64 [2, b], on the device."""
        stops = [begin + length for begin, length in zip(self._begins, self._lengths, strict=True)]
        # As in `MemoryLayer`: a search in inference mode may not be the last one.
        with torch.inference_mode(False):
            return to_device(torch.tensor([self._begins, stops]), self.keys.device)

    @cached_property
    def _mask(self) -> Tensor | None:
        """Which columns hold keys of each stream and set, bool [b r, c]; None if all do."""
        _, r, columns, _ = self.keys.shape
        if min(self._lengths) == columns:
            return None
        with torch.inference_mode(False):
            column = torch.arange(columns, device=self.keys.device)
            first, stop = self._spans[..., None]
            mask: Tensor = (column >= first) & (column < stop)
            return mask.repeat_interleave(r, dim=0)


class _Held(NamedTuple):
    """Where the keys of a stream's rows are, from the oldest on.

    Attributes:
        numbering: What the rows are numbered in, see `Rows.numbered`.
        oldest: The number of the oldest one.
        begin: The column of its key.
        stop: The column behind the last key.
    """

    numbering: weakref.ref[object]
    oldest: int
    begin: int
    stop: int

    def of(self, rows: Rows) -> _Held | None:
        """Where those of other rows are, of the stream at another time; None if they are not here."""
        numbering, oldest = rows.numbered()
        begin = self.begin + oldest - self.oldest
        if numbering is not self.numbering() or not self.begin <= begin <= self.stop:
            return None
        return self._replace(oldest=oldest, begin=begin)


class _Buffer:
    """Room for keys, [b, r, size, e]; of each stream, the first `used` columns are never written again."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.data = torch.empty(shape, dtype=dtype, device=device)
        self.used = [0] * shape[0]


class KeptKeys:
    """The routing keys of a layer's rows, for as long as the projection stays the same.

    A call projects only rows that are new, and a row's key has the same bits whatever other rows it is
    projected with. It is rounded once, to the rows' type: the cosine of a key and a query in bfloat16 is off
    by 2^-8 at most. Keys of all streams are in one buffer, so that one search goes through them without a
    copy: each stream's side by side, the newest of all in one column, as long as the streams grow alike. What
    was handed out does not change.
    """

    def __init__(self, streams: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = _Buffer(streams, 0, 0, 0, dtype=dtype, device=device)
        self._held: list[_Held | None] = [None] * streams
        self._projection: Scoring | None = None  # a copy
        self._source: tuple[int, int] | None = None  # where it came from

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, with room for those to come."""
        return self._buffer.data.nbytes

    def fork(self) -> KeptKeys:
        """The same keys, for a layer that goes on by itself."""
        return copy.copy(self)

    def of(self, streams: Sequence[Rows], projection: Tensor) -> RoutingKeys | None:
        """The keys of rows, of which those that are new are projected.

        None while a CUDA graph is captured, in which nothing can be compared or kept, unless all keys are
        there and the projection is where it was.

        Args:
            streams: The rows of each stream.
            projection: [r, e, d], without gradient.

        Raises:
            CorruptionError: A row on disk is damaged.
        """
        # The products of a key are scores of its row.
        scoring = Scoring(projection.flatten(0, 1), normalize=None, scale=1.0, backend=None)
        capturing = projection.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self._keep_for(scoring, *projection.shape[:2])
        elif scoring.source != self._source:
            return None
        held = self._find(streams)
        new = [each.stop < each.begin + len(rows) for each, rows in zip(held, streams, strict=True)]
        if any(new):
            if capturing:
                return None
            if not self._has_room(streams, held, new):
                held = self._moved(streams, held)
            held = [
                self._extended(i, each, rows, scoring) if new[i] else each
                for i, (each, rows) in enumerate(zip(held, streams, strict=True))
            ]
        self._held = [*held]
        spans = [(each.begin, len(rows)) for each, rows in zip(held, streams, strict=True)]
        first = min((begin for begin, count in spans if count), default=0)
        stop = max((begin + count for begin, count in spans if count), default=0)
        begins = [begin - first if count else 0 for begin, count in spans]
        return RoutingKeys(self._buffer.data[:, :, first:stop], begins, [count for _, count in spans])

    def _keep_for(self, scoring: Scoring, r: int, e: int) -> None:
        """Forgets all keys if the projection is not that of the last call."""
        known, (streams, *sizes) = self._projection, self._buffer.data.shape
        if known is None or [r, e] != sizes[::2] or not scoring.equals(known):
            self._buffer = self._room(streams, r, 0, e)
            self._held = [None] * streams
        self._projection, self._source = scoring.copy(), scoring.source

    def _find(self, streams: Sequence[Rows]) -> list[_Held]:
        """Where the keys are of each stream that has some; of the others, none, where they are to begin."""
        found = [held and held.of(rows) for held, rows in zip(self._held, streams, strict=True)]
        stop = max(len(rows) + (held.begin if held else 0) for held, rows in zip(found, streams, strict=True))
        result = []
        for held, rows, used in zip(found, streams, self._buffer.used, strict=True):
            if held is None:
                numbering, oldest = rows.numbered()
                begin = max(used, stop - len(rows))
                held = _Held(weakref.ref(numbering), oldest, begin, begin)
            result.append(held)
        return result

    def _has_room(self, streams: Sequence[Rows], held: Sequence[_Held], new: Sequence[bool]) -> bool:
        """Whether the keys of new rows have their places, and no fork has taken them."""
        size = self._buffer.data.shape[2]
        return all(
            each.begin + len(rows) <= size and used <= each.stop
            for each, rows, grows, used in zip(held, streams, new, self._buffer.used, strict=True)
            if grows
        )

    def _moved(self, streams: Sequence[Rows], held: Sequence[_Held]) -> list[_Held]:
        """Where the keys are after they went to a new buffer, all streams' newest to one column."""
        longest = max(map(len, streams))
        count, r, _, e = self._buffer.data.shape
        buffer = self._room(count, r, longest + -(-longest // _ROOM), e)
        moved = []
        for i, (each, rows) in enumerate(zip(held, streams, strict=True)):
            begin, known = longest - len(rows), min(each.stop - each.begin, len(rows))
            keys = self._buffer.data[i, :, each.begin : each.begin + known]
            buffer.data[i, :, begin : begin + known] = keys
            buffer.used[i] = begin + known
            moved.append(each._replace(begin=begin, stop=begin + known))
        self._buffer, self._held = buffer, [*moved]
        return moved

    def _extended(self, stream: int, held: _Held, rows: Rows, scoring: Scoring) -> _Held:
        """Adds the keys of the rows that have none."""
        _, r, _, e = self._buffer.data.shape
        stop = held.stop
        for block in rows.blocks(stop - held.begin, len(rows)):
            keys = F.normalize(scoring.of(block).view(r, e, -1), dim=1).mT
            self._buffer.data[stream, :, stop : stop + len(block)] = keys
            stop += len(block)
        self._buffer.used[stream] = stop
        return held._replace(stop=stop)

    def _room(self, *shape: int) -> _Buffer:
        return _Buffer(*shape, dtype=self._buffer.data.dtype, device=self._buffer.data.device)
