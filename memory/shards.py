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
import re
import secrets
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from xlroute.memory.errors import CorruptionError
from xlroute.memory.layout import KINDS, METADATA, Layout, plain_group_document
from xlroute.memory.log import Extent, within
from xlroute.memory.place import StorePath, list_names
from xlroute.memory.rows_bytes import Bytes

SHARDS = "shards"
LEVELS = range(1, 23)
DEFAULT_LEVEL = 3
# What a shard is made of: bytes of rows of all layers in a shard, at least one chunk; and in an inner chunk.
_SHARD_BYTES = 512 * 2**20
_INNER_BYTES = 128 * 2**10
_READ_BYTES = 32 * 2**20  # of rows that are asked for at once where a shard is made of them
# So many inner chunks have an index that can be read as a whole, and so large a one can be decoded.
_MAX_INNER_CHUNKS = 1 << 24
_MAX_INNER_BYTES = 1 << 26
CRC_BYTES = 4
_ENTRY_BYTES = 16
_NAME = re.compile(r"[0-9a-f]{8}")
_FOLDER = re.compile(rf"stream-\d+\.\d+-\d+\.{_NAME.pattern}")


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


def shard_name(stream: int, shard: Shard) -> str:
    """The name of the folder of a shard."""
    return f"stream-{stream}.{shard.start}-{shard.stop}.{shard.name}"


def list_shards(root: StorePath) -> set[str]:
    """The names of the folders of all shards in a store, whole or in part."""
    folder = root / SHARDS
    try:
        found = {name for name in list_names(folder) if _FOLDER.fullmatch(name)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    if isinstance(folder, Path):
        found = {name for name in found if (folder / name).is_dir() and not (folder / name).is_symlink()}
    return found


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
        return self.count * _ENTRY_BYTES + CRC_BYTES

    @property
    def stride(self) -> int:
        """Bytes of an inner chunk that is not compressed, with its checksum."""
        return self.inner_rows * self.row_bytes + CRC_BYTES

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
        body = data[:-CRC_BYTES]
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
        entries = np.frombuffer(index[:-CRC_BYTES], np.dtype("<u8")).reshape(-1, 2)
        offsets, lengths = entries[:, 0], entries[:, 1]
        data = self.size - self.index_bytes
        # No sum of these goes beyond 64 bits.
        bounded = bool((lengths > CRC_BYTES).all() and (lengths <= data).all() and (offsets <= data).all())
        ends = offsets + lengths
        if not bounded or offsets[0] != 0 or ends[-1] != data or (ends[:-1] != offsets[1:]).any():
            raise ValueError("expected inner chunks that follow each other in the file, got another index")
        return entries.astype(np.int64)


def checksum_bytes(data: bytes) -> bytes:
    """CRC32C as zarr writes it behind what it is of."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def has_checksum(data: bytes) -> bool:
    """Whether the bytes of an inner chunk, or of an index, end with the checksum of the others."""
    return checksum_bytes(data[:-CRC_BYTES]) == data[-CRC_BYTES:]


def missing_file(path: StorePath) -> CorruptionError:
    """What is wrong where there is no file of a shard."""
    return CorruptionError(f"{path}: expected a file of a shard, got no such file")


def check_size(path: StorePath, array: ShardArray, size: int) -> None:
    """Raises CorruptionError if the file of the array has another size."""
    if size != array.size:
        raise CorruptionError(f"{path}: expected a file of {array.size} bytes, got {size}")


class ShardFile(ABC):
    """One file of a shard that is open for reading, wherever it is.

    Args:
        path: The file.
        array: The array that is in it.

    Raises:
        CorruptionError: Its index is damaged and needed.
        OSError: The operating system refused to read.
    """

    def __init__(self, path: StorePath, array: ShardArray) -> None:
        self.path = path
        self.array = array
        self._places: NDArray[np.int64] | None = None
        if array.level is not None:
            try:
                self._places = array.places(self.index())
            except ValueError as error:
                raise CorruptionError(f"{path}: {error}") from error

    @abstractmethod
    def read(self, start: int, count: int) -> bytes:
        """Bytes of the file."""

    def index(self) -> bytes:
        """The bytes of the index."""
        return self.read(self.array.size - self.array.index_bytes, self.array.index_bytes)

    def has_index(self) -> bool:
        """Whether there is an index that zarr can use."""
        return self._places is not None or self.index() == self.array.plain_index()

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
        data = np.empty((rows.shape[0], self.array.row_bytes), np.uint8)
        order = np.argsort(numbers, kind="stable")
        bounds = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=-1))
        parts = [order[first:last] for first, last in itertools.pairwise(bounds.tolist())]
        inners = self._decoded([int(numbers[part[0]]) for part in parts])
        for part, inner in zip(parts, inners, strict=True):
            data[part] = inner[local[part]]
        return data

    def _decoded(self, numbers: Sequence[int]) -> Iterator[Bytes]:
        """The rows of inner chunks."""
        return (self._decode(self.inner(number)) for number in numbers)

    def _decode(self, inner: bytes) -> Bytes:
        """The rows of an inner chunk."""
        try:
            return self.array.decoded(inner)
        except ValueError as error:
            raise CorruptionError(f"{self.path}: {error}") from error


FileT = TypeVar("FileT", bound=ShardFile)


class OpenShard(Generic[FileT]):
    """A shard whose files are open.

    Args:
        shard: The shard.
        files: Its files, of rows and of checksums.
    """

    def __init__(self, shard: Shard, files: Iterable[FileT]) -> None:
        self.shard = shard
        self.rows, self.checksums = files

    @property
    def files(self) -> tuple[FileT, FileT]:
        """The files, of rows and of checksums."""
        return self.rows, self.checksums

    def take(self, layer: int, rows: NDArray[np.int64]) -> tuple[Bytes, NDArray[np.uint32]]:
        """Copies of rows [k], by their numbers in the log, and what is stored as their checksums.

        Raises:
            CorruptionError: They cannot be decompressed.
        """
        local = rows - self.shard.start
        checksums = np.ascontiguousarray(self.checksums.take(layer, local))
        return self.rows.take(layer, local), checksums.view("<u4")[:, 0]


# Writing

# Called with layer, start and stop; gives the rows, [k, row_bytes], and their checksums, [k].
Source = Callable[[int, int, int], tuple[Bytes, NDArray[np.uint32]]]
Sink = Callable[[bytes], None]  # called with the bytes that come next


def new_shard(layout: Layout, start: int, stop: int, level: int | None) -> Shard:
    """A shard of rows `start` to `stop` that is to be written, whose size is not known yet."""
    least = 2 * (stop - start) * layout.layers // _MAX_INNER_CHUNKS
    inner_rows = min(stop - start, max(1, _INNER_BYTES // layout.row_bytes, least))
    return Shard(start, stop, secrets.token_hex(4), inner_rows, level, 0)


def write_arrays(layout: Layout, shard: Shard, source: Source, sinks: Sequence[Sink]) -> Shard:
    """Writes the files of a shard, a little at a time.

    Args:
        layout: The layout of the store.
        shard: The shard.
        source: Where rows and checksums come from.
        sinks: Where the files go, of rows and of checksums.

    Returns:
        The shard with the size of its rows.
    """
    arrays = [ShardArray(layout, shard, kind) for kind in KINDS]
    lengths: list[list[int]] = [[] for _ in arrays]
    inner = shard.inner_rows
    step = inner * max(1, _READ_BYTES // (inner * layout.row_bytes))
    for layer in range(layout.layers):
        for start in range(shard.start, shard.stop, step):
            data, checksums = source(layer, start, min(shard.stop, start + step))
            parts = data, checksums.astype("<u4").view(np.uint8).reshape(-1, 4)
            for array, part, sink, each in zip(arrays, parts, sinks, lengths, strict=True):
                for first in range(0, part.shape[0], inner):
                    encoded = array.encoded(part[first : first + inner])
                    sink(encoded)
                    each.append(len(encoded))
    for array, sink, each in zip(arrays, sinks, lengths, strict=True):
        sink(array.index(each))
    return shard._replace(size=sum(lengths[0]) + arrays[0].index_bytes)


def shard_documents(layout: Layout, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
    """The metadata of the arrays of a shard and of its folder: file, from the folder on, and contents."""
    for kind in KINDS:
        yield f"{kind}/{METADATA}", ShardArray(layout, shard, kind).document()
    yield METADATA, plain_group_document()
