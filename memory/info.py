"""What a store holds and what it takes up."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from xlroute.memory.commits import read_commit, record_path
from xlroute.memory.disk import Disk, DiskUsage
from xlroute.memory.errors import CommitNotFoundError
from xlroute.memory.layout import Eviction
from xlroute.memory.place import StorePath


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
class MemoryInfo:
    """What `MemoryStore.info` tells.

    Attributes:
        path: Where the store is, or None for a store in memory.
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
        memory_bytes: Bytes of what the store keeps: rows, with room for rows to come, scores, positions that
            do not follow from the number of rows, and counts of what was routed.
        routed: How often any row of a stream was routed since its reset, in all layers together, [b]; None
            where that was never recorded.
        disk: What it takes up on disk; None for a store in memory.
        commits: The commits that can be opened, oldest first.
    """

    path: StorePath | None
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
    routed: tuple[int, ...] | None
    disk: DiskUsage | None
    commits: tuple[CommitInfo, ...]


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
