"""Chunk files: rows and their checksums, written in place and checked on every read; and shards of such rows.

The checksum of a row is the CRC32C of its bytes, combined by exclusive or with 32 bits that stand for its
address: the layer, the stream, the row's number in the log and the number of the writer that wrote it. So a
row that was damaged is noticed, and so is a whole row, with its checksum, at the wrong place: from another
array or another row, or left by a writer whose rows no commit refers to.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from xlroute.memory.errors import CommitNotFoundError, CorruptionError
from xlroute.memory.layout import COMMITS, KINDS, METADATA, Layout, read_room
from xlroute.memory.log import Extent
from xlroute.memory.maps import FileMap
from xlroute.memory.place import StorePath, list_names
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.sealed import encode, replace_file, sync, write_all
from xlroute.memory.shard_files import MappedShard, OpenShardFile, map_shard, open_shard, write_shard
from xlroute.memory.shards import (
    SHARDS,
    OpenShard,
    Shard,
    ShardArray,
    Source,
    in_shards,
    list_shards,
    outside,
    shard_name,
    with_rows,
)

# Of two files each; a process may have 65,530 by default.
_MAX_MAPS = 4096
BLOCK_BYTES = 4 * 2**20
_NO_PART = np.iinfo(np.int64).max


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


def wrong_rows(
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


class Scanned(NamedTuple):
    """Rows as they were found on disk, whatever state they are in.

    Attributes:
        data: Their bytes, [k, row_bytes].
        checksums: What is stored as their checksums, [k].
        wrong: Numbers in the log of those that do not have theirs.
    """

    data: Bytes
    checksums: NDArray[np.uint32]
    wrong: NDArray[np.int64]


class _OpenChunk(NamedTuple):
    """Files of a chunk that are open; it reads as `OpenShard` does, rows that follow each other."""

    first: int
    row_bytes: int
    rows: int
    checksums: int

    def take(self, layer: int, rows: NDArray[np.int64]) -> tuple[Bytes, NDArray[np.uint32]]:
        local = int(rows[0]) - self.first
        data = np.empty((rows.shape[0], self.row_bytes), np.uint8)
        stored = np.empty(rows.shape[0], np.dtype("<u4"))
        os.preadv(self.rows, [data.data], local * self.row_bytes)
        os.preadv(self.checksums, [stored.data], local * 4)
        return data, stored


class _MappedChunk(NamedTuple):
    """Files of a chunk that are mapped; it reads as `OpenShard` does."""

    first: int
    rows: Bytes
    checksums: NDArray[np.uint32]
    memory: FileMap  # of the rows

    def take(self, layer: int, rows: NDArray[np.int64]) -> tuple[Bytes, NDArray[np.uint32]]:
        local = rows - self.first
        return self.rows.take(local, 0), self.checksums.take(local)

    def prefetch(self, layer: int, rows: NDArray[np.int64]) -> None:
        size = self.rows.shape[1]
        for row in (rows - self.first).tolist():
            self.memory.advise(mmap.MADV_WILLNEED, row * size, (row + 1) * size)


# A chunk is known by its layer, stream and number; a shard by its stream and what it is.
_Key = tuple[int, int, int] | tuple[int, Shard]
_Mapped = _MappedChunk | MappedShard


class Chunks(ABC):
    """The chunk files of a store, and the shards that take the place of some, wherever it is.

    Args:
        root: Folder of the store.
        layout: Its layout.
        record: The commit record that a reader relies on: once it is gone, so may be its rows. None while the
            store is open for writing: what is held here stays.
        shards: The shards of each stream that rows are read from, in the order of their rows.
    """

    def __init__(
        self,
        root: StorePath,
        layout: Layout,
        record: StorePath | None,
        shards: Sequence[Sequence[Shard]] = (),
    ) -> None:
        self.root = root
        self.layout = layout
        self.record = record
        self.shards: Sequence[Sequence[Shard]] = shards or [()] * layout.streams
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
        self._copy(layer, stream, rows, data, stored)
        wrong = wrong_rows(layer, stream, data, stored, rows, writers)
        if wrong.size:
            row = int(wrong[0])
            [(shard, _)] = in_shards([Extent(row, row + 1, 0)], self.shards[stream])
            raise self._wrong_row(layer, stream, row, shard)
        return data

    def blocks(self, layer: int, stream: int, extents: Iterable[Extent]) -> Iterator[Bytes]:
        """Reads whole extents in order, in blocks of a few MiB [k, row_bytes], and checks every row.

        Raises:
            CorruptionError: A row, or the file it is in, is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """
        for found in self.checked(layer, stream, extents):
            yield found.data

    def checked(self, layer: int, stream: int, extents: Iterable[Extent]) -> Iterator[Scanned]:
        """As `blocks`, with the checksums that are stored."""
        parts = [*self.parts(stream, extents)]
        for _, part in parts:
            self._check_room(layer, stream, part.stop)
        for shard, found in self._scan_all(layer, stream, parts):
            if found.wrong.size:
                raise self._wrong_row(layer, stream, int(found.wrong[0]), shard)
            yield found

    def _scan_all(
        self, layer: int, stream: int, parts: Iterable[tuple[Shard | None, Extent]]
    ) -> Iterator[tuple[Shard | None, Scanned]]:
        """As `scan`, for several extents."""
        for shard, part in parts:
            for found in self.scan(layer, stream, part, shard):
                yield shard, found

    @abstractmethod
    def prefetch(self, layer: int, stream: int, rows: NDArray[np.int64]) -> None:
        """Begins to fetch rows [k] that will be read soon, where that is of use.

        Raises:
            CorruptionError: The file that a row is in is damaged or missing.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """

    @abstractmethod
    def scan(self, layer: int, stream: int, piece: Extent, shard: Shard | None = None) -> Iterator[Scanned]:
        """Reads an extent that lies in one chunk, or in a shard, in blocks of a few MiB.

        Raises:
            CorruptionError: A file is missing or of another length, or cannot be decompressed.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """

    @abstractmethod
    def opened_shard(self, stream: int, shard: Shard) -> AbstractContextManager[OpenShard[Any]]:
        """A shard that is read from its first inner chunk to its last.

        Raises:
            CorruptionError: A file is missing or of another length, or an index is damaged and needed.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """

    @abstractmethod
    def check_present(self, layer: int, stream: int, extents: Iterable[Extent]) -> None:
        """Checks that all files of the extents are there and whole, before anyone makes room for the rows.

        Raises:
            CorruptionError: A file is missing or truncated, or the index of a shard is damaged and needed.
            CommitNotFoundError: The rows are gone because the commit was dropped.
        """

    @abstractmethod
    def _copy(
        self,
        layer: int,
        stream: int,
        rows: NDArray[np.int64],
        data: Bytes,
        stored: NDArray[np.uint32],
    ) -> None:
        """Copies single rows [k] and what is stored as their checksums into `data` and `stored` [k]."""

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

    def parts(self, stream: int, extents: Iterable[Extent]) -> Iterator[tuple[Shard | None, Extent]]:
        """Splits extents where files end: each part, and the shard it is in; None for one chunk file."""
        for shard, part in in_shards(extents, self.shards[stream]):
            if shard is not None:
                yield shard, part
                continue
            for _, start, stop in self.pieces(part.start, part.stop):
                yield None, part._replace(start=start, stop=stop)

    def _grouped(
        self, stream: int, rows: NDArray[np.int64]
    ) -> Iterator[tuple[int | Shard, NDArray[np.int64]]]:
        """The shards, and the numbers of the chunks elsewhere, that hold any of the rows [k].

        Each comes with the indices of the rows that it holds, in the order of the log.
        """
        order = np.argsort(rows)
        ordered = rows[order]
        parts = ordered // self.layout.chunk_rows
        shards = self.shards[stream]
        if shards:
            starts, stops = np.array([(shard.start, shard.stop) for shard in shards]).T
            index = np.searchsorted(starts, ordered, side="right") - 1
            # Shards get the numbers below 0.
            parts = np.where((index >= 0) & (ordered < stops[index]), ~index, parts)
        bounds = np.flatnonzero(np.diff(parts, prepend=_NO_PART, append=_NO_PART))
        for first, last in itertools.pairwise(bounds.tolist()):
            part = int(parts[first])
            yield part if part >= 0 else shards[~part], order[first:last]

    def _place(
        self, layer: int, stream: int, row: int, shard: Shard | None
    ) -> tuple[int, Sequence[StorePath]]:
        """The number of a row in its files, and those of rows and of checksums."""
        if shard is not None:
            folder = self.root / SHARDS / shard_name(stream, shard)
            return row - shard.start, [folder / ShardArray(self.layout, shard, kind).name for kind in KINDS]
        chunk, local = divmod(row, self.layout.chunk_rows)
        return local, [self.path(layer, stream, chunk, kind) for kind in KINDS]

    def _scanned(
        self,
        layer: int,
        stream: int,
        rows: NDArray[np.int64],
        writer: int,
        data: Bytes,
        stored: NDArray[np.uint32],
    ) -> Scanned:
        """Rows [k] as they were read, and which of them are wrong."""
        writers = np.full(rows.shape[0], writer)
        return Scanned(data, stored, wrong_rows(layer, stream, data, stored, rows, writers))

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

    def _wrong_row(
        self, layer: int, stream: int, row: int, shard: Shard | None
    ) -> CorruptionError | CommitNotFoundError:
        array = self.layout.array_name(layer, stream, "rows")
        local, paths = self._place(layer, stream, row, shard)
        files = " and ".join(map(str, paths))
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

    @contextmanager
    def _noticed(self) -> Iterator[None]:
        """Tells damage that is found inside from rows that are gone with their commit."""
        try:
            yield
        except CorruptionError as error:
            raise self._damaged(str(error)) from error

    # Writing

    @abstractmethod
    def write(
        self, layer: int, stream: int, start: int, data: Bytes, writer: int, *, fresh_from: int
    ) -> None:
        """Writes rows and their checksums at row `start` of the log.

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

    def _checksums(self, layer: int, stream: int, start: int, data: Bytes, writer: int) -> NDArray[np.uint32]:
        """The checksums of the rows from `start` on [k, row_bytes] as they are written, [k]."""
        rows = np.arange(start, start + data.shape[0])
        bits = address_bits(layer, stream, rows, np.full(data.shape[0], writer))
        return (row_checksums(data) ^ bits).astype("<u4")

    @abstractmethod
    def write_shard(self, stream: int, start: int, stop: int, level: int | None, source: Source) -> Shard:
        """Writes rows `start` to `stop` of the log as a shard, whole or not at all, to the medium.

        Args:
            stream: Stream.
            start: First row.
            stop: The row after the last one.
            level: Of compression with zstd, or None.
            source: Where rows and checksums come from.

        Raises:
            OSError: The operating system refused.
            StoreLockedError: Somebody else has taken the store over.
        """

    @abstractmethod
    def delete_shards(self, names: Collection[str]) -> None:
        """Deletes shards, whole or in part, by the names of their folders.

        Raises:
            OSError: The operating system refused.
        """

    @abstractmethod
    def _known_shards(self) -> set[str]:
        """The names of the folders of shards that are there, but for those of a writer who has taken over."""

    @abstractmethod
    def _delete(self, stream: int, chunks: Sequence[int]) -> None:
        """Deletes the files of chunks in all layers."""

    def hold(self, holder: Holder) -> None:
        """Keeps the files of the holder's extents for as long as the holder lives."""
        self._holders.add(holder)

    def release(self, stream: int, extents: Iterable[Extent], end: int) -> None:
        """Deletes the files of a stream's chunks that nothing refers to; zarr then reads fill values there.

        Args:
            stream: Stream.
            extents: The rows that any commit has in chunk files.
            end: The end of the log. The chunk that it is in stays: it will be written to.

        Raises:
            OSError: The operating system refused.
        """
        present = self._list_present(stream)
        needed = {*extents}
        for holder in self._holders:
            if holder.stream == stream:
                needed.update(outside(holder.extents, self.shards[stream]))
        for extent in needed:
            present = present - {chunk for chunk, _, _ in self.pieces(extent.start, extent.stop)}
        gone = [chunk for chunk in sorted(present) if (chunk + 1) * self.layout.chunk_rows <= end]
        self._delete(stream, gone)
        self._present[stream].difference_update(gone)

    def release_shards(self, named: Collection[tuple[int, Shard]]) -> None:
        """Deletes the shards that nothing refers to, and what a crash has left of others.

        Args:
            named: The shards that any commit names, each with its stream.

        Raises:
            OSError: The operating system refused.
        """
        needed = {*named}
        for holder in self._holders:
            held = with_rows(self.shards[holder.stream], holder.extents)
            needed.update((holder.stream, shard) for shard in held)
        self.shards = [
            [shard for shard in shards if (stream, shard) in needed]
            for stream, shards in enumerate(self.shards)
        ]
        gone = self._known_shards() - {shard_name(*each) for each in needed}
        if gone:
            self.delete_shards(gone)

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
    """The chunk files of a store in a folder, written in place, and its shards.

    Args:
        root: As for `Chunks`.
        layout: As for `Chunks`.
        record: As for `Chunks`.
        shards: As for `Chunks`.
        new: Whether the store is still being made, so that no commit needs its metadata yet.
    """

    root: Path

    def __init__(
        self,
        root: Path,
        layout: Layout,
        record: StorePath | None,
        *,
        shards: Sequence[Sequence[Shard]] = (),
        new: bool = False,
    ) -> None:
        super().__init__(root, layout, record, shards)
        self._new = new
        self._maps: OrderedDict[_Key, _Mapped] = OrderedDict()
        self._unsynced: set[Path] = set()

    # Reading

    def path(self, layer: int, stream: int, chunk: int, kind: str) -> Path:
        """See `Chunks`."""
        layout = self.layout
        return self.root / layout.array_name(layer, stream, kind) / layout.chunk_name(chunk, kind)

    def prefetch(self, layer: int, stream: int, rows: NDArray[np.int64]) -> None:
        """Asks the operating system to fetch rows; it does so meanwhile."""
        for files, chosen in self._mapped(layer, stream, rows):
            files.prefetch(layer, rows[chosen])

    def scan(self, layer: int, stream: int, piece: Extent, shard: Shard | None = None) -> Iterator[Scanned]:
        """See `Chunks`."""
        step = max(1, BLOCK_BYTES // self.layout.row_bytes)
        chunk = piece.start // self.layout.chunk_rows
        opened = self._opened(layer, stream, chunk) if shard is None else self.opened_shard(stream, shard)
        with opened as files:
            for low in range(piece.start, piece.stop, step):
                rows = np.arange(low, min(low + step, piece.stop))
                with self._noticed():
                    data, stored = files.take(layer, rows)
                yield self._scanned(layer, stream, rows, piece.writer, data, stored)

    def check_present(self, layer: int, stream: int, extents: Iterable[Extent]) -> None:
        """See `Chunks`."""
        for shard, part in self.parts(stream, extents):
            if shard is not None:
                self._map_shard(stream, shard)
                continue
            for kind in KINDS:
                path = self.path(layer, stream, part.start // self.layout.chunk_rows, kind)
                try:
                    size = path.stat().st_size
                except (FileNotFoundError, NotADirectoryError) as error:
                    raise self._missing(path) from error
                self._check_size(path, size, kind)

    def _copy(
        self,
        layer: int,
        stream: int,
        rows: NDArray[np.int64],
        data: Bytes,
        stored: NDArray[np.uint32],
    ) -> None:
        """See `Chunks`; through memory maps."""
        for files, chosen in self._mapped(layer, stream, rows):
            with self._noticed():
                data[chosen], stored[chosen] = files.take(layer, rows[chosen])

    def _mapped(
        self, layer: int, stream: int, rows: NDArray[np.int64]
    ) -> Iterator[tuple[_Mapped, NDArray[np.int64]]]:
        """The mapped files that hold any of the rows [k], each with the indices of the rows it holds."""
        for part, chosen in self._grouped(stream, rows):
            if isinstance(part, Shard):
                yield self._map_shard(stream, part), chosen
            else:
                yield self._map(layer, stream, part), chosen

    @contextmanager
    def _opened(self, layer: int, stream: int, chunk: int) -> Iterator[_OpenChunk]:
        """The files of a chunk, both of the right size."""
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
            yield _OpenChunk(chunk * self.layout.chunk_rows, self.layout.row_bytes, *files)

    @contextmanager
    def opened_shard(self, stream: int, shard: Shard) -> Iterator[OpenShard[OpenShardFile]]:
        """See `Chunks`."""
        with ExitStack() as stack:
            with self._noticed():
                opened = stack.enter_context(open_shard(self.root, self.layout, stream, shard))
            yield opened

    def _map(self, layer: int, stream: int, chunk: int) -> _Mapped:
        """A chunk as memory."""
        key = layer, stream, chunk
        if key in self._maps:
            self._maps.move_to_end(key)
            return self._maps[key]
        with self._opened(layer, stream, chunk) as files:
            memory, sums = (
                FileMap(file, self.layout.chunk_bytes(kind))
                for file, kind in zip((files.rows, files.checksums), KINDS, strict=True)
            )
        for each in (memory, sums):
            # Rows are chosen by content: reading ahead would read what nobody asked for.
            each.advise(mmap.MADV_RANDOM)
        rows = memory.data.reshape(self.layout.chunk_rows, self.layout.row_bytes)
        return self._kept(key, _MappedChunk(files.first, rows, sums.data.view("<u4"), memory))

    def _map_shard(self, stream: int, shard: Shard) -> _Mapped:
        """A shard as memory."""
        key = stream, shard
        if key in self._maps:
            self._maps.move_to_end(key)
            return self._maps[key]
        with self._noticed():
            opened = map_shard(self.root, self.layout, stream, shard)
        return self._kept(key, opened)

    def _kept(self, key: _Key, files: _Mapped) -> _Mapped:
        """The files, which are kept among the maps that were used last."""
        self._maps[key] = files
        if len(self._maps) > _MAX_MAPS:
            self._maps.popitem(last=False)
        return files

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

    def write_shard(self, stream: int, start: int, stop: int, level: int | None, source: Source) -> Shard:
        """See `Chunks`."""
        return write_shard(self.root, self.layout, stream, start, stop, level, source)

    def delete_shards(self, names: Collection[str]) -> None:
        """See `Chunks`."""
        for name in sorted(names):
            shutil.rmtree(self.root / SHARDS / name)
        # A map would keep what is in a deleted file on the disk.
        for key in [key for key in self._maps if len(key) == 2 and shard_name(*key) in names]:
            del self._maps[key]

    def _known_shards(self) -> set[str]:
        return list_shards(self.root)

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
            parts = self.parts(stream, extents)
            # Shards are on the medium before any commit names them.
            chunks = {part.start // self.layout.chunk_rows for shard, part in parts if shard is None}
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
