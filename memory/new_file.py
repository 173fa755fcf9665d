"""Files written for the user: whole or not there, and never in place of another."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A file under another name beside `target`; it gets its name when all went well.

    Raises:
        FileExistsError: There is something at `target`.
        OSError: The operating system refused to write.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target}: expected nothing, got something that exists")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.writing")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
