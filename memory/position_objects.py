"""Positions in an object store: put before the record that names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xlroute.memory.s3 import S3Path
from xlroute.memory.side_files import SideObjects
from xlroute.memory.survivors import POSITIONS, POSITIONS_NAME, Survivors, position_bytes, positions_name


class PositionObjects(SideObjects):
    """The positions of a store in an object store that is being written.

    Args:
        root: Folder of the store.
        present: Streams, and rows of them whose positions are there.
    """

    def __init__(self, root: S3Path, present: Iterable[tuple[int, Survivors]] = ()) -> None:
        super().__init__(root, POSITIONS, POSITIONS_NAME, (positions_name(*each) for each in present))

    def write(self, stream: int, survivors: Survivors) -> None:
        """Puts the positions of rows that a commit will refer to, unless they are there.

        Raises:
            OSError: The object store refused, or cannot be reached.
        """
        self.write_named(positions_name(stream, survivors), lambda: position_bytes(survivors.positions))

    def keep(self, needed: Iterable[tuple[int, Survivors]], ends: Sequence[int]) -> None:
        """Deletes the positions of rows below the ends of the streams' logs that no commit refers to.

        Those of rows from there on may be of a writer who has taken over: he writes no others.

        Raises:
            OSError: The object store refused, or cannot be reached.
        """

        def may_go(name: str) -> bool:
            match = POSITIONS_NAME.fullmatch(name)
            assert match is not None
            return int(match[2]) <= ends[int(match[1])]

        self.keep_named({positions_name(*each) for each in needed}, may_go)
