"""The memory store: everything that a model has read, by layer and stream."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlroute.memory.buffer import Rows, RowSpan
from xlroute.memory.claim import unlock
from xlroute.memory.cold import ColdRows
from xlroute.memory.compact import CompactReport, compact_store
from xlroute.memory.disk import Disk
from xlroute.memory.errors import NoPathError, ReadOnlyError, StoreClosedError
from xlroute.memory.eviction import by_scores, every_nth, rows_left
from xlroute.memory.info import MemoryInfo, describe_commits
from xlroute.memory.kept_values import KeptOfLayer
from xlroute.memory.layer import MemoryLayer, checked_indices, positions_of
from xlroute.memory.layout import DTYPE_NAMES, DTYPES, Eviction, Layout, check_positive
from xlroute.memory.log import StreamLog, StreamLogs
from xlroute.memory.place import StorePath, store_path
from xlroute.memory.repair import RepairReport, repair_store
from xlroute.memory.routes import DocumentRoutes, RouteCounts
from xlroute.memory.s3 import S3Path
from xlroute.memory.scores import KeptScores, LatestScores, StoredScores
from xlroute.memory.shards import DEFAULT_LEVEL, LEVELS
from xlroute.memory.side_by_side import Streams, bytes_left_behind, grown
from xlroute.memory.storage import chunk_bytes_at, copy_to, create_at, open_disk
from xlroute.memory.survivors import Survivors
from xlroute.memory.tiers import TieredRows, Tiers, rows_in_memory, rows_on_disk
from xlroute.memory.verify import Progress, VerifyReport, verify_store

Mode = Literal["r", "r+"]
Compression = Literal["zstd"]
_BLOCK_BYTES = 4 * 2**20  # of rows that are written anew at once
# A folder; or a store in an object store, as a url that begins with s3://.
Location = str | os.PathLike[str] | S3Path


class MemoryStore:
    """Past hidden states of b streams in l layers, in memory, on disk or in an object store.

    Rows are appended, and leave when their stream is reset or when it exceeds the capacity: the oldest first,
    or as another policy has it. On disk, what was appended is there for others, and for the next process,
    once it is committed; nothing else commits, neither `close` nor the end of a `with` block. There is one
    writer at a time; readers need no lock, keep the commit that they opened, and are safe while the writer
    goes on. Every row that is read from disk is checked.

    Use `create`, `open` or `fork` to get one.

    Attributes:
        path: Where the store is: its folder, or, for a store in an object store, a path whose string is the
            url; None for a store in memory.
        mode: "r" for a store that was opened for reading alone, else "r+".
        device: Where rows live that are in memory.
        version: A number that every append and every reset raises, so that whoever keeps it can tell that
            the rows have changed.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        device: torch.device,
        fingerprint: str | None,
        logs: Sequence[StreamLog],
        rows: Sequence[Sequence[Rows]],
        path: StorePath | None = None,
        mode: Mode = "r+",
        disk: Disk | None = None,
        tiers: Tiers | None = None,
        routes: RouteCounts | None = None,
    ) -> None:
        self.path = path
        self.mode: Mode = mode
        self.device = device
        self.version = 0
        self._layout = layout
        self._fingerprint = fingerprint
        self._disk = disk
        self._tiers = tiers
        self._closed = False
        self._logs = StreamLogs(logs)
        self._rows = [Streams(streams) for streams in rows]
        # Scores of rows on disk, and of those that others leave from between, are kept with each stream.
        with_scores = disk is None and tiers is None and layout.eviction == "oldest"
        self._kept = [
            KeptOfLayer.nothing(layout.streams, self.dtype, device, scores=with_scores)
            for _ in range(layout.layers)
        ]
        # For every layer and stream, what routing has scored rows with; only where that decides which leave.
        self._latest: list[list[LatestScores]] | None = None
        if layout.eviction == "lowest_score":
            self._latest = [[None] * layout.streams for _ in range(layout.layers)]
        self._routes = routes

    @classmethod
    def create(
        cls,
        path: Location | None = None,
        *,
        layers: int,
        streams: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        fingerprint: str | None = None,
        chunk_bytes: int | None = None,
        keep_commits: int = 8,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        capacity_bytes: int | None = None,
        eviction: Eviction = "oldest",
        keep_every: int | None = None,
    ) -> MemoryStore:
        """Makes an empty store, and opens it for writing. On disk it has one commit.

        It appears at the path whole or not at all. A process that is killed while it makes one may leave a
        hidden folder beside the path, named `.<name>.<number>.creating`, which can be deleted.

        | eviction | which rows leave when a stream exceeds the capacity |
        |---|---|
        | "oldest" | the oldest, just as many as needed |
        | "lowest_score" | those that routing has given the lowest scores |
        | "every_nth" | those whose position is no multiple of `keep_every`, oldest first; then the oldest |

        With "lowest_score" and "every_nth", rows leave from between others. Those that stay are written anew,
        so that a quarter of the capacity leaves at once: a stream holds three quarters of it or more. On disk
        they take up new room; what they took before goes with the commits that hold it. Among equals the
        oldest leave first, and the result is that of appending the rows one by one.

        With "lowest_score", a row has the score that it got when its layer was last scored, through
        `MemoryLayer.scores`, or what the commit that was opened has stored: the highest of its scores against
        all routing tokens. Of several layers, the ranks of a row are added up: in each the number of rows
        that it outdoes. Rows that are not scored yet, in all layers that have been scored at all, leave last,
        oldest first.

        Args:
            path: Where: nothing, or an empty folder; or a url, s3://bucket/folder, where there is nothing.
                None keeps the store in memory.
            layers: Memory layers, l.
            streams: Streams, b.
            dim: Width of a row, d.
            dtype: Type of the rows: float64, float32, float16 or bfloat16.
            device: Where rows live that are in memory.
            capacity: Rows that a stream holds at most. None for no bound.
            fingerprint: Identifies the weights that write the rows.
            chunk_bytes: Size of a file of rows, in bytes, rounded down to whole rows. None for 64 MiB, and
                for 4 MiB in an object store: there, every commit puts the last file of each layer and stream
                anew, and the writer keeps them in memory.
            keep_commits: How many commits stay readable, besides the pinned ones and the last durable one.
            device_bytes: Memory that rows may take on the device, of all layers and streams together. The
                newest rows are kept there; all are in the host's memory or, for a store on disk, there.
            host_bytes: Memory that rows of a store on disk may take on the host besides; newer ones are kept.
                It goes with `device_bytes`.
            capacity_bytes: Bytes of rows that the store holds at most, all layers and streams together; each
                stream has the same share. It is turned into a capacity in rows. If both are given, the
                smaller one holds.
            eviction: Which rows leave when a stream exceeds the capacity.
            keep_every: With "every_nth", n: at least 2.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: A number is below 1 or enormous, `capacity_bytes` is less than a row of each layer and
                stream takes, the dtype or the eviction is another one, `keep_every` does not go with it, a
                policy has no capacity to go with, `host_bytes` no `device_bytes` or no path, or there is no
                such device.
            ImportError: The path is a url, and obstore is not installed.
            StoreExistsError: There is something at the path.
            StoreWriteError: The operating system, or the object store, refused to write.
        """
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype: expected one of torch.{', torch.'.join(DTYPES)}, got {dtype}")
        for name, number in (("layers", layers), ("streams", streams), ("dim", dim)):
            check_positive(name, number)
        root = None if path is None else store_path(path)
        if chunk_bytes is None:
            chunk_bytes = chunk_bytes_at(root)
        check_positive("chunk_bytes", chunk_bytes)
        _check_fingerprint(fingerprint)
        layout = Layout(
            layers=layers,
            streams=streams,
            dim=dim,
            dtype=DTYPE_NAMES[dtype],
            capacity=_capacity(capacity, capacity_bytes, layers * streams * dim * dtype.itemsize),
            chunk_rows=max(1, chunk_bytes // (dim * dtype.itemsize)),
            keep_commits=keep_commits,
            eviction=eviction,
            keep_every=keep_every,
        )
        device = _checked_device(device)
        if root is None and host_bytes is not None:
            raise ValueError(f"host_bytes: expected None for a store in memory, got {host_bytes}")
        _check_tiers(device_bytes, host_bytes)
        if root is not None:
            create_at(root, layout, fingerprint)
            return cls.open(root, mode="r+", device=device, device_bytes=device_bytes, host_bytes=host_bytes)
        tiers = _tiers(layout, device_bytes, host_bytes)
        rows: list[list[Rows]] = [
            [
                RowSpan.empty(dim, dtype, device) if tiers is None else rows_in_memory(layout, device)
                for _ in range(streams)
            ]
            for _ in range(layers)
        ]
        logs = [StreamLog()] * streams
        return cls(layout, device=device, fingerprint=fingerprint, logs=logs, rows=rows, tiers=tiers)

    @classmethod
    def open(
        cls,
        path: Location,
        *,
        mode: Mode = "r",
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,
        commit: str | None = None,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
    ) -> MemoryStore:
        """Opens a store that has a path. No row is read before it is needed.

        Args:
            path: The folder of the store, or its url: s3://bucket/folder.
            mode: "r" to read one commit, whatever a writer does meanwhile; "r+" to write as well.
            device: Where rows live that are in memory.
            fingerprint: What the commit's fingerprint must be; None opens whatever weights wrote it.
            commit: Id of the commit to open, or None for the last. With mode "r+", the store goes back to it
                at once: its contents become the last commit, and commits in between age out like others.
            device_bytes: Memory that rows may take on the device, of all layers and streams together; others
                are read from disk when asked for. None for all that are appended, and for older ones from the
                first time that all are needed.
            host_bytes: Memory that rows may take on the host besides; it goes with `device_bytes`.

        Raises:
            TypeError: `device`, `fingerprint` or a number of bytes is of the wrong type.
            ValueError: `mode` is another one, `commit` cannot be an id, there is no such device, a number of
                bytes is below 1, `host_bytes` comes alone, or the path is a url of another kind.
            ImportError: The path is a url, and obstore is not installed.
            StoreNotFoundError: There is nothing at the path.
            FormatError: There is something else, or a store of a newer format.
            CorruptionError: The metadata or the commit record is damaged.
            CommitNotFoundError: There is no such commit.
            FingerprintError: The fingerprint is another one.
            StoreLockedError: Mode "r+", and another writer holds the store. In an object store, one that was
                killed holds it as well: see `unlock`.
            StoreWriteError: Mode "r+", and the operating system refused to read or write.
            OSError: Mode "r", and the operating system refused to read, which is no sign of damage.
        """
        if mode not in ("r", "r+"):
            raise ValueError(f"mode: expected 'r' or 'r+', got {mode!r}")
        _check_fingerprint(fingerprint)
        device = _checked_device(device)
        _check_tiers(device_bytes, host_bytes)
        root = store_path(path)
        disk = open_disk(root, commit=commit, writable=mode == "r+", fingerprint=fingerprint)
        try:
            return cls._opened(root, disk, mode, device, _tiers(disk.layout, device_bytes, host_bytes))
        except BaseException:
            disk.close()
            raise

    @staticmethod
    def verify(
        path: Location,
        *,
        commit: str | None = None,
        all_commits: bool = False,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Reads everything that a commit refers to, and reports all damage; changes nothing.

        The metadata of the store and all commit records are examined in any case. If the last record is
        damaged, the rows of the last commit that can be read are examined instead.

        Args:
            path: The folder of the store, or its url. What a writer commits meanwhile is left out.
            commit: Id of the commit whose rows are examined, or None for the last.
            all_commits: Whether to examine the rows of all commits that can be read.
            progress: Called after every few MiB with the bytes of rows examined so far, and with all of them.

        Raises:
            ValueError: `commit` cannot be an id, or comes together with `all_commits`.
            StoreNotFoundError: There is nothing at the path.
            FormatError: There is something else, or a store of a newer format.
            CommitNotFoundError: There is no such commit, or a writer has dropped it meanwhile.
            OSError: The operating system refused to read a file, which is no sign of damage.
        """
        return verify_store(store_path(path), commit=commit, all_commits=all_commits, progress=progress)

    @staticmethod
    def repair(path: Location, *, progress: Progress | None = None) -> RepairReport:
        """Makes a damaged store one that can be read and written again, and says what was lost.

        Of the last commit whose record can be read, each stream keeps its longest run of rows that no layer
        has damaged; of two equally long ones the newer. The result is a new commit, durable, and nothing but
        that: older rows leave as eviction would have them leave, and where the run ends before the newest
        row, the stream is as it was when that run's last row had just been appended. So a store that was
        repaired holds the last rows of those it says were appended, in order, at the positions that they
        always had. Rows on both sides of a damaged one are not kept, since positions would have a gap. Where
        a policy has left gaps before, the run is one of the rows held; rows whose positions are damaged count
        as damaged. Keeping the newest rows whatever their number would lose a whole document to one torn row
        at its end, which is what a power cut damages; the longest run loses the least.

        No commit is dropped and no whole row is written over, so that a damaged file can still be brought
        back from a copy, and an earlier commit opened by its id; they age out as later commits are made.
        Damaged metadata of arrays is written anew, and so is what zarr alone needs of shards; chunk files get
        back their length. A commit record that is damaged is renamed to `<commit id>.json.damaged`. What a
        crash has left is removed, and so are damaged scores, which are computed anew, and damaged counts of
        what was routed.

        Args:
            path: The folder of the store. One in an object store has to be downloaded first.
            progress: Called after every few MiB with the bytes of rows examined so far, and with all of them.

        Raises:
            ValueError: `path` is a url.
            StoreNotFoundError: There is nothing at the path.
            FormatError: There is something else, or a store of a newer format.
            CorruptionError: There is nothing to go by: the metadata of the store or all commit records are
                damaged, or more than half of the arrays are missing.
            StoreLockedError: A writer holds the store.
            StoreWriteError: The operating system refused to read or write; the last commit stands.
        """
        root = store_path(path)
        if isinstance(root, S3Path):
            raise ValueError(
                f"path: expected a folder, got {root}: download the store, repair it there and upload it"
            )
        return repair_store(root, progress=progress)

    @staticmethod
    def unlock(path: Location) -> str | None:
        """Takes a store in an object store from its writer, so that another can open it.

        A writer that was killed stays the writer: nothing there notices that it has ended. If it is at work
        after all, its next commit is refused with StoreLockedError, and the store stays at the last commit.

        Args:
            path: The url of the store.

        Returns:
            Who was the writer; None if nobody was.

        Raises:
            ValueError: `path` is a folder, whose writer lets go of it however it ends.
            StoreNotFoundError: There is nothing at the path.
            FormatError: There is something else, or a store of a newer format.
            CorruptionError: The metadata is damaged.
            StoreWriteError: The object store refused, or cannot be reached.
        """
        root = store_path(path)
        if not isinstance(root, S3Path):
            raise ValueError(f"path: expected a url that begins with s3://, got the folder {root}")
        return unlock(root)

    @classmethod
    def _opened(
        cls, root: StorePath, disk: Disk, mode: Mode, device: torch.device, tiers: Tiers | None
    ) -> MemoryStore:
        """The store at the commit that `disk` is at."""
        layout = disk.layout

        def held(layer: int, stream: int, log: StreamLog) -> Rows:
            stored = disk.stored_scores(layer, stream, log, device)
            if tiers is not None:
                cold = disk.cold(layer, stream, log, torch.device("cpu"), stored)
                return rows_on_disk(cold, layout, device, log, stored, on_host=tiers.host_rows is not None)
            if log.extents:
                return disk.cold(layer, stream, log, device, stored)
            return RowSpan.empty(layout.dim, DTYPES[layout.dtype], device)

        store = cls(
            layout,
            device=device,
            fingerprint=disk.fingerprint,
            logs=disk.logs,
            rows=[
                [held(layer, stream, log) for stream, log in enumerate(disk.logs)]
                for layer in range(layout.layers)
            ],
            path=root,
            mode=mode,
            disk=disk,
            tiers=tiers,
            routes=None if disk.documents is None else RouteCounts(layout.layers, disk.documents),
        )
        if store._latest is not None:
            # Whoever reads on is to evict the rows that would have left without stopping.
            store._latest = [
                [partial(disk.read_highest, layer, stream) for stream in range(layout.streams)]
                for layer in range(layout.layers)
            ]
        return store

    @property
    def layers(self) -> int:
        """Memory layers, l."""
        return self._layout.layers

    @property
    def streams(self) -> int:
        """Streams, b."""
        return self._layout.streams

    @property
    def dim(self) -> int:
        """Width of a row, d."""
        return self._layout.dim

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return DTYPES[self._layout.dtype]

    @property
    def capacity(self) -> int | None:
        """Rows that a stream holds at most, or None."""
        return self._layout.capacity

    @property
    def eviction(self) -> Eviction:
        """Which rows leave when a stream exceeds the capacity."""
        return self._layout.eviction

    @property
    def keep_every(self) -> int | None:
        """With eviction "every_nth", n; else None."""
        return self._layout.keep_every

    @property
    def fingerprint(self) -> str | None:
        """Identifies the weights that write the rows; the next commit records it."""
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, value: str | None) -> None:
        _check_fingerprint(value)
        self._check_writable()
        self._fingerprint = value

    @property
    def lengths(self) -> Tensor:
        """Rows that each stream holds now, int64 [b] on the CPU."""
        self._check_open()
        return torch.tensor(self._logs.lengths, dtype=torch.int64)

    @property
    def logs(self) -> tuple[StreamLog, ...]:
        """What each stream holds now, for whoever follows the store, as `MemoryIndex` does."""
        self._check_open()
        return tuple(self._logs)

    def append(self, states: Tensor, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Appends rows to every stream, detached and in the store's type.

        Beyond the capacity rows leave. With eviction "oldest", exactly the last `capacity` remain; for the
        other policies see `create`. A refused call changes nothing.

        Args:
            states: Rows of every layer and stream, [l, b, n, d], on any device.
            lengths: How many of the n rows of each stream are appended, the first ones: integers [b]. None
                for all.

        Raises:
            TypeError: `states` is no floating-point tensor, or `lengths` are no integers.
            ValueError: A shape is another one, or a length is not in [0, n].
            ReadOnlyError: The store was opened with mode "r".
            StoreWriteError: The operating system refused to write.
            CorruptionError: A file to write to, or rows that had to be read first, are damaged.
        """
        self._check_writable()
        counts = self._checked_counts(states, lengths)
        states = states.detach()
        if self._append_side_by_side(states, counts):
            return
        states = states.to(self.dtype)
        logs = list(self._logs)
        table = [list(rows) for rows in self._rows]
        latest = None if self._latest is None else [list(streams) for streams in self._latest]
        for stream, count in enumerate(counts):
            if not count:
                continue
            log, rows, new = logs[stream], [streams[stream] for streams in table], states[:, stream, :count]
            stays = self._staying(stream, log, count, latest)
            if isinstance(stays, range):
                excess = min(stays.start, log.held)
                rows = [each.dropped(excess) for each in rows]
                new = new[:, max(0, stays.start - log.held) :]
                logs[stream], rows = self._extended(stream, log.dropped(excess), rows, new, count)
            else:
                logs[stream], rows = self._rewritten(stream, log, rows, new, stays)
            for streams, held in zip(table, rows, strict=True):
                streams[stream] = held
            for scores in latest or ():
                scores[stream] = _of_staying(scores[stream], stays)
        self._logs, self._rows, self._latest = StreamLogs(logs), [*map(Streams, table)], latest
        self.version += 1

    def _append_side_by_side(self, states: Tensor, counts: Sequence[int]) -> bool:
        """Appends rows, a layer's in one operation; False, with nothing done, if streams go on singly."""
        capacity, most = self.capacity, max(counts)
        if self._disk is not None or self.eviction != "oldest" or not most:
            return False
        excess = [0] * len(counts)
        if capacity is not None:
            if most > capacity:
                return False
            spans = zip(self._logs.lengths, counts, strict=True)
            excess = [max(0, held + count - capacity) for held, count in spans]
        table = []
        for streams, rows in zip(self._rows, states, strict=True):
            if rows.device != self.device:
                rows = rows.to(self.device, self.dtype)
            together = grown(streams, rows, counts, excess)
            if together is None:
                return False
            table.append(together)
        self._logs, self._rows = self._logs.grown(counts, excess), table
        self.version += 1
        return True

    def _staying(
        self, stream: int, log: StreamLog, count: int, latest: list[list[LatestScores]] | None
    ) -> range | NDArray[np.int64]:
        """Which rows a stream holds after `count` more, as numbers from 0, the oldest that it holds now.

        They are a range up to the newest unless rows leave from between others. Scores that decide and are on
        disk are read, and take their place in `latest`.
        """
        total = log.held + count
        if self.capacity is None or total <= self.capacity:
            return range(total)
        if self.eviction == "oldest":
            return range(total - self.capacity, total)
        if self.keep_every is not None:
            coming = torch.arange(log.appended, log.appended + count)
            worth = every_nth(torch.cat([log.positions(), coming]).numpy(), self.keep_every)
        else:
            known = []
            for scores in latest or ():
                found = scores[stream]
                scores[stream] = found = found() if callable(found) else found
                if found is not None:
                    known.append(found.cpu().numpy())
            worth = by_scores(known)
        stays = rows_left(log.held, count, self.capacity, worth)
        first = int(stays[0])
        return range(first, total) if total - first == stays.size else stays

    def _extended(
        self, stream: int, log: StreamLog, rows: Sequence[Rows], new: Tensor, appended: int
    ) -> tuple[StreamLog, list[Rows]]:
        """What a stream holds after new rows [l, k, d], the last k of as many that are appended."""
        if self._disk is not None:
            log = self._disk.write(stream, log, new.cpu(), appended)
        else:
            log = log.extended(new.shape[1], 0, appended=appended)
        return log, [self._grown(held, layer, stream, log, new[layer]) for layer, held in enumerate(rows)]

    def _rewritten(
        self, stream: int, log: StreamLog, rows: Sequence[Rows], new: Tensor, stays: NDArray[np.int64]
    ) -> tuple[StreamLog, list[Rows]]:
        """What a stream holds after new rows [l, k, d], if only those stay that are chosen.

        It is as if the stream had been reset, and the rows that stay had been appended again: they are
        written anew, in blocks, and what is there stays as it is for whoever refers to it.
        """
        assert self.capacity is not None
        coming = torch.arange(log.appended, log.appended + new.shape[1])
        positions = torch.cat([log.positions(), coming])[stays]
        old = torch.from_numpy(stays[stays < log.held])
        begun = log.anew()
        anew = [each.anew(begun, self.capacity, self._carried(each, old, log.end)) for each in rows]
        step = max(1, _BLOCK_BYTES // (self.layers * self._layout.row_bytes))
        for start in range(0, len(old), step):
            block = torch.stack([each.gather(old[start : start + step]) for each in rows])
            begun, anew = self._extended(stream, begun, anew, block, 0)
        chosen = torch.from_numpy(stays[stays >= log.held] - log.held).to(new.device)
        begun, anew = self._extended(stream, begun, anew, new[:, chosen], new.shape[1])
        # The newest follow one another; the positions of the others do not follow from how many there are.
        own = int((positions != torch.arange(begun.appended - len(positions), begun.appended)).sum())
        return replace(begun, survivors=Survivors.at(log.end, positions[:own].clone())), anew

    def _carried(self, rows: Rows, chosen: Tensor, number: int) -> StoredScores:
        """The scores that are kept of chosen rows, which get the numbers from `number` on."""
        kept = rows.kept_scores()
        kept = None if kept is None else kept.chosen(chosen)
        if kept is not None:
            kept = kept._replace(first=kept.first + number)
        return StoredScores(self.dtype, self.device, kept)

    def _grown(self, held: Rows, layer: int, stream: int, log: StreamLog, new: Tensor) -> Rows:
        """The rows of a layer and stream followed by `new`, which are on disk already if the store is."""
        if isinstance(held, TieredRows):
            assert self._tiers is not None
            home = self._home_of(held.home, layer, stream, log, new)
            return held.grown(new, home, self._tiers.device_rows)
        if self._disk is not None and isinstance(held, ColdRows) and not held.loaded:
            return self._disk.cold(layer, stream, log, self.device, held.stored)
        return held.span().appended(new)

    def _home_of(self, home: Rows, layer: int, stream: int, log: StreamLog, new: Tensor) -> Rows | None:
        """All rows, the new ones too, outside of fast memory; None if they are nowhere but on disk."""
        if isinstance(home, TieredRows):
            assert self._tiers is not None
            assert self._tiers.host_rows is not None
            below = self._home_of(home.home, layer, stream, log, new)
            return home.grown(new, below, self._tiers.host_rows)
        if isinstance(home, ColdRows):
            if self._disk is None:
                return None  # the fork of a store on disk writes nothing there
            return self._disk.cold(layer, stream, log, home.device, home.stored)
        return home.span().appended(new)

    def _checked_counts(self, states: Tensor, lengths: Tensor | Sequence[int] | None) -> list[int]:
        """Checks the arguments of `append`; returns how many rows each stream appends."""
        expected = f"[{self.layers}, {self.streams}, n, {self.dim}]"
        if not isinstance(states, Tensor) or not states.is_floating_point():
            given = states.dtype if isinstance(states, Tensor) else type(states).__name__
            raise TypeError(f"states: expected a floating-point tensor {expected}, got {given}")
        shape = list(states.shape)
        if len(shape) != 4 or [*shape[:2], shape[3]] != [self.layers, self.streams, self.dim]:
            raise ValueError(f"states: expected shape {expected}, got {shape}")
        if lengths is None:
            return [shape[2]] * self.streams
        valid = _as_tensor("lengths", lengths, "integers")
        if valid.is_floating_point() or valid.is_complex() or valid.dtype == torch.bool:
            raise TypeError(f"lengths: expected integers, got {valid.dtype}")
        if valid.shape != (self.streams,):
            raise ValueError(f"lengths: expected shape [{self.streams}], got {list(valid.shape)}")
        counts = [int(count) for count in valid.tolist()]
        for stream, count in enumerate(counts):
            if not 0 <= count <= shape[2]:
                raise ValueError(f"lengths: expected 0 to {shape[2]} in stream {stream}, got {count}")
        return counts

    def layer(self, layer: int) -> MemoryLayer:
        """The rows of one layer as they stand now; nothing that happens to the store later changes them.

        Raises:
            IndexError: There is no such layer.
        """
        self._check_open()
        if not 0 <= layer < self.layers:
            raise IndexError(f"layer: expected 0 to {self.layers - 1}, got {layer}")
        return MemoryLayer(
            self._rows[layer],
            self._logs,
            dim=self.dim,
            dtype=self.dtype,
            device=self.device,
            kept=self._kept[layer],
            latest_scores=None if self._latest is None else self._latest[layer],
            count_routed=None if self._routes is None else self._routes.counter(layer, self._logs),
        )

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies all rows of one layer.

        Returns:
            The rows, [b, m, d], oldest first, zeros beyond a stream's length; and which exist, bool [b, m].

        Raises:
            IndexError: There is no such layer.
            CorruptionError: A row on disk is damaged.
        """
        held = self.layer(layer)
        views = held.views()
        out = torch.zeros(held.shape, dtype=self.dtype, device=self.device)
        for stream, view in enumerate(views):
            out[stream, : view.shape[0]] = view
        return out, held.mask

    def gather(self, layer: int, indices: Tensor) -> Tensor:
        """Copies some rows of one layer; as `MemoryLayer.gather` of the layer as it stands now.

        Raises:
            TypeError: `indices` is not an integer tensor.
            ValueError: The first size is not b.
            IndexError: There is no such layer or row.
            CorruptionError: A row on disk is damaged.
        """
        return self.layer(layer).gather(indices)

    def positions(self, indices: Tensor) -> Tensor:
        """How many rows the stream had appended before each of these since its reset.

        Args:
            indices: Rows held now, integers [b, ...], 0 the oldest; -1 means no row and stays -1.

        Returns:
            Positions, int64 of the shape of `indices`.

        Raises:
            TypeError: `indices` is not an integer tensor.
            ValueError: The first size is not b.
            IndexError: There is no such row.
        """
        indices = checked_indices(indices, self.lengths)
        return positions_of(indices, self._logs)

    def reset(self, streams: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Lets go of all rows of some streams, which begin anew: their documents have ended.

        Args:
            streams: Numbers of streams, or a mask, bool [b].

        Raises:
            TypeError: `streams` is neither.
            ValueError: The mask has another shape, or a number does not fit into 64 bits.
            IndexError: There is no such stream.
            ReadOnlyError: The store was opened with mode "r".
        """
        self._check_writable()
        given = _as_tensor("streams", streams, "numbers of streams or a bool mask")
        if given.dtype == torch.bool:
            if given.shape != (self.streams,):
                raise ValueError(f"streams: expected a mask [{self.streams}], got shape {list(given.shape)}")
            given = given.nonzero()
        elif given.numel() and (given.is_floating_point() or given.is_complex()):
            raise TypeError(f"streams: expected numbers of streams or a bool mask, got {given.dtype}")
        numbers = {int(number) for number in given.reshape(-1).tolist()}
        for number in numbers:
            if not 0 <= number < self.streams:
                raise IndexError(f"streams: expected 0 to {self.streams - 1}, got {number}")
        logs = list(self._logs)
        table = [list(rows) for rows in self._rows]
        latest = None if self._latest is None else [list(streams) for streams in self._latest]
        for number in numbers:
            logs[number] = logs[number].reset()
            for rows in table:
                rows[number] = rows[number].dropped(len(rows[number]))
            for scores in latest or ():
                scores[number] = None
        self._logs, self._rows, self._latest = StreamLogs(logs), [*map(Streams, table)], latest
        if self._routes is not None:
            self._routes.reset(numbers)
        self.version += 1

    def forget_first_scores(self) -> None:
        """Lets go of the scores and keys that rows got first, see `MemoryLayer.scores`; rows get them anew.

        Others who open a commit, or a copy, have none either. So what is read on from here is the same.

        Raises:
            StoreClosedError: The store was closed.
        """
        self._check_open()
        for kept in self._kept:
            kept.forget_first()

    def record_routes(self) -> RouteCounts:
        """Counts from now on how often routers fetch each row, and returns the counts.

        They go on from those of the commit that was opened, and are written with every commit; a writer that
        does not record leaves them as they are. Nothing depends on them: where they are damaged or cannot be
        written, they are lost and the store is not. Layers that were there before count nothing.

        Raises:
            StoreClosedError: The store was closed.
        """
        self._check_open()
        if self._routes is None:
            documents = [DocumentRoutes(self.layers) for _ in range(self.streams)]
            self._routes = RouteCounts(self.layers, documents)
        self._routes.recording = True
        return self._routes

    @property
    def routes(self) -> RouteCounts | None:
        """How often routers have fetched each row, as far as it was recorded; None if it never was."""
        self._check_open()
        return self._routes

    def commit(self, durable: bool = False) -> str:
        """Makes what the store holds now the last commit: all of it or, if anything fails, nothing.

        The last `keep_commits` commits, the pinned ones and the last durable one stay readable; older ones
        are dropped.

        Args:
            durable: Whether to wait until the commit survives a power cut. Otherwise it survives the end of
                the process, however it ends. In an object store every commit survives both.

        Returns:
            The id of the commit.

        Raises:
            NoPathError: The store is in memory.
            ReadOnlyError: The store was opened with mode "r".
            StoreWriteError: The operating system, or the object store, refused to write; the last commit
                stands. Or an object store stopped answering at the very end, and the message says that the
                commit is made and will be seen later.
            StoreLockedError: Somebody else has taken the store over; the last commit stands.
        """
        self._check_writable()
        disk = self._on_disk("commit")
        return disk.commit(
            self._logs, self._fingerprint, self._kept_scores(), self._documents(), durable=durable
        )

    def compact(
        self,
        *,
        compression: Compression | None = None,
        level: int | None = None,
        progress: Progress | None = None,
    ) -> CompactReport:
        """Rewrites the rows of the last commit that lie in full chunk files into shards, and commits that.

        A shard takes the place of many chunk files: there are fewer files, and with zstd they are smaller.
        Nothing else changes: the commit holds what the last one holds, under the same fingerprint, and is
        durable; what was appended or reset and not committed stays so. Readers of earlier commits go on
        reading chunk files, which are deleted as those commits are dropped, as ever. Left alone are rows that
        are in shards already or in the chunk that is written to next, and scores.

        Args:
            compression: None to write rows as they are, which are then read one by one, through memory maps
                or as ranges of an object; "zstd" for less space and slower reading, a few hundred at a time.
            level: Of zstd, 1 to 22, as far as more effort makes smaller files; None for 3.
            progress: Called after every few MiB with the bytes of rows rewritten so far, and with all of
                them.

        Raises:
            ValueError: `compression` is another one, or `level` is out of range or given without "zstd".
            NoPathError: The store is in memory.
            ReadOnlyError: The store was opened with mode "r".
            CorruptionError: A row is damaged: nothing was changed.
            StoreWriteError: The operating system, or the object store, refused to write; the last commit
                stands. As for `commit`, it may have been made.
            StoreLockedError: Somebody else has taken the store over; the last commit stands.
        """
        if compression not in (None, "zstd"):
            raise ValueError(f"compression: expected 'zstd' or None, got {compression!r}")
        if level is not None and compression is None:
            raise ValueError(f"level: expected None without compression, got {level!r}")
        if level is not None and (isinstance(level, bool) or level not in LEVELS):
            raise ValueError(f"level: expected {LEVELS[0]} to {LEVELS[-1]}, got {level!r}")
        self._check_writable()
        if compression is not None and level is None:
            level = DEFAULT_LEVEL
        return compact_store(self._on_disk("compact"), level=level, progress=progress)

    def _kept_scores(self) -> list[list[KeptScores | None]]:
        """The scores that are kept of every layer and stream."""
        return [
            [rows.kept_scores() for rows in streams]
            if kept.scores is None
            else [kept.scores.kept(stream, log) for stream, log in enumerate(self._logs)]
            for streams, kept in zip(self._rows, self._kept, strict=True)
        ]

    def _documents(self) -> Sequence[DocumentRoutes]:
        """What was counted of each stream of routings; empty if nothing was."""
        return () if self._routes is None else self._routes.documents

    def commits(self) -> list[str]:
        """Ids of the commits that can be opened now, oldest first; none for a store in memory."""
        self._check_open()
        return [] if self._disk is None else self._disk.list_commits()

    def pin(self, commit_id: str) -> str:
        """Keeps a commit readable, whatever is committed later, until unpinned. Readers can pin as well.

        Returns:
            The id of the pin; each call makes one.

        Raises:
            NoPathError: The store is in memory.
            ValueError: `commit_id` cannot be an id.
            CommitNotFoundError: There is no such commit.
            CorruptionError: Its record is damaged.
            StoreWriteError: The operating system refused to write.
        """
        self._check_open()
        return self._on_disk("pin").pin(commit_id)

    def unpin(self, pin_id: str) -> None:
        """Removes a pin. The commit goes when the writer next commits, if nothing else keeps it.

        Raises:
            NoPathError: The store is in memory.
            ValueError: `pin_id` cannot be the id of a pin.
            CommitNotFoundError: There is no such pin.
            StoreWriteError: The operating system refused.
        """
        self._check_open()
        self._on_disk("unpin").unpin(pin_id)

    def pins(self) -> dict[str, str]:
        """All pins, whoever made them: commit ids by pin id; none for a store in memory."""
        self._check_open()
        return {} if self._disk is None else self._disk.pins()

    def info(self) -> MemoryInfo:
        """What the store holds now, what it takes up in memory and on disk, and its commits. Reads no row."""
        self._check_open()
        row_bytes = self.layers * self._layout.row_bytes
        kept = [log.survivors.nbytes for log in self._logs if log.survivors is not None]
        kept += [each.nbytes for each in itertools.chain(*self._latest or ()) if isinstance(each, Tensor)]
        kept += [each.nbytes for each in itertools.chain(*self._kept) if each is not None]
        kept += [bytes_left_behind(streams) for streams in self._rows]
        if self._routes is not None:
            kept.append(self._routes.nbytes)
        return MemoryInfo(
            path=self.path,
            layers=self.layers,
            streams=self.streams,
            dim=self.dim,
            dtype=self.dtype,
            capacity=self.capacity,
            capacity_bytes=None if self.capacity is None else self.capacity * self.streams * row_bytes,
            eviction=self.eviction,
            keep_every=self.keep_every,
            fingerprint=self._fingerprint,
            rows=tuple(log.held for log in self._logs),
            appended=tuple(log.appended for log in self._logs),
            evicted=tuple(log.appended - log.held for log in self._logs),
            positions=tuple((log.first, log.appended) for log in self._logs),
            rows_bytes=sum(log.held for log in self._logs) * row_bytes,
            memory_bytes=sum(rows.nbytes for streams in self._rows for rows in streams) + sum(kept),
            routed=None if self._routes is None else self._routes.totals,
            disk=None if self._disk is None else self._disk.usage(self._logs),
            commits=() if self._disk is None else describe_commits(self._disk),
        )

    def fork(self) -> MemoryStore:
        """An independent store in memory with the same rows; they are shared until either side writes.

        The fork of a store on disk reads rows from there when they are needed. The fork of one that records
        routes goes on with a copy of the counts.
        """
        self._check_open()
        fork = MemoryStore(
            self._layout,
            device=self.device,
            fingerprint=self._fingerprint,
            logs=self._logs,
            rows=self._rows,
            tiers=self._tiers,
            routes=None if self._routes is None else self._routes.fork(),
        )
        fork._latest = None if self._latest is None else [list(streams) for streams in self._latest]
        fork._kept = [kept.fork() for kept in self._kept]
        return fork

    def copy_to(self, path: Location, durable: bool = False) -> str:
        """Copies the store to a path, all of it or nothing: rows, positions and fingerprint, in one commit.

        Files of rows have the same size in the copy; in an object store, 4 MiB at most. Rows in shards are
        in such files there.

        Args:
            path: Where: nothing, or an empty folder; or a url, s3://bucket/folder, where there is nothing.
            durable: Whether to wait until the copy survives a power cut.

        Returns:
            The id of the copy's commit. The copy is not open.

        Raises:
            StoreExistsError: There is something at the path.
            StoreWriteError: The operating system refused to write.
            CorruptionError: A row on disk is damaged.
        """
        self._check_open()
        return copy_to(
            store_path(path),
            self._layout,
            self._rows,
            self._logs,
            self._fingerprint,
            self._kept_scores(),
            [document.copy() for document in self._documents()],
            durable,
        )

    def close(self) -> None:
        """Lets the next writer in. What was not committed is lost.

        Forks and layers can still be read; what they have not yet read from disk, for as long as the commit
        is there.
        """
        self._closed = True
        if self._disk is not None:
            self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError(
                f"{self.path or 'the memory store'}: expected an open store, got a closed one"
            )

    def _check_writable(self) -> None:
        self._check_open()
        if self.mode == "r":
            raise ReadOnlyError(f"{self.path}: expected a store opened with mode='r+', got mode='r'")
        if self._disk is not None:
            self._disk.check_process()

    def _on_disk(self, verb: str) -> Disk:
        if self._disk is None:
            raise NoPathError(
                f"{verb}: expected a store with a path, got one in memory (copy_to gives it one)"
            )
        return self._disk


def _of_staying(scores: LatestScores, stays: range | NDArray[np.int64]) -> LatestScores:
    """The scores of the rows that stay."""
    if not isinstance(scores, Tensor):
        return scores  # all stay, or there are none
    if isinstance(stays, range):
        return scores[stays.start :]
    return scores[torch.from_numpy(stays[stays < len(scores)]).to(scores.device)]


def _capacity(rows: int | None, total_bytes: int | None, bytes_of_one: int) -> int | None:
    """Rows that a stream holds at most, if `bytes_of_one` is what one row of each layer and stream takes.

    Raises:
        TypeError: A number is no integer.
        ValueError: It is too small.
    """
    if total_bytes is None:
        return rows
    check_positive("capacity_bytes", total_bytes)
    if total_bytes < bytes_of_one:
        raise ValueError(
            f"capacity_bytes: expected at least {bytes_of_one}, a row of each layer and stream, got "
            f"{total_bytes}"
        )
    if rows is not None:
        check_positive("capacity", rows)
    share = total_bytes // bytes_of_one
    return share if rows is None else min(rows, share)


def _check_tiers(device_bytes: int | None, host_bytes: int | None) -> None:
    """Raises TypeError or ValueError unless each is None or at least 1, and the first one is given too."""
    for name, given in (("device_bytes", device_bytes), ("host_bytes", host_bytes)):
        if given is not None:
            check_positive(name, given)
    if device_bytes is None and host_bytes is not None:
        raise ValueError(f"device_bytes: expected a number beside host_bytes={host_bytes}, got None")


def _tiers(layout: Layout, device_bytes: int | None, host_bytes: int | None) -> Tiers | None:
    """How many rows of each layer and stream may be where; None for no bound."""
    if device_bytes is None:
        return None
    # A buffer that grows has room for twice the rows that it held when it was made.
    share = 2 * layout.layers * layout.streams * layout.row_bytes
    return Tiers(max(1, device_bytes // share), None if host_bytes is None else max(1, host_bytes // share))


def _checked_device(device: object) -> torch.device:
    """The device, once a tensor has been made there.

    Raises:
        TypeError: It is neither a device nor the name of one.
        ValueError: PyTorch cannot use it.
    """
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"device: expected a torch.device or a string, got {type(device).__name__}")
    try:
        # As tensors there name it: "cuda" is one of several devices, and the one that was meant stays it.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device: expected one that PyTorch can use here, got {str(device)!r}: {error}"
        ) from error


def _as_tensor(name: str, values: object, expected: str) -> Tensor:
    """The argument `name` as a tensor."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = ValueError if "overflow" in f"{error!r}".lower() else TypeError
        raise kind(f"{name}: expected {expected}, got {values!r:.100}") from error


def _check_fingerprint(fingerprint: object) -> None:
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint: expected a string or None, got {type(fingerprint).__name__}")
