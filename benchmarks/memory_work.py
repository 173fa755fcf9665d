"""What the measurements of the memory store have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from measurement import Measurement

CPU = torch.device("cpu")
OURS, RAW, ZARR = "xlroute", "raw", "zarr"


@dataclass(frozen=True)
class Sizes:
    """How large the work is."""

    segment: int = 1024  # rows of an append
    dim: int = 512
    chosen: int = 1024  # rows of a gather
    gather: tuple[int, ...] = tuple(2**i for i in range(12, 21, 2))  # rows of the stores
    large: int = 100_000_000
    large_dim: int = 128


TINY = Sizes(segment=16, dim=8, chosen=10, gather=(64, 256), large=5000, large_dim=4)


@dataclass(frozen=True)
class Work:
    """One piece of work, what was measured of all who do it, and what else there is to say."""

    name: str
    reach: str
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
