"""Shards in an object store: read in parts, and put before any commit names them.

Inner chunks that had to be decompressed are kept, up to some MiB: rows that are asked for together are often
near each other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.layout import KINDS, METADATA, Layout, plain_group_document
from xlroute.memory.object_parts import read_parts, read_rows
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.s3 import S3Path, in_parallel
from xlroute.memory.sealed import encode
from xlroute.memory.shards import (
    SHARDS,
    OpenShard,
    Shard,
    ShardArray,
    ShardFile,
    Source,
    check_size,
    missing_file,
    shard_documents,
    shard_name,
    write_arrays,
)

_CACHE_BYTES = 32 * 2**20
_AT_ONCE_BYTES = 32 * 2**20  # of inner chunks that are fetched at once
_AHEAD_BYTES = 4 * 2**20


class InnerChunks:
    """Rows of the inner chunks that were decompressed last, for several threads."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[S3Path, int], Bytes] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, path: S3Path, number: int) -> Bytes | None:
        """The rows of an inner chunk, if they are kept."""
        with self._lock:
            rows = self._rows.get((path, number))
            if rows is not None:
                self._rows.move_to_end((path, number))
            return rows

    def keep(self, path: S3Path, number: int, rows: Bytes) -> None:
        """Keeps the rows of an inner chunk, in place of those that nobody has asked for the longest."""
        with self._lock:
            if (path, number) not in self._rows:
                self._rows[path, number] = rows
                self._bytes += rows.nbytes
            while self._bytes > _CACHE_BYTES:
                _, oldest = self._rows.popitem(last=False)
                self._bytes -= oldest.nbytes


class ShardObject(ShardFile):
    """One file of a shard in an object store.

    Args:
        path: The object.
        array: The array that is in it.
        kept: Inner chunks of the store.
    """

    path: S3Path

    def __init__(self, path: S3Path, array: ShardArray, kept: InnerChunks) -> None:
        self._kept = kept
        super().__init__(path, array)

    def read(self, start: int, count: int) -> bytes:
        """See `ShardFile`.

        Raises:
            CorruptionError: The object is missing or of another length.
        """
        return read_parts(self.path, [start], [count], self.check_size)[0]

    def take(self, layer: int, rows: NDArray[np.int64]) -> Bytes:
        """See `ShardFile`; of what is not compressed, the rows alone are fetched."""
        array = self.array
        if array.level is not None:
            return super().take(layer, rows)
        numbers, local = np.divmod(rows, array.inner_rows)
        starts = (numbers + layer * array.inners) * array.stride + local * array.row_bytes
        return read_rows(self.path, starts, array.row_bytes, self.check_size)

    def _decoded(self, numbers: Sequence[int]) -> Iterator[Bytes]:
        at_once = max(1, _AT_ONCE_BYTES // (self.array.inner_rows * self.array.row_bytes))
        for first in range(0, len(numbers), at_once):
            batch = numbers[first : first + at_once]
            found = {each: rows for each in batch if (rows := self._kept.get(self.path, each)) is not None}
            if missing := [each for each in batch if each not in found]:
                starts, counts = zip(*map(self.place, missing), strict=True)
                parts = read_parts(self.path, starts, counts, self.check_size)
                for each, part in zip(missing, parts, strict=True):
                    found[each] = self._decode(part)
                    self._kept.keep(self.path, each, found[each])
            yield from (found[each] for each in batch)

    def check_size(self, size: int | None) -> None:
        """Raises CorruptionError unless `size` is that of the object; None stands for no object."""
        if size is None:
            raise missing_file(self.path)
        check_size(self.path, self.array, size)


class ShardObjectAhead(ShardObject):
    """One file of a shard that is read from its beginning to its end, a few MiB at a time."""

    _start = 0
    _data = b""

    def read(self, start: int, count: int) -> bytes:
        """See `ShardFile`."""
        if not self._start <= start <= start + count <= self._start + len(self._data):
            self._data = super().read(start, min(max(count, _AHEAD_BYTES), self.array.size - start))
            self._start = start
        return self._data[start - self._start : start - self._start + count]


def open_shard(
    root: S3Path, layout: Layout, stream: int, shard: Shard, kept: InnerChunks
) -> OpenShard[ShardObject]:
    """A shard to read some rows of. That its objects are whole is seen when they are read.

    Args:
        root: Folder of the store.
        layout: Its layout.
        stream: Stream.
        shard: The shard.
        kept: Inner chunks of the store.

    Raises:
        CorruptionError: The index is missing or damaged, and needed.
        OSError: The object store refused, or cannot be reached.
    """
    return OpenShard(shard, [ShardObject(*each, kept) for each in _objects(root, layout, stream, shard)])


def open_shard_ahead(root: S3Path, layout: Layout, stream: int, shard: Shard) -> OpenShard[ShardObject]:
    """A shard to read from its beginning to its end; arguments and errors are those of `open_shard`."""
    files = (ShardObjectAhead(*each, InnerChunks()) for each in _objects(root, layout, stream, shard))
    return OpenShard(shard, files)


def put_shard(root: S3Path, layout: Layout, stream: int, shard: Shard, source: Source) -> Shard:
    """Puts a shard, whole or not at all.

    Args:
        root: Folder of the store.
        layout: Its layout.
        stream: Stream.
        shard: The shard.
        source: Where rows and checksums come from.

    Returns:
        The shard with the size of its rows.

    Raises:
        OSError: The object store refused, or cannot be reached.
    """
    folder = root / SHARDS / shard_name(stream, shard)
    try:
        with ExitStack() as stack:
            sinks = [stack.enter_context(path.writing()) for path, _ in _objects(root, layout, stream, shard)]
            shard = write_arrays(layout, shard, source, sinks)
        files = [(root / SHARDS / METADATA, plain_group_document())]
        files += ((folder / name, document) for name, document in shard_documents(layout, shard))
        in_parallel(lambda file: file[0].write_bytes(encode(file[1])), files)
    except BaseException:
        with suppress(OSError):
            folder.delete(folder.sizes())
        raise
    return shard


def _objects(root: S3Path, layout: Layout, stream: int, shard: Shard) -> Iterator[tuple[S3Path, ShardArray]]:
    """The objects of rows and of checksums, each with the array that is in it."""
    for kind in KINDS:
        array = ShardArray(layout, shard, kind)
        yield root / SHARDS / shard_name(stream, shard) / array.name, array
