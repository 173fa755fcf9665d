"""Scores in an object store: the same small stores, put with each commit."""

from __future__ import annotations

from collections.abc import Mapping

from xlroute.memory.chunk_objects import ChunkObjects
from xlroute.memory.claim import Claim
from xlroute.memory.layout import METADATA, Layout, empty_folders, plain_group_document
from xlroute.memory.place import StorePath
from xlroute.memory.s3 import S3Path, in_parallel
from xlroute.memory.score_files import ScoreChunks
from xlroute.memory.sealed import encode


class ScoreObjects(ScoreChunks[ChunkObjects]):
    """The scores of a store in an object store.

    Args:
        root: As for `ScoreChunks`.
        layout: As for `ScoreChunks`.
        record: As for `ScoreChunks`.
        claim: The writer's hold on the store; None for a reader.
    """

    _root: S3Path

    def __init__(
        self, root: S3Path, layout: Layout, record: StorePath | None, claim: Claim | None = None
    ) -> None:
        super().__init__(root, layout, record)
        self._claim = claim

    def put(self, ends: Mapping[int, int]) -> None:
        """Puts what was written of scores below the ends of the streams' logs.

        Raises:
            StoreLockedError: Somebody else has taken the store over.
            OSError: The object store refused, or cannot be reached.
        """
        for files in self._open.values():
            files.put(ends, tails=True)

    def _chunks(self, name: str, layout: Layout) -> ChunkObjects:
        return ChunkObjects(self._root / name, layout, self._record, claim=self._claim)

    def _folders(self) -> list[str]:
        return [name for name in self._root.names() if name != METADATA]

    def _delete(self, name: str) -> None:
        folder = self._root / name
        folder.delete(folder.sizes())

    def _make(self, name: str, layout: Layout) -> None:
        folder = self._root / name
        files = [
            (self._root / METADATA, encode(plain_group_document())),
            (folder / METADATA, encode(layout.group_document())),
            *((folder / below / METADATA, data) for below, data in empty_folders(layout)),
        ]
        # A writer who has been replaced must not put less room in place of more.
        in_parallel(lambda file: file[0].swap(file[1], None), files)
