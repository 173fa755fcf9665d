"""What a stream holds: ranges of its append-only log of rows."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from xlroute.memory.survivors import Survivors
from xlroute.memory.to_device import integers


class Extent(NamedTuple):
    """Rows `start` to `stop` of a stream's log, written by the writer whose number is `writer`."""

    start: int
    stop: int
    writer: int


def within(extents: Sequence[Extent], start: int, stop: int) -> Iterator[Extent]:
    """The parts of extents, which ascend, that lie in rows `start` to `stop`."""
    first = bisect_right(extents, start, key=lambda extent: extent.stop)
    for extent in itertools.islice(extents, first, None):
        if extent.start >= stop:
            return
        yield extent._replace(start=max(start, extent.start), stop=min(stop, extent.stop))


@dataclass(frozen=True)
class StreamLog:
    """One stream at one moment; a value, the same for all layers.

    Rows only ever go in at `end`. Reset and eviction let go of rows and leave the log as it is, so that
    whoever still refers to them finds them.

    Attributes:
        extents: The rows held, oldest first.
        appended: How many rows the stream has appended since its reset.
        end: The first row of the log that nothing has ever referred to.
        survivors: Rows of the log that have positions of their own, because others have left from between
            them. Those still held are the oldest rows, in the first extent; all others follow one another up
            to the newest. None if there are no such rows.
    """

    extents: tuple[Extent, ...] = ()
    appended: int = 0
    end: int = 0
    survivors: Survivors | None = None

    @cached_property
    def held(self) -> int:
        """The number of rows held."""
        return sum(extent.stop - extent.start for extent in self.extents)

    @property
    def oldest(self) -> int:
        """A number for the oldest row held; those after it count on. No other row of the log ever gets it."""
        return self.end - self.held

    @property
    def surviving(self) -> int:
        """How many of the rows held have positions of their own; they are the oldest ones."""
        if self.survivors is None or not self.extents:
            return 0
        return max(0, min(self.extents[0].stop, self.survivors.stop) - self.extents[0].start)

    def own_positions(self, device: torch.device | str = "cpu") -> Tensor:
        """The positions of the rows that have their own, int64 [n].

        Raises:
            CorruptionError: The file that they are in is damaged or missing.
            CommitNotFoundError: It is gone because the commit was dropped.
        """
        if self.survivors is None:
            return torch.empty(0, dtype=torch.int64, device=device)
        first = self.extents[0].start - self.survivors.start
        return self.survivors.on(torch.device(device))[first : first + self.surviving]

    @property
    def first(self) -> int:
        """The position of the oldest row held, or of the next one if there is none."""
        return int(self.own_positions()[0]) if self.surviving else self.appended - self.held

    def positions(self) -> Tensor:
        """The positions of all rows held, oldest first, int64 [m] on the CPU.

        Raises:
            CorruptionError, CommitNotFoundError: As `own_positions`.
        """
        own = self.own_positions()
        first = self.appended - (self.held - len(own))
        return torch.cat([own, torch.arange(first, self.appended)])

    def part(self, start: int, stop: int) -> tuple[Extent, ...]:
        """The rows `start` to `stop` of those held, oldest first."""
        extents = []
        for extent in self.dropped(start).extents:
            taken = min(stop - start, extent.stop - extent.start)
            if taken > 0:
                extents.append(extent._replace(stop=extent.start + taken))
            start += taken
        return tuple(extents)

    def extended(self, written: int, writer: int, *, appended: int) -> StreamLog:
        """The log after `appended` more rows, of which the last `written` were written at `end`."""
        stop = self.end + written
        extents = self.extents
        if written and extents and extents[-1].stop == self.end and extents[-1].writer == writer:
            extents = (*extents[:-1], Extent(extents[-1].start, stop, writer))
        elif written:
            extents = (*extents, Extent(self.end, stop, writer))
        return StreamLog(extents, self.appended + appended, stop, self.survivors)

    def dropped(self, count: int) -> StreamLog:
        """The log without the `count` oldest of the rows held."""
        if not count and self.survivors is None:
            return self
        extents = list(self.extents)
        while count:
            first = extents[0]
            taken = min(count, first.stop - first.start)
            count -= taken
            if taken == first.stop - first.start:
                del extents[0]
            else:
                extents[0] = Extent(first.start + taken, first.stop, first.writer)
        log = StreamLog(tuple(extents), self.appended, self.end, self.survivors)
        return log if self.survivors is None or log.surviving else replace(log, survivors=None)

    def truncated(self, count: int) -> StreamLog:
        """The log without the `count` newest of the rows held, as if they had not been appended yet."""
        if not count:
            return self
        extents = []
        left = self.held - count
        appended = self.appended - count
        if 0 < left <= self.surviving:
            appended = int(self.own_positions()[left - 1]) + 1
        for extent in self.extents:
            taken = min(left, extent.stop - extent.start)
            left -= taken
            if taken:
                extents.append(extent._replace(stop=extent.start + taken))
        return replace(
            self, extents=tuple(extents), appended=appended, survivors=self.survivors if extents else None
        )

    def anew(self) -> StreamLog:
        """The log of a stream whose rows are about to be written anew, as those that come next."""
        return replace(self, extents=(), survivors=None)

    def reset(self) -> StreamLog:
        """The log of a stream that begins anew."""
        return StreamLog((), 0, self.end)


class StreamLogs(tuple[StreamLog, ...]):
    """What each of the streams holds, at one moment."""

    @cached_property
    def lengths(self) -> list[int]:
        """The number of rows that each holds."""
        return [log.held for log in self]

    @cached_property
    def ends(self) -> list[int]:
        """The `end` of each."""
        return [log.end for log in self]

    @cached_property
    def surviving(self) -> bool:
        """Whether some of the rows held have positions of their own."""
        return any(log.surviving for log in self)

    def counts(self, device: torch.device) -> Tensor:
        """Rows that each has appended since its reset, and rows that it holds: int64 [2, b]."""
        found = self._counts.get(device)
        if found is None:
            found = self._counts[device] = integers([[log.appended for log in self], self.lengths], device)
        return found

    @cached_property
    def _counts(self) -> dict[torch.device, Tensor]:
        return {}

    def grown(self, counts: Sequence[int], excess: Sequence[int]) -> StreamLogs:
        """The logs of streams in memory without some of their oldest rows, followed by new ones.

        Args:
            counts: How many rows each stream appends.
            excess: How many of its oldest each drops; 0 where it appends none.
        """
        # Streams that have always grown alike have one log.
        known: dict[tuple[int, int], StreamLog] = {}
        logs = []
        for log, count, left in zip(self, counts, excess, strict=True):
            after = known.get((id(log), count))
            if after is None:
                after = log.dropped(left).extended(count, 0, appended=count) if count else log
                known[id(log), count] = after
            logs.append(after)
        grown = StreamLogs(logs)
        # What is known need not be counted again.
        spans = zip(self.lengths, counts, excess, strict=True)
        grown.lengths = [length + count - left for length, count, left in spans]
        grown.ends = [end + count for end, count in zip(self.ends, counts, strict=True)]
        if not self.surviving:
            grown.surviving = False
        return grown


def survivors_of(logs: Iterable[StreamLog]) -> Iterator[tuple[int, Survivors]]:
    """The streams of which some rows have positions of their own, and these rows."""
    for stream, log in enumerate(logs):
        if log.survivors is not None:
            yield stream, log.survivors
