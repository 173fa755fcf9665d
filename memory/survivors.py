"""Rows that stay while others from between them leave: their positions, and the files that hold these.

The positions of rows that were appended one after the other follow from how many there are. Where a policy
has evicted rows from between others, those that stay are written anew, and their positions are kept beside
them, in a file that a commit record names together with its checksum. So it is whole or it is damaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from xlroute.memory.errors import CorruptionError
from xlroute.memory.place import StorePath
from xlroute.memory.side_files import SideFiles, list_side_files

POSITIONS = "positions"
POSITIONS_NAME = re.compile(r"stream-(\d+)\.\d+-(\d+)\.[0-9a-f]{8}")
_BYTES = 8  # of a position


@dataclass(frozen=True)
class Survivors:
    """Rows `start` to `stop` of a stream's log, whose positions have gaps between them.

    Attributes:
        start: The first row.
        stop: The row behind the last.
        crc32c: Of their positions as they are written, in 8 hexadecimal digits.
        read: Gives the positions; it is called once.
    """

    start: int
    stop: int
    crc32c: str
    read: Callable[[], Tensor] = field(compare=False, repr=False)
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def at(cls, start: int, positions: Tensor) -> Survivors:
        """The rows from `start` on, with positions int64 [n] on the CPU."""
        seal = f"{google_crc32c.value(position_bytes(positions)):08x}"
        return cls(start, start + len(positions), seal, lambda: positions)

    @cached_property
    def positions(self) -> Tensor:
        """The positions, int64 [n] on the CPU, ascending.

        Raises:
            CorruptionError: The file that they are in is damaged or missing.
            CommitNotFoundError: It is gone because the commit was dropped.
        """
        return self.read()

    def load(self) -> None:
        """Reads the positions now.

        Raises:
            CorruptionError, CommitNotFoundError: As `positions`.
        """
        _ = self.positions

    def on(self, device: torch.device) -> Tensor:
        """The positions on a device."""
        if device.type == "cpu":
            return self.positions
        if device not in self._copies:
            self._copies[device] = self.positions.to(device)
        return self._copies[device]

    @property
    def nbytes(self) -> int:
        """Bytes of the positions, wherever they are."""
        return (1 + len(self._copies)) * _BYTES * (self.stop - self.start)


def positions_path(root: StorePath, stream: int, survivors: Survivors) -> StorePath:
    """The file of the positions of some rows of a stream."""
    return root / POSITIONS / positions_name(stream, survivors)


def positions_name(stream: int, survivors: Survivors) -> str:
    """The name of the file of the positions of some rows of a stream."""
    return f"stream-{stream}.{survivors.start}-{survivors.stop}.{survivors.crc32c}"


def read_positions(path: StorePath, count: int, crc32c: str) -> Tensor:
    """Reads `count` positions, int64 [count].

    Raises:
        CorruptionError: The file is damaged or missing.
        OSError: The operating system refused to read it.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size == _BYTES * count else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptionError(f"{path}: expected the positions of {count} rows, got no such file") from error
    except IsADirectoryError as error:
        raise CorruptionError(f"{path}: expected a file, got a folder") from error
    if data is None:
        raise CorruptionError(f"{path}: expected {_BYTES * count} bytes, got {size}")
    found = f"{google_crc32c.value(data):08x}"
    if found != crc32c:
        raise CorruptionError(f"{path}: expected checksum {crc32c}, got {found}: the file is damaged")
    numbers = np.frombuffer(data, "<i8").astype(np.int64)
    if numbers[0] < 0 or (np.diff(numbers) < 1).any():
        raise CorruptionError(f"{path}: expected positions that ascend from 0 or more, got others")
    return torch.from_numpy(numbers)


def list_positions(root: StorePath) -> list[str]:
    """The names of all files of positions in a store."""
    return list_side_files(root / POSITIONS, POSITIONS_NAME)


class Positions(Protocol):
    """The files of positions of a store that is being written, wherever it is."""

    def write(self, stream: int, survivors: Survivors) -> None:
        """Writes the positions of rows that a commit will refer to, unless they are there."""


class PositionFiles(SideFiles):
    """The files of positions of a store in a folder that is being written.

    Args:
        root: Folder of the store.
        present: Streams, and rows of them whose files are there.
    """

    def __init__(self, root: Path, present: Iterable[tuple[int, Survivors]] = ()) -> None:
        super().__init__(root, POSITIONS, POSITIONS_NAME, (positions_name(*each) for each in present))

    def write(self, stream: int, survivors: Survivors) -> None:
        """Writes the positions of rows that a commit will refer to, unless they are there.

        Raises:
            OSError: The operating system refused.
        """
        self.write_named(positions_name(stream, survivors), lambda: position_bytes(survivors.positions))

    def mark_unsynced(self, stream: int, survivors: Survivors) -> None:
        """Notes that a file may not be on the medium."""
        self.mark_named_unsynced(positions_name(stream, survivors))

    def keep(self, needed: Iterable[tuple[int, Survivors]]) -> None:
        """Deletes all files but those that commits refer to.

        Raises:
            OSError: The operating system refused.
        """
        self.keep_named({positions_name(*each) for each in needed})


def position_bytes(positions: Tensor) -> bytes:
    """Positions as they are written."""
    return positions.numpy().astype("<i8").tobytes()
