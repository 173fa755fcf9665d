"""Rewrites rows that nobody will write beside again from chunk files into shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.chunks import Chunks
from xlroute.memory.commits import Commit
from xlroute.memory.disk import Disk, writing
from xlroute.memory.layout import KINDS, Layout
from xlroute.memory.log import Extent, within
from xlroute.memory.place import StorePath
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.shards import (
    SHARDS,
    Shard,
    ShardArray,
    Source,
    chunks_in_shard,
    shard_documents,
    shard_name,
)
from xlroute.memory.verify import Meter, Progress


@dataclass(frozen=True)
class CompactReport:
    """What `MemoryStore.compact` has done.

    Bytes are what the file system has set aside; in an object store, the lengths of objects.

    Attributes:
        path: Where the store is.
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

    path: StorePath
    commit: str | None
    rows: int = 0
    shards: int = 0
    files_before: int = 0
    bytes_before: int = 0
    files_after: int = 0
    bytes_after: int = 0
    files_kept: int = 0
    bytes_kept: int = 0


def compact_store(disk: Disk, *, level: int | None, progress: Progress | None) -> CompactReport:
    """Rewrites sealed rows of the last commit into shards; see `MemoryStore.compact`."""
    disk.check_process()
    with writing(disk.root):
        return _compact(disk, level, progress)


def _compact(disk: Disk, level: int | None, progress: Progress | None) -> CompactReport:
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
    files_before, bytes_before = disk.taken(before)
    rows = layout.layers * sum(part.stop - part.start for _, _, parts in runs for part in parts)
    meter = Meter(progress, rows * layout.row_bytes)
    shards: list[list[Shard]] = [[] for _ in range(layout.streams)]
    try:
        for stream, run, parts in runs:
            source = _source(files, stream, parts, meter)
            shards[stream].append(files.write_shard(stream, *run, level, source))
    except BaseException:
        with suppress(OSError):
            files.delete_shards({shard_name(*each) for each in _numbered(shards)})
        raise
    commit = disk.commit_shards(shards)
    files_after, bytes_after = disk.taken(
        disk.root / SHARDS / shard_name(stream, shard) / name
        for stream, shard in _numbered(shards)
        for name in _files_of(layout, shard)
    )
    files_kept, bytes_kept = disk.taken(before)
    return CompactReport(
        path=disk.root,
        commit=commit,
        rows=rows,
        shards=len(runs),
        files_before=files_before,
        bytes_before=bytes_before,
        files_after=files_after,
        bytes_after=bytes_after,
        files_kept=files_kept,
        bytes_kept=bytes_kept,
    )


def _numbered(shards: Sequence[Sequence[Shard]]) -> Iterator[tuple[int, Shard]]:
    """The shards of all streams, each with its stream."""
    return ((stream, shard) for stream, each in enumerate(shards) for shard in each)


def _files_of(layout: Layout, shard: Shard) -> Iterator[str]:
    """The files of a shard, from its folder on."""
    yield from (ShardArray(layout, shard, kind).name for kind in KINDS)
    yield from (name for name, _ in shard_documents(layout, shard))


def _sealed_runs(files: Chunks, commit: Commit, stream: int) -> Iterator[tuple[int, int]]:
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


def _source(files: Chunks, stream: int, extents: Sequence[Extent], meter: Meter) -> Source:
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
