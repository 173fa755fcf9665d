"""Rows as the bytes that are written."""

from __future__ import annotations

import torch
from torch import Tensor

from xlroute.memory.chunks import Bytes


def as_bytes(rows: Tensor) -> Bytes:
    """The bytes of rows [k, d] on the CPU, [k, row_bytes]."""
    rows = rows.contiguous()
    # PyTorch calls a tensor contiguous whatever the strides of its sizes of 1 are; `view` does not.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8).numpy()
