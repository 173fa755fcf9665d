"""What is kept of the rows of a layer, those of all streams side by side: routing keys, and first scores.

Shapes: b streams, m rows of the longest, d dim, r sets of values, e width of a value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype
from xlroute.memory.buffer import Rows
from xlroute.memory.log import StreamLog
from xlroute.memory.scores import KeptScores, Scoring
from xlroute.memory.side_by_side import SideBySide

_ROOM = 4  # in a buffer, room for values to come: one for so many that there are
_MOST_TOGETHER = 1 << 16  # new rows of all streams that are copied to be scored together


class Columns(NamedTuple):
    """Values of all rows of a layer.

    Attributes:
        values: [b, r, c, e], out of a longer buffer. Those of a stream stand side by side in some of the c
            columns; the others mean nothing.
        begins: The column of each stream's oldest row.
        lengths: How many rows each stream holds.
    """

    values: Tensor
    begins: list[int]
    lengths: list[int]

    def of_stream(self, stream: int) -> Tensor:
        """Those of one stream, [r, m_i, e], without a copy."""
        return self.values[stream].narrow(1, self.begins[stream], self.lengths[stream])


class _Held(NamedTuple):
    """Where the values of a stream's rows are.

    Attributes:
        shift: The column of a row's value, less the number of the row, see `StreamLog.oldest`.
        begin: The column of the first value.
        stop: The column behind the last.
        ends: Where the stream ended, in numbers of rows, whenever some got their first values; ascending.
    """

    shift: int
    begin: int
    stop: int
    ends: tuple[int, ...] = ()

    def has(self, log: StreamLog) -> bool:
        """Whether the oldest of the rows that the stream holds at some time is among them."""
        return self.begin <= log.oldest + self.shift < self.stop

    def lacks(self, log: StreamLog) -> int:
        """How many of these rows, the newest, have no values yet."""
        return max(0, log.end + self.shift - self.stop)


class _Buffer:
    """Room for values, [b, r, size, e]; of each stream, the first `used` columns are never written again."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.data = torch.empty(shape, dtype=dtype, device=device)
            # As in `Block`: autograd may have saved values that were handed out.
            self.target = self.data.data
        self.used = [0] * shape[0]


class KeptValues:
    """A value of each row of a layer: scores, or a routing key.

    A call scores only rows that are new, and a row's value has the same bits whatever other rows it is scored
    with. It is rounded once. Values of all streams are in one buffer, so that whoever searches goes through
    them without a copy: each stream's side by side, the newest of all in one column, as long as the streams
    grow alike. What was handed out does not change.

    Args:
        streams: b.
        dtype: Of the values: for keys the rows' type, in bfloat16 of which the cosine of a key and a query is
            off by 2^-8 at most.
        device: Where they go.
        unit: They are of unit length, as routing keys are.
        first: Each row keeps the value that it got first, by whatever tokens; otherwise all values are of the
            same tokens, and other ones begin anew.

    Attributes:
        scoring: How the last call scored, with a copy of its tokens; None before the first.
    """

    def __init__(
        self, streams: int, dtype: torch.dtype, device: torch.device, *, unit: bool, first: bool
    ) -> None:
        self._unit = unit
        self._first = first
        self.scoring: Scoring | None = None
        self._source: tuple[int, int] | None = None  # where its tokens came from
        self._held: list[_Held | None] = [None] * streams
        self._buffer = _Buffer(streams, 0, 0, 0, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, with room for those to come."""
        return self._buffer.data.nbytes

    def fork(self) -> KeptValues:
        """The same values, for a layer that goes on by itself."""
        return copy.copy(self)

    def forget(self, r: int = 0, e: int = 0) -> None:
        """Begins anew, for r values of width e of each row."""
        self._held = [None] * len(self._held)
        self._buffer = self._room(r, 0, e)

    @torch.no_grad()
    def of(
        self, streams: Sequence[Rows], logs: Sequence[StreamLog], scoring: Scoring, r: int
    ) -> Columns | None:
        """The values of rows, of which those that are new are scored.

        None while a CUDA graph is captured, in which nothing can be compared or kept, unless all values are
        there, and the tokens where they were; those do not matter for first values.

        Args:
            streams: The rows of each stream.
            logs: What each stream holds: these rows.
            scoring: By r·e tokens.
            r: Sets of values.

        Raises:
            CorruptionError: A row on disk is damaged.
        """
        tokens = scoring.tokens
        capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        if not self._known(scoring, r, capturing):
            if capturing:
                return None
            self.forget(r, len(tokens) // r)
        if not capturing:
            self.scoring, self._source = scoring.copy(), scoring.source
        held = self._find(logs)
        if any(each.lacks(log) for each, log in zip(held, logs, strict=True)):
            if capturing:
                return None
            if not self._has_room(logs, held):
                held = self._moved(logs, held)
            held = self._extended(streams, logs, held, scoring)
        self._held = [*held]
        spans = [(log.oldest + each.shift, log.held) for each, log in zip(held, logs, strict=True)]
        first = min((begin for begin, count in spans if count), default=0)
        stop = max((begin + count for begin, count in spans if count), default=0)
        begins = [begin - first if count else 0 for begin, count in spans]
        return Columns(self._buffer.data[:, :, first:stop], begins, [count for _, count in spans])

    def kept(self, stream: int, log: StreamLog) -> KeptScores | None:
        """The scores [r, n] that there are of the rows that a stream holds."""
        held = self._held[stream]
        if held is None or self.scoring is None or not held.has(log):
            return None
        first = log.oldest + held.shift
        count = min(log.held, held.stop - first)
        if not count:
            return None
        return KeptScores(self.scoring.stamp, 0, self._buffer.data[stream, :, first : first + count, 0])

    def ends(self, stream: int, log: StreamLog) -> list[int]:
        """How many of the rows that a stream holds there were whenever some got first values, ascending.

        A row got its own the first time that there were more than those before it.
        """
        held = self._held[stream]
        ends = () if held is None else held.ends
        return [min(end, log.end) - log.oldest for end in ends if end > log.oldest]

    def _known(self, scoring: Scoring, r: int, capturing: bool) -> bool:
        """Whether values stay: they are of the same tokens as far as that matters."""
        known, (_, sets, _, e) = self.scoring, self._buffer.data.shape
        if known is None or sets != r or len(scoring.tokens) != r * e or scoring.options != known.options:
            return False
        if self._first:
            return True
        return scoring.source == self._source if capturing else scoring.equals(known)

    def _find(self, logs: Sequence[StreamLog]) -> list[_Held]:
        """Where the values are of each stream that has some; of the others, none, where they are to begin."""
        found = [
            held if held is not None and held.has(log) else None
            for held, log in zip(self._held, logs, strict=True)
        ]
        stop = max(log.end + held.shift if held else log.held for held, log in zip(found, logs, strict=True))
        result = []
        for held, log, used in zip(found, logs, self._buffer.used, strict=True):
            if held is None:
                begin = max(used, stop - log.held)
                held = _Held(begin - log.oldest, begin, begin)
            result.append(held)
        return result

    def _has_room(self, logs: Sequence[StreamLog], held: Sequence[_Held]) -> bool:
        """Whether the values of new rows have their places, and no fork has taken them."""
        size = self._buffer.data.shape[2]
        return all(
            log.end + each.shift <= size and used <= each.stop
            for each, log, used in zip(held, logs, self._buffer.used, strict=True)
            if each.lacks(log)
        )

    def _moved(self, logs: Sequence[StreamLog], held: Sequence[_Held]) -> list[_Held]:
        """Where the values are after they went to a new buffer, all streams' newest to one column."""
        longest = max(log.held for log in logs)
        _, r, _, e = self._buffer.data.shape
        buffer = self._room(r, longest + -(-longest // _ROOM), e)
        moved = []
        for i, (each, log) in enumerate(zip(held, logs, strict=True)):
            known = log.held - each.lacks(log)
            begin, old = longest - log.held, log.oldest + each.shift
            buffer.target[i, :, begin : begin + known] = self._buffer.data[i, :, old : old + known]
            buffer.used[i] = begin + known
            ends = tuple(min(end, log.oldest + known) for end in each.ends if end > log.oldest)
            moved.append(_Held(longest - log.end, begin, begin + known, ends))
        self._buffer, self._held = buffer, [*moved]
        return moved

    def _extended(
        self, streams: Sequence[Rows], logs: Sequence[StreamLog], held: Sequence[_Held], scoring: Scoring
    ) -> list[_Held]:
        """Adds the values of the rows that have none; those of all streams at once where they are few."""
        counts = [each.lacks(log) for each, log in zip(held, logs, strict=True)]
        b, stops, many = len(held), {each.stop for each in held}, sum(counts) > _MOST_TOGETHER
        together = SideBySide.of(streams)
        newest = None if together is None or many or len(stops) > 1 else together.newest(counts)
        if newest is not None:
            stop = max(stops) + counts[0]
            values = self._values(newest.flatten(0, 1), scoring)
            self._buffer.target[:, :, max(stops) : stop] = torch.unflatten(values, 1, (b, -1)).transpose(0, 1)
            self._buffer.used = [stop] * b
            return [
                each._replace(stop=stop, ends=(*each.ends, log.end) if self._first else ())
                for each, log in zip(held, logs, strict=True)
            ]
        new = [rows.blocks(len(rows) - count, len(rows)) for rows, count in zip(streams, counts, strict=True)]
        found: Iterable[Iterable[Tensor]]
        if not many:
            values = self._values(torch.cat([block for blocks in new for block in blocks]), scoring)
            found = ([part] for part in torch.split(values, counts, dim=1))
        else:
            found = ((self._values(block, scoring) for block in blocks) for blocks in new)
        result = []
        for i, (each, log, parts) in enumerate(zip(held, logs, found, strict=True)):
            stop = each.stop
            for values in parts:
                self._buffer.target[i, :, stop : stop + values.shape[1]] = values
                stop += values.shape[1]
            if counts[i]:
                self._buffer.used[i] = stop
                ends = (*each.ends, log.end) if self._first else ()
                each = each._replace(stop=stop, ends=ends)
            result.append(each)
        return result

    def _values(self, rows: Tensor, scoring: Scoring) -> Tensor:
        """Those of rows [n, d], [r, n, e]."""
        _, r, _, e = self._buffer.data.shape
        scores = scoring.of(rows).view(r, e, -1)
        return (F.normalize(scores, dim=1) if self._unit else scores).mT

    def _room(self, r: int, size: int, e: int) -> _Buffer:
        data = self._buffer.data
        return _Buffer(len(self._held), r, size, e, dtype=data.dtype, device=data.device)


class KeptOfLayer(NamedTuple):
    """What is kept of the rows of a layer, those of all streams side by side, in memory alone."""

    keys: KeptValues  # routing keys, for as long as the projection stays the same
    first_keys: KeptValues  # the routing key that each row got first
    first_scores: KeptValues  # the scores that each row got first
    scores: KeptValues | None  # scores of the present tokens; None where each stream keeps its own

    @classmethod
    def nothing(cls, streams: int, dtype: torch.dtype, device: torch.device, *, scores: bool) -> KeptOfLayer:
        """Nothing yet, of rows of a type."""
        wide = compute_dtype(dtype)
        return cls(
            KeptValues(streams, dtype, device, unit=True, first=False),
            KeptValues(streams, dtype, device, unit=True, first=True),
            KeptValues(streams, wide, device, unit=False, first=True),
            KeptValues(streams, wide, device, unit=False, first=False) if scores else None,
        )

    def fork(self) -> KeptOfLayer:
        """The same, for a layer that goes on by itself."""
        return KeptOfLayer(
            self.keys.fork(),
            self.first_keys.fork(),
            self.first_scores.fork(),
            None if self.scores is None else self.scores.fork(),
        )

    def forget_first(self) -> None:
        """Lets go of what rows got first."""
        self.first_keys.forget()
        self.first_scores.forget()
