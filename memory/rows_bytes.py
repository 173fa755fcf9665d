"""Rows as the bytes that are written."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes: TypeAlias = NDArray[np.uint8]


def as_bytes(rows: Tensor) -> Bytes:
    """The bytes of rows [k, d] on the CPU, [k, row_bytes]."""
    rows = rows.contiguous()
    # PyTorch calls a tensor contiguous whatever the strides of its sizes of 1 are; `view` does not.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8).numpy()
