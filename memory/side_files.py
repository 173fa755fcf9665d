"""Small files in a folder of their own in a store, whose names say what they contain.

A commit record names them. So a file that is there is whole or damaged, and never written twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from xlroute.memory.layout import COMMITS, METADATA, plain_group_document
from xlroute.memory.place import StorePath, list_names
from xlroute.memory.s3 import S3Path
from xlroute.memory.sealed import encode, replace_file, sync


def list_side_files(folder: StorePath, pattern: re.Pattern[str]) -> list[str]:
    """The names of the files in a folder that have such names; none if there is no such folder."""
    try:
        return [name for name in list_names(folder) if pattern.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


class SideFiles:
    """The files of one folder of a store that is being written.

    Args:
        root: Folder of the store.
        name: Name of theirs.
        pattern: What their names are like.
        present: The names of some that are there.
    """

    def __init__(self, root: Path, name: str, pattern: re.Pattern[str], present: Iterable[str] = ()) -> None:
        self._root = root
        self._folder = root / name
        self._pattern = pattern
        self._present = {*present}
        self._unsynced: set[Path] = set()

    def write_named(self, name: str, data: Callable[[], bytes]) -> None:
        """Writes a file that a commit will name, unless it is there.

        Raises:
            OSError: The operating system refused.
        """
        if name in self._present:
            return
        metadata = self._folder / METADATA
        if not metadata.exists():
            self._folder.mkdir(exist_ok=True)
            replace_file(metadata, encode(plain_group_document()), scratch=self._root / COMMITS)
            self._unsynced.add(metadata)
        replace_file(self._folder / name, data(), scratch=self._root / COMMITS)
        self._present.add(name)
        self.mark_named_unsynced(name)

    def mark_named_unsynced(self, name: str) -> None:
        """Notes that a file may not be on the medium."""
        self._unsynced.update((self._folder / name, self._folder, self._root))

    def mark_present_unsynced(self) -> None:
        """Notes that none of the files that are there may be on the medium."""
        for name in self._present:
            self.mark_named_unsynced(name)

    def sync(self) -> None:
        """Waits until everything written so far is on the medium.

        Raises:
            OSError: The operating system refused.
        """
        for path in sorted(self._unsynced):
            sync(path)
        self._unsynced.clear()

    def keep_named(self, names: Container[str]) -> None:
        """Deletes all files but these.

        Raises:
            OSError: The operating system refused.
        """
        for name in list_side_files(self._folder, self._pattern):
            if name not in names:
                path = self._folder / name
                self._present.discard(name)
                self._unsynced.discard(path)
                path.unlink(missing_ok=True)


class SideObjects:
    """The same in an object store. Whoever puts a name puts the same.

    Args:
        root: As for `SideFiles`.
        name: As for `SideFiles`.
        pattern: As for `SideFiles`.
        present: As for `SideFiles`.
    """

    def __init__(
        self, root: S3Path, name: str, pattern: re.Pattern[str], present: Iterable[str] = ()
    ) -> None:
        self._folder = root / name
        self._pattern = pattern
        self._put = {*present}
        self._found: set[str] | None = None

    def write_named(self, name: str, data: Callable[[], bytes]) -> None:
        """Puts a file that a commit will name, unless it is there.

        Raises:
            OSError: The object store refused, or cannot be reached.
        """
        if name in self._put:
            return
        if not self._put:
            (self._folder / METADATA).write_bytes(encode(plain_group_document()))
        (self._folder / name).write_bytes(data())
        self._put.add(name)

    def keep_named(self, names: Iterable[str], may_go: Callable[[str], bool] = lambda name: True) -> None:
        """Deletes all others that this writer has found or put, as far as they may go.

        Raises:
            OSError: The object store refused, or cannot be reached.
        """
        if self._found is None:
            self._found = {*list_side_files(self._folder, self._pattern)}
        gone = {name for name in (self._found | self._put).difference(names) if may_go(name)}
        self._folder.delete(gone)
        self._found -= gone
        self._put -= gone
