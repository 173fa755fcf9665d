"""Rows that stay on disk until somebody needs all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xlroute.memory.buffer import RowSpan
from xlroute.memory.chunks import Bytes, ChunkFiles
from xlroute.memory.layout import DTYPES
from xlroute.memory.log import Extent, StreamLog


class ColdRows:
    """The rows of one layer and stream on disk: an immutable value, read when asked for.

    A few rows are read one by one. The first time that all are needed they are read once and stay in memory.

    Args:
        files: The chunk files of the store.
        layer: Layer.
        stream: Stream.
        log: What the stream holds.
        device: Where rows go that are read.
    """

    def __init__(
        self, files: ChunkFiles, layer: int, stream: int, log: StreamLog, device: torch.device
    ) -> None:
        self.stream = stream
        self._files = files
        self._layer = layer
        self._log = log
        self._device = device
        self._dtype = DTYPES[files.layout.dtype]
        self._span: RowSpan | None = None
        # A commit drops what no commit refers to; these rows may be asked for again, in backward, after it.
        files.hold(self)

    def __len__(self) -> int:
        return self._log.held

    @property
    def loaded(self) -> bool:
        """Whether all rows are in memory."""
        return self._span is not None

    @property
    def nbytes(self) -> int:
        """Bytes that they keep in memory: none until all were read."""
        return 0 if self._span is None else self._span.nbytes

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

    def gather(self, index: Tensor) -> Tensor:
        """Copies of the rows at `index` (int64 [k]), [k, d]; zeros where it is -1, for which nothing is read.

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        if self._span is not None:
            return self._span.gather(index)
        extents = np.array(self._log.extents, np.int64).reshape(-1, 3)
        counts = extents[:, 1] - extents[:, 0]
        ends = np.cumsum(counts)
        given = index.cpu().numpy()
        chosen = given[given >= 0]
        extent = np.searchsorted(ends, chosen, side="right")
        rows = extents[extent, 0] + chosen - (ends - counts)[extent]
        data = self._files.read(self._layer, self.stream, rows, extents[extent, 2])
        if chosen.size < given.size:
            found, data = data, np.zeros((given.size, data.shape[1]), np.uint8)
            data[given >= 0] = found
        return self._tensor(data).to(self._device)

    def dropped(self, count: int) -> ColdRows | RowSpan:
        """The rows without the `count` oldest ones."""
        if self._span is not None:
            return self._span.dropped(count)
        return ColdRows(self._files, self._layer, self.stream, self._log.dropped(count), self._device)

    def _tensor(self, data: Bytes) -> Tensor:
        # Flat first: PyTorch refuses to view no rows as another type.
        flat = torch.from_numpy(data.reshape(-1)).view(self._dtype)
        return flat.view(data.shape[0], self._files.layout.dim)
