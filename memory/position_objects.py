"""Positions in an object store: put before the record that names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xlroute.memory.layout import METADATA, plain_group_document
from xlroute.memory.s3 import S3Path
from xlroute.memory.sealed import encode
from xlroute.memory.survivors import (
    POSITIONS,
    POSITIONS_NAME,
    Survivors,
    list_positions,
    position_bytes,
    positions_name,
)


class PositionObjects:
    """The positions of a store in an object store that is being written.

    Their names say what they contain, so that whoever puts them puts the same.

    Args:
        root: Folder of the store.
        present: Streams, and rows of them whose positions are there.
    """

    def __init__(self, root: S3Path, present: Iterable[tuple[int, Survivors]] = ()) -> None:
        self._root = root
        self._folder = root / POSITIONS
        self._put = {positions_name(*each) for each in present}
        self._found: set[str] | None = None

    def write(self, stream: int, survivors: Survivors) -> None:
        """Puts the positions of rows that a commit will refer to, unless they are there.

        Raises:
            OSError: The object store refused, or cannot be reached.
        """
        name = positions_name(stream, survivors)
        if name in self._put:
            return
        if not self._put:
            (self._folder / METADATA).write_bytes(encode(plain_group_document()))
        (self._folder / name).write_bytes(position_bytes(survivors.positions))
        self._put.add(name)

    def keep(self, needed: Iterable[tuple[int, Survivors]], ends: Sequence[int]) -> None:
        """Deletes the positions of rows below the ends of the streams' logs that no commit refers to.

        Those of rows from there on may be of a writer who has taken over: he writes no others.

        Raises:
            OSError: The object store refused, or cannot be reached.
        """
        if self._found is None:
            self._found = {*list_positions(self._root)}
        names = {positions_name(*each) for each in needed}
        gone = []
        for name in (self._found | self._put) - names:
            match = POSITIONS_NAME.fullmatch(name)
            assert match is not None
            if int(match[2]) <= ends[int(match[1])]:
                gone.append(name)
        self._folder.delete(gone)
        self._found.difference_update(gone)
        self._put.difference_update(gone)
