"""What is damaged in a store on disk, and what a crash has left there. Nothing is changed."""

from __future__ import annotations

import glob
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xlroute.memory.chunks import Chunks
from xlroute.memory.commits import Commit, list_commits, read_commit, record_path
from xlroute.memory.damage import Damage, Ranges, damage_of, file_problem, ranges_of
from xlroute.memory.errors import CommitNotFoundError, CorruptionError, MemoryStoreError
from xlroute.memory.layout import (
    COMMITS,
    KINDS,
    METADATA,
    Layout,
    count_arrays,
    plain_group_document,
    read_group,
    read_room,
)
from xlroute.memory.log import Extent, survivors_of
from xlroute.memory.place import StorePath
from xlroute.memory.route_files import read_routes, routes_path
from xlroute.memory.sealed import TEMPORARY, read_document
from xlroute.memory.shard_check import check_shard
from xlroute.memory.shards import SHARDS, Shard, in_shards, list_shards, shard_name
from xlroute.memory.storage import open_chunks, open_scores, read_writer
from xlroute.memory.survivors import POSITIONS, list_positions, positions_name, positions_path

# What is called after every few MiB with the bytes done so far, and with all there are.
Progress = Callable[[int, int], None]
# A writer may drop all commits that were just listed, and make others, so often in a row.
_READ_ATTEMPTS = 10


@dataclass(frozen=True)
class VerifyReport:
    """What `MemoryStore.verify` has found.

    Attributes:
        path: Where the store is.
        commits: Ids of the commits whose rows were examined, oldest first.
        rows: Number of rows that these commits hold, in all layers together; each counts once.
        damage: Everything that is damaged: metadata, then commit records, positions, then rows by stream and
            layer in chunk files, and in shards.
        scores: Damage to stored scores. It does no harm: they are computed anew.
        routes: Damage to counts of what was routed. It does no harm: they are left out.
        leftovers: Files and folders that a crash has left behind. They do no harm, and `repair` removes them.
        writer: Who holds the store for writing, or held it until killed; None if the last writer closed it.
            What a writer at work has not committed yet is among the leftovers.
    """

    path: StorePath
    commits: tuple[str, ...]
    rows: int
    damage: tuple[Damage, ...]
    scores: tuple[Damage, ...]
    routes: tuple[Damage, ...]
    leftovers: tuple[StorePath, ...]
    writer: str | None

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage


def verify_store(
    root: StorePath, *, commit: str | None, all_commits: bool, progress: Progress | None
) -> VerifyReport:
    """Examines a store; see `MemoryStore.verify`."""
    if commit is not None and all_commits:
        raise ValueError(f"commit: expected None together with all_commits=True, got {commit!r}")
    wanted = None if commit is None else record_path(root, commit)
    try:
        layout = read_group(root)
    except CorruptionError as error:
        group = damage_of(error, root / METADATA)
        return VerifyReport(root, (), 0, (group,), (), (), tuple(find_leftovers(root)), read_writer(root))
    known, records = read_records(root, layout)
    if commit is None:
        chosen = known if all_commits else dict(list(known.items())[-1:])
    else:
        chosen = {name: known[name] for name in known if name == commit}
        if not chosen and not {wanted, root / COMMITS} & {each.path for each in records}:
            raise CommitNotFoundError(f"commit: expected one of {', '.join(known) or 'none'}, got {commit}")

    metadata = check_metadata(root, layout)
    countable = layout.arrays <= 2 * count_arrays(root)
    if not countable:
        chosen = {}  # most of the store is gone, or the metadata claim what nobody can count
    rows: list[Damage] = []
    extents = [
        merged(extent for commit in chosen.values() for extent in commit.logs[stream].extents)
        for stream in range(layout.streams if chosen else 0)
    ]
    count = layout.layers * _count(extent for stream in extents for extent in stream)
    if countable:
        metadata += check_arrays(root, layout, extents)
        files = open_chunks(root, layout)
        in_files, sharded = split(chosen.values(), range(len(extents)))
        examined_rows = _count(extent for each in (*in_files, *sharded.values()) for extent in each)
        meter = Meter(progress, layout.layers * layout.row_bytes * examined_rows)
        rows += check_positions(root, chosen.values())
        for stream, given in enumerate(in_files):
            for layer in range(layout.layers):
                rows += check_rows(files, layer, stream, given, meter.advance)
        for (stream, shard), given in sharded.items():
            rows += check_shard(files, stream, shard, given, meter.advance)
        if known:
            ends = [*check_ends(files, list(known.values())[-1], extents)]
            # Once a writer has made another commit, the files that it has gone on from may go.
            newest = max([*known, *(each.path.stem for each in records)])
            if list_commits(root)[-1:] == [newest]:
                metadata += ends
    examined = chosen
    if rows:
        # The rows of a commit go after its record: if that is still there, they were there to be read.
        examined = {name: held for name, held in chosen.items() if record_path(root, name).exists()}
        if not examined:
            raise CommitNotFoundError(
                f"commit {', '.join(chosen)}: expected its rows, got a store that has dropped it since then"
            )
        rows = [each for each in (_held_by(root, each, examined) for each in rows) if each.commits]
    damage = (*(_held_by(root, each, examined) for each in metadata), *records, *rows)
    leftovers = find_leftovers(root, layout, [] if records else [*known.values()])
    scores = tuple(check_scores(root, layout, examined.values())) if countable else ()
    if scores:
        # A writer that drops a commit meanwhile drops its scores too.
        remaining = [held for name, held in examined.items() if record_path(root, name).exists()]
        scores = tuple(check_scores(root, layout, remaining))
    routes = tuple(check_routes(root, layout, examined.values()))
    return VerifyReport(
        root, tuple(examined), count, damage, scores, routes, tuple(leftovers), read_writer(root)
    )


def check_scores(root: StorePath, layout: Layout, commits: Iterable[Commit]) -> Iterator[Damage]:
    """Reads all scores that the commits name and that are there, and yields what is damaged."""
    named: dict[tuple[int, str, int], list[set[Extent]]] = {}
    for commit in commits:
        for layer, scores in enumerate(commit.scores):
            if scores is not None:
                key = layer, scores.stamp, scores.columns
                held = named.setdefault(key, [set() for _ in commit.logs])
                for each, log, span in zip(held, commit.logs, scores.spans, strict=True):
                    each.update(log.part(*span))
    files = open_scores(root, layout)
    for key, held in sorted(named.items()):
        chunks, _ = files.find(*key, ())
        if not chunks.root.exists():
            continue  # somebody has removed them
        extents = [files.find(*key, merged(rows))[1] for rows in held]
        yield from check_arrays(chunks.root, chunks.layout, extents)
        for stream, given in enumerate(extents):
            yield from check_rows(chunks, 0, stream, given, lambda _: None)


def check_routes(root: StorePath, layout: Layout, commits: Iterable[Commit]) -> Iterator[Damage]:
    """Reads all routed counts that the commits name and that are there, and yields what is damaged."""
    seen = set()
    for commit in commits:
        for stream, log in enumerate(commit.logs):
            routes = commit.routes_of(stream)
            if routes is None or (stream, routes) in seen:
                continue
            seen.add((stream, routes))
            try:
                read_routes(root, stream, routes, layout.layers, log.appended)
            except FileNotFoundError:
                continue  # somebody has removed them
            except (CorruptionError, OSError) as error:
                yield damage_of(error, routes_path(root, stream, routes), stream=stream)


class Meter:
    """Tells whoever asked how far the work is.

    Args:
        progress: Whom to tell, or None.
        total: Bytes of all the work.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def advance(self, count: int) -> None:
        """Tells of `count` more bytes."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def read_records(root: StorePath, layout: Layout) -> tuple[dict[str, Commit], list[Damage]]:
    """Reads all commit records: those that can be read by id, oldest first, and the damage to others."""
    for _ in range(_READ_ATTEMPTS):
        known: dict[str, Commit] = {}
        damage: list[Damage] = []
        try:
            names = list_commits(root)
        except (CorruptionError, OSError) as error:
            return known, [damage_of(error, root / COMMITS)]
        for name in names:
            try:
                known[name] = read_commit(root, name, layout)
            except CommitNotFoundError:
                continue  # a writer has dropped it just now
            except (CorruptionError, OSError) as error:
                damage.append(damage_of(error, record_path(root, name)))
        if known or damage:
            return known, damage
    return {}, [Damage(root / COMMITS, "expected the record of a commit, got none")]


def check_metadata(root: StorePath, layout: Layout) -> list[Damage]:
    """The damage to metadata beside that of the group and of the arrays."""
    damage = []
    found = count_arrays(root)
    if found != layout.arrays:
        problem = f"expected {layout.arrays} arrays beside it, got {found}"
        damage.append(Damage(root / METADATA, problem))
    path = root / COMMITS / METADATA
    try:
        if read_document(path) != plain_group_document():
            damage.append(Damage(path, f"expected {plain_group_document()}, got another document"))
    except FileNotFoundError:
        damage.append(Damage(path, "expected the metadata of a group, got no such file"))
    except (CorruptionError, OSError) as error:
        damage.append(damage_of(error, path))
    return damage


def check_arrays(root: StorePath, layout: Layout, extents: Sequence[Sequence[Extent]]) -> list[Damage]:
    """The damage to the metadata of the arrays, which are to have room for all extents of each stream.

    `extents` may be empty where no commit is known.
    """
    damage = []
    for stream in range(layout.streams):
        given = extents[stream] if extents else ()
        ranges = tuple((extent.start, extent.stop) for extent in given)
        needed = max((extent.stop for extent in given), default=0)
        for layer in range(layout.layers):
            for kind in KINDS:
                array = layout.array_name(layer, stream, kind)
                path = root / array / METADATA
                try:
                    room = read_room(root, layout, layer, stream, kind)
                except (CorruptionError, OSError) as error:
                    damage.append(replace(damage_of(error, path, array, stream), rows=ranges))
                    continue
                if room < needed:
                    problem = f"expected room for {needed} rows, got {room}"
                    damage.append(Damage(path, problem, array, stream, rows=ranges))
    return damage


def check_ends(files: Chunks, commit: Commit, examined: Sequence[Sequence[Extent]]) -> Iterator[Damage]:
    """The damage to chunk files that the next rows go into beside older ones.

    Args:
        files: The chunk files.
        commit: The commit that a writer would go on from.
        examined: Rows of each stream whose chunk files are examined anyway; may be empty.
    """
    layout = files.layout
    for stream, log in enumerate(commit.logs):
        chunk, rows = divmod(log.end, layout.chunk_rows)
        start = log.end - rows
        known = examined[stream] if examined else ()
        if not rows or any(
            extent.start < start + layout.chunk_rows and start < extent.stop for extent in known
        ):
            continue
        for layer in range(layout.layers):
            for kind in KINDS:
                path = files.path(layer, stream, chunk, kind)
                problem = file_problem(path, layout.chunk_bytes(kind))
                if problem is not None:
                    yield Damage(path, problem, layout.array_name(layer, stream, kind), stream, chunk)


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """Each row of the extents once, in the order of the log."""
    found: list[Extent] = []
    for extent in sorted({*extents}, key=lambda extent: (extent.writer, extent.start)):
        last = found[-1] if found else None
        if last is not None and last.writer == extent.writer and extent.start <= last.stop:
            found[-1] = last._replace(stop=max(last.stop, extent.stop))
        else:
            found.append(extent)
    return sorted(found)


def split(
    commits: Collection[Commit], streams: Iterable[int]
) -> tuple[list[list[Extent]], dict[tuple[int, Shard], list[Extent]]]:
    """What the commits hold of each stream in chunk files; and of streams in shards."""
    in_files: list[list[Extent]] = []
    sharded: dict[tuple[int, Shard], list[Extent]] = {}
    for stream in streams:
        in_files.append(merged(extent for commit in commits for extent in commit.in_files(stream)))
        for commit in commits:
            for shard, part in in_shards(commit.logs[stream].extents, commit.shards_of(stream)):
                if shard is not None:
                    sharded.setdefault((stream, shard), []).append(part)
    return in_files, {key: merged(extents) for key, extents in sharded.items()}


def _count(extents: Iterable[Extent]) -> int:
    return sum(extent.stop - extent.start for extent in extents)


def check_positions(root: StorePath, commits: Iterable[Commit]) -> list[Damage]:
    """The damage to files of positions that the commits name, each file once."""
    damage: dict[StorePath, Damage] = {}
    for commit in commits:
        for stream, survivors in survivors_of(commit.logs):
            path = positions_path(root, stream, survivors)
            try:
                survivors.load()
            except (MemoryStoreError, OSError) as error:
                held = survivors.start, survivors.stop
                damage[path] = replace(damage_of(error, path, stream=stream), rows=(held,))
    return [*damage.values()]


def check_rows(
    files: Chunks, layer: int, stream: int, extents: Iterable[Extent], advance: Callable[[int], None]
) -> Iterator[Damage]:
    """Reads all rows of the extents in one layer, chunk by chunk, and yields what is damaged.

    Args:
        files: The chunk files.
        layer: Layer.
        stream: Stream.
        extents: The rows.
        advance: Called with the number of bytes that were just examined.
    """
    layout = files.layout
    array = layout.array_name(layer, stream, "rows")
    try:
        present = sorted(set().union(*(files.listed(layer, stream, kind) for kind in KINDS)))
    except (FileNotFoundError, NotADirectoryError):
        present = []
    for extent in extents:
        row = extent.start
        while row < extent.stop:
            chunk = row // layout.chunk_rows
            # A record may speak of more chunks than anyone can count; those that are missing count as one.
            index = bisect_left(present, chunk)
            there = index < len(present) and present[index] == chunk
            after = chunk + 1 if there else present[index] if index < len(present) else extent.stop
            piece = extent._replace(start=row, stop=min(extent.stop, after * layout.chunk_rows))
            for path, problem, rows in _check_piece(files, layer, stream, piece, there, advance):
                yield Damage(path, problem, array, stream, chunk, rows)
            row = piece.stop


def _check_piece(
    files: Chunks, layer: int, stream: int, piece: Extent, there: bool, advance: Callable[[int], None]
) -> Iterator[tuple[StorePath, str, Ranges]]:
    """The damage to rows of one chunk, or of missing chunks in a row: file, problem and rows."""
    chunk, last = (row // files.layout.chunk_rows for row in (piece.start, piece.stop - 1))
    whole = ((piece.start, piece.stop),)
    paths = [files.path(layer, stream, chunk, kind) for kind in KINDS]
    problems: list[tuple[StorePath, str, Ranges]] = []
    if not there:
        beyond = f" nor any up to chunk {last}" if last > chunk else ""
        problems.append((paths[0], f"expected a chunk file, got neither it nor {paths[1]}{beyond}", whole))
    else:
        for path, kind in zip(paths, KINDS, strict=True):
            problem = file_problem(path, files.layout.chunk_bytes(kind))
            if problem is not None:
                problems.append((path, problem, whole))
    if problems:
        yield from problems
        advance((piece.stop - piece.start) * files.layout.row_bytes)
        return
    wrong: list[NDArray[np.int64]] = []
    row = piece.start
    try:
        for found in files.scan(layer, stream, piece):
            wrong.append(found.wrong)
            row += found.data.shape[0]
            advance(found.data.nbytes)
    except (MemoryStoreError, OSError) as error:
        # A medium that fails, or files that somebody removes: what was not read is lost.
        yield paths[0], damage_of(error, paths[0]).problem, ((row, piece.stop),)
        advance((piece.stop - row) * files.layout.row_bytes)
    rows = np.concatenate([np.empty(0, np.int64), *wrong])
    if rows.size:
        problem = f"expected every row to have its checksum, got others: it or {paths[1]} is damaged"
        yield paths[0], problem, ranges_of(rows)


def _held_by(root: StorePath, damage: Damage, commits: dict[str, Commit]) -> Damage:
    """The damage together with the commits that hold any of its rows, or have rows in the damaged shard."""
    if damage.stream is None:
        return damage
    holders = []
    for name, commit in commits.items():
        extents = commit.logs[damage.stream].extents
        if any(
            extent.start < stop and start < extent.stop for extent in extents for start, stop in damage.rows
        ) or _in_shard(root, damage, commit.shards_of(damage.stream)):
            holders.append(name)
    return replace(damage, commits=tuple(holders))


def _in_shard(root: StorePath, damage: Damage, shards: Iterable[Shard]) -> bool:
    """Whether damage from which no row suffers is in one of the shards of its stream."""
    if damage.rows or damage.stream is None:
        return False
    folders = (root / SHARDS / shard_name(damage.stream, shard) for shard in shards)
    return any(str(damage.path).startswith(f"{folder}/") for folder in folders)


def find_leftovers(
    root: StorePath, layout: Layout | None = None, commits: Sequence[Commit] = ()
) -> list[StorePath]:
    """What a crash has left in a store and beside it.

    Args:
        root: The folder of the store.
        layout: Its layout, or None if it cannot be read.
        commits: All commits of the store; none where a record is damaged: nobody knows which files it refers
            to.
    """
    found: list[StorePath] = []
    if isinstance(root, Path):
        found += [path for path in (root / COMMITS).glob(f"{TEMPORARY}*") if path.is_file()]
        creating = re.compile(rf"\.{re.escape(root.name)}\.[0-9a-f]{{8}}\.creating")
        beside = root.parent.glob(f".{glob.escape(root.name)}.*.creating")
        found += [
            path
            for path in beside
            if creating.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
    if layout is None or not commits or layout.arrays > 2 * count_arrays(root):
        return sorted(found, key=str)
    _, sharded = split(commits, range(layout.streams))
    found += [root / SHARDS / name for name in list_shards(root) - {shard_name(*each) for each in sharded}]
    named = {positions_name(*each) for commit in commits for each in survivors_of(commit.logs)}
    found += [root / POSITIONS / name for name in list_positions(root) if name not in named]
    files = open_chunks(root, layout)
    size = layout.chunk_rows
    for stream in range(layout.streams):
        extents = merged(extent for commit in commits for extent in commit.in_files(stream))
        # The next row goes into this chunk.
        end = max(commit.logs[stream].end for commit in commits)
        for layer in range(layout.layers):
            for kind in KINDS:
                try:
                    listed = files.listed(layer, stream, kind)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # damage, not a leftover
                for chunk in listed:
                    start, stop = chunk * size, (chunk + 1) * size
                    needed = any(extent.start < stop and start < extent.stop for extent in extents)
                    if not needed and not start < end < stop:
                        found.append(files.path(layer, stream, chunk, kind))
    return sorted(found, key=str)
