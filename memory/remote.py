"""A store in an object store: who may write to it, and how a commit comes about.

Rows are put beyond everything that any commit has ever referred to, so that they change nothing. A commit is
one conditional put of commits/writer.json (see `Claim`); then its record gets its name, the records of old
commits are deleted, and after them the chunk files that nothing refers to any more.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from xlroute.memory.buffer import Rows
from xlroute.memory.chunk_objects import ChunkObjects
from xlroute.memory.claim import WRITER, Claim, Decided, read_decided
from xlroute.memory.commits import (
    PINS,
    Commit,
    list_commits,
    list_pins,
    new_pin,
    parse_commit,
    read_commit,
    record_path,
)
from xlroute.memory.disk import Disk, DiskUsage, copied_logs, copy_rows, writing
from xlroute.memory.errors import (
    CommitNotFoundError,
    CorruptionError,
    StoreExistsError,
    StoreLockedError,
    StoreWriteError,
)
from xlroute.memory.layout import COMMITS, METADATA, Layout, empty_folders, new_metadata
from xlroute.memory.log import StreamLog, survivors_of
from xlroute.memory.place import StorePath
from xlroute.memory.position_objects import PositionObjects
from xlroute.memory.route_files import ROUTES, ROUTES_NAME, named_routes, write_routes
from xlroute.memory.routes import DocumentRoutes
from xlroute.memory.rows_bytes import Bytes
from xlroute.memory.s3 import S3Path, in_parallel
from xlroute.memory.score_files import write_scores
from xlroute.memory.score_objects import ScoreObjects
from xlroute.memory.scores import KeptScores
from xlroute.memory.sealed import encode
from xlroute.memory.shards import Shard
from xlroute.memory.side_files import SideObjects

# The last chunk of each stream is put whole with every commit, and in the writer's memory until it is full.
CHUNK_BYTES = 4 * 2**20


@contextmanager
def _new_store(root: S3Path, layout: Layout) -> Iterator[Claim]:
    """The folder of an empty store, which is one when all went well; until then it has no metadata."""
    exists = f"{root}: expected nothing, got something that exists"
    with writing(root):
        if root.names():
            raise StoreExistsError(exists)
        try:
            claim = Claim(root)
        except StoreLockedError as error:
            raise StoreExistsError(exists) from error
        try:
            if root.sizes().keys() != {f"{COMMITS}/{WRITER}"}:
                raise StoreExistsError(exists)
        except BaseException:
            claim.release()
            raise
        try:
            files = [(root / name / METADATA, data) for name, data in empty_folders(layout)]
            in_parallel(lambda file: file[0].write_bytes(file[1]), files)
            yield claim
            (root / METADATA).write_bytes(new_metadata(layout))
            claim.release()
        except BaseException:
            with suppress(OSError, StoreLockedError):
                claim.check()  # without it, the store is made, and somebody else may be at work
                # The claim goes last: until then nobody else makes a store here.
                root.delete(root.sizes().keys() - {f"{COMMITS}/{WRITER}"})
                root.delete([f"{COMMITS}/{WRITER}"])
            raise


def create_remote_store(root: S3Path, layout: Layout, fingerprint: str | None) -> None:
    """As `create_store`, in an object store."""
    with _new_store(root, layout):
        _put_record(root, Commit(1, None, fingerprint, False, (StreamLog(),) * layout.streams))


def copy_remote_store(
    root: S3Path,
    layout: Layout,
    rows: Sequence[Sequence[Rows]],
    held: Sequence[StreamLog],
    fingerprint: str | None,
    kept: Sequence[Sequence[KeptScores | None]],
    documents: Sequence[DocumentRoutes],
    durable: bool,
) -> str:
    """As `copy_store`, to an object store; in chunks that are no larger than by default there."""
    layout = replace(layout, chunk_rows=min(layout.chunk_rows, max(1, CHUNK_BYTES // layout.row_bytes)))
    logs = copied_logs(held)
    ends = {stream: log.end for stream, log in enumerate(logs)}
    with _new_store(root, layout) as claim:
        files = ChunkObjects(root, layout, None, claim=claim)
        for stream, stop in copy_rows(files, rows, logs):
            files.put({stream: stop}, tails=False)
        files.put(ends, tails=True)
        positions = PositionObjects(root)
        for stream, survivors in survivors_of(logs):
            positions.write(stream, survivors)
        score_files = ScoreObjects(root, layout, None, claim)
        scores = tuple(
            write_scores(score_files, layer, logs, streams, None) for layer, streams in enumerate(kept)
        )
        score_files.put(ends)
        routes = write_routes(SideObjects(root, ROUTES, ROUTES_NAME), documents)
        commit = Commit(1, None, fingerprint, durable, logs, scores if any(scores) else (), routes=routes)
        _put_record(root, commit)
    return commit.id


def _put_record(root: S3Path, commit: Commit) -> None:
    (root / COMMITS / f"{commit.id}.json").write_bytes(encode(commit.sealed()))


class RemoteDisk(Disk):
    """A store in an object store: see `Disk`."""

    root: S3Path
    files: ChunkObjects
    _score_files: ScoreObjects
    _positions: PositionObjects
    _route_files: SideObjects
    _claim: Claim | None = None
    _decided: Commit | None = None  # the last commit, as long as its record may not be there
    _dropped: tuple[str, ...] = ()  # with the last commit

    def usage(self, logs: Sequence[StreamLog]) -> DiskUsage:
        """See `Disk`."""
        sizes = self.root.sizes()
        chunk_files = sum(key.startswith("layer-") and not key.endswith(METADATA) for key in sizes)
        size = sum(sizes.values())
        return DiskUsage(
            self.layout.format, self.layout.chunk_rows, chunk_files, size, size, **self._shard_usage(logs)
        )

    def taken(self, paths: Iterable[StorePath]) -> tuple[int, int]:
        """See `Disk`; bytes are the lengths of the objects."""
        sizes = self.root.sizes()
        found = [sizes[name] for path in paths if (name := str(path).removeprefix(f"{self.root}/")) in sizes]
        return len(found), sum(found)

    def _chunks(self, commit: Commit, record: StorePath) -> ChunkObjects:
        return ChunkObjects(self.root, self.layout, record, shards=commit.shards, claim=self._claim)

    def _open_files(self, opened: Commit) -> None:
        self._score_files = ScoreObjects(self.root, self.layout, self.files.record, self._claim)
        if self._writing:
            self._positions = PositionObjects(self.root, survivors_of(opened.logs))
            self._route_files = SideObjects(self.root, ROUTES, ROUTES_NAME, named_routes([opened]))

    def _lock(self) -> None:
        self._claim = Claim(self.root)
        try:
            self._carry_out(self._claim.found)
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._claim is None or self._process != os.getpid():
            return
        # Whoever has taken the store over has nothing to wait for.
        with writing(self.root), suppress(StoreLockedError):
            with suppress(OSError):
                self._put_decided()
            # It is never taken back: its record may still appear, after another of the same generation.
            record = None if self._decided is None else self._decided.sealed()
            self._claim.release(record, () if record is None else self._dropped)

    def _carry_out(self, decided: Decided) -> None:
        """Does what a killed writer has decided and may have left undone."""
        names = list_commits(self.root)
        if decided.record is not None:
            path = self.root / COMMITS / WRITER
            try:
                commit_id = f"{decided.record['generation']:012d}-{decided.record['crc32c']}"
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptionError(f"{path}: expected a commit record, got another document") from error
            commit = parse_commit(self.root, {**decided.record}, commit_id, self.layout, path)
            if not names or commit_id[:12] > names[-1][:12]:
                # What was copied here from elsewhere may have another past; then its rows are not there.
                with suppress(CorruptionError, CommitNotFoundError):
                    self._checked(commit, record_path(self.root, commit_id))
                    _put_record(self.root, commit)
                    names.append(commit_id)
        # The last commit is never dropped.
        self._delete_records(name for name in decided.dropped if name < names[-1])

    def _delete_records(self, names: Iterable[str]) -> list[str]:
        """Deletes the records of those commits that nobody has pinned; returns their ids."""
        gone = [*names]
        if gone:
            pinned = {*list_pins(self.root).values()}
            gone = [name for name in gone if name not in pinned]
            (self.root / COMMITS).delete(f"{name}.json" for name in gone)
        return gone

    def _sync_records(self) -> None:
        """What was put is on the medium."""

    def _write(self, stream: int, start: int, rows: Sequence[Bytes]) -> None:
        fresh = self._ends[stream]

        def write(layer: int) -> None:
            self.files.write(layer, stream, start, rows[layer], self._writer, fresh_from=fresh)

        in_parallel(write, range(len(rows)))
        self.files.put({stream: start + rows[0].shape[0]}, tails=False)

    def _finish_writing(self, logs: Sequence[StreamLog], durable: bool) -> None:
        ends = {stream: log.end for stream, log in enumerate(logs)}
        self.files.put(ends, tails=True)
        self._score_files.put(ends)

    def _publish(self, commit: Commit) -> None:
        assert self._claim is not None
        self._put_decided()
        dropped = tuple(self._expired(list_pins(self.root).values()))
        self._claim.decide(commit.sealed(), dropped)
        self._decided, self._dropped = commit, dropped
        try:
            self._put_decided()
        except OSError as error:
            raise StoreWriteError(
                f"{self.root}: expected to put the record of commit {commit.id}, got {error}; the commit is "
                "made, and seen once this writer commits again or closes the store, or another opens it"
            ) from error

    def _put_decided(self) -> None:
        """Puts the record of the commit that was decided last, if it may not be there yet."""
        if self._decided is not None:
            _put_record(self.root, self._decided)
            self._decided = None

    def _stands(self, commit: Commit) -> bool:
        return commit is self._decided

    def _discard(self, shards: Iterable[tuple[int, Shard]]) -> None:
        """See `Disk`. A request that got no answer may be carried out later, even by the next writer."""

    def _drop_records(self) -> None:
        # Pins are looked for again: whoever adds one makes sure after that that the commit is not dropped.
        for name in self._delete_records(self._dropped):
            del self._commits[name]

    def _drop_unnamed(self, commits: Sequence[Commit]) -> None:
        self.files.release_shards(self.named_shards())
        named = (each for commit in commits for each in survivors_of(commit.logs))
        self._positions.keep(named, self._ends)
        self._route_files.keep_named(named_routes(commits))

    def _add_pin(self, commit: str) -> str:
        pin = new_pin(read_commit(self.root, commit, self.layout))
        path = self.root / COMMITS / PINS / pin
        path.write_bytes(b"")
        # In this order: the writer decides which commits it drops, then looks for pins, then deletes.
        if commit in read_decided(self.root).dropped or not record_path(self.root, commit).exists():
            path.unlink(missing_ok=True)
            raise CommitNotFoundError(f"commit: expected one that is in the store, got {commit}")
        return pin
