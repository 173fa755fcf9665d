"""Files made for the user: new, and whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def check_absent(target: Path) -> None:
    """Raises FileExistsError if there is anything at `target`."""
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target}: expected nothing, got something that exists")


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A file under another name beside `target`; it gets its name when all went well.

    Raises:
        FileExistsError: There is something at `target`.
        OSError: The operating system refused to write.
    """
    check_absent(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.writing")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
