"""Rows of which the newest are in fast memory, and the others where there is more room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory.buffer import Rows, RowSpan, on_device
from xlroute.memory.cold import ColdRows
from xlroute.memory.layout import DTYPES, Layout
from xlroute.memory.log import StreamLog
from xlroute.memory.scores import KeptScores, Scoring, StoredScores


class Tiers(NamedTuple):
    """How many rows of one layer and stream may be in memory.

    Attributes:
        device_rows: On the device, at least 1.
        host_rows: On the host besides, at least 1; None where none are kept between disk and device.
    """

    device_rows: int
    host_rows: int | None


class TieredRows:
    """The rows of one layer and stream in two places: an immutable value, as all `Rows` are.

    The rows are those at home up to the first one that is in fast memory, and from there on those in fast
    memory. Home may hold these too. It may itself have two tiers: disk, host memory and device make three.

    Args:
        home: Rows from the oldest on, as many as are not in fast memory, or more.
        hot: The newest rows, on the device that everything is computed on.
        length: The number of rows.
        oldest: A number for the oldest row; those after it count on.
        stored: The scores of the rows, in these numbers.
    """

    def __init__(self, home: Rows, hot: RowSpan, length: int, oldest: int, stored: StoredScores) -> None:
        self.home = home
        self._hot = hot
        self._length = length
        self._oldest = oldest
        self.stored = stored

    def __len__(self) -> int:
        return self._length

    @property
    def device(self) -> torch.device:
        """Where rows go that are asked for."""
        return self._hot.device

    @property
    def nbytes(self) -> int:
        """Bytes that they keep in memory, on whatever device."""
        # Rows on disk count the scores, which are the same.
        scores = self.stored.nbytes if isinstance(self.home, RowSpan) else 0
        return self.home.nbytes + self._hot.nbytes + scores

    @property
    def _cut(self) -> int:
        """The first row in fast memory."""
        return self._length - len(self._hot)

    def span(self) -> RowSpan:
        """Copies of all rows, in fast memory for as long as the caller keeps them."""
        rows = self._hot.alike(self._length)
        for block in self.blocks(0, self._length):
            rows = rows.appended(block)
        return rows

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows `start` to `stop` in blocks [k, d] on the device."""
        if start < min(stop, self._cut):
            yield from on_device(self.home.blocks(start, min(stop, self._cut)), self.device)
        if max(start, self._cut) < stop:
            yield from self._hot.blocks(max(start, self._cut) - self._cut, stop - self._cut)

    def at_hand(self) -> Tensor | None:
        """See `Rows`."""
        return self._hot.at_hand() if self._cut == 0 else None

    def gather(self, index: Tensor) -> Tensor:
        """Copies of the rows at `index` (int64 [k]), [k, d]; zeros where it is -1.

        Of rows that are not in fast memory, only those go to the device that were asked for. A GPU reads
        those in pinned memory by itself. For rows on disk the host has to know the index, and waits for it.
        """
        if self._cut == 0:
            return self._hot.gather(index)
        found = self._hot.gather(torch.where(index >= self._cut, index - self._cut, -1))
        if index.device != found.device:
            index = index.to(found.device)
        if index.is_cuda and not isinstance(self.home, ColdRows):
            elsewhere = (index >= 0) & (index < self._cut)
            there = self.home.gather(torch.where(elsewhere, index, -1))
            return torch.where(elsewhere[:, None], there, found)
        wanted = index.cpu()
        places = ((wanted >= 0) & (wanted < self._cut)).nonzero()[:, 0]
        if places.numel():
            found[places.to(found.device)] = self.home.gather(wanted[places]).to(found.device)
        return found

    def prefetch(self, index: Tensor) -> None:
        """See `Rows`."""
        if self._cut > 0:
            wanted = index.cpu()
            self.home.prefetch(wanted[(wanted >= 0) & (wanted < self._cut)])

    def dropped(self, count: int) -> TieredRows:
        """The rows without the `count` oldest ones."""
        home = self.home.dropped(min(count, len(self.home)))
        hot = self._hot.dropped(max(0, count - self._cut))
        return TieredRows(home, hot, self._length - count, self._oldest + count, self.stored)

    def anew(self, log: StreamLog, room: int, stored: StoredScores) -> TieredRows:
        """See `Rows`."""
        # All scores are kept here; those at home are the same ones, or none.
        home = self.home
        home = home.alike(room) if isinstance(home, RowSpan) else home.anew(log, room, stored)
        return TieredRows(home, self._hot.alike(0), 0, log.end, stored)

    def grown(self, new: Tensor, home: Rows | None, most: int) -> TieredRows:
        """The rows followed by `new` [n, d].

        Args:
            new: Rows, on any device.
            home: All rows, the new ones too, where there is more room; None to keep those in fast memory that
                are nowhere else.
            most: How many rows may be in fast memory, at least 1, if the others are at home.
        """
        length = self._length + new.shape[0]
        stored = self.stored.extended(self._oldest + self._length, self._oldest + length)
        if home is None:
            return TieredRows(self.home, self._hot.appended(new), length, self._oldest, stored)
        new = new[-most:]
        hot = self._hot.dropped(max(0, len(self._hot) + new.shape[0] - most)).appended(new)
        return TieredRows(home, hot, length, self._oldest, stored)

    def scores(self, scoring: Scoring, keep: bool = True) -> Tensor:
        """See `Rows`. Rows that have no scores yet pass through the device block by block."""
        if not keep or scoring.differentiated:
            if self._cut == 0:
                return self._hot.scores(scoring, keep=False)
            read_all = partial(self.blocks, 0, self._length)
            scores: Tensor = _ScoresOfBlocks.apply(scoring.tokens, scoring, read_all)  # type: ignore[no-untyped-call]
            return scores

        def read(start: int, stop: int) -> Iterator[Tensor]:
            return self.blocks(start - self._oldest, stop - self._oldest)

        return self.stored.of(self._oldest, self._oldest + self._length, scoring, read)

    def kept_scores(self) -> KeptScores | None:
        """See `Rows`."""
        return self.stored.kept(self._oldest, self._oldest + self._length)


def rows_in_memory(layout: Layout, device: torch.device) -> TieredRows:
    """No rows, for a stream that keeps all in the host's memory and the newest on the device."""
    dtype = DTYPES[layout.dtype]
    stored = StoredScores(dtype, device)
    hot = RowSpan.empty(layout.dim, dtype, device)
    return TieredRows(_on_host(layout, device), hot, 0, 0, stored)


def rows_on_disk(
    cold: Rows, layout: Layout, device: torch.device, log: StreamLog, stored: StoredScores, *, on_host: bool
) -> TieredRows:
    """The rows of a stream on disk, none of them in memory yet.

    Args:
        cold: The rows.
        layout: The layout of their store.
        device: The device.
        log: What the stream holds.
        stored: The scores of the rows.
        on_host: Whether some will also be kept in the host's memory.
    """
    if on_host:
        cold = TieredRows(cold, _on_host(layout, device), log.held, log.oldest, stored)
    hot = RowSpan.empty(layout.dim, DTYPES[layout.dtype], device)
    return TieredRows(cold, hot, log.held, log.oldest, stored)


def _on_host(layout: Layout, device: torch.device) -> RowSpan:
    pinned = device.type == "cuda"
    return RowSpan.empty(layout.dim, DTYPES[layout.dtype], torch.device("cpu"), pinned=pinned)


class _ScoresOfBlocks(torch.autograd.Function):
    """Scores [r, m] of rows that are read block by block, once forward and once backward."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scoring: Scoring, read: Callable[[], Iterator[Tensor]]) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.scoring, ctx.read = scoring, read
        return torch.cat([row_scores(rows, tokens, **scoring.options) for rows in read()], dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        total = torch.zeros_like(tokens)
        first = 0
        for rows in ctx.read():
            with torch.enable_grad():
                leaf = tokens.detach().requires_grad_()
                scores = row_scores(rows, leaf, **ctx.scoring.options)
            stop = first + rows.shape[0]
            total += torch.autograd.grad(scores, leaf, grad[:, first:stop])[0]
            first = stop
        return total, None, None
