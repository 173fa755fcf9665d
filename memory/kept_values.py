"""What is kept of the rows of a layer, those of all streams side by side: routing keys, and first scores.

Shapes: b streams, m rows of the longest, d dim, r sets of values, e width of a value.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype
from xlroute.memory.log import StreamLog, StreamLogs
from xlroute.memory.scores import KeptScores, Scoring
from xlroute.memory.side_by_side import Streams
from xlroute.memory.to_device import begin_to_host

_ROOM = 4  # in a buffer, room for values to come: one for so many that there are
_MOST_TOGETHER = 1 << 16  # new rows of all streams that are scored together


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
    """Where the values of each stream's rows are; a stream without any begins where it stops.

    Attributes:
        shifts: The column of a row's value, less the number of the row, see `StreamLog.oldest`.
        begins: The column of the first value.
        stops: The column behind the last.
    """

    shifts: list[int]
    begins: list[int]
    stops: list[int]

    @classmethod
    def nothing(cls, streams: int) -> _Held:
        """No values of any stream."""
        return cls([0] * streams, [0] * streams, [0] * streams)

    def firsts(self, logs: StreamLogs) -> list[int]:
        """The column of the oldest of the rows that each stream holds at some time."""
        spans = zip(logs.ends, logs.lengths, self.shifts, strict=True)
        return [end - length + shift for end, length, shift in spans]

    def lacking(self, logs: StreamLogs) -> list[int]:
        """How many of these rows of each stream, the newest, have no values yet."""
        spans = zip(logs.ends, self.shifts, self.stops, strict=True)
        return [n if (n := end + shift - stop) > 0 else 0 for end, shift, stop in spans]


class _Buffer:
    """Room for values, [b, r, size, e]; of each stream, the first `used` columns are never written again."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.data = torch.empty(shape, dtype=dtype, device=device)
            # As in `Block`: autograd may have saved values that were handed out.
            self.target = self.data.data
        self.used = [0] * shape[0]
        # Where each stream stopped whenever some of its rows got their first values, ascending; columns that
        # were used later are those of a fork.
        self.ends: list[list[int]] = [[] for _ in range(shape[0])]


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
        scoring: How the last call scored, with a copy of its tokens; None if there are no values, while it is
            not known whether they are of these tokens, and for first values, where tokens are not compared.
    """

    def __init__(
        self, streams: int, dtype: torch.dtype, device: torch.device, *, unit: bool, first: bool
    ) -> None:
        self._unit = unit
        self._first = first
        self.scoring: Scoring | None = None
        self._assumed: Scoring | None = None
        self._options: dict[str, Any] | None = None  # how the last call scored
        self._source: tuple[int, int] | None = None  # where its tokens came from
        self._held = _Held.nothing(streams)
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
        self.scoring = self._assumed = None
        self._held = _Held.nothing(len(self._held.stops))
        self._buffer = self._room(r, 0, e)

    def assume(self, scoring: Scoring) -> None:
        """Takes a scoring for that of its values, until it is told by `settle`; values are lost if it is not.

        Args:
            scoring: One that is comparable to that of the values.
        """
        assert self.scoring is not None
        scoring.settle(self.scoring, True)
        self._assumed, self.scoring = scoring, None

    def settle(self, scoring: Scoring, equal: bool) -> None:
        """Learns whether the scoring that it assumes, if it still does, was that of its values."""
        if scoring is not self._assumed:
            return
        if equal:
            self.scoring, self._source, self._assumed = scoring.copy(), scoring.source, None
        else:
            self.forget()

    def of(self, streams: Streams, logs: StreamLogs, scoring: Scoring, r: int) -> Columns | None:
        """The values of rows, of which those that are new are scored; without gradient, by whoever asks.

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
            self._options = scoring.options
            if not self._first and scoring is not self._assumed:
                self.scoring, self._source = scoring.copy(), scoring.source
        held = self._find(logs)
        counts = held.lacking(logs)
        if any(counts):
            if capturing:
                return None
            if not self._has_room(held, counts):
                held = self._moved(logs, held, counts)
            held = self._extended(streams, held, counts, scoring)
        self._held = held
        firsts, lengths = held.firsts(logs), logs.lengths
        spans = [(begin, begin + n) for begin, n in zip(firsts, lengths, strict=True) if n]
        first = min(spans)[0] if spans else 0
        stop = max([stop for _, stop in spans], default=0)
        begins = [begin - first if n else 0 for begin, n in zip(firsts, lengths, strict=True)]
        return Columns(self._buffer.data.narrow(2, first, stop - first), begins, lengths)

    def kept(self, stream: int, log: StreamLog) -> KeptScores | None:
        """The scores [r, n] that there are of the rows that a stream holds."""
        begin, stop = self._held.begins[stream], self._held.stops[stream]
        first = log.oldest + self._held.shifts[stream]
        if self.scoring is None or not begin <= first < stop:
            return None
        count = min(log.held, stop - first)
        if not count:
            return None
        return KeptScores(self.scoring.stamp, 0, self._buffer.data[stream, :, first : first + count, 0])

    def ends(self, stream: int, log: StreamLog) -> list[int]:
        """How many of the rows that a stream holds there were whenever some got first values, ascending.

        A row got its own the first time that there were more than those before it.
        """
        begin, stop = self._held.begins[stream], self._held.stops[stream]
        first, ends = log.oldest + self._held.shifts[stream], self._buffer.ends[stream]
        following = ends[bisect_right(ends, max(first, begin)) : bisect_right(ends, stop)]
        return [min(end - first, log.held) for end in following]

    def _known(self, scoring: Scoring, r: int, capturing: bool) -> bool:
        """Whether values stay: they are of the same tokens as far as that matters."""
        _, sets, _, e = self._buffer.data.shape
        if sets != r or len(scoring.tokens) != r * e or scoring.options != self._options:
            return False
        if self._first:
            return True
        if capturing:
            return scoring.source == self._source
        return scoring is self._assumed or (self.scoring is not None and scoring.equals(self.scoring))

    def _find(self, logs: StreamLogs) -> _Held:
        """Where the values are of each stream that has some; of the others, none, where they are to begin."""
        held = self._held
        there = [
            begin <= first < stop
            for first, begin, stop in zip(held.firsts(logs), held.begins, held.stops, strict=True)
        ]
        if all(there):
            return held
        newest = max(
            end + shift if found else length
            for end, length, shift, found in zip(logs.ends, logs.lengths, held.shifts, there, strict=True)
        )
        shifts, begins, stops = [*held.shifts], [*held.begins], [*held.stops]
        for i, (log, used) in enumerate(zip(logs, self._buffer.used, strict=True)):
            if not there[i]:
                begins[i] = stops[i] = max(used, newest - log.held)
                shifts[i] = begins[i] - log.oldest
        return _Held(shifts, begins, stops)

    def _has_room(self, held: _Held, counts: Sequence[int]) -> bool:
        """Whether the values of new rows have their places, and no fork has taken them."""
        size = self._buffer.data.shape[2]
        return all(
            used <= stop <= size - count
            for stop, used, count in zip(held.stops, self._buffer.used, counts, strict=True)
            if count
        )

    def _moved(self, logs: StreamLogs, held: _Held, counts: Sequence[int]) -> _Held:
        """Where the values are after they went to a new buffer, all streams' newest to one column."""
        longest = max(logs.lengths)
        _, r, _, e = self._buffer.data.shape
        buffer = self._room(r, longest + -(-longest // _ROOM), e)
        moved = _Held([longest - end for end in logs.ends], [], [])
        firsts = held.firsts(logs)
        alike = all(len({*each}) == 1 for each in (firsts, logs.lengths, counts))
        for i, (old, length, count) in enumerate(zip(firsts, logs.lengths, counts, strict=True)):
            known, begin = length - count, longest - length
            if not alike:
                buffer.target[i, :, begin : begin + known] = self._buffer.data[i, :, old : old + known]
            elif not i:
                buffer.target[:, :, begin : begin + known] = self._buffer.data[:, :, old : old + known]
            moved.begins.append(begin)
            moved.stops.append(begin + known)
            ends = self._buffer.ends[i]
            following = ends[bisect_right(ends, old) : bisect_right(ends, held.stops[i])]
            buffer.ends[i] = [begin + min(end - old, known) for end in following]
        buffer.used = [*moved.stops]
        self._buffer, self._held = buffer, moved
        return moved

    def _extended(self, streams: Streams, held: _Held, counts: list[int], scoring: Scoring) -> _Held:
        """Adds the values of the rows that have none; those of all streams at once where they are few."""
        buffer, stops, many = self._buffer, [*held.stops], sum(counts) > _MOST_TOGETHER
        together = None if many or len({*stops}) > 1 else streams.side_by_side
        newest = None if together is None else together.newest(counts)
        if newest is not None:
            values = self._values(newest, scoring)
            buffer.target.narrow(2, stops[0], counts[0]).copy_(values)
            stops = [stops[0] + counts[0]] * len(stops)
            buffer.used = [*stops]
            if self._first:
                for ends in buffer.ends:
                    ends.append(stops[0])
            return held._replace(stops=stops)
        new = [rows.blocks(len(rows) - count, len(rows)) for rows, count in zip(streams, counts, strict=True)]
        found: Iterable[Iterable[Tensor]]
        if not many:
            values = self._values(torch.cat([block for blocks in new for block in blocks]), scoring)
            found = ([part] for part in torch.split(values, counts, dim=1))
        else:
            found = ((self._values(block, scoring) for block in blocks) for blocks in new)
        for i, parts in enumerate(found):
            for values in parts:
                buffer.target[i, :, stops[i] : stops[i] + values.shape[1]] = values
                stops[i] += values.shape[1]
            if counts[i]:
                buffer.used[i] = stops[i]
                if self._first:
                    buffer.ends[i].append(stops[i])
        return held._replace(stops=stops)

    def _values(self, rows: Tensor, scoring: Scoring) -> Tensor:
        """Those of rows [..., n, d], [..., r, n, e]."""
        _, r, _, e = self._buffer.data.shape
        values = torch.unflatten(scoring.of(rows), -2, (r, e)).mT
        # PyTorch sums the numbers of a value in one order, whatever n is, only where they are side by side.
        return F.normalize(values.contiguous(), dim=-1) if self._unit else values

    def _room(self, r: int, size: int, e: int) -> _Buffer:
        data = self._buffer.data
        return _Buffer(len(data), r, size, e, dtype=data.dtype, device=data.device)


def begin_comparison(pairs: Sequence[tuple[Scoring, KeptValues]]) -> Callable[[], bool]:
    """Tell scorings that they are those that values were kept of, before it is known.

    So the host goes on without waiting for a GPU. On a CPU, and where something else than numbers of tokens
    differs, nothing has to be assumed.

    Args:
        pairs: Each with the values that it is to give.

    Returns:
        What waits, and tells whether all was as assumed. If not, what was computed meanwhile is wrong, the
        values are forgotten, and the scorings are not to be used any more. As long as it was not called, the
        values are lost for any other scoring: those of both tokens may stand side by side.
    """
    assumed: list[tuple[Scoring, KeptValues]] = []
    differences = []
    for ours, kept in pairs:
        theirs = kept.scoring
        if theirs is not None and ours.comparable(theirs):
            if assumes(ours.tokens.device):
                differences.append((ours.tokens != theirs.tokens).any())
                assumed.append((ours, kept))
            else:
                ours.equals(theirs)
    if not assumed:
        return lambda: True
    differ = begin_to_host(torch.stack(differences))
    for ours, kept in assumed:
        kept.assume(ours)

    def as_assumed() -> bool:
        wrong = differ().tolist()
        for (ours, kept), each in zip(assumed, wrong, strict=True):
            kept.settle(ours, not each)
        return not any(wrong)

    return as_assumed


def assumes(device: torch.device) -> bool:
    """Whether the host would have to wait for what a device knows."""
    return device.type != "cpu"


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
