"""The rows of a layer by tensors alone, for code that is compiled.

Shapes: b streams, d dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xlroute.kernels import gather_rows, gather_rows_at


class RowsAtHand(NamedTuple):
    """The rows of all streams of a layer in the memory of the device that reads them.

    They are read by index as those of the `MemoryLayer` that they come from, and carry no gradient. On a GPU
    they are known by where they are: the layer has to be kept until they are read, see `gather_rows_at`.

    Attributes:
        rows: Those of each stream side by side in some of c columns, [b, c, d]; None on a GPU.
        begins: The column of each stream's oldest row, or on a GPU where it is (see `row_places`): int64 [b].
        lengths: How many rows each stream holds, int64 [b].
        newer: How many rows have come since, that are elsewhere, int64 [b].
        dim: d.
        dtype: The type of the rows.
        even: Whether all streams hold equally many rows, and any at all.
    """

    rows: Tensor | None
    begins: Tensor
    lengths: Tensor
    newer: Tensor
    dim: int
    dtype: torch.dtype
    even: bool

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.lengths.device

    def take(self, indices: Tensor) -> Tensor:
        """Copies of rows at int64 indices [b, ...], all in range; zeros at -1: [b, ..., d]."""
        if self.rows is None:
            return gather_rows_at(self.begins, self.lengths, indices, self.dim, self.dtype)
        begins = _along(self.begins, indices)
        return gather_rows(self.rows, torch.where(indices < 0, indices, indices + begins))

    def followers(self, indices: Tensor) -> Tensor:
        """The rows that were appended right after some others, -1 where there is none; see `take`."""
        newest = _along(self.lengths, indices) - 1
        return torch.where((indices >= 0) & (indices < newest), indices + 1, -1)

    def ages(self, indices: Tensor) -> Tensor:
        """How many rows have come from each of these on; for no row, more than those of all rows."""
        return _along(self.lengths + self.newer, indices) - indices


def _along(values: Tensor, indices: Tensor) -> Tensor:
    """Values [b] of streams, as they broadcast to indices [b, ...]."""
    return values.view(-1, *[1] * (indices.ndim - 1))
