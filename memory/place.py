"""Where a store is: in a folder, or in an object store."""

from __future__ import annotations

import os
import re
from pathlib import Path

from xlroute.memory.s3 import S3Path

StorePath = Path | S3Path


def store_path(path: str | os.PathLike[str] | S3Path) -> StorePath:
    """The place that a user names: a folder, made absolute, or a url.

    Raises:
        TypeError: `path` is neither a string nor a path.
        ValueError: It is a url of another kind, or of nothing.
        ImportError: It is in an object store, and obstore is not installed.
    """
    if isinstance(path, S3Path):
        return path
    if isinstance(path, str) and (scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path)):
        if scheme[0] != "s3://":
            raise ValueError(f"path: expected a folder or a url that begins with s3://, got {path!r}")
        return S3Path.from_url(path)
    return Path(path).absolute()


def list_names(folder: StorePath) -> list[str]:
    """Names of what is in a folder.

    Raises:
        FileNotFoundError: There is no such folder.
        NotADirectoryError: There is a file of its name.
    """
    if isinstance(folder, Path):
        return os.listdir(folder)
    names = folder.names()
    if not names:
        raise FileNotFoundError(f"{folder}: expected a folder, got nothing")
    return names
