"""Writes what a commit holds to one file that other programs read, block by block."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.chunks import Chunks
from xlroute.memory.log import StreamLog
from xlroute.memory.new_file import new_file
from xlroute.memory.place import StorePath
from xlroute.memory.routes import DocumentRoutes, RoutedRows
from xlroute.memory.storage import open_disk
from xlroute.memory.verify import Meter, Progress

NPZ, SAFETENSORS = ".npz", ".safetensors"
_BLOCK_POSITIONS = 1 << 18
_SAFETENSORS_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
}


class _Array(NamedTuple):
    """An array to write, whose little-endian bytes come in blocks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_bytes: int
    blocks: Iterator[NDArray[Any]]


def export_store(
    path: StorePath, target: Path, *, commit: str | None = None, progress: Progress | None = None
) -> str:
    """Writes all rows that a commit holds, and their positions, to a file. Every row is checked.

    The file has an array `layer-<i>.stream-<j>.rows` [m, d] for each layer and stream, oldest row first, and
    `stream-<j>.positions`, int64 [m], for each stream. For streams of which the commit has routed counts it
    has `layer-<i>.stream-<j>.routed`, int64 [m], too: how often each row was routed. It appears whole or not
    at all, and is never in memory as a whole.

    Args:
        path: Where the store is.
        target: A new file, whose name ends in .npz or .safetensors. NumPy has no bfloat16, so in an .npz file
            such rows are float32, which changes no number. A .safetensors file names the commit and the
            fingerprint in its metadata.
        commit: Id of the commit, or None for the last.
        progress: Called after every few MiB with the bytes of rows read so far, and with all of them.

    Returns:
        The id of the commit.

    Raises:
        ValueError: `target` ends in something else, or `commit` cannot be an id.
        FileExistsError: There is something at `target`.
        MemoryStoreError: As for `MemoryStore.open`, or a row is damaged.
        OSError: The operating system refused to write.
    """
    if target.suffix not in (NPZ, SAFETENSORS):
        raise ValueError(f"target: expected a name that ends in {NPZ} or {SAFETENSORS}, got {target}")
    disk = open_disk(path, commit=commit, writable=False, fingerprint=None)
    assert disk.files.record is not None
    commit_id = disk.files.record.stem
    held = sum(log.held for log in disk.logs)
    meter = Meter(progress, disk.layout.layers * disk.layout.row_bytes * held)
    arrays = [*_arrays(disk.files, disk.logs, disk.documents or (), meter.advance)]
    with new_file(target) as file:
        if target.suffix == NPZ:
            _write_npz(file, arrays)
        else:
            _write_safetensors(file, arrays, {"commit": commit_id, "fingerprint": disk.fingerprint})
    return commit_id


def _arrays(
    files: Chunks,
    logs: Sequence[StreamLog],
    documents: Sequence[DocumentRoutes],
    advance: Callable[[int], None],
) -> Iterator[_Array]:
    """All arrays; those of 8 bytes a number come first, so that all numbers are aligned in the file."""
    layout = files.layout
    for stream, log in enumerate(logs):
        yield _Array(f"stream-{stream}.positions", "int64", (log.held,), 8, _positions(log))
    for stream, document in enumerate(documents):
        log = logs[stream]
        if document.total:
            for layer, rows in enumerate(document.rows):
                name = layout.array_name(layer, stream, "routed")
                yield _Array(name, "int64", (log.held,), 8, _times(log, rows))
    for layer in range(layout.layers):
        for stream, log in enumerate(logs):
            blocks = _counted(files.blocks(layer, stream, log.extents), advance)
            shape = log.held, layout.dim
            name = layout.array_name(layer, stream, "rows")
            yield _Array(name, layout.dtype, shape, layout.row_bytes, blocks)


def _positions(log: StreamLog) -> Iterator[NDArray[Any]]:
    yield log.own_positions().numpy().astype("<i8")
    for low in range(log.appended - log.held + log.surviving, log.appended, _BLOCK_POSITIONS):
        yield np.arange(low, min(log.appended, low + _BLOCK_POSITIONS), dtype="<i8")


def _times(log: StreamLog, routed: RoutedRows) -> Iterator[NDArray[Any]]:
    for positions in _positions(log):
        yield routed.at(positions).astype("<i8")


def _counted(blocks: Iterator[NDArray[Any]], advance: Callable[[int], None]) -> Iterator[NDArray[Any]]:
    for block in blocks:
        yield block
        advance(block.nbytes)


def _write_npz(file: BinaryIO, arrays: Sequence[_Array]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for array in arrays:
            widen = array.dtype == "bfloat16"
            dtype = np.dtype("float32" if widen else array.dtype).newbyteorder("<")
            header = {"descr": dtype.str, "fortran_order": False, "shape": array.shape}
            # Nothing is known yet of the size, which may pass 4 GiB.
            with archive.open(f"{array.name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in array.blocks:
                    # A bfloat16 is the upper half of the float32 of the same value.
                    wide = block.view("<u2").astype("<u4") << np.uint32(16) if widen else block
                    member.write(wide.tobytes())


def _write_safetensors(file: BinaryIO, arrays: Sequence[_Array], metadata: Mapping[str, str | None]) -> None:
    header: dict[str, Any] = {
        "__metadata__": {name: text for name, text in metadata.items() if text is not None}
    }
    offset = 0
    for array in arrays:
        stop = offset + array.shape[0] * array.row_bytes
        kind = _SAFETENSORS_TYPES[array.dtype]
        header[array.name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
        for block in array.blocks:
            file.write(block.tobytes())
