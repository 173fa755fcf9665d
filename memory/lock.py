"""Locks on a store: one writer at a time, and nobody pins a commit while the writer drops old ones.

The kernel releases both when their process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from xlroute.memory.errors import StoreLockedError
from xlroute.memory.layout import COMMITS
from xlroute.memory.sealed import replace_file

_HOLDER = "writer.txt"
_PIN_SECONDS = 30.0
_PIN_POLL_SECONDS = 0.02


class WriterLock:
    """The lock of the writer of the store in the folder `root`; held until `release`.

    Raises:
        StoreLockedError: Another writer holds it; the message says which.
        OSError: The operating system refused to write.
    """

    def __init__(self, root: Path) -> None:
        self._process = os.getpid()
        self._holder = root / COMMITS / _HOLDER
        self._lock = FileLock(root / COMMITS / "writer.lock", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            holder = read_holder(root) or "one that has not written its name yet"
            raise StoreLockedError(
                f"{root}: expected no other writer, got {holder}; it can be opened with mode='r'"
            ) from error
        try:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            text = f"process {os.getpid()} on {socket.gethostname()}, which opened it at {since}\n"
            replace_file(self._holder, text.encode(), scratch=root / COMMITS)
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """Lets the next writer in; nothing in a fork of the process that took the lock."""
        if os.getpid() != self._process:
            return
        with suppress(OSError):
            self._holder.unlink()
        self._lock.release()


def read_holder(root: Path) -> str | None:
    """Who took the writer's lock last and has not released it: at work, or killed; None if nobody has."""
    try:
        return (root / COMMITS / _HOLDER).read_text(errors="replace").strip()
    except OSError:
        return None


@contextmanager
def pin_lock(root: Path) -> Iterator[None]:
    """Holds a lock, for a moment, while a commit is pinned or old ones are dropped.

    Every commit takes it, so it is no FileLock: that takes longer than the rest of a commit.

    Raises:
        Timeout: Somebody else has held it all the time.
        OSError: The operating system refused.
    """
    path = root / COMMITS / "pins.lock"
    deadline = time.monotonic() + _PIN_SECONDS
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise Timeout(str(path)) from error
                time.sleep(_PIN_POLL_SECONDS)
        try:
            yield
        finally:
            # Closing alone would leave it to a fork that was made meanwhile.
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)
