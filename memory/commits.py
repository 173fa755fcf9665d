"""Commit records: which rows each stream holds, written whole under a name that says what they contain.

A record is the file commits/<generation>-<checksum>.json. The last commit is the one of the highest
generation. A pin is an empty file commits/pins/<commit id>.<number>; while it is there, the commit stays.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlroute.memory.errors import CommitNotFoundError, CorruptionError
from xlroute.memory.layout import COMMITS, FORMAT, Layout
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.sealed import checksum, encode, read_document, replace_file, sync

_ID = re.compile(r"\d{12}-[0-9a-f]{8}")
_PIN = re.compile(rf"({_ID.pattern})\.[0-9a-f]{{8}}")
_PINS = "pins"
_SEAL = "crc32c"
# No stream gets this far; a number beyond it is damage.
_MAX_ROW = 1 << 48


@dataclass(frozen=True)
class Commit:
    """What a commit record says.

    Attributes:
        generation: Counts the commits of the store from 1.
        parent: Id of the commit whose rows this one went on from, or None.
        fingerprint: Of the weights that wrote the rows, or None if nobody said.
        durable: Whether the rows were on the medium before the record was.
        logs: What each stream holds.
    """

    generation: int
    parent: str | None
    fingerprint: str | None
    durable: bool
    logs: tuple[StreamLog, ...]

    def document(self) -> dict[str, Any]:
        """The record without its checksum."""
        return {
            "format": FORMAT,
            "generation": self.generation,
            "parent": self.parent,
            "fingerprint": self.fingerprint,
            "durable": self.durable,
            "streams": [
                {
                    "extents": [list(extent) for extent in log.extents],
                    "appended": log.appended,
                    "end": log.end,
                }
                for log in self.logs
            ],
        }

    @property
    def id(self) -> str:
        """The name of the record."""
        return f"{self.generation:012d}-{checksum(self.document())}"


def record_path(root: Path, commit_id: str) -> Path:
    """Where the record of a commit is.

    Raises:
        ValueError: `commit_id` cannot be the id of a commit.
    """
    if not isinstance(commit_id, str) or not _ID.fullmatch(commit_id):
        raise ValueError(f"commit: expected an id like 000000000012-9f3a2c1d, got {commit_id!r}")
    return root / COMMITS / f"{commit_id}.json"


def list_commits(root: Path) -> list[str]:
    """Ids of all records, oldest first."""
    names = (name.removesuffix(".json") for name in os.listdir(root / COMMITS) if name.endswith(".json"))
    return sorted(name for name in names if _ID.fullmatch(name))


def write_commit(root: Path, commit: Commit) -> None:
    """Writes a record; the commit exists once this returns, or does not exist at all.

    Raises:
        OSError: The operating system refused.
    """
    document = commit.document()
    data = encode({**document, _SEAL: checksum(document)})
    replace_file(record_path(root, commit.id), data, scratch=root / COMMITS, durable=commit.durable)


def read_commit(root: Path, commit_id: str, layout: Layout) -> Commit:
    """Reads a record.

    Raises:
        CommitNotFoundError: There is no such record.
        CorruptionError: It is damaged.
    """
    path = record_path(root, commit_id)
    try:
        document = read_document(path)
    except FileNotFoundError as error:
        raise CommitNotFoundError(
            f"commit: expected one of {', '.join(list_commits(root)) or 'none'}, got {commit_id}"
        ) from error
    given = document.pop(_SEAL, None)
    actual = checksum(document)
    if given != actual or actual != commit_id[-8:]:
        raise CorruptionError(
            f"{path}: expected checksum {commit_id[-8:]}, got {actual}: the commit record is damaged; "
            "earlier commits can be opened by their ids"
        )
    try:
        commit = Commit(
            generation=document["generation"],
            parent=document["parent"],
            fingerprint=document["fingerprint"],
            durable=document["durable"],
            logs=tuple(_log(entry, layout) for entry in document["streams"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"{path}: expected a commit record, got another document: {error!r}") from error
    if commit.document() != document or commit.id != commit_id or len(commit.logs) != layout.streams:
        raise CorruptionError(
            f"{path}: expected commit {commit_id} of {layout.streams} streams, got another one"
        )
    return commit


def _log(entry: dict[str, Any], layout: Layout) -> StreamLog:
    """The log of one stream in a record; ValueError if no writer can have written it."""
    log = StreamLog(tuple(Extent(*extent) for extent in entry["extents"]), entry["appended"], entry["end"])
    last = 0
    for extent in log.extents:
        if not last <= extent.start < extent.stop <= log.end or not 0 <= extent.writer < 1 << 32:
            raise ValueError(f"impossible rows {list(extent)}")
        last = extent.stop
    most = log.appended if layout.capacity is None else min(log.appended, layout.capacity)
    if not log.held <= most or not log.end <= _MAX_ROW:
        raise ValueError(f"impossible numbers of rows: {entry}")
    return log


def list_pins(root: Path) -> dict[str, str]:
    """All pins: the id of the commit, by pin id."""
    try:
        names = os.listdir(root / COMMITS / _PINS)
    except FileNotFoundError:
        return {}
    matches = (_PIN.fullmatch(name) for name in names)
    return {match[0]: match[1] for match in matches if match}


def add_pin(root: Path, commit: Commit) -> str:
    """Pins a commit. A durable commit gets a durable pin.

    Returns:
        The id of the pin.

    Raises:
        OSError: The operating system refused.
    """
    folder = root / COMMITS / _PINS
    folder.mkdir(exist_ok=True)
    pin = f"{commit.id}.{secrets.token_hex(4)}"
    # The name is all there is to it, so the file is whole as soon as it is there.
    os.close(os.open(folder / pin, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    if commit.durable:
        sync(folder)
        sync(folder.parent)
    return pin


def remove_pin(root: Path, pin: str) -> None:
    """Removes a pin.

    Raises:
        ValueError: `pin` cannot be the id of a pin.
        CommitNotFoundError: There is no such pin.
    """
    if not isinstance(pin, str) or not _PIN.fullmatch(pin):
        raise ValueError(f"pin: expected an id that pin() returned, got {pin!r}")
    try:
        (root / COMMITS / _PINS / pin).unlink()
    except FileNotFoundError as error:
        raise CommitNotFoundError(f"pin: expected one that is in the store, got {pin}") from error
