"""Parts of an object that may not be what it was: damaged, or gone with its commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.s3 import S3Path

# Called with the size of an object, or None if there is none; raises what is wrong with that, if anything is.
CheckSize = Callable[[int | None], None]


def read_parts(path: S3Path, starts: Sequence[int], lengths: Sequence[int], check: CheckSize) -> list[bytes]:
    """Parts of an object, all of them whole.

    Raises:
        OSError: The object store refused, or cannot be reached; or what `check` raises.
    """
    try:
        parts = path.read_ranges(starts, lengths)
    except FileNotFoundError:
        check(None)
        raise
    except OSError:
        # A part that begins beyond the end of the object is refused.
        _check(path, check)
        raise
    if any(len(part) != length for part, length in zip(parts, lengths, strict=True)):
        _check(path, check)
        raise OSError(f"{path}: expected parts of {sum(lengths)} bytes, got {sum(map(len, parts))}")
    return parts


def read_rows(path: S3Path, starts: NDArray[np.int64], size: int, check: CheckSize) -> Bytes:
    """The `size` bytes from each of the `starts` [k] on, [k, size]; those that follow each other as one part.

    Raises:
        OSError: As for `read_parts`.
    """
    firsts = np.flatnonzero(np.diff(starts, prepend=starts[:1] - size - 1) != size)
    counts = np.diff(firsts, append=starts.size)
    parts = read_parts(path, starts[firsts].tolist(), (counts * size).tolist(), check)
    return np.frombuffer(bytearray().join(parts), np.uint8).reshape(starts.size, size)


def _check(path: S3Path, check: CheckSize) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = None
    check(size)
