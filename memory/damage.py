"""Damage to files: what is said of it."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.place import StorePath

Ranges = tuple[tuple[int, int], ...]
# What the operating system says where the medium fails, or something else has taken the place of a file.
_DAMAGE = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written, and what cannot be read because of it.

    Attributes:
        path: The file or folder. Where a row does not have its checksum, either of two files is damaged: this
            is the file of rows, and `problem` names the other.
        problem: What was expected there and what was found.
        array: Name of the array that the file belongs to; None for metadata of the store, commit records,
            positions and routed counts.
        stream: The stream of the array, of the positions or of the counts; else None.
        chunk: Number of the chunk, or of the inner chunk of a shard, which counts those of all layers; None
            for metadata, commit records, positions and whole shards.
        rows: The rows of the log that cannot be read, or whose positions cannot, as ranges [start, stop)
            without those that no examined commit holds. There may be none: metadata, indexes and checksums of
            chunks that zarr needs.
        commits: The examined commits that hold any of these rows; if there are none, that have others in the
            damaged shard.
    """

    path: StorePath
    problem: str
    array: str | None = None
    stream: int | None = None
    chunk: int | None = None
    rows: Ranges = ()
    commits: tuple[str, ...] = ()


def damage_of(
    error: Exception, path: StorePath, array: str | None = None, stream: int | None = None
) -> Damage:
    """The damage to a file that an error tells of; raises the error if it tells of none."""
    if not isinstance(error, OSError):
        return Damage(path, str(error).removeprefix(f"{path}: "), array, stream)
    if error.errno not in _DAMAGE:
        # Such as a file of somebody else's: what is in it may be whole.
        raise error
    return Damage(path, f"expected a file that can be read, got {error.strerror}", array, stream)


def file_problem(path: StorePath, expected: int) -> str | None:
    """What is wrong with a chunk file as a whole, if anything is."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "expected a chunk file, got no such file"
    if not stat.S_ISREG(found.st_mode):
        return "expected a chunk file, got something else"
    size = found.st_size
    return None if size == expected else f"expected a chunk file of {expected} bytes, got {size}"


def ranges_of(rows: NDArray[np.int64]) -> Ranges:
    """Ascending numbers [k] as ranges [start, stop)."""
    parts = np.split(rows, np.nonzero(np.diff(rows) != 1)[0] + 1)
    return tuple((int(part[0]), int(part[-1]) + 1) for part in parts)
