"""A memory store of very many rows that takes little of the disk: rows of zeros, in sparse files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from xlroute.memory import MemoryStore
from xlroute.memory.chunks import address_bits, row_checksums
from xlroute.memory.commits import Commit, read_commit, write_commit
from xlroute.memory.layout import METADATA, read_layout
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.sealed import encode

WRITER = 1


def build_large(path: Path, rows: int, dim: int) -> Path:
    """Makes a store of one layer and stream with so many float16 rows of zeros; returns the path."""
    MemoryStore.create(path, layers=1, streams=1, dim=dim, dtype=torch.float16).close()
    layout = read_layout(path)
    folders = {kind: path / layout.array_name(0, 0, kind) for kind in ("rows", "crc32c")}
    for kind, folder in folders.items():
        (folder / METADATA).write_bytes(encode(layout.array_document(kind, layout.room_for(rows))))
    of_zeros = row_checksums(np.zeros((1, layout.row_bytes), np.uint8))
    for chunk in range(-(-rows // layout.chunk_rows)):
        numbers = np.arange(chunk * layout.chunk_rows, (chunk + 1) * layout.chunk_rows)
        with (folders["rows"] / layout.chunk_name(chunk, "rows")).open("wb") as file:
            file.truncate(layout.chunk_bytes("rows"))
        sums = of_zeros ^ address_bits(0, 0, numbers, np.full(numbers.size, WRITER))
        sums.astype("<u4").tofile(folders["crc32c"] / layout.chunk_name(chunk, "crc32c"))
    first = read_commit(path, sorted(each.stem for each in (path / "commits").glob("0*.json"))[-1], layout)
    log = StreamLog((Extent(0, rows, WRITER),), rows, rows)
    write_commit(path, Commit(first.generation + 1, first.id, None, False, (log,)))
    return path
