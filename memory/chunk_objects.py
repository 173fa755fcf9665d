"""Chunk files in an object store: put whole, read in parts.

An object cannot be extended. So the last chunk of a stream stays in the writer's memory, and is put again
with every commit, zeros behind its rows. Rows in it never change, so whoever reads a newer object than his
commit finds the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.chunks import BLOCK_BYTES, Chunks, Scanned
from xlroute.memory.claim import Claim
from xlroute.memory.errors import CommitNotFoundError, CorruptionError
from xlroute.memory.layout import KINDS, METADATA, Layout, read_room
from xlroute.memory.log import Extent
from xlroute.memory.place import StorePath
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.s3 import S3Path, in_parallel
from xlroute.memory.sealed import encode
from xlroute.memory.shards import Shard

# Somebody else may have put an object between looking at it and putting it, so often in a row.
_ATTEMPTS = 10
_AHEAD_BYTES = 32 * 2**20  # of chunks that are read at once, before anyone has asked for all of them


@dataclass
class _Chunk:
    """A chunk in the writer's memory.

    Attributes:
        rows: Bytes of its rows, [chunk_rows, row_bytes].
        checksums: Their checksums, [chunk_rows].
        e_tags: By kind, what stands for the object that is there; None for none, as far as is known.
        changed: Whether the object lacks rows.
    """

    rows: Bytes
    checksums: NDArray[np.uint32]
    e_tags: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(KINDS))
    changed: bool = True

    def data(self, kind: str) -> NDArray[np.uint8]:
        """The bytes of the object."""
        return self.rows.reshape(-1) if kind == "rows" else self.checksums.view(np.uint8)


class ChunkObjects(Chunks):
    """The chunk files of a store in an object store.

    Args:
        root: As for `Chunks`.
        layout: As for `Chunks`.
        record: As for `Chunks`.
        claim: The writer's hold on the store; None for a reader.
    """

    root: S3Path

    def __init__(
        self, root: S3Path, layout: Layout, record: StorePath | None, claim: Claim | None = None
    ) -> None:
        super().__init__(root, layout, record)
        self._claim = claim
        self._chunks: dict[tuple[int, int, int], _Chunk] = {}

    # Reading

    def path(self, layer: int, stream: int, chunk: int, kind: str) -> S3Path:
        """See `Chunks`."""
        return self.root / self.layout.array_name(layer, stream, kind) / self.layout.chunk_name(chunk, kind)

    def prefetch(self, layer: int, stream: int, rows: NDArray[np.int64]) -> None:
        """Nothing: whoever wants rows early can gather them early."""

    def check_present(self, layer: int, stream: int, extents: Iterable[Extent]) -> None:
        """See `Chunks`."""
        extents = [*extents]
        folders = (self.root / self.layout.array_name(layer, stream, kind) for kind in KINDS)
        sizes = [folder.sizes() for folder in folders] if extents else []
        for extent in extents:
            for chunk, _, _ in self.pieces(extent.start, extent.stop):
                if (layer, stream, chunk) in self._chunks:
                    continue
                for kind, found in zip(KINDS, sizes, strict=True):
                    path = self.path(layer, stream, chunk, kind)
                    if path.name not in found:
                        raise self._missing(path)
                    self._check_size(path, found[path.name], kind)

    def scan(self, layer: int, stream: int, piece: Extent, shard: Shard | None = None) -> Iterator[Scanned]:
        """See `Chunks`; no commit that is read here has rows in shards."""
        chunk = piece.start // self.layout.chunk_rows
        first = chunk * self.layout.chunk_rows
        held = self._chunks.get((layer, stream, chunk))
        step = max(1, BLOCK_BYTES // self.layout.row_bytes)
        for low in range(piece.start, piece.stop, step):
            rows = np.arange(low, min(low + step, piece.stop))
            if held is not None:
                data, stored = held.rows[rows - first], held.checksums[rows - first]
            else:
                start = np.array([low - first])
                fetch = partial(self._fetch, layer, stream, chunk, first=start, count=rows.size)
                found, sums = in_parallel(fetch, KINDS)
                data, stored = found.reshape(rows.size, self.layout.row_bytes), sums.view("<u4")
            yield self._scanned(layer, stream, rows, piece.writer, data, stored)

    def _scan_all(
        self, layer: int, stream: int, parts: Iterable[tuple[Shard | None, Extent]]
    ) -> Iterator[tuple[Shard | None, Scanned]]:
        """See `Chunks`; several chunks at once."""
        at_once = max(1, _AHEAD_BYTES // self.layout.chunk_bytes("rows"))
        left = iter(parts)
        while some := [*islice(left, at_once)]:
            for blocks in in_parallel(lambda part: [*self.scan(layer, stream, part[1])], some):
                for found in blocks:
                    yield None, found

    def _copy(
        self,
        layer: int,
        stream: int,
        rows: NDArray[np.int64],
        data: Bytes,
        stored: NDArray[np.uint32],
    ) -> None:
        """See `Chunks`. Rows that are near each other are fetched with those between them."""
        chunks, local = np.divmod(rows, self.layout.chunk_rows)
        order = np.argsort(chunks, kind="stable")
        bounds = np.flatnonzero(np.diff(chunks[order], prepend=-1, append=-1))
        wanted = []
        for first, last in pairwise(bounds.tolist()):
            part = order[first:last]
            chunk = int(chunks[part[0]])
            if (held := self._chunks.get((layer, stream, chunk))) is not None:
                data[part] = held.rows[local[part]]
                stored[part] = held.checksums[local[part]]
            else:
                wanted += [(chunk, part, kind) for kind in KINDS]

        def fetch(each: tuple[int, NDArray[np.int64], str]) -> None:
            chunk, part, kind = each
            found = self._fetch(layer, stream, chunk, kind, local[part], 1)
            if kind == "rows":
                data[part] = found.reshape(-1, self.layout.row_bytes)
            else:
                stored[part] = found.view("<u4")

        in_parallel(fetch, wanted)

    def _fetch(
        self, layer: int, stream: int, chunk: int, kind: str, first: NDArray[np.int64], count: int
    ) -> NDArray[np.uint8]:
        """The bytes of `count` rows, or of their checksums, from each row `first` [k] of a chunk on."""
        path = self.path(layer, stream, chunk, kind)
        size = self.layout.row_bytes if kind == "rows" else 4
        try:
            parts = path.read_ranges((first * size).tolist(), count * size)
        except FileNotFoundError as error:
            raise self._missing(path) from error
        except OSError:
            self._check_object(path, kind)
            raise
        if any(len(part) != count * size for part in parts):
            self._check_object(path, kind)
        return np.frombuffer(bytearray().join(parts), np.uint8)

    def _check_object(self, path: S3Path, kind: str) -> None:
        """Raises what tells of an object that is too short to be read, if it is."""
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise self._missing(path) from error
        self._check_size(path, size, kind)

    # Writing

    def write(
        self, layer: int, stream: int, start: int, data: Bytes, writer: int, *, fresh_from: int
    ) -> None:
        """See `Chunks`. The rows are kept in memory until `put`."""
        checksums = self._checksums(layer, stream, start, data, writer)
        self._make_room(layer, stream, start + data.shape[0])
        for chunk, low, high in self.pieces(start, start + data.shape[0]):
            first = chunk * self.layout.chunk_rows
            held = self._chunks.get((layer, stream, chunk))
            if held is None:
                held = self._chunk(layer, stream, chunk, low - first, fresh=first >= fresh_from)
                self._chunks[layer, stream, chunk] = held
            held.rows[low - first : high - first] = data[low - start : high - start]
            held.checksums[low - first : high - first] = checksums[low - start : high - start]
            held.changed = True
            if stream in self._present:
                self._present[stream].add(chunk)

    def _chunk(self, layer: int, stream: int, chunk: int, rows: int, *, fresh: bool) -> _Chunk:
        """A chunk whose first `rows` rows are in the object store."""
        layout = self.layout
        held = _Chunk(
            np.zeros((layout.chunk_rows, layout.row_bytes), np.uint8), np.zeros(layout.chunk_rows, "<u4")
        )
        for kind in KINDS if rows else ():
            path = self.path(layer, stream, chunk, kind)
            try:
                data, held.e_tags[kind] = path.read()
            except FileNotFoundError as error:
                if fresh:
                    continue
                raise self._missing(path) from error
            if not fresh:
                self._check_size(path, len(data), kind)
            given = np.frombuffer(data, np.uint8)[: held.data(kind).size // layout.chunk_rows * rows]
            held.data(kind)[: given.size] = given
        if rows:
            # In this order: see `_put`.
            assert self._claim is not None
            self._claim.check()
        return held

    def _make_room(self, layer: int, stream: int, rows: int) -> None:
        """Grows the arrays, in their metadata alone, to hold `rows` rows."""
        if self._room.get((layer, stream), -1) >= rows:
            return
        for kind in KINDS:
            path = self.root / self.layout.array_name(layer, stream, kind) / METADATA
            data = encode(self.layout.array_document(kind, self.layout.room_for(rows)))
            for _ in range(_ATTEMPTS):
                # First: a writer who has been replaced must not put less room in place of more.
                e_tag = path.e_tag()
                if read_room(self.root, self.layout, layer, stream, kind) >= rows or path.swap(data, e_tag):
                    break
        self._check_room(layer, stream, rows)

    def put(self, ends: Mapping[int, int], *, tails: bool) -> None:
        """Puts chunks in memory that hold rows below the ends of their streams' logs.

        Args:
            ends: The ends, by stream.
            tails: Whether to put the chunks that the ends are inside of, too; these stay in memory.

        Raises:
            StoreLockedError: Somebody else has taken the store over.
            OSError: The object store refused, or cannot be reached.
        """
        size = self.layout.chunk_rows
        full = {key for key in self._chunks if (key[2] + 1) * size <= ends.get(key[1], 0)}
        begun = {key for key in self._chunks if tails and key[2] * size < ends.get(key[1], 0)}
        changed = [key for key in sorted(full | begun) if self._chunks[key].changed]
        in_parallel(self._put, [(*key, kind) for key in changed for kind in KINDS])
        for key in changed:
            self._chunks[key].changed = False
        for key in full:
            del self._chunks[key]

    def _put(self, each: tuple[int, int, int, str]) -> None:
        layer, stream, chunk, kind = each
        assert self._claim is not None
        path = self.path(layer, stream, chunk, kind)
        held = self._chunks[layer, stream, chunk]
        for _ in range(_ATTEMPTS):
            e_tag = path.swap(held.data(kind).data, held.e_tags[kind])
            if e_tag is not None:
                held.e_tags[kind] = e_tag
                return
            # A killed writer has left something there, or a call that got no answer was carried out, or
            # somebody has taken over. In this order: he puts nothing before he has the claim, so that what is
            # seen before the claim is found to be held is not his.
            e_tag = path.e_tag()
            self._claim.check()
            held.e_tags[kind] = e_tag
        raise OSError(f"{path}: expected to put it, got another object each time")

    def _damaged(self, message: str) -> CorruptionError | CommitNotFoundError:
        if self._claim is not None and self.record is None:
            self._claim.check()  # whoever has taken over may have dropped the rows
        return super()._damaged(message)

    def _delete(self, stream: int, chunks: Sequence[int]) -> None:
        keys = []
        for chunk in chunks:
            for layer in range(self.layout.layers):
                self._chunks.pop((layer, stream, chunk), None)
                for kind in KINDS:
                    name = self.layout.array_name(layer, stream, kind)
                    keys.append(f"{name}/{self.layout.chunk_name(chunk, kind)}")
        self.root.delete(keys)
