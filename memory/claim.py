"""Who may write to a store in an object store, and what the last writer has decided.

Nothing can be locked or renamed there. All depends on one small object instead, commits/writer.json, which is
only ever put on condition that it still is what the writer has seen last. Whoever gets it to name him is the
writer, until somebody else is named. A commit is made by putting its record there; putting the record under
its own name only carries that out, and the next writer does so if this one could not. So no two writers can
commit the same generation, however late the requests of one of them arrive.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from xlroute.memory.errors import CorruptionError, StoreLockedError
from xlroute.memory.layout import COMMITS, read_group
from xlroute.memory.s3 import S3Path
from xlroute.memory.sealed import checksum, encode, read_document

WRITER = "writer.json"
_FORMAT = 1  # of this object
_SEAL = "crc32c"
# Somebody else may have put the object between looking at it and putting it, so often in a row.
_ATTEMPTS = 10


@dataclass(frozen=True)
class Decided:
    """What commits/writer.json says.

    Attributes:
        holder: Who is writing: `process`, `host`, `since`, and a random `token`; None if nobody is.
        record: The record of the commit that was decided last, or None if it is sure to be there.
        dropped: Ids of the commits that were dropped with it.
    """

    holder: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    dropped: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As it is written."""
        document = {
            "format": _FORMAT,
            "holder": self.holder,
            "record": self.record,
            "dropped": [*self.dropped],
        }
        return {**document, _SEAL: checksum(document)}

    @property
    def writer(self) -> str | None:
        """Who is writing, in words."""
        if self.holder is None:
            return None
        known = (self.holder.get(name) for name in ("process", "host", "since"))
        return "process {} on {}, which opened it at {}".format(*known)


def read_decided(root: S3Path) -> Decided:
    """What was decided last; nothing, if no writer has ever opened the store there.

    Raises:
        CorruptionError: The object is damaged.
        OSError: The object store cannot be read.
    """
    path = root / COMMITS / WRITER
    try:
        document = read_document(path)
    except FileNotFoundError:
        return Decided()
    given = document.pop(_SEAL, None)
    if checksum(document) != given:
        raise CorruptionError(
            f"{path}: expected checksum {given}, got {checksum(document)}: the object is damaged; "
            f"python -m xlroute.memory unlock {root} puts another"
        )
    try:
        return Decided(document["holder"], document["record"], tuple(document["dropped"]))
    except (KeyError, TypeError) as error:
        raise CorruptionError(
            f"{path}: expected what a writer has put there, got {document!r:.100}"
        ) from error


class Claim:
    """A writer's hold on the store; taken when it is made.

    Attributes:
        found: What the writer before has decided.

    Raises:
        StoreLockedError: Somebody else is writing, or has been killed while he was.
        CorruptionError: commits/writer.json is damaged.
        OSError: The object store refused, or cannot be reached.
    """

    def __init__(self, root: S3Path) -> None:
        self._root = root
        self._path = root / COMMITS / WRITER
        self._holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": secrets.token_hex(16),
        }
        for _ in range(_ATTEMPTS):
            # First, so that what is read afterwards is that, or newer, and then not put in place of.
            self._e_tag = self._path.e_tag()
            self.found = read_decided(root)
            if self.found.holder is not None and not self._holds(self.found):
                raise StoreLockedError(
                    f"{root}: expected no other writer, got {self.found.writer}; it can be opened with "
                    f"mode='r'; if that process has ended: python -m xlroute.memory unlock {root}"
                )
            if self._put(replace(self.found, holder=self._holder)):
                return
        raise StoreLockedError(f"{root}: expected no other writer, got several that open it at once")

    def check(self) -> None:
        """Raises StoreLockedError if somebody else has taken the store over."""
        found = read_decided(self._root)
        if not self._holds(found):
            raise StoreLockedError(
                f"{self._root}: expected to be its writer, got {found.writer or 'none'}: the store was taken "
                "over; what was not committed is lost"
            )

    def decide(self, record: dict[str, Any], dropped: tuple[str, ...]) -> None:
        """Makes `record` the last commit, without the commits `dropped`.

        Raises:
            StoreLockedError: Somebody else has taken the store over; nothing is decided.
            OSError: The object store refused, or cannot be reached.
        """
        self._replace(Decided(self._holder, record, dropped))

    def release(self, record: dict[str, Any] | None = None, dropped: tuple[str, ...] = ()) -> None:
        """Lets the next writer in, who carries out what was decided, if that is left to do.

        Raises:
            StoreLockedError: Somebody else has taken the store over.
            OSError: The object store refused, or cannot be reached.
        """
        self._replace(Decided(None, record, dropped))

    def _holds(self, decided: Decided) -> bool:
        return decided.holder is not None and decided.holder.get("token") == self._holder["token"]

    def _put(self, decided: Decided) -> bool:
        e_tag = self._path.swap(encode(decided.document()), self._e_tag)
        if e_tag is None:
            return False
        self._e_tag = e_tag
        return True

    def _replace(self, decided: Decided) -> None:
        for _ in range(_ATTEMPTS):
            if self._put(decided):
                return
            # Somebody has taken over; or a call that got no answer was carried out all the same.
            e_tag = self._path.e_tag()
            self.check()
            self._e_tag = e_tag
        raise OSError(f"{self._path}: expected to put it, got another object each time")


def unlock(root: S3Path) -> str | None:
    """Takes the store from its writer, who can commit no more; see `MemoryStore.unlock`."""
    read_group(root)
    path = root / COMMITS / WRITER
    for _ in range(_ATTEMPTS):
        e_tag = path.e_tag()
        try:
            found = read_decided(root)
        except CorruptionError:
            found, writer = Decided(), "a writer whose name is damaged"
        else:
            if found.holder is None:
                return None
            writer = str(found.writer)
        # What was decided stays: the next writer carries it out.
        if path.swap(encode(replace(found, holder=None).document()), e_tag) is not None:
            return writer
    raise OSError(f"{path}: expected to put it, got another object each time")
