"""Rows that stay on disk until somebody needs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlroute.memory.buffer import RowSpan, on_device
from xlroute.memory.chunks import Chunks
from xlroute.memory.layout import DTYPES
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.scores import KeptScores, Scoring, StoredScores


class ColdRows:
    """The rows of one layer and stream on disk: an immutable value, read when asked for.

    A few rows are read one by one. The first time that all are needed they are read once and stay in memory.
    Scores that are on disk are read instead of the rows, which then stay there.

    Args:
        files: The chunk files of the store.
        layer: Layer.
        stream: Stream.
        log: What the stream holds.
        device: Where rows go that are read.
        stored: The scores of the stream's rows, in numbers that begin at `log.oldest`.
    """

    def __init__(
        self,
        files: Chunks,
        layer: int,
        stream: int,
        log: StreamLog,
        device: torch.device,
        stored: StoredScores,
    ) -> None:
        self.stream = stream
        self._files = files
        self._layer = layer
        self._log = log
        self._device = device
        self._dtype = DTYPES[files.layout.dtype]
        self._span: RowSpan | None = None
        self.stored = stored
        # A commit drops what no commit refers to; these rows may be asked for again, in backward, after it.
        files.hold(self)

    def __len__(self) -> int:
        return self._log.held

    @property
    def device(self) -> torch.device:
        """Where rows go that are read."""
        return self._device

    @property
    def loaded(self) -> bool:
        """Whether all rows are in memory."""
        return self._span is not None

    @property
    def nbytes(self) -> int:
        """Bytes that they keep in memory: of scores, and of rows once all were read."""
        return self.stored.nbytes + (0 if self._span is None else self._span.nbytes)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The rows that are read from disk when asked for."""
        return () if self.loaded else self._log.extents

    def span(self) -> RowSpan:
        """All rows, in memory.

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        if self._span is None:
            extents = self._log.extents
            self._files.check_present(self._layer, self.stream, extents)
            layout = self._files.layout
            span = RowSpan.empty(layout.dim, self._dtype, self._device, room=len(self))
            for block in self._files.blocks(self._layer, self.stream, extents):
                span = span.appended(self._tensor(block))
            self._span = span
        return self._span

    def at_hand(self) -> Tensor | None:
        """See `Rows`."""
        return None if self._span is None else self._span.at_hand()

    def gather(self, index: Tensor) -> Tensor:
        """Copies of the rows at `index` (int64 [k]), [k, d]; zeros where it is -1, for which nothing is read.

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        if self._span is not None:
            return self._span.gather(index)
        given = index.cpu().numpy()
        chosen, places = np.unique(given[given >= 0], return_inverse=True)  # each is read once
        rows, writers = self._find(chosen)
        found = self._files.read(self._layer, self.stream, rows, writers)
        data = np.zeros((given.size, found.shape[1]), np.uint8)
        data[given >= 0] = found[places]
        return self._tensor(data).to(self._device)

    def prefetch(self, index: Tensor) -> None:
        """See `Rows`.

        Raises:
            CorruptionError: The file that a row is in is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        if self._span is None:
            given = index.cpu().numpy()
            rows, _ = self._find(given[given >= 0])
            self._files.prefetch(self._layer, self.stream, rows)

    def _find(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers in the log, and the writers, of rows that are counted from the oldest, [k]."""
        extents = np.array(self._log.extents, np.int64).reshape(-1, 3)
        counts = extents[:, 1] - extents[:, 0]
        ends = np.cumsum(counts)
        extent = np.searchsorted(ends, chosen, side="right")
        return extents[extent, 0] + chosen - (ends - counts)[extent], extents[extent, 2]

    def dropped(self, count: int) -> ColdRows | RowSpan:
        """The rows without the `count` oldest ones."""
        if self._span is not None:
            return self._span.dropped(count)
        log = self._log.dropped(count)
        return ColdRows(self._files, self._layer, self.stream, log, self._device, self.stored)

    def anew(self, log: StreamLog, room: int, stored: StoredScores) -> ColdRows | RowSpan:
        """See `Rows`."""
        if self._span is not None:
            return self._span.anew(log, room, stored)
        return ColdRows(self._files, self._layer, self.stream, log, self._device, stored)

    def scores(self, scoring: Scoring, keep: bool = True) -> Tensor:
        """See `Rows`. All rows are read where there are no scores of these tokens on disk.

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        first = self._log.oldest
        known = self._span is None and keep and not scoring.differentiated
        if known and self.stored.serves(first, scoring):
            return self.stored.of(first, self._log.end, scoring, partial(self._numbered_blocks, first))
        return self.span().scores(scoring, keep)

    def kept_scores(self) -> KeptScores | None:
        """See `Rows`."""
        if self._span is not None:
            return self._span.kept_scores()
        return self.stored.kept(self._log.oldest, self._log.end)

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """See `Rows`.

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        if self._span is not None:
            yield from self._span.blocks(start, stop)
        else:
            data = self._files.blocks(self._layer, self.stream, self._log.part(start, stop))
            yield from on_device(map(self._tensor, data), self._device)

    def _numbered_blocks(self, oldest: int, start: int, stop: int) -> Iterator[Tensor]:
        return self.blocks(start - oldest, stop - oldest)

    def _tensor(self, data: Bytes) -> Tensor:
        # Flat first: PyTorch refuses to view no rows as another type.
        flat = torch.from_numpy(data.reshape(-1)).view(self._dtype)
        return flat.view(data.shape[0], self._files.layout.dim)
