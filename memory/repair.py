"""Makes a damaged store on disk one that can be read and written again, with the rows that are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from xlroute.memory.chunks import ChunkFiles
from xlroute.memory.commits import MAX_GENERATION, MAX_ROW, Commit, write_commit
from xlroute.memory.damage import Damage, Ranges
from xlroute.memory.errors import CorruptionError, MemoryStoreError, StoreWriteError
from xlroute.memory.layout import (
    COMMITS,
    KINDS,
    METADATA,
    Layout,
    count_arrays,
    plain_group_document,
    raise_format,
    read_group,
    read_layout,
)
from xlroute.memory.lock import WriterLock
from xlroute.memory.log import Extent, StreamLog, survivors_of
from xlroute.memory.route_files import ROUTES, ROUTES_NAME, named_routes
from xlroute.memory.score_files import SCORES
from xlroute.memory.sealed import encode, replace_file, sync
from xlroute.memory.shard_check import check_shard
from xlroute.memory.shard_files import mend_checksums
from xlroute.memory.shards import SHARDS, Shard, ShardArray, shard_documents, shard_name, with_rows
from xlroute.memory.side_files import SideFiles
from xlroute.memory.survivors import PositionFiles
from xlroute.memory.verify import (
    Meter,
    Progress,
    check_arrays,
    check_ends,
    check_metadata,
    check_positions,
    check_routes,
    check_rows,
    check_scores,
    find_leftovers,
    merged,
    read_records,
    split,
)

# Behind the name of a record that is set aside: nothing takes it for a record then.
_SET_ASIDE = ".damaged"


@dataclass(frozen=True)
class StreamLoss:
    """What one stream has lost. Positions count the rows that it had appended before since its reset.

    Ranges of positions also cover those between the rows of a stream that were evicted by a policy.

    Attributes:
        stream: The stream.
        held: Positions of the rows that it held, [start, stop).
        damaged: Positions of those that are damaged in any layer, as ranges [start, stop). If the positions
            of rows are damaged, so are the rows, and the range begins at 0.
        kept: Positions of the rows that it holds now, [start, stop). The next row that is appended gets the
            position `kept[1]`; if that is below `held[1]`, read on from there.
    """

    stream: int
    held: tuple[int, int]
    damaged: Ranges
    kept: tuple[int, int]

    @property
    def lost(self) -> Ranges:
        """Positions of the rows that it held and holds no more, whole or damaged, as ranges [start, stop)."""
        parts = ((self.held[0], self.kept[0]), (self.kept[1], self.held[1]))
        return tuple(part for part in parts if part[0] < part[1])


@dataclass(frozen=True)
class RepairReport:
    """What `MemoryStore.repair` has found and done.

    Attributes:
        path: The folder of the store.
        base: Id of the commit that was repaired: the last whose record can be read.
        commit: Id of the commit that was written, now the last; None if `base` stands as it was.
        losses: The streams that lost rows.
        damage: What was found damaged of the rows that `base` holds, and could not be restored.
        restored: Files made as they were: metadata, files of rows of the wrong length (not their rows), and
            checksums and indexes of shards that zarr alone needs.
        set_aside: The new names of damaged commit records.
        removed: What a crash had left behind.
        derived: Damaged folders of scores and files of routed counts, which were removed: scores are computed
            anew, and counts are lost.
    """

    path: Path
    base: str
    commit: str | None
    losses: tuple[StreamLoss, ...]
    damage: tuple[Damage, ...]
    restored: tuple[Path, ...]
    set_aside: tuple[Path, ...]
    removed: tuple[Path, ...]
    derived: tuple[Path, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was damaged but scores and counts, which nobody needs."""
        return not (self.commit or self.damage or self.restored or self.set_aside)


def repair_store(root: Path, *, progress: Progress | None) -> RepairReport:
    """Repairs a store; see `MemoryStore.repair`."""
    layout = read_group(root)
    found = count_arrays(root)
    if layout.arrays > 2 * found:
        raise CorruptionError(f"{root / METADATA}: expected {layout.arrays} arrays beside it, got {found}")
    if not (root / COMMITS).is_dir():
        raise CorruptionError(f"{root / COMMITS}: expected the folder of the commits, got none")
    try:
        lock = WriterLock(root)
        try:
            return _repair(root, layout, progress)
        finally:
            lock.release()
    except MemoryStoreError:
        raise
    except OSError as error:
        where = error.filename or root
        text = f"{where}: expected to read and write, got {error.strerror or error}; the last commit stands"
        raise StoreWriteError(error.errno, text) from error


def _repair(root: Path, layout: Layout, progress: Progress | None) -> RepairReport:
    known, records = read_records(root, layout)
    if not known:
        raise CorruptionError(f"{root / COMMITS}: expected the record of a commit that can be read, got none")
    base_id, base = list(known.items())[-1]
    left = find_leftovers(root, layout, [] if records else [*known.values()])
    removed = [path for path in left if isinstance(path, Path)]
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    restored = _restore_metadata(root, layout, [*known.values()])
    read_layout(root)  # refuses what could not be restored
    files = ChunkFiles(root, layout, None, shards=base.shards)
    in_files, sharded = split([base], range(layout.streams))
    restored += _restore_lengths(files, in_files, sharded)

    derived = _remove_derived(root, layout, base)
    meter = Meter(progress, layout.layers * layout.row_bytes * sum(log.held for log in base.logs))
    damage = check_positions(root, [base])
    for stream, extents in enumerate(in_files):
        for layer in range(layout.layers):
            damage += check_rows(files, layer, stream, extents, meter.advance)
    for (stream, shard), extents in sharded.items():
        found = [*check_shard(files, stream, shard, extents, meter.advance)]
        restored += _restore_shard(files, stream, shard, found)
        damage += (each for each in found if each.rows)
    losses = []
    logs = [*base.logs]
    for stream, log in enumerate(base.logs):
        rows = [each for one in damage if one.stream == stream for each in one.rows]
        if rows:
            loss, logs[stream] = _loss(stream, log, rows)
            losses.append(loss)
    ends = [*check_ends(files, base, [log.extents for log in base.logs])]
    newer = [each for each in records if each.path.stem > base_id]
    commit = None
    if losses or ends or newer:
        commit = _committed(root, files, base, logs, [*known.values()], records)
    set_aside = []
    for record in records:
        assert isinstance(record.path, Path)
        target = record.path.with_name(record.path.name + _SET_ASIDE)
        os.replace(record.path, target)
        set_aside.append(target)
    sync(root / COMMITS)
    return RepairReport(
        path=root,
        base=base_id,
        commit=commit,
        losses=tuple(losses),
        damage=(*damage, *ends),
        restored=tuple(restored),
        set_aside=tuple(set_aside),
        removed=tuple(removed),
        derived=tuple(derived),
    )


def _remove_derived(root: Path, layout: Layout, base: Commit) -> list[Path]:
    """Removes the damaged scores and routed counts of a commit, which nobody needs; returns what is gone."""
    found = {
        root / SCORES / each.path.relative_to(root / SCORES).parts[0]
        for each in check_scores(root, layout, [base])
        if isinstance(each.path, Path)
    }
    found |= {each.path for each in check_routes(root, layout, [base]) if isinstance(each.path, Path)}
    for path in sorted(found):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(found)


def _restore_metadata(root: Path, layout: Layout, commits: list[Commit]) -> list[Path]:
    """Writes damaged metadata anew, all of which follows from that of the group; returns the files."""
    restored = []
    path = root / COMMITS / METADATA
    if any(damage.path == path for damage in check_metadata(root, layout)):
        replace_file(path, encode(plain_group_document()), scratch=root / COMMITS, durable=True)
        restored.append(path)
    extents = [
        merged(extent for commit in commits for extent in commit.logs[stream].extents)
        for stream in range(layout.streams)
    ]
    for damage in check_arrays(root, layout, extents):
        assert damage.stream is not None
        assert isinstance(damage.path, Path)
        rows = max(commit.logs[damage.stream].end for commit in commits)
        folder = damage.path.parent
        folder.mkdir(exist_ok=True)
        document = layout.array_document(folder.name.rpartition(".")[2], layout.room_for(rows))
        replace_file(damage.path, encode(document), scratch=root / COMMITS, durable=True)
        restored.append(damage.path)
    sync(root)
    return restored


def _restore_lengths(
    files: ChunkFiles, in_files: Sequence[Sequence[Extent]], sharded: Iterable[tuple[int, Shard]]
) -> list[Path]:
    """Gives the files of a commit the length that they must have; what rows they lack is damage then.

    Args:
        files: The files of the store.
        in_files: For each stream, the rows in chunk files.
        sharded: The shards, each with its stream.
    """
    expected = []
    size = files.layout.chunk_rows
    for stream, extents in enumerate(in_files):
        for layer in range(files.layout.layers):
            for kind in KINDS:
                for chunk in sorted(files.listed(layer, stream, kind)):
                    start, stop = chunk * size, (chunk + 1) * size
                    if any(extent.start < stop and start < extent.stop for extent in extents):
                        path = files.path(layer, stream, chunk, kind)
                        expected.append((path, files.layout.chunk_bytes(kind)))
    for stream, shard in sharded:
        for kind in KINDS:
            array = ShardArray(files.layout, shard, kind)
            folder = files.root / SHARDS / shard_name(stream, shard)
            expected.append((folder / array.name, array.size))
    restored = []
    for path, length in expected:
        # A link may lead out of the store.
        if path.is_file() and not path.is_symlink() and path.stat().st_size != length:
            os.truncate(path, length)
            sync(path)
            restored.append(path)
    return restored


def _restore_shard(files: ChunkFiles, stream: int, shard: Shard, damage: Iterable[Damage]) -> list[Path]:
    """Writes damaged metadata of a shard anew, and indexes and checksums that zarr alone needs.

    They follow from what the commit says of the shard, and from its rows, which are left as they are: those
    that are damaged have no part in a commit any more.
    """
    damaged = {each.path for each in damage}
    restored = []
    for name, document in shard_documents(files.layout, shard):
        path = files.root / SHARDS / shard_name(stream, shard) / name
        if path in damaged and path.parent.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
            replace_file(path, encode(document), scratch=files.root / COMMITS, durable=True)
            sync(path.parent.parent)
            restored.append(path)
    if not damaged - {*restored}:
        return restored
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(files.opened_shard(stream, shard))
        except (CorruptionError, OSError):
            return restored  # a file is gone, or an index that follows from nothing else
        return restored + [file.path for file in opened.files if mend_checksums(file)]


def _loss(stream: int, log: StreamLog, rows: Iterable[tuple[int, int]]) -> tuple[StreamLoss, StreamLog]:
    """What a stream loses if these rows of its log are damaged, and what it holds then."""
    first = 0
    found = []
    for extent in log.extents:
        for start, stop in rows:
            low, high = max(start, extent.start), min(stop, extent.stop)
            if low < high:
                found.append((first + low - extent.start, first + high - extent.start))
        first += extent.stop - extent.start
    damaged: list[tuple[int, int]] = []
    for low, high in sorted(found):
        if damaged and low <= damaged[-1][1]:
            damaged[-1] = (damaged[-1][0], max(high, damaged[-1][1]))
        else:
            damaged.append((low, high))
    starts = [0, *(stop for _, stop in damaged)]
    stops = [*(start for start, _ in damaged), log.held]
    # Of two runs of one length the newer.
    low, high = max(zip(starts, stops, strict=True), key=lambda run: (run[1] - run[0], run[0]))
    left = log.truncated(log.held - high).dropped(low)
    try:
        positions = log.positions()
    except (MemoryStoreError, OSError):
        # Lost, and with them the rows. Nobody knows more than that they lie before all others.
        positions = torch.arange(log.appended - log.held, log.appended)
        positions[: log.surviving] = 0
    at = [*positions.tolist(), log.appended]
    ranges = tuple((at[start], at[stop]) for start, stop in damaged)
    return StreamLoss(stream, (at[0], log.appended), ranges, (at[low], left.appended)), left


def _committed(
    root: Path,
    files: ChunkFiles,
    base: Commit,
    logs: list[StreamLog],
    known: list[Commit],
    records: list[Damage],
) -> str:
    """Commits `logs`, what is left of `base`, durably; returns the id. No record is dropped."""
    # Two commits of one generation would leave open which of them is the last.
    numbers = [commit.generation for commit in known]
    generation = 1 + max([*numbers, *(int(damage.path.stem[:12]) for damage in records)])
    if generation > MAX_GENERATION:
        raise CorruptionError(
            f"{root / COMMITS}: expected generations below {MAX_GENERATION}, got {generation - 1}"
        )
    # Where rows were lost, some are read again, and would be counted twice.
    routes = tuple(
        base.routes_of(stream) if log == base.logs[stream] else None for stream, log in enumerate(logs)
    )
    size = files.layout.chunk_rows
    for stream, log in enumerate(logs):
        # The next row goes into files of its own: not into one that is damaged, and not over rows that only a
        # damaged record refers to, which may be restored.
        end = max(commit.logs[stream].end for commit in known)
        beyond = max(-(-end // size) * size, files.present_end(stream))
        logs[stream] = replace(log, end=beyond if beyond <= MAX_ROW else end)
    raise_format(root, files.layout)
    files.mark_unsynced([log.extents for log in logs])
    files.sync()
    positions = PositionFiles(root)
    for each in survivors_of(logs):
        positions.mark_unsynced(*each)
    positions.sync()
    shards = tuple(with_rows(base.shards_of(stream), log.extents) for stream, log in enumerate(logs))
    commit = Commit(
        generation,
        base.id,
        base.fingerprint,
        True,
        tuple(logs),
        shards=shards if any(shards) else (),
        routes=routes if any(routes) else (),
    )
    route_files = SideFiles(root, ROUTES, ROUTES_NAME, named_routes([commit]))
    route_files.mark_present_unsynced()
    with suppress(OSError):
        route_files.sync()
    write_commit(root, commit)
    return commit.id
