"""What a stream holds: ranges of its append-only log of rows."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


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
    """

    extents: tuple[Extent, ...] = ()
    appended: int = 0
    end: int = 0

    @property
    def held(self) -> int:
        """The number of rows held."""
        return sum(extent.stop - extent.start for extent in self.extents)

    @property
    def oldest(self) -> int:
        """A number for the oldest row held; those after it count on. No other row of the log ever gets it."""
        return self.end - self.held

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
            extents = (*extents[:-1], extents[-1]._replace(stop=stop))
        elif written:
            extents = (*extents, Extent(self.end, stop, writer))
        return StreamLog(extents, self.appended + appended, stop)

    def dropped(self, count: int) -> StreamLog:
        """The log without the `count` oldest of the rows held."""
        extents = list(self.extents)
        while count:
            first = extents[0]
            taken = min(count, first.stop - first.start)
            count -= taken
            if taken == first.stop - first.start:
                del extents[0]
            else:
                extents[0] = first._replace(start=first.start + taken)
        return replace(self, extents=tuple(extents))

    def truncated(self, count: int) -> StreamLog:
        """The log without the `count` newest of the rows held, as if they had not been appended yet."""
        extents = []
        left = self.held - count
        for extent in self.extents:
            taken = min(left, extent.stop - extent.start)
            left -= taken
            if taken:
                extents.append(extent._replace(stop=extent.start + taken))
        return replace(self, extents=tuple(extents), appended=self.appended - count)

    def reset(self) -> StreamLog:
        """The log of a stream that begins anew."""
        return StreamLog((), 0, self.end)
