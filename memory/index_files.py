"""A saved index on disk: a folder with one file for each layer and stream, and a sealed one that names them.

The files come first, under names that say what they contain; then `index.json` gets its name. So a folder
holds one saved index, whole, and what else is in it is left over. Nothing is lost with an index: what is
damaged or gone is built anew from the rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from xlroute.memory.errors import CorruptionError
from xlroute.memory.log import Extent
from xlroute.memory.sealed import TEMPORARY, checksum, encode, read_document, replace_file

FORMAT = 1
_RECORD = "index.json"
_SEAL = "crc32c"
_FILE = re.compile(r"layer-\d+\.stream-\d+\.[0-9a-f]{8}\.faiss")


@dataclass(frozen=True)
class SavedRows:
    """The index of one layer and stream.

    Attributes:
        layer: Layer.
        stream: Stream.
        extents: The rows of the stream's log that it holds, oldest first.
        trained_for: How many rows there were when it was trained; 0 if it never was.
        removed: How many rows are in it, in front of those that it holds, that have left.
        data: The index as faiss writes it.
    """

    layer: int
    stream: int
    extents: tuple[Extent, ...]
    trained_for: int
    removed: int
    data: bytes

    def document(self) -> dict[str, Any]:
        """The entry of `index.json`."""
        return {
            "layer": self.layer,
            "stream": self.stream,
            "extents": [list(extent) for extent in self.extents],
            "trained_for": self.trained_for,
            "removed": self.removed,
            "bytes": len(self.data),
            "crc32c": f"{google_crc32c.value(self.data):08x}",
        }


def _file_name(entry: dict[str, Any]) -> str:
    """The file of an entry; ValueError if no writer can have written it."""
    name = f"layer-{entry['layer']:d}.stream-{entry['stream']:d}.{entry['crc32c']}.faiss"
    if not _FILE.fullmatch(name):
        raise ValueError(f"impossible file {name!r:.100}")
    return name


def write_index(folder: Path, settings: dict[str, Any], saved: Sequence[SavedRows]) -> None:
    """Writes an index in place of the one that the folder holds, all of it or nothing.

    Args:
        folder: Where; it is made if it is not there.
        settings: What the index must have been made with to be of use.
        saved: The index of each layer and stream that has one.

    Raises:
        OSError: The operating system refused to write; the index that was there is there still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = [each.document() for each in saved]
    names = [_file_name(entry) for entry in entries]
    for name, each in zip(names, saved, strict=True):
        replace_file(folder / name, each.data, scratch=folder)
    document = {"format": FORMAT, **settings, "indexes": entries}
    replace_file(folder / _RECORD, encode({**document, _SEAL: checksum(document)}), scratch=folder)
    for path in folder.iterdir():
        if path.name.startswith(TEMPORARY) or (_FILE.fullmatch(path.name) and path.name not in names):
            path.unlink(missing_ok=True)


def read_index(folder: Path, settings: dict[str, Any]) -> list[SavedRows]:
    """Reads the index that a folder holds; none if there is no `index.json`.

    Raises:
        CorruptionError: It is damaged, of another format, or made with other settings.
    """
    path = folder / _RECORD
    try:
        document = read_document(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CorruptionError(f"{path}: expected a file to read, got {error.strerror}") from error
    given = document.pop(_SEAL, None)
    if checksum(document) != given:
        raise CorruptionError(
            f"{path}: expected checksum {given}, got {checksum(document)}: the file is damaged"
        )
    entries = document.pop("indexes", None)
    expected = {"format": FORMAT, **settings}
    if document != expected:
        raise CorruptionError(f"{path}: expected an index with {expected}, got {document}")
    try:
        return [_read_rows(folder, entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"{path}: expected the record of an index, got another: {error!r}") from error


def _read_rows(folder: Path, entry: dict[str, Any]) -> SavedRows:
    path = folder / _file_name(entry)
    try:
        found = path.stat().st_size
        if found != entry["bytes"]:
            raise CorruptionError(f"{path}: expected {entry['bytes']} bytes, got {found}")
        data = path.read_bytes()
    except OSError as error:
        raise CorruptionError(f"{path}: expected a file to read, got {error.strerror}") from error
    saved = SavedRows(
        layer=entry["layer"],
        stream=entry["stream"],
        extents=tuple(Extent(*extent) for extent in entry["extents"]),
        trained_for=entry["trained_for"],
        removed=entry["removed"],
        data=data,
    )
    if saved.document() != entry:
        raise CorruptionError(
            f"{path}: expected checksum {entry['crc32c']}, got another: the file is damaged"
        )
    return saved
