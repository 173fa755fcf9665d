"""What a store on disk looks like to zarr, and the metadata that says so.

A store is a zarr v3 group. For each layer and stream it has an array of rows [n, dim] and an array of
checksums [n], both with uncompressed little-endian chunks of the same number of rows, so that a chunk file is
raw rows. The number of rows in the metadata is room, grown ahead by doubling; what a commit holds is in its
record. bfloat16, which zarr does not know, is stored as uint16; the attribute `dtype` names the real type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from xlroute.memory.errors import CorruptionError, FormatError, StoreNotFoundError
from xlroute.memory.place import StorePath, list_names
from xlroute.memory.s3 import S3Path
from xlroute.memory.sealed import checksum, encode, read_document, replace_file

FORMAT = 2
# Those that can be read; a writer raises the format of a store before it changes anything else.
FORMATS = (1, 2)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
Eviction = Literal["oldest", "lowest_score", "every_nth"]
EVICTIONS: tuple[Eviction, ...] = ("oldest", "lowest_score", "every_nth")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "zarr.json"
COMMITS = "commits"
KINDS = ("rows", "crc32c")
_KEY = "xlroute_memory"
# Far beyond what anyone uses, and small enough that sizes and offsets computed from them are valid.
_MAX_DIM = 2**31 - 1
_MAX_CHUNK_BYTES = 2**46
_SEAL = "crc32c"


def check_positive(name: str, value: object) -> None:
    """Raises TypeError or ValueError, naming the argument, unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its checksum among its attributes."""
    return {**document, "attributes": {**document["attributes"], _SEAL: checksum(document)}}


@dataclass(frozen=True)
class Layout:
    """The shape of a store; nothing of it but the format ever changes.

    Attributes:
        layers: Memory layers.
        streams: Streams.
        dim: Width of a row.
        dtype: Name of the type of a row.
        capacity: Rows that a stream holds at most, or None.
        chunk_rows: Rows in a chunk file.
        keep_commits: Commits that stay readable, besides the pinned ones.
        eviction: Which rows leave first.
        keep_every: Positions that are multiples of it leave last; None unless the eviction is "every_nth".
        format: Version of the format.
    """

    layers: int
    streams: int
    dim: int
    dtype: str
    capacity: int | None
    chunk_rows: int
    keep_commits: int
    eviction: Eviction = "oldest"
    keep_every: int | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("layers", "streams", "dim", "chunk_rows", "keep_commits"):
            check_positive(name, getattr(self, name))
        if self.capacity is not None:
            check_positive("capacity", self.capacity)
        if self.eviction not in EVICTIONS:
            raise ValueError(f"eviction: expected one of {', '.join(EVICTIONS)}, got {self.eviction!r}")
        if self.eviction != "oldest" and self.capacity is None:
            raise ValueError(f"capacity: expected one beside eviction={self.eviction!r}, got None")
        if self.eviction == "every_nth":
            check_positive("keep_every", self.keep_every)
        elif self.keep_every is not None:
            raise ValueError(
                f"keep_every: expected None with eviction={self.eviction!r}, got {self.keep_every}"
            )
        if self.keep_every == 1:
            raise ValueError("keep_every: expected at least 2, got 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.dim > _MAX_DIM:
            raise ValueError(f"dim: expected at most {_MAX_DIM}, got {self.dim}")
        if self.chunk_rows * self.row_bytes >= _MAX_CHUNK_BYTES:
            raise ValueError(
                f"chunk_bytes: expected chunks of fewer than {_MAX_CHUNK_BYTES} bytes, got "
                f"{self.chunk_rows * self.row_bytes}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dim * DTYPES[self.dtype].itemsize

    @property
    def arrays(self) -> int:
        """Number of arrays."""
        return len(KINDS) * self.layers * self.streams

    def array_name(self, layer: int, stream: int, kind: str) -> str:
        """Name of the array of `kind` "rows" or "crc32c"."""
        return f"layer-{layer}.stream-{stream}.{kind}"

    def chunk_name(self, chunk: int, kind: str) -> str:
        """Name of a chunk file in the folder of its array."""
        return f"c.{chunk}.0" if kind == "rows" else f"c.{chunk}"

    def chunk_bytes(self, kind: str) -> int:
        """Bytes of a whole chunk file."""
        return self.chunk_rows * (self.row_bytes if kind == "rows" else 4)

    def group_document(self) -> dict[str, Any]:
        """The metadata of the group."""
        fields = {"format": self.format, **asdict(self)}
        for name in ("eviction", "keep_every"):
            if fields[name] in ("oldest", None):
                del fields[name]  # as in stores that were made before there was a choice
        return _sealed({"zarr_format": 3, "node_type": "group", "attributes": {_KEY: fields}})

    def array_document(self, kind: str, rows: int) -> dict[str, Any]:
        """The metadata of an array with room for `rows` rows."""
        if kind == "rows":
            shape, chunk = [rows, self.dim], [self.chunk_rows, self.dim]
            data_type = "uint16" if self.dtype == "bfloat16" else self.dtype
            attributes = {"dtype": self.dtype}
        else:
            shape, chunk, data_type, attributes = [rows], [self.chunk_rows], "uint32", {}
        return _sealed(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": shape,
                "data_type": data_type,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": 0 if data_type.startswith("uint") else 0.0,
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "attributes": attributes,
                "storage_transformers": [],
            }
        )

    def room_for(self, rows: int) -> int:
        """The room that an array's metadata gives for at least `rows` rows: a power of two of chunks."""
        chunks = -(-rows // self.chunk_rows)
        return self.chunk_rows * (1 << max(0, chunks - 1).bit_length())


def plain_group_document() -> dict[str, Any]:
    """The metadata of a folder that holds no array: without it, zarr warns when it lists the store."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


def empty_folders(layout: Layout) -> Iterator[tuple[str, bytes]]:
    """The folders of an empty store beside its own: their names, and the metadata that each holds."""
    yield COMMITS, encode(plain_group_document())
    for kind in KINDS:
        data = encode(layout.array_document(kind, layout.room_for(0)))
        for layer in range(layout.layers):
            for stream in range(layout.streams):
                yield layout.array_name(layer, stream, kind), data


def write_layout(root: Path, layout: Layout) -> None:
    """Writes the metadata of an empty store into the empty folder `root`."""
    (root / METADATA).write_bytes(new_metadata(layout))
    for name, data in empty_folders(layout):
        (root / name).mkdir()
        (root / name / METADATA).write_bytes(data)


def new_metadata(layout: Layout) -> bytes:
    """The metadata of the group of a new store, which is one of the newest format."""
    return encode(replace(layout, format=FORMAT).group_document())


def raise_format(root: StorePath, layout: Layout) -> Layout:
    """Makes the store one of the newest format, before anything is written that an older one does not know.

    Raises:
        OSError: The operating system, or the object store, refused; the store is as it was.
    """
    if layout.format == FORMAT:
        return layout
    if isinstance(root, S3Path):
        # Whoever does so puts the same.
        (root / METADATA).write_bytes(new_metadata(layout))
    else:
        replace_file(root / METADATA, new_metadata(layout), scratch=root / COMMITS, durable=True)
    return replace(layout, format=FORMAT)


def read_layout(root: StorePath) -> Layout:
    """Reads the layout of the store in the folder `root`.

    Raises:
        StoreNotFoundError: There is nothing at the path.
        FormatError: There is something else, or a store of a newer format.
        CorruptionError: The metadata is damaged, or arrays are missing.
    """
    layout = read_group(root)
    # Before anyone makes room for so many, or for rows so wide.
    expected = layout.arrays
    found = count_arrays(root)
    if found != expected:
        raise CorruptionError(f"{root / METADATA}: expected {expected} arrays beside it, got {found}")
    for kind in KINDS:
        read_room(root, layout, 0, 0, kind)
    return layout


def count_arrays(root: StorePath) -> int:
    """The number of arrays in the folder `root`, whatever state they are in."""
    return sum(name.startswith("layer-") for name in list_names(root))


def read_group(root: StorePath) -> Layout:
    """Reads what the metadata of the group says of the layout, whatever state the arrays are in.

    Raises:
        StoreNotFoundError: There is nothing at the path.
        FormatError: There is something else, or a store of a newer format.
        CorruptionError: The metadata of the group is damaged.
    """
    path = root / METADATA
    try:
        document = read_document(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not root.exists():
            raise StoreNotFoundError(f"{root}: expected a memory store, got nothing") from error
        if not root.is_dir():
            raise FormatError(f"{root}: expected the folder of a memory store, got a file") from error
        raise FormatError(f"{path}: expected the metadata of a memory store, got no such file") from error
    attributes = document.get("attributes")
    fields = attributes.get(_KEY) if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict) or not isinstance(fields, dict):
        raise FormatError(
            f"{path}: expected a memory store, got a zarr {document.get('node_type')} without one"
        )
    version = fields.get("format")
    if version not in FORMATS:
        known = " or ".join(map(str, FORMATS))
        raise FormatError(f"{path}: expected a memory store of format {known}, got format {version!r}")
    given = attributes.pop(_SEAL, None)
    if checksum(document) != given:
        raise CorruptionError(
            f"{path}: expected checksum {given}, got {checksum(document)}: the file is damaged"
        )
    try:
        return Layout(**fields)
    except (TypeError, ValueError) as error:
        raise CorruptionError(
            f"{path}: expected the shape of a memory store, got {fields}: {error}"
        ) from error


def read_room(root: StorePath, layout: Layout, layer: int, stream: int, kind: str) -> int:
    """Reads how many rows an array has room for.

    Raises:
        CorruptionError: The metadata of the array is damaged, missing, or not that of this store.
    """
    path = root / layout.array_name(layer, stream, kind) / METADATA
    try:
        document = read_document(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptionError(f"{path}: expected the metadata of an array, got no such file") from error
    shape = document.get("shape")
    room = shape[0] if isinstance(shape, list) and shape else None
    if type(room) is not int or room < 1 or layout.room_for(room) != room:
        raise CorruptionError(f"{path}: expected a shape that is a power of two of chunks, got {shape}")
    if document != layout.array_document(kind, room):
        raise CorruptionError(
            f"{path}: expected the metadata of an array of this store, got other or damaged"
        )
    return room
