"""A store with a path: who may write to it, what it holds, and how a commit comes about.

In a folder, rows go straight to the chunk files, beyond everything that any commit has ever referred to, so
that they change nothing until the commit record that refers to them gets its name. A commit is that one
rename: before it the store is as the commit before left it, and after it everything that the record refers to
is there. Only then are old records dropped, and after them the chunk files that nothing refers to any more.
"""

from __future__ import annotations

import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from torch import Tensor

from xlroute.memory.buffer import Rows
from xlroute.memory.chunks import ChunkFiles, Chunks
from xlroute.memory.cold import ColdRows
from xlroute.memory.commits import (
    MAX_GENERATION,
    MAX_ROW,
    Commit,
    CommittedScores,
    add_pin,
    list_commits,
    list_pins,
    read_commit,
    record_path,
    remove_pin,
    write_commit,
)
from xlroute.memory.errors import (
    CommitNotFoundError,
    CorruptionError,
    FingerprintError,
    MemoryStoreError,
    StoreExistsError,
    StoreLockedError,
    StoreWriteError,
)
from xlroute.memory.layout import COMMITS, DTYPES, KINDS, Layout, raise_format, read_layout, write_layout
from xlroute.memory.lock import WriterLock, pin_lock
from xlroute.memory.log import Extent, StreamLog, survivors_of
from xlroute.memory.place import StorePath
from xlroute.memory.route_files import (
    ROUTES,
    ROUTES_NAME,
    committed_documents,
    named_routes,
    write_routes,
)
from xlroute.memory.routes import DocumentRoutes
from xlroute.memory.rows_bytes import Bytes, as_bytes
from xlroute.memory.score_files import CommittedStreamScores, ScoreChunks, ScoreFiles, write_scores
from xlroute.memory.scores import KeptScores, StoredScores
from xlroute.memory.sealed import TEMPORARY, sync
from xlroute.memory.shards import Shard, ShardArray, in_shards, shard_name, with_rows
from xlroute.memory.side_files import SideFiles, SideObjects
from xlroute.memory.survivors import PositionFiles, Positions, Survivors

CHUNK_BYTES = 64 * 2**20  # of a file of rows, unless a user says otherwise
_COPY_BYTES = 4 * 2**20
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own blocks are
# A writer may drop the last commit that a reader has just listed, and commit another, so often in a row.
_OPEN_ATTEMPTS = 10


@dataclass(frozen=True)
class DiskUsage:
    """What a store takes up on disk, with everything that is in its folder.

    Attributes:
        format: Version of the format.
        chunk_rows: Rows in a chunk file.
        chunk_files: Files of rows and files of checksums together.
        apparent_bytes: The lengths of all files. Chunk files have their full length from the start.
        allocated_bytes: What the file system has set aside for them.
        shards: Shards that rows are read from.
        shard_rows: Rows held now that are in them, in all layers together.
        shard_bytes: The lengths of their files of rows and of checksums.
    """

    format: int
    chunk_rows: int
    chunk_files: int
    apparent_bytes: int
    allocated_bytes: int
    shards: int = 0
    shard_rows: int = 0
    shard_bytes: int = 0


@contextmanager
def writing(path: StorePath) -> Iterator[None]:
    """Turns the operating system's refusal into StoreWriteError."""
    try:
        yield
    except MemoryStoreError:
        raise
    except Timeout as error:
        raise StoreLockedError(f"{path}: expected the lock of the pins, got none in time: {error}") from error
    except OSError as error:
        text = f"{path}: expected to write, got {error.strerror or error}; the last commit stands"
        raise StoreWriteError(*([text] if error.errno is None else [error.errno, text])) from error


def _make_parents(path: Path) -> None:
    """Makes the folders that `path` will be in, so that they survive a power cut as a durable commit does."""
    missing = []
    folder = path.parent
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextmanager
def _new_folder(path: Path, layout: Layout) -> Iterator[Path]:
    """The folder of an empty store under another name beside `path`; it gets its name when all went well."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise StoreExistsError(f"{path}: expected nothing or an empty folder, got something that exists")
    building = path.parent / f".{path.name}.{secrets.token_hex(4)}.creating"
    try:
        with writing(path):
            _make_parents(path)
            building.mkdir()
            write_layout(building, layout)
            yield building
            os.rename(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def create_store(path: Path, layout: Layout, fingerprint: str | None) -> None:
    """Makes an empty store with one commit; all of it or nothing.

    Raises:
        StoreExistsError: There is something at the path.
        StoreWriteError: The operating system refused to write.
    """
    logs = (StreamLog(),) * layout.streams
    with _new_folder(path, layout) as root:
        write_commit(root, Commit(1, None, fingerprint, False, logs))


def copied_logs(held: Sequence[StreamLog]) -> tuple[StreamLog, ...]:
    """The logs of a new store that the rows of others are copied to, from its first row on."""
    writer = secrets.randbits(32)
    return tuple(_copied(log, writer) for log in held)


def _copied(log: StreamLog, writer: int) -> StreamLog:
    extents = (Extent(0, log.held, writer),) if log.held else ()
    survivors = Survivors.at(0, log.own_positions()) if log.surviving else None
    return StreamLog(extents, log.appended, log.held, survivors)


def copy_rows(
    files: Chunks, rows: Sequence[Sequence[Rows]], logs: Sequence[StreamLog]
) -> Iterator[tuple[int, int]]:
    """Writes the rows of a new store, a few MiB of one layer and stream at a time.

    Yields:
        A stream, and how many of its rows are written in the layer that is being copied.
    """
    step = max(1, _COPY_BYTES // files.layout.row_bytes)
    for layer, streams in enumerate(rows):
        for stream, source in enumerate(streams):
            for start in range(0, len(source), step):
                index = torch.arange(start, min(start + step, len(source)))
                data = as_bytes(source.gather(index).cpu())
                [extent] = logs[stream].extents
                files.write(layer, stream, start, data, extent.writer, fresh_from=0)
                yield stream, start + data.shape[0]


def copy_store(
    path: Path,
    layout: Layout,
    rows: Sequence[Sequence[Rows]],
    held: Sequence[StreamLog],
    fingerprint: str | None,
    kept: Sequence[Sequence[KeptScores | None]],
    documents: Sequence[DocumentRoutes],
    durable: bool,
) -> str:
    """Makes a store with one commit that holds the given rows; all of it or nothing.

    Args:
        path: Where.
        layout: Its layout.
        rows: For every layer and stream, what it holds.
        held: The logs of the streams where the rows come from, [b].
        fingerprint: Of the weights that wrote the rows.
        kept: The scores of the rows, for every layer and stream.
        documents: What was counted of each stream of routings, if anything was.
        durable: Whether to wait until all of it is on the medium.

    Returns:
        The id of the commit.

    Raises:
        StoreExistsError: There is something at the path.
        StoreWriteError: The operating system refused to write.
        CorruptionError: A row to copy is damaged.
    """
    logs = copied_logs(held)
    with _new_folder(path, layout) as root:
        files = ChunkFiles(root, layout, None, new=True)
        for _ in copy_rows(files, rows, logs):
            pass
        positions = PositionFiles(root)
        for stream, survivors in survivors_of(logs):
            positions.write(stream, survivors)
        score_files = ScoreFiles(root, layout, None)
        scores = tuple(
            write_scores(score_files, layer, logs, streams, None) for layer, streams in enumerate(kept)
        )
        route_files = SideFiles(root, ROUTES, ROUTES_NAME)
        routes = write_routes(route_files, documents)
        if durable:
            files.mark_unsynced([log.extents for log in logs])
            files.sync()
            positions.sync()
            score_files.sync()
            with suppress(OSError):
                route_files.sync()
        commit = Commit(1, None, fingerprint, durable, logs, scores if any(scores) else (), routes=routes)
        write_commit(root, commit)
    if durable:
        try:
            with writing(path):
                sync(path.parent)
        except BaseException:
            # It has its name already; the caller is told that there is no such copy.
            shutil.rmtree(path, ignore_errors=True)
            raise
    return commit.id


class Disk(ABC):
    """An open store with a path, at one commit.

    Args:
        root: Folder of the store.
        commit: Id of the commit to open, or None for the last. A writer goes back to it at once: what it held
            is committed again, as the last commit.
        writable: Whether to take the writer's lock.
        fingerprint: What the commit's fingerprint must be, or None for anything.

    Attributes:
        layout: The layout of the store.
        fingerprint: The fingerprint that the commit records.
        logs: What each stream holds.
        documents: What the commit has of routed counts, by stream; None for nothing.

    Raises:
        StoreNotFoundError: There is nothing at the path.
        FormatError: There is something else, or a store of a newer format.
        CorruptionError: The metadata or the commit record is damaged.
        CommitNotFoundError: There is no such commit.
        FingerprintError: The fingerprint is another one.
        StoreLockedError: Another writer holds the store.
        StoreWriteError: The operating system refused to write.
    """

    files: Chunks
    _score_files: ScoreChunks[Any]
    _positions: Positions  # of a writer, as the next
    _route_files: SideFiles | SideObjects

    def __init__(
        self, root: StorePath, *, commit: str | None, writable: bool, fingerprint: str | None
    ) -> None:
        self.root = root
        self.layout = read_layout(root)
        self._process = os.getpid()
        self._writing = writable
        if not writable:
            _, opened = self._read(commit)
            self._check_fingerprint(opened, fingerprint)
            self._open_files(opened)
        else:
            with writing(root):
                self._lock()
            try:
                with writing(root):
                    opened = self._open_for_writing(commit, fingerprint)
            except BaseException:
                self._unlock()
                raise
        self.fingerprint = opened.fingerprint
        self.logs = opened.logs
        self._scores = opened.scores
        self.documents = committed_documents(root, opened, self.layout.layers) if opened.routes else None

    def _open_for_writing(self, commit: str | None, fingerprint: str | None) -> Commit:
        commit_id, opened = self._read(commit)
        self._check_fingerprint(opened, fingerprint)
        self.layout = raise_format(self.root, self.layout)
        self.files.record = None
        self._open_files(opened)
        self._set_scored(opened.logs, opened.scores)
        self._writer = secrets.randbits(32)
        self._last = commit_id
        self._synced = opened.durable
        # A damaged record that was not asked for ages out like any other; until then it is None here.
        self._commits: dict[str, Commit | None] = {}
        for name in list_commits(self.root):
            self._commits[name] = None
            with suppress(CorruptionError):
                self._commits[name] = read_commit(self.root, name, self.layout)
        # Two commits of one generation would leave open which of them is the last.
        self._generation = int(max(self._commits)[:12])
        known = [known for known in self._commits.values() if known is not None]
        if any(known.durable for known in known):
            # Its writer may have been killed before this; the records of earlier durable commits go because
            # of it.
            self._sync_records()
        self._ends = [
            max(log.end for log in logs) for logs in zip(*(known.logs for known in known), strict=True)
        ]
        if commit_id != max(self._commits) and len(known) < len(self._commits):
            # Nobody knows which rows the damaged records refer to; they may be restored.
            self._ends = [
                end if (beyond := self.files.present_end(stream)) > MAX_ROW else max(end, beyond)
                for stream, end in enumerate(self._ends)
            ]
        if commit_id != max(self._commits):
            logs = [replace(log, end=end) for log, end in zip(opened.logs, self._ends, strict=True)]
            self._set_scored(logs, opened.scores)
            self._commit_again(opened, logs, durable=False)
            opened = replace(opened, logs=tuple(logs))
        return opened

    def _read(self, commit: str | None) -> tuple[str, Commit]:
        """Reads the commit that was asked for: its id and what it says."""
        if commit is not None:
            return commit, self._read_checked(commit)
        for _ in range(_OPEN_ATTEMPTS):
            names = list_commits(self.root)
            if names:
                with suppress(CommitNotFoundError):
                    return names[-1], self._read_checked(names[-1])
        raise CorruptionError(f"{self.root / COMMITS}: expected the record of a commit, got none")

    def _read_checked(self, commit_id: str) -> Commit:
        """Reads a commit, and sets `files` to those that its rows are in."""
        opened = read_commit(self.root, commit_id, self.layout)
        self.files = self._checked(opened, record_path(self.root, commit_id))
        return opened

    def _checked(self, commit: Commit, record: StorePath) -> Chunks:
        """The files of a commit that relies on its record, whose rows are there as far as one can tell."""
        files = self._chunks(commit, record)
        # Before anyone makes room for as many rows as the record says.
        for stream, log in enumerate(commit.logs):
            files.check_present(0, stream, log.extents)
        # They stay in memory: the file may go with the commit, and whoever reads the rows needs them.
        for _, survivors in survivors_of(commit.logs):
            survivors.load()
        return files

    def _check_fingerprint(self, opened: Commit, fingerprint: str | None) -> None:
        if fingerprint is not None and fingerprint != opened.fingerprint:
            raise FingerprintError(
                f"{self.root}: expected rows written by weights with fingerprint {fingerprint!r}, got "
                f"{opened.fingerprint!r}"
            )

    def stored_scores(self, layer: int, stream: int, log: StreamLog, device: torch.device) -> StoredScores:
        """The scores, in the numbers of the log, of the rows that a stream holds in the open commit."""
        scores = self._scores[layer] if self._scores else None
        committed = None
        if scores is not None:
            committed = CommittedStreamScores(self._score_files, scores, layer, stream, log)
        return StoredScores(DTYPES[self.layout.dtype], device, committed)

    def read_highest(self, layer: int, stream: int) -> Tensor | None:
        """The highest score of each of the rows that have some in the commit that was opened, [k].

        None if there are none, or not of the oldest rows on.
        """
        scores = self._scores[layer] if self._scores else None
        if scores is None or scores.spans[stream][0] > 0 or scores.spans[stream][1] == 0:
            return None
        committed = CommittedStreamScores(self._score_files, scores, layer, stream, self.logs[stream])
        values = committed.read(committed.first, committed.stop)
        return None if values is None else values.amax(0)

    def cold(
        self, layer: int, stream: int, log: StreamLog, device: torch.device, stored: StoredScores
    ) -> ColdRows:
        """What a stream holds in one layer, to be read when asked for."""
        return ColdRows(self.files, layer, stream, log, device, stored)

    def write(self, stream: int, log: StreamLog, rows: Tensor, appended: int) -> StreamLog:
        """Writes rows beyond the end of a stream's log; no commit refers to them yet.

        Args:
            stream: Stream.
            log: What the stream holds.
            rows: The rows of all layers, [l, k, d] on the CPU.
            appended: How many rows are appended, of which these are the last k.

        Returns:
            What the stream holds then.

        Raises:
            StoreWriteError: The operating system refused to write.
            CorruptionError: A file to write to is damaged.
            StoreLockedError: Another process opened the store.
        """
        self.check_process()
        if max(log.end + rows.shape[1], log.appended + appended) > MAX_ROW:
            raise CorruptionError(
                f"{self.root}: expected stream {stream} to have at most {MAX_ROW} rows, got {log.end} "
                f"in its log and {log.appended} appended"
            )
        with writing(self.root):
            self._write(stream, log.end, [as_bytes(part) for part in rows])
        return log.extended(rows.shape[1], self._writer, appended=appended)

    def commit(
        self,
        logs: Sequence[StreamLog],
        fingerprint: str | None,
        kept: Sequence[Sequence[KeptScores | None]],
        documents: Sequence[DocumentRoutes],
        *,
        durable: bool,
    ) -> str:
        """Commits what the streams hold, the scores that are kept of it, and what was counted of routings.

        Args:
            logs: What each stream holds.
            fingerprint: Of the weights that wrote the rows.
            kept: The scores, for every layer and stream.
            documents: How often the rows of each stream were routed; empty if that was never counted.
            durable: Whether to wait until all of it is on the medium.

        Raises:
            StoreWriteError: The operating system refused to write; there is no such commit.
            StoreLockedError: Another process opened the store.
            CorruptionError: A damaged record leaves no number for the commit.
        """
        self.check_process()
        if self._generation >= MAX_GENERATION:
            raise CorruptionError(
                f"{self.root / COMMITS}: expected generations below {MAX_GENERATION}, got {self._generation}"
            )
        with writing(self.root):
            for stream, survivors in survivors_of(logs):
                self._positions.write(stream, survivors)
            scores = tuple(
                write_scores(self._score_files, layer, logs, streams, self._scored_of(layer, logs))
                for layer, streams in enumerate(kept)
            )
            self._set_scored(logs, scores)
            routes = write_routes(self._route_files, documents)
            self._finish_writing(logs, durable)
            self._generation += 1
            scores = scores if any(scores) else ()
            shards = tuple(
                with_rows(each, log.extents) for each, log in zip(self.files.shards, logs, strict=True)
            )
            commit = Commit(
                self._generation,
                self._last,
                fingerprint,
                durable,
                tuple(logs),
                scores,
                shards if any(shards) else (),
                routes,
            )
            self._commits[commit.id] = commit
            try:
                self._publish(commit)
            except BaseException:
                # A record that could not be taken back is one like any other: its rows stay.
                if not self._stands(commit):
                    del self._commits[commit.id]
                raise
        self._synced = self._synced or durable
        self._last = commit.id
        self._ends = [log.end for log in logs]
        # The commit stands. What cannot be dropped now is dropped after the next one.
        with suppress(OSError):
            self._drop_old()
        return commit.id

    def _commit_again(self, commit: Commit, logs: Sequence[StreamLog], *, durable: bool) -> str:
        """Commits what another commit holds, by these logs."""
        nothing_kept: list[list[KeptScores | None]] = [[None] * len(logs)] * self.layout.layers
        documents = committed_documents(self.root, commit, self.layout.layers)
        return self.commit(logs, commit.fingerprint, nothing_kept, documents, durable=durable)

    def last(self) -> Commit:
        """The last commit."""
        commit = self._commits[self._last]
        assert commit is not None  # it was read, or written, by this process
        return commit

    def named_shards(self) -> set[tuple[int, Shard]]:
        """The shards that commits name, each with its stream."""
        return {
            (stream, shard)
            for commit in self._commits.values()
            if commit is not None
            for stream, shards in enumerate(commit.shards)
            for shard in shards
        }

    def commit_shards(self, shards: Sequence[Sequence[Shard]]) -> str:
        """Commits durably what the last commit holds, some of it in new shards.

        Args:
            shards: The new shards of each stream.

        Returns:
            The id of the commit.

        Raises:
            StoreWriteError: The operating system refused to write; there is no such commit.
        """
        last, before = self.last(), self.files.shards
        self.files.shards = [sorted([*old, *new]) for old, new in zip(before, shards, strict=True)]
        try:
            return self._commit_again(last, last.logs, durable=True)
        except BaseException:
            self.files.shards = before
            self._discard((stream, shard) for stream, each in enumerate(shards) for shard in each)
            raise

    def _set_scored(self, logs: Sequence[StreamLog], scores: Sequence[CommittedScores | None]) -> None:
        """Notes what is on disk of scores, in numbers that stay the same while rows come and go."""
        self._scored = [
            None
            if each is None
            else replace(
                each,
                spans=tuple(
                    (log.oldest + first, log.oldest + stop)
                    for log, (first, stop) in zip(logs, each.spans, strict=True)
                ),
            )
            for each in scores or [None] * self.layout.layers
        ]

    def _scored_of(self, layer: int, logs: Sequence[StreamLog]) -> CommittedScores | None:
        """What is on disk of a layer's scores, of the rows that the logs hold."""
        scored = self._scored[layer]
        if scored is None:
            return None
        spans = (
            (max(first - log.oldest, 0), max(stop - log.oldest, 0))
            for log, (first, stop) in zip(logs, scored.spans, strict=True)
        )
        return replace(scored, spans=tuple(spans))

    def _expired(self, pinned: Iterable[str]) -> list[str]:
        """The commits that are to be dropped, oldest first, if these are pinned."""
        names = sorted(self._commits)
        keep = {*names[-self.layout.keep_commits :], *pinned}
        # Until the next durable one: a power cut may take everything after it.
        durable = [name for name, commit in self._commits.items() if commit is not None and commit.durable]
        keep.update(durable[-1:])
        return [name for name in names if name not in keep]

    def _drop_old(self) -> None:
        self._drop_records()
        known = [commit for commit in self._commits.values() if commit is not None]
        if len(known) < len(self._commits):
            # Nobody knows which rows a damaged record refers to; it may be restored.
            return
        needed = [
            {extent for log in logs for extent in log.extents}
            for logs in zip(*(commit.logs for commit in known), strict=True)
        ]
        for stream in range(self.layout.streams):
            in_files = {extent for commit in known for extent in commit.in_files(stream)}
            self.files.release(stream, in_files, self._ends[stream])
        self._drop_unnamed(known)
        stamps = {
            (layer, scores.stamp)
            for commit in known
            for layer, scores in enumerate(commit.scores)
            if scores is not None
        }
        self._score_files.keep(stamps, needed, self._ends)

    def list_commits(self) -> list[str]:
        """Ids of the commits that can be opened, oldest first."""
        found: list[str] = []
        for _ in range(_OPEN_ATTEMPTS):
            for name in list_commits(self.root):
                with suppress(CorruptionError, CommitNotFoundError):
                    read_commit(self.root, name, self.layout)
                    found.append(name)
            if found:
                break
        return found

    def pins(self) -> dict[str, str]:
        """All pins: the id of the commit, by pin id."""
        return list_pins(self.root)

    def pin(self, commit: str) -> str:
        """Keeps a commit readable; returns the id of the pin."""
        with writing(self.root):
            return self._add_pin(commit)

    def unpin(self, pin: str) -> None:
        """Removes a pin."""
        with writing(self.root):
            remove_pin(self.root, pin)

    def check_process(self) -> None:
        """Raises StoreLockedError in another process than the one that opened the store, such as its fork."""
        if self._process != os.getpid():
            raise StoreLockedError(
                f"{self.root}: expected the process that opened it, {self._process}, got {os.getpid()}, "
                "which has no lock of its own; it can open the store with mode='r'"
            )

    def close(self) -> None:
        """Lets the next writer in, unless this is another process than the one that opened the store."""
        if self._writing:
            # The next writer does not know who still reads here.
            self.files.record = record_path(self.root, self._last)
            self._writing = False
            self._unlock()

    @abstractmethod
    def usage(self, logs: Sequence[StreamLog]) -> DiskUsage:
        """What the store takes up, whose streams hold the rows of these logs.

        A writer may add and remove files meanwhile.
        """

    def _shard_usage(self, logs: Sequence[StreamLog]) -> dict[str, int]:
        """What `usage` tells of shards."""
        shards = [shard for each in self.files.shards for shard in each]
        in_them = (
            part
            for log, each in zip(logs, self.files.shards, strict=True)
            for shard, part in in_shards(log.extents, each)
            if shard is not None
        )
        arrays = (ShardArray(self.layout, shard, kind) for shard in shards for kind in KINDS)
        return {
            "shards": len(shards),
            "shard_rows": self.layout.layers * sum(part.stop - part.start for part in in_them),
            "shard_bytes": sum(array.size for array in arrays),
        }

    @abstractmethod
    def taken(self, paths: Iterable[StorePath]) -> tuple[int, int]:
        """How many of these files of the store there are, and the bytes that they take up."""

    @abstractmethod
    def _chunks(self, commit: Commit, record: StorePath) -> Chunks:
        """The files that a commit's rows are in, for whoever relies on its record."""

    @abstractmethod
    def _open_files(self, opened: Commit) -> None:
        """Sets `_score_files` beside `files`, and for a writer `_positions`."""

    @abstractmethod
    def _lock(self) -> None:
        """Makes this the writer."""

    @abstractmethod
    def _unlock(self) -> None:
        """Lets the next writer in."""

    @abstractmethod
    def _sync_records(self) -> None:
        """Waits until the names of the records are on the medium."""

    @abstractmethod
    def _write(self, stream: int, start: int, rows: Sequence[Bytes]) -> None:
        """Writes rows of all layers, [l] of [k, row_bytes], at row `start` of a stream's log."""

    @abstractmethod
    def _finish_writing(self, logs: Sequence[StreamLog], durable: bool) -> None:
        """Brings what was written to where a record may refer to it."""

    @abstractmethod
    def _publish(self, commit: Commit) -> None:
        """Makes the commit: all of it, or an error."""

    @abstractmethod
    def _stands(self, commit: Commit) -> bool:
        """Whether a commit may be there although `_publish` has raised an error."""

    @abstractmethod
    def _discard(self, shards: Iterable[tuple[int, Shard]]) -> None:
        """Deletes shards, each given with its stream, that a commit which failed was to name.

        Those that may yet turn out to be named stay; they go with the next commit if they are not.
        """

    @abstractmethod
    def _drop_records(self) -> None:
        """Deletes the records of old commits, and takes them from `_commits`."""

    @abstractmethod
    def _drop_unnamed(self, commits: Sequence[Commit]) -> None:
        """Deletes positions, shards and routed counts that no commit names; these are all there are."""

    @abstractmethod
    def _add_pin(self, commit: str) -> str:
        """Pins a commit."""


class FolderDisk(Disk):
    """A store in a folder: see `Disk`."""

    root: Path
    files: ChunkFiles
    _score_files: ScoreFiles
    _positions: PositionFiles
    _route_files: SideFiles

    def usage(self, logs: Sequence[StreamLog]) -> DiskUsage:
        """See `Disk`."""
        layout = self.layout
        chunk_files = sum(
            len(self.files.listed(layer, stream, kind))
            for layer in range(layout.layers)
            for stream in range(layout.streams)
            for kind in KINDS
        )
        apparent = allocated = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with suppress(FileNotFoundError):
                    status = os.lstat(os.path.join(folder, name))
                    apparent += status.st_size
                    allocated += status.st_blocks * _BLOCK_BYTES
        return DiskUsage(
            format=layout.format,
            chunk_rows=layout.chunk_rows,
            chunk_files=chunk_files,
            apparent_bytes=apparent,
            allocated_bytes=allocated,
            **self._shard_usage(logs),
        )

    def taken(self, paths: Iterable[StorePath]) -> tuple[int, int]:
        """See `Disk`; bytes are what the file system has set aside."""
        count = total = 0
        for path in paths:
            with suppress(FileNotFoundError):
                total += os.lstat(str(path)).st_blocks * _BLOCK_BYTES
                count += 1
        return count, total

    def _chunks(self, commit: Commit, record: StorePath) -> ChunkFiles:
        return ChunkFiles(self.root, self.layout, record, shards=commit.shards)

    def _open_files(self, opened: Commit) -> None:
        self._score_files = ScoreFiles(self.root, self.layout, self.files.record)
        if self._writing:
            for left in (self.root / COMMITS).glob(f"{TEMPORARY}*"):
                left.unlink()
            self._positions = PositionFiles(self.root, survivors_of(opened.logs))
            self._route_files = SideFiles(self.root, ROUTES, ROUTES_NAME, named_routes([opened]))

    def _lock(self) -> None:
        self._held = WriterLock(self.root)

    def _unlock(self) -> None:
        self._held.release()

    def _sync_records(self) -> None:
        sync(self.root / COMMITS)

    def _write(self, stream: int, start: int, rows: Sequence[Bytes]) -> None:
        for layer, data in enumerate(rows):
            self.files.write(layer, stream, start, data, self._writer, fresh_from=self._ends[stream])

    def _finish_writing(self, logs: Sequence[StreamLog], durable: bool) -> None:
        if durable:
            if not self._synced:
                self.files.mark_unsynced([log.extents for log in logs])
                for stream, survivors in survivors_of(logs):
                    self._positions.mark_unsynced(stream, survivors)
                self._route_files.mark_present_unsynced()
            self.files.sync()
            self._positions.sync()
            self._score_files.sync()
            with suppress(OSError):
                self._route_files.sync()

    def _publish(self, commit: Commit) -> None:
        write_commit(self.root, commit)

    def _stands(self, commit: Commit) -> bool:
        return record_path(self.root, commit.id).exists()

    def _discard(self, shards: Iterable[tuple[int, Shard]]) -> None:
        names = {shard_name(*each) for each in {*shards} - self.named_shards()}
        with suppress(OSError):
            self.files.delete_shards(names)

    def _drop_records(self) -> None:
        with pin_lock(self.root):
            for name in self._expired(list_pins(self.root).values()):
                record_path(self.root, name).unlink(missing_ok=True)
                del self._commits[name]

    def _drop_unnamed(self, commits: Sequence[Commit]) -> None:
        self.files.release_shards(self.named_shards())
        self._positions.keep(each for commit in commits for each in survivors_of(commit.logs))
        self._route_files.keep_named(named_routes(commits))

    def _add_pin(self, commit: str) -> str:
        with pin_lock(self.root):
            return add_pin(self.root, read_commit(self.root, commit, self.layout))
