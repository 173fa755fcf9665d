"""Shards: sealed rows of a stream, of all layers, in two files that zarr reads as sharded arrays.

A shard takes the place of the files of some chunks of a stream, one after the other: the same rows under the
same numbers in the log, with the same checksums. It is written once, whole, before any commit names it. Its
arrays, rows [l, n, d] and checksums [l, n], have one zarr shard each: inner chunks of a few hundred rows of
one layer, each followed by its CRC32C, and an index at the end. Only rows may be compressed. The metadata
follow from what a commit record says of the shard, and they, the checksums of inner chunks and the index of
what is not compressed are there for zarr alone: rows have their own checksums, and inner chunks of one length
their places.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import secrets
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from xlroute.memory.errors import CorruptionError
from xlroute.memory.layout import COMMITS, KINDS, METADATA, Layout, plain_group_document
from xlroute.memory.log import Extent, within
from xlroute.memory.maps import FileMap
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.sealed import encode, replace_file, sync, write_all

SHARDS = "shards"
LEVELS = range(1, 23)
DEFAULT_LEVEL = 3
# What a shard is made of: bytes of rows of all layers in a shard, at least one chunk; and in an inner chunk.
_SHARD_BYTES = 512 * 2**20
_INNER_BYTES = 128 * 2**10
# So many inner chunks have an index that can be read as a whole, and so large a one can be decoded.
_MAX_INNER_CHUNKS = 1 << 24
_MAX_INNER_BYTES = 1 << 26
_CRC_BYTES = 4
_ENTRY_BYTES = 16
_NAME = re.compile(r"[0-9a-f]{8}")


class Shard(NamedTuple):
    """What a commit record says of a shard.

    Attributes:
        start: The first row of the log that it stands for; the first of a chunk.
        stop: The row after the last one; the first of a chunk.
        name: 8 hexadecimal digits.
        inner_rows: Rows in an inner chunk.
        level: Of compression with zstd; None where rows are as they are.
        size: Bytes of the file of rows.
    """

    start: int
    stop: int
    name: str
    inner_rows: int
    level: int | None
    size: int


def plausible(layout: Layout, shard: Shard) -> bool:
    """Whether a shard of rows can have been written so, and takes no more memory than it should to read."""
    if not _NAME.fullmatch(shard.name) or not (shard.level is None or shard.level in LEVELS):
        return False
    if not 1 <= shard.inner_rows <= max(1, _MAX_INNER_BYTES // layout.row_bytes):
        return False
    array = ShardArray(layout, shard, "rows")
    if array.count > _MAX_INNER_CHUNKS:
        return False
    return shard.size > array.index_bytes if array.level is not None else shard.size == array.plain_size


def in_shards(extents: Iterable[Extent], shards: Sequence[Shard]) -> Iterator[tuple[Shard | None, Extent]]:
    """Splits extents where shards begin and end: each part, and the shard it is in; None for chunk files."""
    for extent in extents:
        start = extent.start
        while start < extent.stop:
            index = bisect_right(shards, start, key=lambda shard: shard.stop)
            following = shards[index] if index < len(shards) else None
            inside = following is not None and following.start <= start
            stop = extent.stop
            if following is not None:
                stop = min(stop, following.stop if inside else following.start)
            yield following if inside else None, extent._replace(start=start, stop=stop)
            start = stop


def outside(extents: Iterable[Extent], shards: Sequence[Shard]) -> Iterable[Extent]:
    """The parts of extents that are in chunk files."""
    if not shards:
        return extents
    return (part for shard, part in in_shards(extents, shards) if shard is None)


def with_rows(shards: Iterable[Shard], extents: Sequence[Extent]) -> tuple[Shard, ...]:
    """Those of the shards that hold any row of the extents, which ascend."""
    return tuple(shard for shard in shards if any(within(extents, shard.start, shard.stop)))


def shard_folder(root: Path, stream: int, shard: Shard) -> Path:
    """Where a shard is."""
    return root / SHARDS / f"stream-{stream}.{shard.start}-{shard.stop}.{shard.name}"


def shard_paths(root: Path, layout: Layout, stream: int, shard: Shard) -> list[Path]:
    """The files of a shard: of rows and of checksums."""
    folder = shard_folder(root, stream, shard)
    return [folder / ShardArray(layout, shard, kind).name for kind in KINDS]


def unnamed_shards(root: Path, named: Iterable[tuple[int, Shard]]) -> list[Path]:
    """Folders of shards other than those, which are given with their streams; whole or in part."""
    try:
        found = {path for path in (root / SHARDS).iterdir() if path.is_dir() and not path.is_symlink()}
    except FileNotFoundError:
        return []
    return sorted(found - {shard_folder(root, stream, shard) for stream, shard in named})


def chunks_in_shard(layout: Layout) -> int:
    """How many chunks of a stream a new shard stands for at most."""
    return max(1, _SHARD_BYTES // (layout.layers * layout.chunk_bytes("rows")))


class ShardArray:
    """One of the two arrays of a shard: where in its file is what.

    Args:
        layout: The layout of the store.
        shard: The shard.
        kind: "rows" or "crc32c".

    Attributes:
        row_bytes: Bytes of a row of the array.
        inner_rows: Rows in an inner chunk; the last one of each layer is filled up with zeros.
        inners: Inner chunks of a layer.
        count: Inner chunks of all layers, one layer after the other.
        level: Of compression, or None.
        size: Bytes of the file.
    """

    def __init__(self, layout: Layout, shard: Shard, kind: str) -> None:
        self.row_bytes = layout.row_bytes if kind == "rows" else 4
        self.inner_rows = shard.inner_rows
        self.inners = -(-(shard.stop - shard.start) // shard.inner_rows)
        self.count = layout.layers * self.inners
        self.level = shard.level if kind == "rows" else None
        self.size = self.plain_size if self.level is None else shard.size
        self._layout = layout
        self._rows = shard.stop - shard.start
        self._kind = kind

    @property
    def index_bytes(self) -> int:
        """Bytes of the index."""
        return self.count * _ENTRY_BYTES + _CRC_BYTES

    @property
    def stride(self) -> int:
        """Bytes of an inner chunk that is not compressed, with its checksum."""
        return self.inner_rows * self.row_bytes + _CRC_BYTES

    @property
    def plain_size(self) -> int:
        """Bytes of the file if nothing in it is compressed."""
        return self.count * self.stride + self.index_bytes

    @property
    def name(self) -> str:
        """Name of the file in the folder of the shard."""
        return f"{self._kind}/c.0.0{'.0' if self._kind == 'rows' else ''}"

    def document(self) -> dict[str, Any]:
        """The metadata of the array: of one shard that holds all."""
        like = self._layout.array_document(self._kind, 0)
        width = like["shape"][1:]
        plain = like["codecs"]
        codecs = [*plain, {"name": "crc32c"}]
        if self.level is not None:
            zstd = {"name": "zstd", "configuration": {"level": self.level, "checksum": False}}
            codecs.insert(len(plain), zstd)
        sharding = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, self.inner_rows, *width],
                "codecs": codecs,
                "index_codecs": [*plain, {"name": "crc32c"}],
                "index_location": "end",
            },
        }
        layers = self._layout.layers
        grid = {"chunk_shape": [layers, self.inners * self.inner_rows, *width]}
        return {
            **like,
            "shape": [layers, self._rows, *width],
            "chunk_grid": {"name": "regular", "configuration": grid},
            "codecs": [sharding],
            # Without the seal.
            "attributes": {name: text for name, text in like["attributes"].items() if name == "dtype"},
        }

    def encoded(self, data: Bytes) -> bytes:
        """The bytes in the file of an inner chunk of the rows [k, row_bytes], filled up with zeros."""
        whole = np.zeros((self.inner_rows, self.row_bytes), np.uint8)
        whole[: data.shape[0]] = data
        body: bytes = whole.tobytes() if self.level is None else Zstd(self.level).encode(whole)
        return body + checksum_bytes(body)

    def decoded(self, data: bytes) -> Bytes:
        """The rows [inner_rows, row_bytes] of an inner chunk, whose own checksum does not matter here.

        Raises:
            ValueError: It cannot be decompressed.
        """
        body = data[:-_CRC_BYTES]
        rows = np.empty((self.inner_rows, self.row_bytes), np.uint8)
        if self.level is None:
            return np.frombuffer(body, np.uint8).reshape(rows.shape)
        try:
            # Nothing is written beyond these rows, whatever the data say of their length.
            Zstd().decode(body, out=rows.reshape(-1))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"expected data that zstd can decompress, got others: {error}") from error
        return rows

    def index(self, lengths: Iterable[int]) -> bytes:
        """The index of inner chunks of these lengths, one after the other."""
        entries = np.fromiter(lengths, np.dtype("<u8"), self.count)
        body = np.stack([np.cumsum(entries, dtype="<u8") - entries, entries], axis=1).tobytes()
        return body + checksum_bytes(body)

    def plain_index(self) -> bytes:
        """The index of inner chunks that are not compressed."""
        return self.index(itertools.repeat(self.stride, self.count))

    def places(self, index: bytes) -> NDArray[np.int64]:
        """First byte and length of every inner chunk, [count, 2], as an index says that may be damaged.

        Raises:
            ValueError: It cannot be the index.
        """
        if not has_checksum(index):
            raise ValueError("expected an index with its checksum at the end of the file, got another")
        entries = np.frombuffer(index[:-_CRC_BYTES], np.dtype("<u8")).reshape(-1, 2)
        offsets, lengths = entries[:, 0], entries[:, 1]
        data = self.size - self.index_bytes
        # No sum of these goes beyond 64 bits.
        bounded = bool((lengths > _CRC_BYTES).all() and (lengths <= data).all() and (offsets <= data).all())
        ends = offsets + lengths
        if not bounded or offsets[0] != 0 or ends[-1] != data or (ends[:-1] != offsets[1:]).any():
            raise ValueError("expected inner chunks that follow each other in the file, got another index")
        return entries.astype(np.int64)


def checksum_bytes(data: bytes) -> bytes:
    """CRC32C as zarr writes it behind what it is of."""
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def has_checksum(data: bytes) -> bool:
    """Whether the bytes of an inner chunk, or of an index, end with the checksum of the others."""
    return checksum_bytes(data[:-_CRC_BYTES]) == data[-_CRC_BYTES:]


class ShardFile:
    """One file of a shard that is open for reading.

    Args:
        path: The file.
        array: The array that is in it.
        file: Its descriptor, which is not closed.
        mapped: Whether to map the file, and to do without the descriptor from then on.

    Raises:
        CorruptionError: The file is of another length, or its index is damaged and needed.
        OSError: The operating system refused to read.
    """

    def __init__(self, path: Path, array: ShardArray, file: int, *, mapped: bool) -> None:
        self.path = path
        self.array = array
        size = os.fstat(file).st_size
        if size != array.size:
            raise CorruptionError(f"{path}: expected a file of {array.size} bytes, got {size}")
        self.read: Callable[[int, int], bytes] = lambda start, count: os.pread(file, count, start)
        self._map: FileMap | None = None
        self._rows: Bytes | None = None
        if mapped:
            self._map = FileMap(file, array.size)
            # Rows are chosen by content: reading ahead would read what nobody asked for.
            self._map.advise(mmap.MADV_RANDOM)
            data = self._map.data
            self.read = lambda start, count: data[start : start + count].tobytes()
            if array.level is None:
                shape = array.count, array.inner_rows, array.row_bytes
                self._rows = np.ndarray(shape, np.uint8, data, 0, (array.stride, array.row_bytes, 1))
        self._places: NDArray[np.int64] | None = None
        if array.level is not None:
            try:
                self._places = array.places(self.index())
            except ValueError as error:
                raise CorruptionError(f"{path}: {error}") from error

    def index(self) -> bytes:
        """The bytes of the index."""
        return self.read(self.array.size - self.array.index_bytes, self.array.index_bytes)

    def has_index(self) -> bool:
        """Whether there is an index that zarr can use."""
        try:
            return self._places is not None or self.index() == self.array.plain_index()
        except OSError:
            return False  # the medium fails

    def place(self, number: int) -> tuple[int, int]:
        """First byte and length of an inner chunk; `number` counts those of all layers."""
        if self._places is None:
            return number * self.array.stride, self.array.stride
        start, count = self._places[number].tolist()
        return start, count

    def inner(self, number: int) -> bytes:
        """The bytes of an inner chunk, with its checksum."""
        return self.read(*self.place(number))

    def take(self, layer: int, rows: NDArray[np.int64]) -> Bytes:
        """Copies of the rows [k] of a layer, counted from the first of the shard, [k, row_bytes].

        Raises:
            CorruptionError: They cannot be decompressed.
        """
        numbers, local = np.divmod(rows, self.array.inner_rows)
        numbers += layer * self.array.inners
        if self._rows is not None:
            return self._rows[numbers, local]
        data = np.empty((rows.shape[0], self.array.row_bytes), np.uint8)
        order = np.argsort(numbers, kind="stable")
        bounds = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=-1))
        for first, last in itertools.pairwise(bounds.tolist()):
            chosen = order[first:last]
            try:
                inner = self.array.decoded(self.inner(int(numbers[chosen[0]])))
            except ValueError as error:
                raise CorruptionError(f"{self.path}: {error}") from error
            data[chosen] = inner[local[chosen]]
        return data

    def prefetch(self, layer: int, rows: NDArray[np.int64]) -> None:
        """Asks the operating system to fetch what the rows [k] of a layer are in; the file is mapped."""
        assert self._map is not None
        numbers, local = np.divmod(rows, self.array.inner_rows)
        for number, row in zip(numbers.tolist(), local.tolist(), strict=True):
            start, count = self.place(layer * self.array.inners + number)
            if self._rows is not None:
                start, count = start + row * self.array.row_bytes, self.array.row_bytes
            self._map.advise(mmap.MADV_WILLNEED, start, start + count)


class OpenShard:
    """A shard whose files are open.

    Args:
        root: Folder of the store.
        layout: Its layout.
        stream: Stream.
        shard: The shard.
        mapped: Whether to map the files; if not, `close` closes them.

    Raises:
        CorruptionError: A file is missing or of another length, or an index is damaged and needed.
        OSError: The operating system refused to read.
    """

    def __init__(self, root: Path, layout: Layout, stream: int, shard: Shard, *, mapped: bool) -> None:
        self.shard = shard
        self._descriptors: list[int] = []
        folder = shard_folder(root, stream, shard)
        try:
            self.files = [self._opened(folder, ShardArray(layout, shard, kind), mapped) for kind in KINDS]
        except BaseException:
            self.close()
            raise
        if mapped:
            self.close()
        self.rows, self.checksums = self.files

    def _opened(self, folder: Path, array: ShardArray, mapped: bool) -> ShardFile:
        path = folder / array.name
        try:
            self._descriptors.append(os.open(path, os.O_RDONLY))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptionError(f"{path}: expected a file of a shard, got no such file") from error
        return ShardFile(path, array, self._descriptors[-1], mapped=mapped)

    def take(self, layer: int, rows: NDArray[np.int64]) -> tuple[Bytes, NDArray[np.uint32]]:
        """Copies of rows [k], by their numbers in the log, and what is stored as their checksums.

        Raises:
            CorruptionError: They cannot be decompressed.
        """
        local = rows - self.shard.start
        checksums = np.ascontiguousarray(self.checksums.take(layer, local))
        return self.rows.take(layer, local), checksums.view("<u4")[:, 0]

    def prefetch(self, layer: int, rows: NDArray[np.int64]) -> None:
        """Asks the operating system to fetch rows [k] of the log; the files are mapped."""
        self.rows.prefetch(layer, rows - self.shard.start)

    def close(self) -> None:
        """Closes the files, unless they are mapped."""
        while self._descriptors:
            os.close(self._descriptors.pop())


# Writing

# Called with layer, start and stop; gives the rows, [k, row_bytes], and their checksums, [k].
Source = Callable[[int, int, int], tuple[Bytes, NDArray[np.uint32]]]


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
    least = 2 * (stop - start) * layout.layers // _MAX_INNER_CHUNKS
    inner_rows = min(stop - start, max(1, _INNER_BYTES // layout.row_bytes, least))
    shard = Shard(start, stop, secrets.token_hex(4), inner_rows, level, 0)
    # Nobody looks for a shard before a commit names it: it needs no other name until it is whole.
    place = shard_folder(root, stream, shard)
    place.mkdir()
    try:
        shard = _write_arrays(place, layout, shard, source)
        sync(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return shard


def _write_arrays(folder: Path, layout: Layout, shard: Shard, source: Source) -> Shard:
    """Writes the files of a shard; returns it with the size of its rows."""
    arrays = [ShardArray(layout, shard, kind) for kind in KINDS]
    lengths: list[list[int]] = [[] for _ in arrays]
    files = []
    try:
        for array in arrays:
            path = folder / array.name
            path.parent.mkdir()
            files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        ends = [0] * len(arrays)
        for layer in range(layout.layers):
            for start in range(shard.start, shard.stop, shard.inner_rows):
                data, checksums = source(layer, start, min(shard.stop, start + shard.inner_rows))
                parts = data, checksums.astype("<u4").view(np.uint8).reshape(-1, 4)
                for index, (array, part) in enumerate(zip(arrays, parts, strict=True)):
                    encoded = array.encoded(part)
                    write_all(files[index], encoded, ends[index])
                    ends[index] += len(encoded)
                    lengths[index].append(len(encoded))
        for file, array, end, each in zip(files, arrays, ends, lengths, strict=True):
            write_all(file, array.index(each), end)
            os.fsync(file)
    finally:
        for file in files:
            os.close(file)
    shard = shard._replace(size=ends[0] + arrays[0].index_bytes)
    for path, document in shard_documents(folder, layout, shard):
        path.write_bytes(encode(document))
        sync(path)
        sync(path.parent)
    return shard


def shard_documents(folder: Path, layout: Layout, shard: Shard) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The metadata of the arrays of a shard and of its folder: file and contents."""
    for kind in KINDS:
        yield folder / kind / METADATA, ShardArray(layout, shard, kind).document()
    yield folder / METADATA, plain_group_document()


def mend_checksums(file: ShardFile) -> bool:
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
                write_all(opened, checksum_bytes(inner[:-_CRC_BYTES]), start + count - _CRC_BYTES)
                mended = True
        if not file.has_index():
            write_all(opened, array.plain_index(), array.size - array.index_bytes)
            mended = True
        os.fsync(opened)
    finally:
        os.close(opened)
    return mended
