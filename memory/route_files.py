"""Routed counts on disk: a file for each stream that has some, which a commit record names.

It holds, little-endian, how many rows of each layer were ever routed, int64 [l]; then, for one layer after
the other, the positions of these, int64 [n], and how often each was routed, uint32 [n]. Nothing that anybody
needs is lost with it: what is damaged is left out with a warning, and what is gone without.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from functools import partial

import google_crc32c
import numpy as np

from xlroute.memory.commits import Commit, CommittedRoutes
from xlroute.memory.errors import CorruptionError
from xlroute.memory.place import StorePath
from xlroute.memory.routes import DocumentRoutes, RoutedRows
from xlroute.memory.side_files import SideFiles, SideObjects

ROUTES = "routes"
ROUTES_NAME = re.compile(r"stream-\d+\.\d+\.[0-9a-f]{8}")
_MOST = 2**32 - 1  # that a count on disk can say


def routes_path(root: StorePath, stream: int, committed: CommittedRoutes) -> StorePath:
    """The file of a stream's routed counts."""
    return root / ROUTES / routes_name(stream, committed)


def routes_name(stream: int, committed: CommittedRoutes) -> str:
    """The name of the file of a stream's routed counts."""
    return f"stream-{stream}.{committed.total}.{committed.crc32c}"


def named_routes(commits: Iterable[Commit]) -> set[str]:
    """The names of the files of routed counts that commits name."""
    return {
        routes_name(stream, each)
        for commit in commits
        for stream, each in enumerate(commit.routes)
        if each is not None
    }


def committed_documents(root: StorePath, commit: Commit, layers: int) -> list[DocumentRoutes]:
    """What a commit has of routed counts, by stream, to be read when asked for."""
    documents = []
    for stream, log in enumerate(commit.logs):
        routes = commit.routes_of(stream)
        read = None if routes is None else partial(_read, root, stream, routes, layers, log.appended)
        documents.append(DocumentRoutes(layers, routes, read))
    return documents


def _read(
    root: StorePath, stream: int, committed: CommittedRoutes, layers: int, appended: int
) -> list[RoutedRows] | None:
    """The routed counts of a stream by layer; None if they are gone or, with a warning, damaged."""
    try:
        return read_routes(root, stream, committed, layers, appended)
    except FileNotFoundError:
        return None
    except (CorruptionError, OSError) as error:
        warnings.warn(f"the counts of what was routed are lost: {error}", stacklevel=2)
        return None


def read_routes(
    root: StorePath, stream: int, committed: CommittedRoutes, layers: int, appended: int
) -> list[RoutedRows]:
    """Reads the routed counts of a stream, by layer.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptionError: It is damaged.
        OSError: The operating system refused to read it.
    """
    path = routes_path(root, stream, committed)
    try:
        data = path.read_bytes()
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except IsADirectoryError as error:
        raise CorruptionError(f"{path}: expected a file, got a folder") from error
    found = f"{google_crc32c.value(data):08x}"
    if found != committed.crc32c:
        raise CorruptionError(
            f"{path}: expected checksum {committed.crc32c}, got {found}: the file is damaged"
        )
    try:
        rows = _decoded(data, layers)
    except ValueError as error:
        raise CorruptionError(f"{path}: expected the counts of {layers} layers, got others") from error
    for each in rows:
        steps = np.diff(each.positions, prepend=-1, append=appended)
        if (steps < 1).any() or (each.counts < 1).any():
            raise CorruptionError(
                f"{path}: expected positions that ascend from 0 to below {appended}, and counts of at least "
                "1, got others"
            )
    total = sum(int(each.counts.sum()) for each in rows)
    if total != committed.total:
        raise CorruptionError(f"{path}: expected {committed.total} routed rows, got {total}")
    return rows


def write_routes(
    files: SideFiles | SideObjects, documents: Iterable[DocumentRoutes]
) -> tuple[CommittedRoutes | None, ...]:
    """Writes what was counted of each stream, unless it is there; returns what a commit says of it.

    It says nothing of what cannot be written: that is no reason for a commit to fail.
    """
    routes = tuple(_write(files, *each) for each in enumerate(documents))
    return routes if any(routes) else ()


def _write(files: SideFiles | SideObjects, stream: int, document: DocumentRoutes) -> CommittedRoutes | None:
    if document.committed is None and document.total:
        rows = [each._replace(counts=each.counts.clip(max=_MOST)) for each in document.rows]
        data = _encoded(rows)
        total = sum(int(each.counts.sum()) for each in rows)
        committed = CommittedRoutes(total, f"{google_crc32c.value(data):08x}")
        try:
            files.write_named(routes_name(stream, committed), lambda: data)
        except OSError:
            return None
        document.committed = committed
    return document.committed


def _encoded(rows: Sequence[RoutedRows]) -> bytes:
    """Routed counts by layer as they are written."""
    sizes = np.array([len(each.positions) for each in rows], "<i8")
    parts = [part for each in rows for part in (each.positions.astype("<i8"), each.counts.astype("<u4"))]
    return b"".join(part.tobytes() for part in (sizes, *parts))


def _decoded(data: bytes, layers: int) -> list[RoutedRows]:
    """Routed counts by layer; ValueError if these are not the bytes of any."""
    sizes = np.frombuffer(data, "<i8", layers)
    if (sizes < 0).any() or 8 * layers + 12 * int(sizes.sum()) != len(data):
        raise ValueError(f"{len(data)} bytes for {sizes} rows")
    rows = []
    place = 8 * layers
    for size in sizes.tolist():
        positions = np.frombuffer(data, "<i8", size, place).astype(np.int64)
        counts = np.frombuffer(data, "<u4", size, place + 8 * size).astype(np.int64)
        rows.append(RoutedRows(positions, counts))
        place += 12 * size
    return rows
