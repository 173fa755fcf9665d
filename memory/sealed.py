"""Small JSON files that carry their own checksum and appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c

from xlroute.memory.errors import CorruptionError
from xlroute.memory.place import StorePath

TEMPORARY = "tmp-"


def checksum(document: dict[str, Any]) -> str:
    """CRC32C, as 8 hexadecimal digits, of a document in its shortest form with sorted keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return f"{google_crc32c.value(text.encode()):08x}"


def read_document(path: StorePath) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptionError: It does not hold a JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except IsADirectoryError as error:
        raise CorruptionError(f"{path}: expected a file, got a folder") from error
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path}: expected a JSON object, got damaged text ({error})") from error
    if not isinstance(document, dict):
        raise CorruptionError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def encode(document: dict[str, Any]) -> bytes:
    """The bytes of a document as they are written to a file: a line for each key."""
    # Indented throughout, a record of many streams would take longer to write than anything else of a commit.
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset` of the open file."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest = rest[written:]
        offset += written


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the medium."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def replace_file(path: Path, data: bytes, *, scratch: Path, durable: bool = False) -> None:
    """Writes a file under another name in `scratch` (on the same file system) and renames it to `path`.

    A reader sees the old file or the new one. With `durable`, the new one survives a power cut.
    """
    temporary = scratch / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            write_all(file, data, 0)
            if durable:
                os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync(path.parent)
