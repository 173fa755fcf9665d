"""Commit records: which rows each stream holds, written whole under a name that says what they contain.

A record is the file commits/<generation>-<checksum>.json. The last commit is the one of the highest
generation. A pin is an empty file commits/pins/<commit id>.<number>; while it is there, the commit stays.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from xlroute.memory.errors import CommitNotFoundError, CorruptionError
from xlroute.memory.layout import COMMITS, FORMAT, FORMATS, Layout
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.place import StorePath, list_names
from xlroute.memory.sealed import checksum, encode, read_document, replace_file, sync
from xlroute.memory.shards import Shard, outside, plausible, with_rows
from xlroute.memory.survivors import Survivors, positions_path, read_positions

_ID = re.compile(r"\d{12}-[0-9a-f]{8}")
_PIN = re.compile(rf"({_ID.pattern})\.[0-9a-f]{{8}}")
_STAMP = re.compile(r"[0-9a-f]{32}")
_CRC = re.compile(r"[0-9a-f]{8}")
PINS = "pins"
_SEAL = "crc32c"
# No stream and no store gets this far; a number beyond it is damage.
MAX_ROW = 1 << 48
MAX_GENERATION = 10**12 - 1
_MAX_BYTES = 1 << 60
_MAX_ROUTES = 1 << 62
_MAX_COLUMNS = 1 << 16


@dataclass(frozen=True)
class CommittedScores:
    """Which rows of a layer have scores on disk.

    Attributes:
        stamp: Stands for what they were scored with.
        columns: Scores of a row.
        spans: For each stream, first and last + 1 of its rows that have scores, 0 the oldest held.
    """

    stamp: str
    columns: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CommittedRoutes:
    """What a file says of how often the rows of a stream were routed.

    Attributes:
        total: How often any of them was, at least 1.
        crc32c: Of the file, in 8 hexadecimal digits.
    """

    total: int
    crc32c: str


@dataclass(frozen=True)
class Commit:
    """What a commit record says.

    Attributes:
        generation: Counts the commits of the store from 1.
        parent: Id of the commit whose rows this one went on from, or None.
        fingerprint: Of the weights that wrote the rows, or None if nobody said.
        durable: Whether the rows were on the medium before the record was.
        logs: What each stream holds.
        scores: For each layer, what it has of scores; empty if no layer has any.
        shards: For each stream, the shards that some of its rows are in; empty if no stream has any.
        routes: For each stream, what there is of routed counts; empty if no stream has any.
        format: Version of the format of the record.
    """

    generation: int
    parent: str | None
    fingerprint: str | None
    durable: bool
    logs: tuple[StreamLog, ...]
    scores: tuple[CommittedScores | None, ...] = ()
    shards: tuple[tuple[Shard, ...], ...] = ()
    routes: tuple[CommittedRoutes | None, ...] = ()
    format: int = FORMAT

    def shards_of(self, stream: int) -> tuple[Shard, ...]:
        """The shards that rows of a stream are in."""
        return self.shards[stream] if self.shards else ()

    def routes_of(self, stream: int) -> CommittedRoutes | None:
        """What there is of a stream's routed counts."""
        return self.routes[stream] if self.routes else None

    def in_files(self, stream: int) -> Iterable[Extent]:
        """What a stream holds in chunk files."""
        return outside(self.logs[stream].extents, self.shards_of(stream))

    def document(self) -> dict[str, Any]:
        """The record without its checksum."""
        document: dict[str, Any] = {
            "format": self.format,
            "generation": self.generation,
            "parent": self.parent,
            "fingerprint": self.fingerprint,
            "durable": self.durable,
            "streams": [_stream_entry(log) for log in self.logs],
        }
        if self.scores:
            document["scores"] = [
                None
                if each is None
                else {
                    "stamp": each.stamp,
                    "columns": each.columns,
                    "spans": [list(span) for span in each.spans],
                }
                for each in self.scores
            ]
        if self.shards:
            document["shards"] = [
                [
                    {
                        "rows": [shard.start, shard.stop],
                        "name": shard.name,
                        "inner_rows": shard.inner_rows,
                        "zstd": shard.level,
                        "bytes": shard.size,
                    }
                    for shard in shards
                ]
                for shards in self.shards
            ]
        if self.routes:
            document["routes"] = [None if each is None else [each.total, each.crc32c] for each in self.routes]
        return document

    def sealed(self) -> dict[str, Any]:
        """The record as it is written."""
        return {**self.document(), _SEAL: self.seal}

    @cached_property
    def seal(self) -> str:
        """The checksum of the record."""
        return checksum(self.document())

    @property
    def id(self) -> str:
        """The name of the record."""
        return f"{self.generation:012d}-{self.seal}"


def record_path(root: StorePath, commit_id: str) -> StorePath:
    """Where the record of a commit is.

    Raises:
        ValueError: `commit_id` cannot be the id of a commit.
    """
    if not isinstance(commit_id, str) or not _ID.fullmatch(commit_id):
        raise ValueError(f"commit: expected an id like 000000000012-9f3a2c1d, got {commit_id!r}")
    return root / COMMITS / f"{commit_id}.json"


def list_commits(root: StorePath) -> list[str]:
    """Ids of all records, oldest first.

    Raises:
        CorruptionError: The folder of the records is missing.
    """
    folder = root / COMMITS
    try:
        names = [name.removesuffix(".json") for name in list_names(folder) if name.endswith(".json")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptionError(f"{folder}: expected the folder of the commits, got none") from error
    return sorted(name for name in names if _ID.fullmatch(name))


def write_commit(root: Path, commit: Commit) -> None:
    """Writes a record; the commit exists once this returns, or does not exist at all.

    Raises:
        OSError: The operating system refused.
    """
    path = root / COMMITS / f"{commit.id}.json"
    try:
        replace_file(path, encode(commit.sealed()), scratch=root / COMMITS, durable=commit.durable)
    except BaseException:
        # It may have got its name before this; the caller is told that there is no such commit.
        with suppress(OSError):
            path.unlink()
        raise


def read_commit(root: StorePath, commit_id: str, layout: Layout) -> Commit:
    """Reads a record.

    Raises:
        CommitNotFoundError: There is no such record.
        CorruptionError: It is damaged, or the folder of the records is missing.
    """
    path = record_path(root, commit_id)
    try:
        document = read_document(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CommitNotFoundError(
            f"commit: expected one of {', '.join(list_commits(root)) or 'none'}, got {commit_id}"
        ) from error
    return parse_commit(root, document, commit_id, layout, path)


def parse_commit(
    root: StorePath, document: dict[str, Any], commit_id: str, layout: Layout, path: StorePath
) -> Commit:
    """What a record says, of the document that was read at `path`.

    Raises:
        CorruptionError: It is damaged.
    """
    given = document.pop(_SEAL, None)
    actual = checksum(document)
    if given != actual or actual != commit_id[-8:]:
        raise CorruptionError(
            f"{path}: expected checksum {commit_id[-8:]}, got {actual}: the commit record is damaged; "
            "earlier commits can be opened by their ids"
        )
    try:
        commit = Commit(
            generation=_number(document["generation"], MAX_GENERATION),
            parent=_of_types(document["parent"], str, type(None)),
            fingerprint=_of_types(document["fingerprint"], str, type(None)),
            durable=_of_types(document["durable"], bool),
            logs=tuple(
                _log(entry, layout, stream, root, path) for stream, entry in enumerate(document["streams"])
            ),
            format=document["format"],
        )
        if commit.format not in FORMATS:
            raise ValueError(f"a record of format {commit.format!r}")
        if "scores" in document:
            scores = tuple(_scores(entry, commit.logs) for entry in document["scores"])
            if len(scores) != layout.layers:
                raise ValueError(f"scores of {len(scores)} layers")
            commit = replace(commit, scores=scores)
        if "shards" in document:
            shards = zip(document["shards"], commit.logs, strict=True)
            commit = replace(commit, shards=tuple(_shards(each, log, layout) for each, log in shards))
        if "routes" in document:
            commit = replace(commit, routes=tuple(map(_routes, document["routes"])))
            if len(commit.routes) != layout.streams:
                raise ValueError(f"routes of {len(commit.routes)} streams")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"{path}: expected a commit record, got another document: {error!r}") from error
    if commit.document() != document or commit.id != commit_id or len(commit.logs) != layout.streams:
        raise CorruptionError(
            f"{path}: expected commit {commit_id} of {layout.streams} streams, got another one"
        )
    return commit


def _stream_entry(log: StreamLog) -> dict[str, Any]:
    """What a record says of a stream."""
    entry: dict[str, Any] = {
        "extents": [list(extent) for extent in log.extents],
        "appended": log.appended,
        "end": log.end,
    }
    if log.survivors is not None:
        entry["survivors"] = [log.survivors.start, log.survivors.stop, log.survivors.crc32c]
    return entry


def _log(entry: dict[str, Any], layout: Layout, stream: int, root: StorePath, record: StorePath) -> StreamLog:
    """The log of one stream in a record; ValueError if no writer can have written it."""
    extents = tuple(Extent(*(_number(n, MAX_ROW) for n in extent)) for extent in entry["extents"])
    log = StreamLog(extents, _number(entry["appended"], MAX_ROW), _number(entry["end"], MAX_ROW))
    last = 0
    for extent in log.extents:
        if not last <= extent.start < extent.stop <= log.end or not extent.writer < 1 << 32:
            raise ValueError(f"impossible rows {list(extent)}")
        last = extent.stop
    # A stream of which a repair has dropped rows holds fewer.
    if log.held > (log.appended if layout.capacity is None else min(log.appended, layout.capacity)):
        raise ValueError(f"{log.held} rows held of {log.appended} with capacity {layout.capacity}")
    if "survivors" in entry:
        log = _with_survivors(log, entry["survivors"], stream, root, record)
    return log


def _with_survivors(
    log: StreamLog, entry: list[Any], stream: int, root: StorePath, record: StorePath
) -> StreamLog:
    """The log with rows whose positions are read when needed; ValueError if no writer can have written it."""
    start, stop, crc32c = entry
    start, stop = _number(start, MAX_ROW), _number(stop, MAX_ROW)
    if not _CRC.fullmatch(_of_types(crc32c, str)) or not log.extents:
        raise ValueError(f"impossible survivors {entry!r:.100}")
    oldest, *later = log.extents
    if not start <= oldest.start < stop <= log.end or any(extent.start < stop for extent in later):
        raise ValueError(f"survivors {entry!r:.100} of rows {log.extents!r:.100}")

    def read() -> Tensor:
        path = positions_path(root, stream, survivors)
        try:
            positions = read_positions(path, stop - start, crc32c)
        except CorruptionError as error:
            if record.exists():
                raise
            raise CommitNotFoundError(
                f"commit {record.stem}: expected its positions, got a store that has dropped it since then "
                f"({error})"
            ) from error
        newest = int(positions[oldest.start - start + found.surviving - 1])
        following = log.appended - log.held + found.surviving
        if newest >= following:
            raise CorruptionError(f"{path}: expected positions below {following}, got {newest}")
        return positions

    survivors = Survivors(start, stop, crc32c, read)
    found = replace(log, survivors=survivors)
    return found


def _scores(entry: dict[str, Any] | None, logs: tuple[StreamLog, ...]) -> CommittedScores | None:
    """What a record says of a layer's scores; ValueError if no writer can have written it."""
    if entry is None:
        return None
    stamp = _of_types(entry["stamp"], str)
    columns = _number(entry["columns"], _MAX_COLUMNS)
    spans = tuple((_number(first, MAX_ROW), _number(stop, MAX_ROW)) for first, stop in entry["spans"])
    if not _STAMP.fullmatch(stamp) or columns < 1 or len(spans) != len(logs):
        raise ValueError(f"impossible scores {entry!r:.100}")
    for (first, stop), log in zip(spans, logs, strict=True):
        if not first <= stop <= log.held:
            raise ValueError(f"scores of rows {first} to {stop}, of {log.held} held")
    return CommittedScores(stamp, columns, spans)


def _routes(entry: list[Any] | None) -> CommittedRoutes | None:
    """What a record says of a stream's routed counts; ValueError if no writer can have written it."""
    if entry is None:
        return None
    total, crc32c = entry
    routes = CommittedRoutes(_number(total, _MAX_ROUTES), _of_types(crc32c, str))
    if not (total and _CRC.fullmatch(crc32c)):
        raise ValueError(f"impossible routes {entry!r:.100}")
    return routes


def _shards(entries: list[dict[str, Any]], log: StreamLog, layout: Layout) -> tuple[Shard, ...]:
    """The shards of one stream in a record; ValueError if no writer can have written them."""
    shards = []
    last = 0
    for entry in entries:
        start, stop = (_number(row, MAX_ROW) for row in entry["rows"])
        name = _of_types(entry["name"], str)
        level = _of_types(entry["zstd"], int, type(None))
        inner_rows, size = _number(entry["inner_rows"], MAX_ROW), _number(entry["bytes"], _MAX_BYTES)
        shard = Shard(start, stop, name, inner_rows, level, size)
        whole = start % layout.chunk_rows == stop % layout.chunk_rows == 0
        if not (whole and last <= start < stop <= log.end and plausible(layout, shard)):
            raise ValueError(f"impossible shard {shard}")
        shards.append(shard)
        last = stop
    if len(with_rows(shards, log.extents)) < len(shards):
        raise ValueError("shards without rows")
    return tuple(shards)


def _number(value: object, most: int) -> int:
    """The value, if it is an integer that a record can hold; neither 1.0 nor True is one."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"expected an integer from 0 to {most}, got {value!r:.100}")
    return value


def _of_types(value: Any, *types: type) -> Any:
    """The value, if it is of one of the types."""
    if type(value) not in types:
        raise TypeError(f"expected {' or '.join(t.__name__ for t in types)}, got {type(value).__name__}")
    return value


def list_pins(root: StorePath) -> dict[str, str]:
    """All pins: the id of the commit, by pin id."""
    try:
        names = list_names(root / COMMITS / PINS)
    except FileNotFoundError:
        return {}
    matches = (_PIN.fullmatch(name) for name in names)
    return {match[0]: match[1] for match in matches if match}


def new_pin(commit: Commit) -> str:
    """The id of another pin of a commit, which is the name of its file."""
    return f"{commit.id}.{secrets.token_hex(4)}"


def add_pin(root: Path, commit: Commit) -> str:
    """Pins a commit. A durable commit gets a durable pin.

    Returns:
        The id of the pin.

    Raises:
        OSError: The operating system refused.
    """
    folder = root / COMMITS / PINS
    folder.mkdir(exist_ok=True)
    pin = new_pin(commit)
    # The name is all there is to it, so the file is whole as soon as it is there.
    os.close(os.open(folder / pin, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    if commit.durable:
        sync(folder)
        sync(folder.parent)
    return pin


def remove_pin(root: StorePath, pin: str) -> None:
    """Removes a pin.

    Raises:
        ValueError: `pin` cannot be the id of a pin.
        CommitNotFoundError: There is no such pin.
    """
    if not isinstance(pin, str) or not _PIN.fullmatch(pin):
        raise ValueError(f"pin: expected an id that pin() returned, got {pin!r}")
    try:
        (root / COMMITS / PINS / pin).unlink()
    except FileNotFoundError as error:
        raise CommitNotFoundError(f"pin: expected one that is in the store, got {pin}") from error
