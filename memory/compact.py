"""Rewrites rows that nobody will write beside again from chunk files into shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.chunks import ChunkFiles
from xlroute.memory.commits import Commit
from xlroute.memory.disk import FolderDisk, allocated_bytes, writing
from xlroute.memory.layout import KINDS
from xlroute.memory.log import Extent, within
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.shards import Shard, Source, chunks_in_shard, shard_folder, write_shard
from xlroute.memory.verify import Meter, Progress


@dataclass(frozen=True)
class CompactReport:
    """What `MemoryStore.compact` has done. Bytes are what the file system has set aside.

    Attributes:
        path: The folder of the store.
        commit: Id of the commit that was made, now the last; None if there was nothing to do.
        rows: Rows that were rewritten, in all layers together.
        shards: Shards that were written.
        files_before: Chunk files that the rows were in.
        bytes_before: Bytes of those.
        files_after: Files of the shards, their metadata included.
        bytes_after: Bytes of those.
        files_kept: Chunk files, of those before, that are still there: earlier commits need them, or layers
            and forks of this store. They go with the commit after that.
        bytes_kept: Bytes of those.
    """

    path: Path
    commit: str | None
    rows: int = 0
    shards: int = 0
    files_before: int = 0
    bytes_before: int = 0
    files_after: int = 0
    bytes_after: int = 0
    files_kept: int = 0
    bytes_kept: int = 0


def compact_store(disk: FolderDisk, *, level: int | None, progress: Progress | None) -> CompactReport:
    """Rewrites sealed rows of the last commit into shards; see `MemoryStore.compact`."""
    disk.check_process()
    layout, files, last = disk.layout, disk.files, disk.last()
    runs = [
        (stream, run, [*within(last.logs[stream].extents, *run)])
        for stream in range(layout.streams)
        for run in _sealed_runs(files, last, stream)
    ]
    if not runs:
        return CompactReport(disk.root, None)
    before = [
        files.path(layer, stream, chunk, kind)
        for stream, run, _ in runs
        for chunk in range(run[0] // layout.chunk_rows, run[1] // layout.chunk_rows)
        for layer in range(layout.layers)
        for kind in KINDS
    ]
    bytes_before = allocated_bytes(before)
    rows = layout.layers * sum(part.stop - part.start for _, _, parts in runs for part in parts)
    meter = Meter(progress, rows * layout.row_bytes)
    shards: list[list[Shard]] = [[] for _ in range(layout.streams)]
    try:
        with writing(disk.root):
            for stream, run, parts in runs:
                source = _source(files, stream, parts, meter)
                shards[stream].append(write_shard(disk.root, layout, stream, *run, level, source))
        commit = disk.commit_shards(shards)
    except BaseException:
        named = disk.named_shards()
        for stream, found in enumerate(shards):
            for shard in found:
                if (stream, shard) not in named:
                    shutil.rmtree(shard_folder(disk.root, stream, shard), ignore_errors=True)
        raise
    folders = [shard_folder(disk.root, stream, shard) for stream, each in enumerate(shards) for shard in each]
    after = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in before if path.exists()]
    return CompactReport(
        path=disk.root,
        commit=commit,
        rows=rows,
        shards=len(runs),
        files_before=len(before),
        bytes_before=bytes_before,
        files_after=len(after),
        bytes_after=allocated_bytes(after),
        files_kept=len(kept),
        bytes_kept=allocated_bytes(kept),
    )


def _sealed_runs(files: ChunkFiles, commit: Commit, stream: int) -> Iterator[tuple[int, int]]:
    """The rows of whole chunks that follow each other, in which a commit holds rows and nobody will write."""
    size = files.layout.chunk_rows
    sealed = commit.logs[stream].end // size
    held = commit.in_files(stream)
    chunks = {chunk for part in held for chunk, _, _ in files.pieces(part.start, part.stop) if chunk < sealed}
    first = stop = -1
    for chunk in sorted(chunks):
        if chunk != stop or stop - first == chunks_in_shard(files.layout):
            if first < stop:
                yield first * size, stop * size
            first = chunk
        stop = chunk + 1
    if first < stop:
        yield first * size, stop * size


def _source(files: ChunkFiles, stream: int, extents: Sequence[Extent], meter: Meter) -> Source:
    """Reads and checks the rows of the extents; rows between them are zeros, and so are their checksums."""

    def read(layer: int, start: int, stop: int) -> tuple[Bytes, NDArray[np.uint32]]:
        data = np.zeros((stop - start, files.layout.row_bytes), np.uint8)
        checksums = np.zeros(stop - start, np.uint32)
        for part in within(extents, start, stop):
            done = part.start - start
            for found in files.checked(layer, stream, [part]):
                rows = slice(done, done + found.data.shape[0])
                data[rows], checksums[rows] = found.data, found.checksums
                done = rows.stop
                meter.advance(found.data.nbytes)
        return data, checksums

    return read
