"""Makes a damaged store on disk one that can be read and written again, with the rows that are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from xlroute.memory.chunks import ChunkFiles
from xlroute.memory.commits import MAX_GENERATION, MAX_ROW, Commit, write_commit
from xlroute.memory.errors import CorruptionError, MemoryStoreError, StoreWriteError
from xlroute.memory.layout import (
    COMMITS,
    KINDS,
    METADATA,
    Layout,
    count_arrays,
    plain_group_document,
    read_group,
    read_layout,
)
from xlroute.memory.lock import WriterLock
from xlroute.memory.log import StreamLog
from xlroute.memory.sealed import encode, replace_file, sync
from xlroute.memory.verify import (
    Damage,
    Meter,
    Progress,
    Ranges,
    check_arrays,
    check_ends,
    check_metadata,
    check_rows,
    find_leftovers,
    merged,
    read_records,
)

# Behind the name of a record that is set aside: nothing takes it for a record then.
_SET_ASIDE = ".damaged"


@dataclass(frozen=True)
class StreamLoss:
    """What one stream has lost. Positions count the rows that it had appended before since its reset.

    Attributes:
        stream: The stream.
        held: Positions of the rows that it held, [start, stop).
        damaged: Positions of those that are damaged in any layer, as ranges [start, stop).
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
        restored: Files made as they were: metadata, and chunk files of the wrong length (not their rows).
        set_aside: The new names of damaged commit records.
        removed: What a crash had left behind.
    """

    path: Path
    base: str
    commit: str | None
    losses: tuple[StreamLoss, ...]
    damage: tuple[Damage, ...]
    restored: tuple[Path, ...]
    set_aside: tuple[Path, ...]
    removed: tuple[Path, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was damaged."""
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
    found = find_leftovers(root, layout, [] if records else [*known.values()])
    removed = [path for path in found if isinstance(path, Path)]
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    restored = _restore_metadata(root, layout, [*known.values()])
    read_layout(root)  # refuses what could not be restored
    files = ChunkFiles(root, layout, None)
    restored += _restore_lengths(files, base)

    meter = Meter(progress, layout.layers * layout.row_bytes * sum(log.held for log in base.logs))
    damage: list[Damage] = []
    for stream, log in enumerate(base.logs):
        for layer in range(layout.layers):
            damage += check_rows(files, layer, stream, log.extents, meter.advance)
    losses = []
    for stream, log in enumerate(base.logs):
        rows = [each for found in damage if found.stream == stream for each in found.rows]
        if rows:
            losses.append(_loss(stream, log, rows))
    ends = [*check_ends(files, base, [log.extents for log in base.logs])]
    newer = [each for each in records if each.path.stem > base_id]
    commit = None
    if losses or ends or newer:
        commit = _committed(root, files, base, losses, [*known.values()], records)
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
    )


def _restore_metadata(root: Path, layout: Layout, commits: list[Commit]) -> list[Path]:
    """Writes damaged metadata anew, all of which follows from that of the group; returns the files."""
    restored = []
    path = root / COMMITS / METADATA
    if any(damage.path == path for damage in check_metadata(root, layout)):
        replace_file(path, encode(plain_group_document()), scratch=root / COMMITS, durable=True)
        restored.append(path)
    extents = [merged(commits, stream) for stream in range(layout.streams)]
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


def _restore_lengths(files: ChunkFiles, commit: Commit) -> list[Path]:
    """Gives chunk files of a commit the length that they must have; what rows they lack is damage then."""
    restored = []
    size = files.layout.chunk_rows
    for stream, log in enumerate(commit.logs):
        for layer in range(files.layout.layers):
            for kind in KINDS:
                expected = files.layout.chunk_bytes(kind)
                for chunk in sorted(files.listed(layer, stream, kind)):
                    path = files.path(layer, stream, chunk, kind)
                    start, stop = chunk * size, (chunk + 1) * size
                    if (
                        any(extent.start < stop and start < extent.stop for extent in log.extents)
                        and path.is_file()
                        and not path.is_symlink()  # it may lead out of the store
                        and path.stat().st_size != expected
                    ):
                        os.truncate(path, expected)
                        sync(path)
                        restored.append(path)
    return restored


def _loss(stream: int, log: StreamLog, rows: Iterable[tuple[int, int]]) -> StreamLoss:
    """What a stream loses if these rows of its log are damaged."""
    first = position = log.appended - log.held
    found = []
    for extent in log.extents:
        for start, stop in rows:
            low, high = max(start, extent.start), min(stop, extent.stop)
            if low < high:
                found.append((position + low - extent.start, position + high - extent.start))
        position += extent.stop - extent.start
    damaged: list[tuple[int, int]] = []
    for low, high in sorted(found):
        if damaged and low <= damaged[-1][1]:
            damaged[-1] = (damaged[-1][0], max(high, damaged[-1][1]))
        else:
            damaged.append((low, high))
    starts = [first, *(stop for _, stop in damaged)]
    stops = [*(start for start, _ in damaged), log.appended]
    # Of two runs of one length the newer.
    kept = max(zip(starts, stops, strict=True), key=lambda run: (run[1] - run[0], run[0]))
    return StreamLoss(stream, (first, log.appended), tuple(damaged), kept)


def _committed(
    root: Path,
    files: ChunkFiles,
    base: Commit,
    losses: Iterable[StreamLoss],
    known: list[Commit],
    records: list[Damage],
) -> str:
    """Commits what is left of `base`, durably; returns the id. No record is dropped."""
    # Two commits of one generation would leave open which of them is the last.
    numbers = [commit.generation for commit in known]
    generation = 1 + max([*numbers, *(int(damage.path.stem[:12]) for damage in records)])
    if generation > MAX_GENERATION:
        raise CorruptionError(
            f"{root / COMMITS}: expected generations below {MAX_GENERATION}, got {generation - 1}"
        )
    logs = list(base.logs)
    for loss in losses:
        log = logs[loss.stream].truncated(loss.held[1] - loss.kept[1])
        logs[loss.stream] = log.dropped(loss.kept[0] - loss.held[0])
    size = files.layout.chunk_rows
    for stream, log in enumerate(logs):
        # The next row goes into files of its own: not into one that is damaged, and not over rows that only a
        # damaged record refers to, which may be restored.
        end = max(commit.logs[stream].end for commit in known)
        beyond = max(-(-end // size) * size, files.present_end(stream))
        logs[stream] = replace(log, end=beyond if beyond <= MAX_ROW else end)
    files.mark_unsynced([log.extents for log in logs])
    files.sync()
    commit = Commit(generation, base.id, base.fingerprint, True, tuple(logs))
    write_commit(root, commit)
    return commit.id
