"""What reads and writes a store, by the place where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xlroute.memory.buffer import Rows
from xlroute.memory.chunk_objects import ChunkObjects
from xlroute.memory.chunks import ChunkFiles, Chunks
from xlroute.memory.claim import read_decided
from xlroute.memory.disk import CHUNK_BYTES, Disk, FolderDisk, copy_store, create_store
from xlroute.memory.errors import CorruptionError
from xlroute.memory.layout import Layout
from xlroute.memory.lock import read_holder
from xlroute.memory.log import StreamLog
from xlroute.memory.place import StorePath
from xlroute.memory.remote import CHUNK_BYTES as REMOTE_CHUNK_BYTES
from xlroute.memory.remote import RemoteDisk, copy_remote_store, create_remote_store
from xlroute.memory.routes import DocumentRoutes
from xlroute.memory.s3 import S3Path
from xlroute.memory.score_files import ScoreChunks, ScoreFiles
from xlroute.memory.score_objects import ScoreObjects
from xlroute.memory.scores import KeptScores


def open_disk(root: StorePath, *, commit: str | None, writable: bool, fingerprint: str | None) -> Disk:
    """Opens a store; see `Disk`."""
    kind = RemoteDisk if isinstance(root, S3Path) else FolderDisk
    return kind(root, commit=commit, writable=writable, fingerprint=fingerprint)


def create_at(root: StorePath, layout: Layout, fingerprint: str | None) -> None:
    """Makes an empty store; see `create_store`."""
    if isinstance(root, S3Path):
        create_remote_store(root, layout, fingerprint)
    else:
        create_store(root, layout, fingerprint)


def copy_to(
    root: StorePath,
    layout: Layout,
    rows: Sequence[Sequence[Rows]],
    held: Sequence[StreamLog],
    fingerprint: str | None,
    kept: Sequence[Sequence[KeptScores | None]],
    documents: Sequence[DocumentRoutes],
    durable: bool,
) -> str:
    """Makes a store with the given rows; see `copy_store`."""
    if isinstance(root, S3Path):
        return copy_remote_store(root, layout, rows, held, fingerprint, kept, documents, durable)
    return copy_store(root, layout, rows, held, fingerprint, kept, documents, durable)


def chunk_bytes_at(root: StorePath | None) -> int:
    """The size of a file of rows, unless a user says otherwise."""
    return REMOTE_CHUNK_BYTES if isinstance(root, S3Path) else CHUNK_BYTES


def open_chunks(root: StorePath, layout: Layout) -> Chunks:
    """The chunk files of a store, for reading, whatever becomes of its commits."""
    if isinstance(root, S3Path):
        return ChunkObjects(root, layout, None)
    return ChunkFiles(root, layout, None)


def open_scores(root: StorePath, layout: Layout) -> ScoreChunks[Any]:
    """The scores of a store, for reading, whatever becomes of its commits."""
    if isinstance(root, S3Path):
        return ScoreObjects(root, layout, None)
    return ScoreFiles(root, layout, None)


def read_writer(root: StorePath) -> str | None:
    """Who took the store for writing and has not let go of it: at work, or killed; None if nobody has."""
    if not isinstance(root, S3Path):
        return read_holder(root)
    try:
        return read_decided(root).writer
    except CorruptionError as error:
        return str(error)
