"""What a store holds and what it takes up."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from xlroute.memory.commits import read_commit, record_path
from xlroute.memory.disk import Disk
from xlroute.memory.errors import CommitNotFoundError
from xlroute.memory.layout import KINDS, Eviction
from xlroute.memory.log import StreamLog
from xlroute.memory.shards import ShardArray, in_shards

_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own blocks are


@dataclass(frozen=True)
class CommitInfo:
    """A commit that can be opened.

    Attributes:
        id: Its id.
        generation: Counts the commits of the store from 1.
        time: When it was made: the time of its record.
        durable: Whether it was made to survive a power cut.
        pinned: Whether anyone has pinned it.
        rows: Rows that each stream holds in it, [b].
        fingerprint: Of the weights that wrote the rows, or None.
    """

    id: str
    generation: int
    time: datetime
    durable: bool
    pinned: bool
    rows: tuple[int, ...]
    fingerprint: str | None


@dataclass(frozen=True)
class DiskUsage:
    """What a store takes up on disk, with everything that is in its folder.

    Attributes:
        format: Version of the format.
        chunk_rows: Rows in a chunk file.
        chunk_files: Files of rows and files of checksums together.
        apparent_bytes: The lengths of all files. Chunk files have their full length from the start.
        allocated_bytes: What the file system has set aside for them.
        shards: Shards that rows are read from.
        shard_rows: Rows held now that are in them, in all layers together.
        shard_bytes: The lengths of their files of rows and of checksums.
    """

    format: int
    chunk_rows: int
    chunk_files: int
    apparent_bytes: int
    allocated_bytes: int
    shards: int
    shard_rows: int
    shard_bytes: int


@dataclass(frozen=True)
class MemoryInfo:
    """What `MemoryStore.info` tells.

    Attributes:
        path: The folder of the store, or None for a store in memory.
        layers: Memory layers, l.
        streams: Streams, b.
        dim: Width of a row, d.
        dtype: Type of the rows.
        capacity: Rows that a stream holds at most, or None.
        capacity_bytes: Bytes of rows that the store holds at most, all layers and streams together, or None.
        eviction: Which rows leave when a stream exceeds the capacity.
        keep_every: With eviction "every_nth", n; else None.
        fingerprint: Of the weights that write the rows, or None.
        rows: Rows that each stream holds now, committed or not, [b].
        appended: Rows that each stream has appended since its reset, [b].
        evicted: Those of them that it does not hold any more, [b].
        positions: The position of the oldest row that each stream holds, and the one after the newest, [b].
        rows_bytes: Bytes of the rows that all layers and streams hold now.
        memory_bytes: Bytes of the tensors that the store keeps: rows, with room for rows to come, scores, and
            positions that do not follow from the number of rows.
        disk: What it takes up on disk; None for a store in memory.
        commits: The commits that can be opened, oldest first.
    """

    path: Path | None
    layers: int
    streams: int
    dim: int
    dtype: torch.dtype
    capacity: int | None
    capacity_bytes: int | None
    eviction: Eviction
    keep_every: int | None
    fingerprint: str | None
    rows: tuple[int, ...]
    appended: tuple[int, ...]
    evicted: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]
    rows_bytes: int
    memory_bytes: int
    disk: DiskUsage | None
    commits: tuple[CommitInfo, ...]


def disk_usage(disk: Disk, logs: Sequence[StreamLog]) -> DiskUsage:
    """Adds up what is in the folder of a store whose streams hold the rows of these logs.

    A writer may add and remove files meanwhile.
    """
    layout = disk.layout
    chunk_files = sum(
        len(disk.files.listed(layer, stream, kind))
        for layer in range(layout.layers)
        for stream in range(layout.streams)
        for kind in KINDS
    )
    apparent = allocated = 0
    for folder, _, names in os.walk(disk.root):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(folder, name))
                apparent += status.st_size
                allocated += status.st_blocks * _BLOCK_BYTES
    shards = [shard for each in disk.files.shards for shard in each]
    in_them = (
        part
        for log, each in zip(logs, disk.files.shards, strict=True)
        for shard, part in in_shards(log.extents, each)
        if shard is not None
    )
    return DiskUsage(
        format=layout.format,
        chunk_rows=layout.chunk_rows,
        chunk_files=chunk_files,
        apparent_bytes=apparent,
        allocated_bytes=allocated,
        shards=len(shards),
        shard_rows=layout.layers * sum(part.stop - part.start for part in in_them),
        shard_bytes=sum(ShardArray(layout, shard, kind).size for shard in shards for kind in KINDS),
    )


def allocated_bytes(paths: Iterable[Path]) -> int:
    """What the file system has set aside for files; those that are not there count nothing."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.lstat().st_blocks * _BLOCK_BYTES
    return total


def describe_commits(disk: Disk) -> tuple[CommitInfo, ...]:
    """Reads the records of all commits that can be opened."""
    found = []
    pinned = {*disk.pins().values()}
    for name in disk.list_commits():
        with suppress(CommitNotFoundError, FileNotFoundError):  # a writer may drop it meanwhile
            commit = read_commit(disk.root, name, disk.layout)
            info = CommitInfo(
                id=name,
                generation=commit.generation,
                time=datetime.fromtimestamp(record_path(disk.root, name).stat().st_mtime, UTC),
                durable=commit.durable,
                pinned=name in pinned,
                rows=tuple(log.held for log in commit.logs),
                fingerprint=commit.fingerprint,
            )
            found.append(info)
    return tuple(found)
