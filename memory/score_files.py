"""Scores on disk: for each layer and stamp a small store beside the rows, in the rows' own numbers.

A row of scores has the number, in the log, of the row that it belongs to, and the number of its writer. A
commit record says which of the rows that it holds have scores; those of stamps that no record names are
deleted. Nothing is lost with them: what is damaged or gone is computed anew.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from xlroute.memory.chunks import ChunkFiles, Chunks
from xlroute.memory.commits import CommittedScores
from xlroute.memory.errors import CommitNotFoundError, CorruptionError
from xlroute.memory.layout import COMMITS, DTYPES, METADATA, Layout, plain_group_document, write_layout
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.place import StorePath
from xlroute.memory.rows_bytes import as_bytes
from xlroute.memory.scores import KeptScores
from xlroute.memory.sealed import encode, replace_file

SCORES = "scores"
ChunksT = TypeVar("ChunksT", bound=Chunks)


class ScoreChunks(ABC, Generic[ChunksT]):
    """The scores of a store, wherever it is.

    Args:
        root: Folder of the store.
        layout: Its layout.
        record: The commit record that a reader relies on; None for a writer.
    """

    def __init__(self, root: StorePath, layout: Layout, record: StorePath | None) -> None:
        self._root = root / SCORES
        self._layout = layout
        self._record = record
        self._open: dict[tuple[int, str], ChunksT] = {}
        self._damaged: set[tuple[int, int, str]] = set()  # layers, streams and stamps
        # What `keep` has left: layers and stamps, and for each stream the rows that commits hold.
        self._left: tuple[set[tuple[int, str]], Sequence[set[Extent]]] | None = None

    def write(self, layer: int, stream: int, stamp: str, values: Tensor, extents: Sequence[Extent]) -> None:
        """Writes scores [r, n] of the n rows of the extents.

        Raises:
            OSError: The operating system refused.
            CorruptionError: The metadata of the scores is damaged.
        """
        files = self._files(layer, stamp, values.shape[0], create=True)
        done = 0
        for extent in _bound(layer, stamp, extents):
            count = extent.stop - extent.start
            data = as_bytes(values[:, done : done + count].T.cpu())
            files.write(0, stream, extent.start, data, extent.writer, fresh_from=0)
            done += count
        self._damaged.discard((layer, stream, stamp))

    def read(
        self, layer: int, stream: int, stamp: str, columns: int, extents: Sequence[Extent]
    ) -> Tensor | None:
        """The scores [r, n] of the n rows of the extents; None if gone or, with a warning, damaged."""
        if self._has_dropped(layer, stream, stamp, extents):
            return None
        files, extents = self.find(layer, stamp, columns, extents)
        dtype = DTYPES[files.layout.dtype]
        try:
            files.check_present(0, stream, extents)
            parts = [torch.from_numpy(block).view(dtype) for block in files.blocks(0, stream, extents)]
        except CommitNotFoundError:
            return None
        except CorruptionError as error:
            if self._record is not None and not self._record.exists():
                return None  # a writer has dropped the commit just now, and its scores
            if files.root.exists():  # otherwise somebody has removed them
                warnings.warn(f"the scores are computed anew: {error}", stacklevel=2)
            self._damaged.add((layer, stream, stamp))
            return None
        return torch.cat(parts).T

    def find(
        self, layer: int, stamp: str, columns: int, extents: Sequence[Extent]
    ) -> tuple[ChunksT, Sequence[Extent]]:
        """The chunk files of a layer's scores, as layer 0, and the extents as they are written there."""
        return self._files(layer, stamp, columns, create=False), _bound(layer, stamp, extents)

    def _has_dropped(self, layer: int, stream: int, stamp: str, extents: Sequence[Extent]) -> bool:
        """Whether `keep` may have deleted scores of the extents: a layer can outlive all commits of it."""
        if self._left is None:
            return False
        stamps, held = self._left
        return (layer, stamp) not in stamps or not all(
            any(
                each.writer == extent.writer and each.start <= extent.start and extent.stop <= each.stop
                for each in held[stream]
            )
            for extent in extents
        )

    def damaged(self, layer: int, stream: int, stamp: str) -> bool:
        """Whether scores were found damaged, and not written again since then."""
        return (layer, stream, stamp) in self._damaged

    def discard(self, layer: int, stamp: str) -> None:
        """Deletes the scores of a layer and stamp.

        Raises:
            OSError: The operating system refused.
        """
        name = _name(layer, stamp)
        if (self._root / name).exists():
            self._delete(name)
        del self._open[layer, stamp]
        self._damaged = {each for each in self._damaged if (each[0], each[2]) != (layer, stamp)}

    def keep(
        self, needed: Iterable[tuple[int, str]], extents: Sequence[set[Extent]], ends: Sequence[int]
    ) -> None:
        """Deletes the scores of all other layers and stamps, and those of rows that no commit refers to.

        Args:
            needed: The layers and stamps that commit records name.
            extents: For each stream, what the commits hold.
            ends: The ends of the streams' logs.

        Raises:
            OSError: The operating system refused.
        """
        stamps = {*needed}
        self._left = stamps, extents
        needed_names = {_name(layer, stamp) for layer, stamp in stamps}
        for name in self._folders():
            if name not in needed_names:
                self._delete(name)
        self._open = {key: files for key, files in self._open.items() if key in stamps}
        for files in self._open.values():
            for stream, held in enumerate(extents):
                files.release(stream, held, ends[stream])

    def _files(self, layer: int, stamp: str, columns: int, *, create: bool) -> ChunksT:
        if (layer, stamp) not in self._open:
            name = _name(layer, stamp)
            layout = Layout(
                layers=1,
                streams=self._layout.streams,
                dim=columns,
                dtype="float64" if self._layout.dtype == "float64" else "float32",
                capacity=self._layout.capacity,
                chunk_rows=self._layout.chunk_rows,
                keep_commits=1,
            )
            if create and not (self._root / name).exists():
                self._make(name, layout)
            self._open[layer, stamp] = self._chunks(name, layout)
        return self._open[layer, stamp]

    @abstractmethod
    def _chunks(self, name: str, layout: Layout) -> ChunksT:
        """The chunk files of one layer and stamp."""

    @abstractmethod
    def _folders(self) -> list[str]:
        """The names of the folders of all layers and stamps, and what a crash has left beside them."""

    @abstractmethod
    def _delete(self, name: str) -> None:
        """Deletes a folder; a crash leaves what nobody takes for scores that a record names."""

    @abstractmethod
    def _make(self, name: str, layout: Layout) -> None:
        """Makes a folder without scores."""


class ScoreFiles(ScoreChunks[ChunkFiles]):
    """The scores of a store in a folder.

    Args:
        root: As for `ScoreChunks`.
        layout: As for `ScoreChunks`.
        record: As for `ScoreChunks`.
    """

    _root: Path

    def sync(self) -> None:
        """Waits until the scores written so far are on the medium.

        Raises:
            OSError: The operating system refused.
        """
        for files in self._open.values():
            files.sync()

    def _chunks(self, name: str, layout: Layout) -> ChunkFiles:
        return ChunkFiles(self._root / name, layout, self._record)

    def _folders(self) -> list[str]:
        return [each.name for each in self._root.iterdir() if each.is_dir()] if self._root.exists() else []

    def _delete(self, name: str) -> None:
        """Deletes a folder; a crash leaves it under a name that nobody takes for one with scores."""
        dropped = self._root / f".{secrets.token_hex(4)}.dropped"
        os.rename(self._root / name, dropped)
        shutil.rmtree(dropped)

    def _make(self, name: str, layout: Layout) -> None:
        """Makes a folder without scores, whole or not at all; a crash leaves what the next commit deletes."""
        self._root.mkdir(exist_ok=True)
        metadata = self._root / METADATA
        if not metadata.exists():
            replace_file(metadata, encode(plain_group_document()), scratch=self._root.parent / COMMITS)
        building = self._root / f".{secrets.token_hex(4)}.creating"
        building.mkdir()
        write_layout(building, layout)
        os.rename(building, self._root / name)


def _name(layer: int, stamp: str) -> str:
    """The name of the folder of a layer and stamp."""
    return f"layer-{layer}.{stamp}"


def _bound(layer: int, stamp: str, extents: Sequence[Extent]) -> list[Extent]:
    """The extents with writers that stand for the layer and stamp too: other files have other checksums."""
    bits = int(stamp[:8], 16) ^ layer
    return [extent._replace(writer=extent.writer ^ bits) for extent in extents]


class CommittedStreamScores:
    """The scores that a commit holds of one stream: `PersistedScores` in the numbers of `StoredScores`.

    Args:
        files: Where they are.
        scores: What the commit says of the layer.
        layer: Layer.
        stream: Stream.
        log: What the stream held at the commit.
    """

    def __init__(
        self, files: ScoreChunks[Any], scores: CommittedScores, layer: int, stream: int, log: StreamLog
    ) -> None:
        self.stamp = scores.stamp
        first, stop = scores.spans[stream]
        self.first, self.stop = log.oldest + first, log.oldest + stop
        self._files = files
        self._columns = scores.columns
        self._layer = layer
        self._stream = stream
        self._log = log

    def read(self, start: int, stop: int) -> Tensor | None:
        """See `PersistedScores`."""
        extents = self._log.part(start - self._log.oldest, stop - self._log.oldest)
        return self._files.read(self._layer, self._stream, self.stamp, self._columns, extents)


def write_scores(
    files: ScoreChunks[Any],
    layer: int,
    logs: Sequence[StreamLog],
    kept: Sequence[KeptScores | None],
    before: CommittedScores | None,
) -> CommittedScores | None:
    """Writes what is new of a layer's scores.

    Args:
        files: Where to.
        layer: Layer.
        logs: What the streams hold.
        kept: The scores that are in memory, for each stream.
        before: What is there, in the numbers of rows that the logs hold.

    Returns:
        What is there then; None for nothing, as where streams are scored by tokens of their own.

    Raises:
        OSError: The operating system refused.
    """
    found = {(each.stamp, each.values.shape[0]) for each in kept if each is not None}
    if not found and before is not None:
        found = {(before.stamp, before.columns)}
    if len(found) != 1:
        return None
    ((stamp, columns),) = found
    there = [(0, 0)] * len(logs) if before is None or before.stamp != stamp else before.spans
    try:
        spans = _write_new(files, layer, stamp, logs, kept, there)
    except CorruptionError:
        # Of the metadata: nobody reads what is there, and nothing can be added to it.
        files.discard(layer, stamp)
        spans = _write_new(files, layer, stamp, logs, kept, [(0, 0)] * len(logs))
    if not any(first < stop for first, stop in spans):
        return None
    return CommittedScores(stamp, columns, tuple(spans))


def _write_new(
    files: ScoreChunks[Any],
    layer: int,
    stamp: str,
    logs: Sequence[StreamLog],
    kept: Sequence[KeptScores | None],
    there: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    """Writes the scores that are not `there` yet; returns the rows of each stream that have some then."""
    spans = []
    for stream, (log, scores) in enumerate(zip(logs, kept, strict=True)):
        first, stop = (0, 0) if files.damaged(layer, stream, stamp) else there[stream]
        if scores is not None:
            start, end = scores.first, scores.first + scores.values.shape[1]
            if not first <= start <= stop:
                first = stop = start
            if stop < end:
                values = scores.values[:, stop - start :]
                files.write(layer, stream, stamp, values, log.part(stop, end))
                stop = end
        spans.append((first, stop))
    return spans
