"""What is damaged in a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xlroute.memory.chunks import Chunks, wrong_rows
from xlroute.memory.damage import Damage, damage_of, file_problem, ranges_of
from xlroute.memory.errors import CorruptionError, MemoryStoreError
from xlroute.memory.layout import KINDS
from xlroute.memory.log import Extent, within
from xlroute.memory.sealed import read_document
from xlroute.memory.shards import (
    SHARDS,
    OpenShard,
    Shard,
    ShardArray,
    has_checksum,
    shard_documents,
    shard_name,
)


def check_shard(
    files: Chunks, stream: int, shard: Shard, extents: Sequence[Extent], advance: Callable[[int], None]
) -> Iterator[Damage]:
    """Reads the rows of the extents in a shard, and what zarr reads beside them, and yields what is damaged.

    Args:
        files: The files of the store.
        stream: Stream.
        shard: The shard.
        extents: The rows; they ascend.
        advance: Called with the number of bytes that were just examined.
    """
    layout = files.layout
    name = f"{SHARDS}/{shard_name(stream, shard)}"
    folder = files.root / name
    rows = tuple((extent.start, extent.stop) for extent in extents)
    found = []
    for file, document in shard_documents(layout, shard):
        path = folder / file
        try:
            if read_document(path) != document:
                yield Damage(path, "expected the metadata of this shard, got other or damaged", stream=stream)
        except FileNotFoundError:
            yield Damage(path, "expected the metadata of this shard, got no such file", stream=stream)
        except (CorruptionError, OSError) as error:
            yield damage_of(error, path, stream=stream)
    for kind in KINDS:
        array = ShardArray(layout, shard, kind)
        problem = file_problem(folder / array.name, array.size)
        if problem is not None:
            found.append(Damage(folder / array.name, problem, f"{name}/{kind}", stream, rows=rows))
    if not found:
        try:
            with files.opened_shard(stream, shard) as opened:
                yield from _check_indexes(opened, stream, name)
                yield from _check_inner_chunks(files, stream, opened, name, extents, advance)
            return
        except (MemoryStoreError, OSError) as error:
            # The index that compressed rows need, or files that somebody removes.
            path = folder / ShardArray(layout, shard, "rows").name
            found.append(Damage(path, damage_of(error, path).problem, f"{name}/rows", stream, rows=rows))
    yield from found
    advance(layout.layers * layout.row_bytes * sum(stop - start for start, stop in rows))


def _check_indexes(shard: OpenShard[Any], stream: int, name: str) -> Iterator[Damage]:
    """The damage to indexes that zarr alone needs."""
    for file, kind in zip(shard.files, KINDS, strict=True):
        problem = None
        try:
            if not file.has_index():
                problem = "expected the index of the shard at its end, got another"
        except OSError as error:
            problem = damage_of(error, file.path).problem  # the medium fails
        if problem is not None:
            yield Damage(file.path, problem, f"{name}/{kind}", stream)


def _check_inner_chunks(
    files: Chunks,
    stream: int,
    shard: OpenShard[Any],
    name: str,
    extents: Sequence[Extent],
    advance: Callable[[int], None],
) -> Iterator[Damage]:
    """The damage to inner chunks that hold any rows of the extents: to rows or, if none, what zarr checks."""
    size = shard.rows.array.inner_rows
    for number in range(shard.rows.array.count):
        layer, local = divmod(number, shard.rows.array.inners)
        start = shard.shard.start + local * size
        parts = [*within(extents, start, start + size)]
        if not parts:
            continue
        held = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        writers = np.concatenate([np.full(part.stop - part.start, part.writer) for part in parts])
        advance(held.shape[0] * files.layout.row_bytes)
        try:
            inner = [file.inner(number) for file in shard.files]
            data, stored = (file.array.decoded(each) for file, each in zip(shard.files, inner, strict=True))
        except (ValueError, OSError) as error:
            # It cannot be decompressed, or the medium fails.
            problem = damage_of(error, shard.rows.path).problem
            yield Damage(shard.rows.path, problem, f"{name}/rows", stream, number, ranges_of(held))
            continue
        checksums = stored.view("<u4")[held - start, 0]
        wrong = wrong_rows(layer, stream, data[held - start], checksums, held, writers)
        if wrong.size:
            problem = (
                f"expected every row of inner chunk {number} to have its checksum, got others: it or "
                f"{shard.checksums.path} is damaged"
            )
            yield Damage(shard.rows.path, problem, f"{name}/rows", stream, number, ranges_of(wrong))
            continue
        for file, kind, each in zip(shard.files, KINDS, inner, strict=True):
            if not has_checksum(each):
                problem = (
                    f"expected inner chunk {number} to have its checksum, got another, its rows being whole"
                )
                yield Damage(file.path, problem, f"{name}/{kind}", stream, number)
