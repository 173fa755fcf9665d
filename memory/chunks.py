"""Chunk files: rows and their checksums, written in place and checked on every read.

The checksum of a row is the CRC32C of its bytes, combined by exclusive or with 32 bits that stand for its
address: the layer, the stream, the row's number in the log and the number of the writer that wrote it. So a
row that was damaged is noticed, and so is a whole row, with its checksum, at the wrong place: from another
array or another row, or left by a writer whose rows no commit refers to.
"""

from __future__ import annotations

import itertools
import mmap
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakSet

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from xlroute.memory.errors import CommitNotFoundError, CorruptionError
from xlroute.memory.layout import COMMITS, KINDS, METADATA, Layout, read_room
from xlroute.memory.log import Extent
from xlroute.memory.place import StorePath, list_names
from xlroute.memory.sealed import encode, replace_file, sync, write_all

Bytes = NDArray[np.uint8]
# A map holds a file descriptor, of which a process has 1,024 by default.
_MAX_MAPS = 128
BLOCK_BYTES = 4 * 2**20


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def address_bits(
    layer: int, stream: int, rows: NDArray[np.int64], writers: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """The 32 bits that stand for the addresses of rows [k], [k]."""
    bits = _mixed(writers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    bits = _mixed(bits ^ np.uint64(layer << 32 ^ stream))
    bits = _mixed(bits ^ rows.astype(np.uint64))
    return (bits >> np.uint64(32)).astype(np.uint32)


def row_checksums(data: Bytes) -> NDArray[np.uint32]:
    """CRC32C of every row of `data` [k, row_bytes], [k]."""
    # A row of an array is read where it is; slices of its bytes would be copied first.
    return np.fromiter(map(google_crc32c.value, np.ascontiguousarray(data)), np.uint32, data.shape[0])


def _wrong_rows(
    layer: int,
    stream: int,
    data: Bytes,
    stored: NDArray[np.uint32],
    rows: NDArray[np.int64],
    writers: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Those of `rows` [k] whose bytes [k, row_bytes] do not have the checksum that is stored for them [k]."""
    wrong = row_checksums(data) != stored ^ address_bits(layer, stream, rows, writers)
    return rows[np.nonzero(wrong)[0]]


class Holder(Protocol):
    """Somebody in this process who may still read rows of a stream."""

    @property
    def stream(self) -> int:
        """The stream."""

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The rows that may be read."""


class _Chunk(NamedTuple):
    rows: Bytes
    checksums: NDArray[np.uint32]
    memory: mmap.mmap  # of the rows


class Chunks(ABC):
    """The chunk files of a store, wherever it is.

    Args:
        root: Folder of the store.
        layout: Its layout.
        record: The commit record that a reader relies on: once it is gone, so may be its rows. None while the
            store is open for writing: what is held here stays.
    """

    def __init__(self, root: StorePath, layout: Layout, record: StorePath | None) -> None:
        self.root = root
        self.layout = layout
        self.record = record
        self._room: dict[tuple[int, int], int] = {}
        self._present: dict[int, set[int]] = {}
        self._holders: WeakSet[Holder] = WeakSet()

    # Reading

    def read(self, layer: int, stream: int, rows: NDArray[np.int64], writers: NDArray[np.int64]) -> Bytes:
        """Copies single rows and checks them.

        Args:
            layer: Layer.
            stream: Stream.
            rows: Numbers of the rows in the log, [k].
            writers: Who wrote them, [k].

        Returns:
            Their bytes, [k, row_bytes].

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        self._check_room(layer, stream, int(rows.max(initial=-1)) + 1)
        data = np.empty((rows.shape[0], self.layout.row_bytes), np.uint8)
        stored = np.empty(rows.shape[0], np.uint32)
        chunks, local = np.divmod(rows, self.layout.chunk_rows)
        order = np.argsort(chunks, kind="stable")
        bounds = np.flatnonzero(np.diff(chunks[order], prepend=-1, append=-1))
        parts = [order[first:last] for first, last in itertools.pairwise(bounds.tolist())]
        self._copy(layer, stream, [(int(chunks[part[0]]), part) for part in parts], local, data, stored)
        wrong = _wrong_rows(layer, stream, data, stored, rows, writers)
        if wrong.size:
            raise self._wrong_row(layer, stream, int(wrong[0]))
        return data

    def blocks(self, layer: int, stream: int, extents: Iterable[Extent]) -> Iterator[Bytes]:
        """Reads whole extents in order, in blocks of a few MiB [k, row_bytes], and checks every row.

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        for extent in extents:
            self._check_room(layer, stream, extent.stop)
            pieces = (
                extent._replace(start=start, stop=stop)
                for _, start, stop in self.pieces(extent.start, extent.stop)
            )
            for data, wrong in self._scan_all(layer, stream, pieces):
                if wrong.size:
                    raise self._wrong_row(layer, stream, int(wrong[0]))
                yield data

    def _scan_all(
        self, layer: int, stream: int, pieces: Iterable[Extent]
    ) -> Iterator[tuple[Bytes, NDArray[np.int64]]]:
        """As `scan`, for extents that lie in one chunk each."""
        for piece in pieces:
            yield from self.scan(layer, stream, piece)

    @abstractmethod
    def prefetch(self, layer: int, stream: int, rows: NDArray[np.int64]) -> None:
        """Begins to fetch rows [k] that will be read soon, where that is of use.

        Raises:
            CorruptionError: The file that a row is in is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """

    @abstractmethod
    def check_present(self, layer: int, stream: int, extents: Iterable[Extent]) -> None:
        """Checks that all files of the extents are there and whole, before anyone makes room for the rows.

        Raises:
            CorruptionError: A file is missing or truncated.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """

    @abstractmethod
    def write(
        self, layer: int, stream: int, start: int, data: Bytes, writer: int, *, fresh_from: int
    ) -> None:
        """Writes rows and their checksums, at row `start` of the log.

        Args:
            layer: Layer.
            stream: Stream.
            start: First row.
            data: Bytes of the rows, [k, row_bytes].
            writer: Number of the writer.
            fresh_from: First row that no commit refers to. A short file from there on is what a killed writer
                left; before, it is damage.

        Raises:
            OSError: The operating system refused; nothing that a commit refers to has changed.
            CorruptionError: The file to write to, or the metadata of the array, is damaged.
        """

    @abstractmethod
    def _copy(
        self,
        layer: int,
        stream: int,
        parts: Sequence[tuple[int, NDArray[np.int64]]],
        local: NDArray[np.int64],
        data: Bytes,
        stored: NDArray[np.uint32],
    ) -> None:
        """Copies single rows and what is stored as their checksums.

        Args:
            layer: Layer.
            stream: Stream.
            parts: For each chunk, its number and where its rows are in the other arguments.
            local: Numbers of the rows in their chunks, [k].
            data: Where the bytes of the rows go, [k, row_bytes].
            stored: Where the checksums go, [k].
        """

    @abstractmethod
    def _blocks_of(
        self, layer: int, stream: int, chunk: int, start: int, stop: int
    ) -> Iterator[tuple[Bytes, NDArray[np.uint32]]]:
        """Rows `start` to `stop` of a chunk and what is stored as their checksums, a few MiB at a time."""

    @abstractmethod
    def _delete(self, stream: int, chunks: Sequence[int]) -> None:
        """Deletes the files of chunks in all layers."""

    def _checksums(self, layer: int, stream: int, start: int, data: Bytes, writer: int) -> NDArray[np.uint32]:
        """The checksums of the rows from `start` on [k, row_bytes] as they are written, [k]."""
        rows = np.arange(start, start + data.shape[0])
        bits = address_bits(layer, stream, rows, np.full(data.shape[0], writer))
        return (row_checksums(data) ^ bits).astype("<u4")

    def scan(self, layer: int, stream: int, piece: Extent) -> Iterator[tuple[Bytes, NDArray[np.int64]]]:
        """Reads an extent that lies in one chunk, in blocks of a few MiB, whatever state its rows are in.

        Yields:
            Bytes of rows, [k, row_bytes]; and which of these rows of the log do not have their checksum.

        Raises:
            CorruptionError: A file is missing or truncated.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        chunk = piece.start // self.layout.chunk_rows
        first = chunk * self.layout.chunk_rows
        low = piece.start
        for data, stored in self._blocks_of(layer, stream, chunk, piece.start - first, piece.stop - first):
            rows = np.arange(low, low + data.shape[0])
            yield data, _wrong_rows(layer, stream, data, stored, rows, np.full(rows.size, piece.writer))
            low += data.shape[0]

    @abstractmethod
    def path(self, layer: int, stream: int, chunk: int, kind: str) -> StorePath:
        """The file of a chunk's rows or of their checksums."""

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Splits rows `start` to `stop` at the ends of chunks: (chunk, start, stop)."""
        size = self.layout.chunk_rows
        while start < stop:
            chunk = start // size
            end = min(stop, (chunk + 1) * size)
            yield chunk, start, end
            start = end

    def _missing(self, path: StorePath) -> CorruptionError | CommitNotFoundError:
        return self._damaged(f"{path}: expected a chunk file, got no such file")

    def _check_size(self, path: StorePath, size: int, kind: str) -> None:
        expected = self.layout.chunk_bytes(kind)
        if size != expected:
            raise self._damaged(f"{path}: expected a chunk file of {expected} bytes, got {size}")

    def _check_room(self, layer: int, stream: int, rows: int) -> None:
        """Checks that both arrays are those of this store and have room for `rows` rows."""
        if self._room.get((layer, stream), -1) >= rows:
            return
        rooms = [read_room(self.root, self.layout, layer, stream, kind) for kind in KINDS]
        self._room[layer, stream] = min(rooms)
        for kind, room in zip(KINDS, rooms, strict=True):
            if room < rows:
                path = self.root / self.layout.array_name(layer, stream, kind) / METADATA
                raise self._damaged(f"{path}: expected room for {rows} rows, got {room}")

    def _wrong_row(self, layer: int, stream: int, row: int) -> CorruptionError | CommitNotFoundError:
        array = self.layout.array_name(layer, stream, "rows")
        chunk, local = divmod(row, self.layout.chunk_rows)
        files = " and ".join(str(self.path(layer, stream, chunk, kind)) for kind in KINDS)
        return self._damaged(
            f"{files}: expected row {local} of the files (row {row} of array {array}) to have its "
            "checksum, got another: one of the two is damaged"
        )

    def _damaged(self, message: str) -> CorruptionError | CommitNotFoundError:
        if self.record is not None and not self.record.exists():
            return CommitNotFoundError(
                f"commit {self.record.stem}: expected its rows, got a store that has dropped it since then "
                f"({message})"
            )
        return CorruptionError(message)

    def hold(self, holder: Holder) -> None:
        """Keeps the files of the holder's extents for as long as the holder lives."""
        self._holders.add(holder)

    def release(self, stream: int, extents: Iterable[Extent], end: int) -> None:
        """Deletes the files of a stream's chunks that nothing refers to; zarr then reads fill values there.

        Args:
            stream: Stream.
            extents: The rows that any commit refers to.
            end: The end of the log. The chunk that it is in stays: it will be written to.

        Raises:
            OSError: The operating system refused.
        """
        present = self._list_present(stream)
        needed = {*extents}
        needed.update(*(holder.extents for holder in self._holders if holder.stream == stream))
        for extent in needed:
            present = present - {chunk for chunk, _, _ in self.pieces(extent.start, extent.stop)}
        gone = [chunk for chunk in sorted(present) if (chunk + 1) * self.layout.chunk_rows <= end]
        self._delete(stream, gone)
        self._present[stream].difference_update(gone)

    def present_end(self, stream: int) -> int:
        """The first row of a stream beyond all of its chunk files."""
        return (max(self._list_present(stream), default=-1) + 1) * self.layout.chunk_rows

    def _list_present(self, stream: int) -> set[int]:
        """The chunks of a stream of which any file exists; the first call lists the folders."""
        if stream not in self._present:
            self._present[stream] = set().union(
                *(self.listed(layer, stream, kind) for layer in range(self.layout.layers) for kind in KINDS)
            )
        return self._present[stream]

    def listed(self, layer: int, stream: int, kind: str) -> set[int]:
        """The chunks of one array that have a file.

        Raises:
            FileNotFoundError: The folder of the array is missing.
        """
        names = {*list_names(self.root / self.layout.array_name(layer, stream, kind))}
        parts = (name.split(".") for name in names)
        chunks = (int(part[1]) for part in parts if len(part) > 1 and part[1].isdecimal())
        return {chunk for chunk in chunks if self.layout.chunk_name(chunk, kind) in names}


class ChunkFiles(Chunks):
    """The chunk files of a store in a folder, written in place.

    Args:
        root: As for `Chunks`.
        layout: As for `Chunks`.
        record: As for `Chunks`.
        new: Whether the store is still being made, so that no commit needs its metadata yet.
    """

    root: Path

    def __init__(self, root: Path, layout: Layout, record: StorePath | None, *, new: bool = False) -> None:
        super().__init__(root, layout, record)
        self._new = new
        self._maps: OrderedDict[tuple[int, int, int], _Chunk] = OrderedDict()
        self._unsynced: set[Path] = set()

    # Reading

    def path(self, layer: int, stream: int, chunk: int, kind: str) -> Path:
        """See `Chunks`."""
        return self.root / self.layout.array_name(layer, stream, kind) / self.layout.chunk_name(chunk, kind)

    def prefetch(self, layer: int, stream: int, rows: NDArray[np.int64]) -> None:
        """Asks the operating system to fetch rows; it does so meanwhile."""
        size = self.layout.row_bytes
        chunks, local = np.divmod(rows, self.layout.chunk_rows)
        for chunk, row in zip(chunks.tolist(), local.tolist(), strict=True):
            start = row * size // mmap.PAGESIZE * mmap.PAGESIZE
            memory = self._map(layer, stream, chunk).memory
            memory.madvise(mmap.MADV_WILLNEED, start, (row + 1) * size - start)

    def check_present(self, layer: int, stream: int, extents: Iterable[Extent]) -> None:
        """See `Chunks`."""
        for extent in extents:
            for chunk, _, _ in self.pieces(extent.start, extent.stop):
                for kind in KINDS:
                    path = self.path(layer, stream, chunk, kind)
                    try:
                        size = path.stat().st_size
                    except (FileNotFoundError, NotADirectoryError) as error:
                        raise self._missing(path) from error
                    self._check_size(path, size, kind)

    def _copy(
        self,
        layer: int,
        stream: int,
        parts: Sequence[tuple[int, NDArray[np.int64]]],
        local: NDArray[np.int64],
        data: Bytes,
        stored: NDArray[np.uint32],
    ) -> None:
        """See `Chunks`; through memory maps."""
        for chunk, part in parts:
            files = self._map(layer, stream, chunk)
            data[part] = files.rows[local[part]]
            stored[part] = files.checksums[local[part]]

    def _blocks_of(
        self, layer: int, stream: int, chunk: int, start: int, stop: int
    ) -> Iterator[tuple[Bytes, NDArray[np.uint32]]]:
        """See `Chunks`."""
        step = max(1, BLOCK_BYTES // self.layout.row_bytes)
        with self._opened(layer, stream, chunk) as (rows_file, checksum_file):
            for low in range(start, stop, step):
                count = min(step, stop - low)
                data = np.empty((count, self.layout.row_bytes), np.uint8)
                stored = np.empty(count, np.uint32)
                os.preadv(rows_file, [data.data], low * self.layout.row_bytes)
                os.preadv(checksum_file, [stored.data], low * 4)
                yield data, stored

    @contextmanager
    def _opened(self, layer: int, stream: int, chunk: int) -> Iterator[tuple[int, int]]:
        """File descriptors of a chunk's rows and checksums, both of the right size."""
        with ExitStack() as stack:
            files = []
            for kind in KINDS:
                path = self.path(layer, stream, chunk, kind)
                try:
                    file = os.open(path, os.O_RDONLY)
                except FileNotFoundError as error:
                    raise self._missing(path) from error
                stack.callback(os.close, file)
                self._check_size(path, os.fstat(file).st_size, kind)
                files.append(file)
            yield files[0], files[1]

    def _map(self, layer: int, stream: int, chunk: int) -> _Chunk:
        """A chunk as memory; the maps used last are kept."""
        key = layer, stream, chunk
        if key in self._maps:
            self._maps.move_to_end(key)
            return self._maps[key]
        with self._opened(layer, stream, chunk) as files:
            maps = [
                mmap.mmap(file, self.layout.chunk_bytes(kind), access=mmap.ACCESS_READ)
                for file, kind in zip(files, KINDS, strict=True)
            ]
        for memory in maps:
            # Rows are chosen by content: reading ahead would read what nobody asked for.
            memory.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(maps[0], np.uint8).reshape(self.layout.chunk_rows, self.layout.row_bytes)
        self._maps[key] = _Chunk(rows, np.frombuffer(maps[1], np.dtype("<u4")), maps[0])
        if len(self._maps) > _MAX_MAPS:
            self._maps.popitem(last=False)
        return self._maps[key]

    # Writing

    def write(
        self, layer: int, stream: int, start: int, data: Bytes, writer: int, *, fresh_from: int
    ) -> None:
        """See `Chunks`; in place."""
        checksums = self._checksums(layer, stream, start, data, writer)
        self._make_room(layer, stream, start + data.shape[0])
        for chunk, low, high in self.pieces(start, start + data.shape[0]):
            first = chunk * self.layout.chunk_rows
            for kind, part, size in (
                ("rows", data[low - start : high - start], self.layout.row_bytes),
                ("crc32c", checksums[low - start : high - start], 4),
            ):
                path = self.path(layer, stream, chunk, kind)
                fresh = first >= fresh_from
                try:
                    file = os.open(path, os.O_RDWR | (os.O_CREAT if fresh else 0), 0o666)
                except FileNotFoundError as error:
                    raise self._missing(path) from error
                if stream in self._present:
                    self._present[stream].add(chunk)
                try:
                    self._unsynced.update((path, path.parent))
                    length = os.fstat(file).st_size
                    if fresh and length != self.layout.chunk_bytes(kind):
                        os.ftruncate(file, self.layout.chunk_bytes(kind))
                    else:
                        self._check_size(path, length, kind)
                    write_all(file, np.ascontiguousarray(part).data.cast("B"), (low - first) * size)
                finally:
                    os.close(file)

    def _make_room(self, layer: int, stream: int, rows: int) -> None:
        """Grows the arrays, in their metadata alone, to hold `rows` rows."""
        if self._room.get((layer, stream), -1) >= rows:
            return
        for kind in KINDS:
            if read_room(self.root, self.layout, layer, stream, kind) < rows:
                path = self.root / self.layout.array_name(layer, stream, kind) / METADATA
                document = self.layout.array_document(kind, self.layout.room_for(rows))
                # Every durable commit needs the file that this one takes the place of: a power cut must leave
                # the old one or the new one, whole.
                replace_file(path, encode(document), scratch=self.root / COMMITS, durable=not self._new)
        self._check_room(layer, stream, rows)

    def _delete(self, stream: int, chunks: Sequence[int]) -> None:
        for chunk in chunks:
            for layer in range(self.layout.layers):
                self._maps.pop((layer, stream, chunk), None)
                for kind in KINDS:
                    path = self.path(layer, stream, chunk, kind)
                    self._unsynced.discard(path)
                    path.unlink(missing_ok=True)

    # Durability

    def mark_unsynced(self, streams: Iterable[Iterable[Extent]]) -> None:
        """Notes that all metadata and the files of every stream's extents may not be on the medium."""
        commits = self.root / COMMITS
        self._unsynced.update(
            (self.root / METADATA, commits / METADATA, commits, self.root, self.root.parent)
        )
        for stream, extents in enumerate(streams):
            chunks = {chunk for extent in extents for chunk, _, _ in self.pieces(extent.start, extent.stop)}
            for layer in range(self.layout.layers):
                for kind in KINDS:
                    folder = self.root / self.layout.array_name(layer, stream, kind)
                    self._unsynced.update((folder / METADATA, folder))
                    self._unsynced.update(self.path(layer, stream, chunk, kind) for chunk in chunks)

    def sync(self) -> None:
        """Waits until everything written so far is on the medium.

        Raises:
            OSError: The operating system refused.
        """
        for path in sorted(self._unsynced):
            sync(path)
        self._unsynced.clear()
