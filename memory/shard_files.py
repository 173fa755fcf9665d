"""Shards in a folder: read through memory maps or piece by piece, and on the medium once they are written."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.layout import COMMITS, KINDS, METADATA, Layout, plain_group_document
from xlroute.memory.maps import FileMap
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.sealed import encode, replace_file, sync, write_all
from xlroute.memory.shards import (
    CRC_BYTES,
    SHARDS,
    OpenShard,
    Shard,
    ShardArray,
    ShardFile,
    Source,
    check_size,
    checksum_bytes,
    has_checksum,
    missing_file,
    new_shard,
    shard_documents,
    shard_name,
    write_arrays,
)


class OpenShardFile(ShardFile):
    """One file of a shard that is read piece by piece.

    Args:
        path: The file.
        array: The array that is in it.
        file: Its descriptor, which is not closed.
    """

    path: Path

    def __init__(self, path: Path, array: ShardArray, file: int) -> None:
        self._file = file
        super().__init__(path, array)

    def read(self, start: int, count: int) -> bytes:
        """See `ShardFile`."""
        return os.pread(self._file, count, start)


class MappedShardFile(ShardFile):
    """One file of a shard as memory.

    Args:
        path: The file.
        array: The array that is in it.
        file: Its descriptor, which can be closed afterwards.
    """

    def __init__(self, path: Path, array: ShardArray, file: int) -> None:
        self._map = FileMap(file, array.size)
        # Rows are chosen by content: reading ahead would read what nobody asked for.
        self._map.advise(mmap.MADV_RANDOM)
        self._rows: Bytes | None = None
        if array.level is None:
            shape = array.count, array.inner_rows, array.row_bytes
            self._rows = np.ndarray(shape, np.uint8, self._map.data, 0, (array.stride, array.row_bytes, 1))
        super().__init__(path, array)

    def read(self, start: int, count: int) -> bytes:
        """See `ShardFile`."""
        return self._map.data[start : start + count].tobytes()

    def take(self, layer: int, rows: NDArray[np.int64]) -> Bytes:
        """See `ShardFile`."""
        if self._rows is None:
            return super().take(layer, rows)
        numbers, local = np.divmod(rows, self.array.inner_rows)
        found: Bytes = self._rows[numbers + layer * self.array.inners, local]
        return found

    def prefetch(self, layer: int, rows: NDArray[np.int64]) -> None:
        """Asks the operating system to fetch what the rows [k] of a layer are in."""
        numbers, local = np.divmod(rows, self.array.inner_rows)
        for number, row in zip(numbers.tolist(), local.tolist(), strict=True):
            start, count = self.place(layer * self.array.inners + number)
            if self._rows is not None:
                start, count = start + row * self.array.row_bytes, self.array.row_bytes
            self._map.advise(mmap.MADV_WILLNEED, start, start + count)


class MappedShard(OpenShard[MappedShardFile]):
    """A shard as memory."""

    def prefetch(self, layer: int, rows: NDArray[np.int64]) -> None:
        """Asks the operating system to fetch rows [k] of the log."""
        self.rows.prefetch(layer, rows - self.shard.start)


@contextmanager
def _descriptors(
    root: Path, layout: Layout, stream: int, shard: Shard
) -> Iterator[list[tuple[Path, ShardArray, int]]]:
    """The files of a shard, both of the right size, each with the array that is in it and its descriptor."""
    with ExitStack() as stack:
        found = []
        for kind in KINDS:
            array = ShardArray(layout, shard, kind)
            path = root / SHARDS / shard_name(stream, shard) / array.name
            try:
                file = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise missing_file(path) from error
            stack.callback(os.close, file)
            check_size(path, array, os.fstat(file).st_size)
            found.append((path, array, file))
        yield found


@contextmanager
def open_shard(root: Path, layout: Layout, stream: int, shard: Shard) -> Iterator[OpenShard[OpenShardFile]]:
    """A shard that is read piece by piece; at the end its files are closed.

    Args:
        root: Folder of the store.
        layout: Its layout.
        stream: Stream.
        shard: The shard.

    Raises:
        CorruptionError: A file is missing or of another length, or an index is damaged and needed.
        OSError: The operating system refused to read.
    """
    with _descriptors(root, layout, stream, shard) as found:
        yield OpenShard(shard, [OpenShardFile(*each) for each in found])


def map_shard(root: Path, layout: Layout, stream: int, shard: Shard) -> MappedShard:
    """A shard as memory; arguments and errors are those of `open_shard`."""
    with _descriptors(root, layout, stream, shard) as found:
        return MappedShard(shard, [MappedShardFile(*each) for each in found])


def write_shard(
    root: Path, layout: Layout, stream: int, start: int, stop: int, level: int | None, source: Source
) -> Shard:
    """Writes a shard, whole or not at all, and waits until it is on the medium.

    Args:
        root: Folder of the store.
        layout: Its layout.
        stream: Stream.
        start: First row of the log.
        stop: The row after the last one.
        level: Of compression with zstd, or None.
        source: Where rows and checksums come from.

    Raises:
        OSError: The operating system refused.
    """
    folder = root / SHARDS
    folder.mkdir(exist_ok=True)
    sync(root)
    if not (folder / METADATA).exists():
        replace_file(folder / METADATA, encode(plain_group_document()), scratch=root / COMMITS, durable=True)
    shard = new_shard(layout, start, stop, level)
    # Nobody looks for a shard before a commit names it: it needs no other name until it is whole.
    place = folder / shard_name(stream, shard)
    place.mkdir()
    try:
        shard = _write_files(place, layout, shard, source)
        sync(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return shard


def _write_files(folder: Path, layout: Layout, shard: Shard, source: Source) -> Shard:
    """Writes what is in the folder of a shard; returns the shard with the size of its rows."""
    with ExitStack() as stack:
        files = []
        for kind in KINDS:
            path = folder / ShardArray(layout, shard, kind).name
            path.parent.mkdir()
            files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            stack.callback(os.close, files[-1])
        shard = write_arrays(layout, shard, source, [partial(_append, file) for file in files])
        for file in files:
            os.fsync(file)
    for name, document in shard_documents(layout, shard):
        path = folder / name
        path.write_bytes(encode(document))
        sync(path)
        sync(path.parent)
    return shard


def _append(file: int, data: bytes) -> None:
    """Writes bytes at the end of an open file."""
    write_all(file, data, os.fstat(file).st_size)


def mend_checksums(file: OpenShardFile) -> bool:
    """Writes checksums of inner chunks, and an index that follows from nothing else, which do not fit anew.

    Returns:
        Whether there were any.

    Raises:
        OSError: The operating system refused.
    """
    mended = False
    array = file.array
    opened = os.open(file.path, os.O_WRONLY)
    try:
        for number in range(array.count):
            try:
                inner = file.inner(number)
            except OSError:
                continue  # the medium fails, and its rows are lost
            if not has_checksum(inner):
                start, count = file.place(number)
                write_all(opened, checksum_bytes(inner[:-CRC_BYTES]), start + count - CRC_BYTES)
                mended = True
        try:
            has_index = file.has_index()
        except OSError:
            has_index = False  # the medium fails
        if not has_index:
            write_all(opened, array.plain_index(), array.size - array.index_bytes)
            mended = True
        os.fsync(opened)
    finally:
        os.close(opened)
    return mended
