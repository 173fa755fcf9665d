"""Chunk files in an object store: put whole, read in parts; and shards of such rows.

An object cannot be extended. So the last chunk of a stream stays in the writer's memory, and is put again
with every commit, zeros behind its rows. Rows in it never change, so whoever reads a newer object than his
commit finds the same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.chunks import BLOCK_BYTES, Chunks, Scanned
from xlroute.memory.claim import Claim
from xlroute.memory.errors import CommitNotFoundError, CorruptionError, StoreLockedError
from xlroute.memory.layout import KINDS, METADATA, Layout, read_room
from xlroute.memory.log import Extent
from xlroute.memory.object_parts import read_rows
from xlroute.memory.place import StorePath
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.s3 import S3Path, in_parallel
from xlroute.memory.sealed import encode
from xlroute.memory.shard_objects import (
    InnerChunks,
    ShardObject,
    open_shard,
    open_shard_ahead,
    put_shard,
)
from xlroute.memory.shards import (
    SHARDS,
    OpenShard,
    Shard,
    Source,
    list_shards,
    new_shard,
    shard_name,
)

# Somebody else may have put an object between looking at it and putting it, so often in a row.
_ATTEMPTS = 10
_AHEAD_BYTES = 32 * 2**20  # of rows that are read at once, before anyone has asked for all of them


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
    """The chunk files of a store in an object store, and its shards.

    Args:
        root: As for `Chunks`.
        layout: As for `Chunks`.
        record: As for `Chunks`.
        shards: As for `Chunks`.
        claim: The writer's hold on the store; None for a reader.
    """

    root: S3Path

    def __init__(
        self,
        root: S3Path,
        layout: Layout,
        record: StorePath | None,
        *,
        shards: Sequence[Sequence[Shard]] = (),
        claim: Claim | None = None,
    ) -> None:
        super().__init__(root, layout, record, shards)
        self._claim = claim
        self._chunks: dict[tuple[int, int, int], _Chunk] = {}
        self._opened: dict[tuple[int, Shard], OpenShard[ShardObject]] = {}
        self._inner_chunks = InnerChunks()
        self._sizes: dict[str, int] = {}  # of the objects of shards, as they were listed last
        # Names of shards that this writer may delete: his own, and those that were there before he came.
        self._removable: set[str] = set()
        self._listed = False

    # Reading

    def path(self, layer: int, stream: int, chunk: int, kind: str) -> S3Path:
        """See `Chunks`."""
        return self.root / self.layout.array_name(layer, stream, kind) / self.layout.chunk_name(chunk, kind)

    def prefetch(self, layer: int, stream: int, rows: NDArray[np.int64]) -> None:
        """Nothing: whoever wants rows early can gather them early."""

    @contextmanager
    def opened_shard(self, stream: int, shard: Shard) -> Iterator[OpenShard[ShardObject]]:
        """See `Chunks`."""
        with self._noticed():
            opened = open_shard_ahead(self.root, self.layout, stream, shard)
        yield opened

    def check_present(self, layer: int, stream: int, extents: Iterable[Extent]) -> None:
        """See `Chunks`."""
        extents = [*extents]
        folders = (self.root / self.layout.array_name(layer, stream, kind) for kind in KINDS)
        sizes = [folder.sizes() for folder in folders] if extents else []
        shards = set()
        for shard, part in self.parts(stream, extents):
            chunk = part.start // self.layout.chunk_rows
            if shard is not None:
                shards.add(shard)
            elif (layer, stream, chunk) not in self._chunks:
                for kind, found in zip(KINDS, sizes, strict=True):
                    path = self.path(layer, stream, chunk, kind)
                    self._check_object(path, kind, found.get(path.name))
        self._open_shards(stream, shards)
        for shard in shards:
            for file in self._open_shard(stream, shard).files:
                with self._noticed():
                    file.check_size(self._size_in_shards(f"{shard_name(stream, shard)}/{file.array.name}"))

    def scan(self, layer: int, stream: int, piece: Extent, shard: Shard | None = None) -> Iterator[Scanned]:
        """See `Chunks`."""
        part = piece.start // self.layout.chunk_rows if shard is None else shard
        held = self._held(layer, stream, part)
        step = max(1, BLOCK_BYTES // self.layout.row_bytes)
        for low in range(piece.start, piece.stop, step):
            rows = np.arange(low, min(low + step, piece.stop))
            if held is not None:
                local = rows % self.layout.chunk_rows
                data, stored = held.rows[local], held.checksums[local]
            else:
                data, sums = in_parallel(partial(self._fetch, layer, stream, part, rows), KINDS)
                stored = sums.view("<u4")[:, 0]
            yield self._scanned(layer, stream, rows, piece.writer, data, stored)

    def _scan_all(
        self, layer: int, stream: int, parts: Iterable[tuple[Shard | None, Extent]]
    ) -> Iterator[tuple[Shard | None, Scanned]]:
        """See `Chunks`; several chunks, or blocks of a shard, at once."""
        for batch in self._batches(parts):
            self._open_shards(stream, {shard for shard, _ in batch if shard is not None})
            found = in_parallel(lambda each: [*self.scan(layer, stream, each[1], each[0])], batch)
            for (shard, _), blocks in zip(batch, found, strict=True):
                for block in blocks:
                    yield shard, block

    def _batches(
        self, parts: Iterable[tuple[Shard | None, Extent]]
    ) -> Iterator[list[tuple[Shard | None, Extent]]]:
        """Parts of extents that are to be read at once, those in shards cut where blocks of them end."""
        batch, size = [], 0
        for shard, part in parts:
            for piece in [part] if shard is None else _blocks(self.layout, shard, part):
                batch.append((shard, piece))
                size += (piece.stop - piece.start) * self.layout.row_bytes
                if size >= _AHEAD_BYTES:
                    yield batch
                    batch, size = [], 0
        yield batch

    def _copy(
        self,
        layer: int,
        stream: int,
        rows: NDArray[np.int64],
        data: Bytes,
        stored: NDArray[np.uint32],
    ) -> None:
        """See `Chunks`. Rows that are near each other are fetched with those between them."""
        wanted = []
        for part, chosen in self._grouped(stream, rows):
            held = self._held(layer, stream, part)
            if held is not None:
                local = rows[chosen] % self.layout.chunk_rows
                data[chosen], stored[chosen] = held.rows[local], held.checksums[local]
            else:
                wanted += [(part, chosen, kind) for kind in KINDS]
        self._open_shards(stream, {part for part, _, _ in wanted if isinstance(part, Shard)})

        def fetch(each: tuple[int | Shard, NDArray[np.int64], str]) -> None:
            part, chosen, kind = each
            found = self._fetch(layer, stream, part, rows[chosen], kind)
            if kind == "rows":
                data[chosen] = found
            else:
                stored[chosen] = found.view("<u4")[:, 0]

        in_parallel(fetch, wanted)

    def _held(self, layer: int, stream: int, part: int | Shard) -> _Chunk | None:
        """A chunk, given by its number, if it is in the writer's memory."""
        return None if isinstance(part, Shard) else self._chunks.get((layer, stream, part))

    def _fetch(self, layer: int, stream: int, part: int | Shard, rows: NDArray[np.int64], kind: str) -> Bytes:
        """Rows [k] of a chunk, given by its number, or of a shard, or what is stored as their checksums."""
        if isinstance(part, Shard):
            opened = self._open_shard(stream, part)
            file = opened.rows if kind == "rows" else opened.checksums
            with self._noticed():
                return file.take(layer, rows - part.start)
        path = self.path(layer, stream, part, kind)
        size = self.layout.row_bytes if kind == "rows" else 4
        starts = (rows - part * self.layout.chunk_rows) * size
        return read_rows(path, starts, size, partial(self._check_object, path, kind))

    def _open_shards(self, stream: int, shards: Collection[Shard]) -> None:
        """Opens the shards that are not open yet, several at once."""
        missing = [shard for shard in shards if (stream, shard) not in self._opened]
        in_parallel(partial(self._open_shard, stream), missing)

    def _open_shard(self, stream: int, shard: Shard) -> OpenShard[ShardObject]:
        """A shard, which is kept open."""
        key = stream, shard
        if key not in self._opened:
            with self._noticed():
                opened = open_shard(self.root, self.layout, stream, shard, self._inner_chunks)
            self._opened[key] = opened
        return self._opened[key]

    def _size_in_shards(self, name: str) -> int | None:
        """The size of an object of a shard, by its key from the folder of all shards on; None for none."""
        if name not in self._sizes:
            # All at once: the next that is asked for is another one of these.
            self._sizes = (self.root / SHARDS).sizes()
        return self._sizes.get(name)

    def _check_object(self, path: S3Path, kind: str, size: int | None) -> None:
        """Raises what tells of an object that is missing, for None, or of another size, if it is."""
        if size is None:
            raise self._missing(path)
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

    def write_shard(self, stream: int, start: int, stop: int, level: int | None, source: Source) -> Shard:
        """See `Chunks`."""
        assert self._claim is not None
        self._claim.check()  # rather than when all has been put
        shard = new_shard(self.layout, start, stop, level)
        self._removable.add(shard_name(stream, shard))
        return put_shard(self.root, self.layout, stream, shard, source)

    def delete_shards(self, names: Collection[str]) -> None:
        """See `Chunks`."""
        folders = [self.root / SHARDS / name for name in sorted(names)]
        in_parallel(lambda folder: folder.delete(folder.sizes()), folders)
        self._removable.difference_update(names)
        for key in [key for key in self._opened if shard_name(*key) in names]:
            del self._opened[key]

    def _known_shards(self) -> set[str]:
        if not self._listed:
            found = list_shards(self.root)
            assert self._claim is not None
            # In this order: whoever takes over puts nothing before he has the claim, so that what is seen
            # before the claim is found to be held is not his.
            with suppress(StoreLockedError):
                self._claim.check()
                self._removable |= found
                self._listed = True
        return self._removable

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


def _blocks(layout: Layout, shard: Shard, part: Extent) -> Iterator[Extent]:
    """The rows of an extent in a shard, a few MiB of whole inner chunks at a time."""
    step = shard.inner_rows * max(1, BLOCK_BYTES // (shard.inner_rows * layout.row_bytes))
    start = part.start
    while start < part.stop:
        stop = min(part.stop, start + step - (start - shard.start) % step)
        yield part._replace(start=start, stop=stop)
        start = stop
