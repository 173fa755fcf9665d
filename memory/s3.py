"""Objects in a bucket under names like those of files: `s3://bucket/folder/name`."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from obstore.store import RetryConfig, S3Store

_URL = re.compile(r"s3://([^/]+)/?(.*?)/?")
# Requests at once. Each waits for the network nearly all of the time.
_AT_ONCE = 16
_NEAR_BYTES = 2**20  # between parts of an object that are fetched in one request
# Of an object that is put in parts.
_PART_BYTES = 8 * 2**20
_PARTS_AT_ONCE = 4
_RETRIES: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}

T = TypeVar("T")
R = TypeVar("R")

_process: int | None = None  # which first asked for an object


def _open_bucket(name: str) -> S3Store:
    """The bucket, with credentials and endpoint from the environment as they are now."""
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise ImportError(
            f's3://{name}: expected the package obstore, got none: pip install "xlroute[s3]"'
        ) from error
    return S3Store(name, retry_config=_RETRIES)


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Turns what the object store refuses into OSError: FileNotFoundError only where there is no object."""
    global _process
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    if _process is None:
        _process = os.getpid()
    if _process != os.getpid():
        # The threads that obstore waits for are not in a fork.
        raise OSError(
            f"{url}: expected process {_process}, which has used an object store before, got its fork "
            f"{os.getpid()}; processes that are started with 'spawn' can use it"
        )
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise OSError(f"{url}: expected a bucket of this name, got none") from error
        raise FileNotFoundError(f"{url}: expected an object, got none") from error
    except BaseError as error:
        refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
        kind = PermissionError if refused else OSError
        raise kind(f"{url}: {str(error).splitlines()[0]}") from error


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Calls a function that waits for an object store with each of the items, several at once.

    When it returns, or raises the first error, no call is under way.
    """
    items = [*items]
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(items))) as pool:
        return [*pool.map(function, items)]


class S3Path:
    """An object in a bucket, or a folder of objects: as much of `pathlib.Path` as a store needs, and `swap`.

    A folder is there if an object is in it. `str` gives the url. Credentials and endpoint come from the
    environment, as obstore reads it.

    Methods raise OSError where the object store refuses or cannot be reached.

    Attributes:
        bucket: The bucket's name.
        key: The object's, or the folder's; empty for the bucket itself.
    """

    def __init__(self, bucket: str, key: str, store: S3Store) -> None:
        self.bucket = bucket
        self.key = key
        self._store = store

    @classmethod
    def from_url(cls, url: str) -> S3Path:
        """The path that a url names.

        Raises:
            ValueError: It names none.
            ImportError: obstore is not installed.
        """
        match = _URL.fullmatch(url)
        if match is None or any(part in ("", ".", "..") for part in match[2].split("/") if match[2]):
            raise ValueError(f"path: expected a url like s3://bucket/folder, got {url!r}")
        return cls(match[1], match[2], _open_bucket(match[1]))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Path({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Path) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> S3Path:
        return S3Path(self.bucket, f"{self.key}/{name}" if self.key else name, self._store)

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def stem(self) -> str:
        """The name without what follows its last dot."""
        return self.name.rpartition(".")[0] or self.name

    # What there is

    def exists(self) -> bool:
        """Whether there is such an object, or anything in a folder of this name."""
        try:
            self.stat()
        except FileNotFoundError:
            return self.is_dir()
        return True

    def is_dir(self) -> bool:
        """Whether there is anything in a folder of this name."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Names of the objects and folders in the folder; none if there is no such folder."""
        import obstore

        with _asking(str(self)):
            found = obstore.list_with_delimiter(self._store, self.key)
        keys = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        return [key.rstrip("/").rpartition("/")[2] for key in keys]

    def sizes(self) -> dict[str, int]:
        """The sizes of all objects in the folder and in those below it, by key from here on."""
        import obstore

        with _asking(str(self)):
            listed = [each for part in obstore.list(self._store, prefix=self.key) for each in part]
        return {each["path"][len(self.key) :].lstrip("/"): each["size"] for each in listed}

    def stat(self) -> os.stat_result:
        """Size and time of the object, as of a file that can be read.

        Raises:
            FileNotFoundError: There is no such object.
        """
        import obstore

        with _asking(str(self)):
            found = obstore.head(self._store, self.key)
        time = found["last_modified"].timestamp()
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, found["size"], time, time, time))

    def e_tag(self) -> str | None:
        """What stands for the object's content; None if there is no such object."""
        import obstore

        try:
            with _asking(str(self)):
                return obstore.head(self._store, self.key)["e_tag"]
        except FileNotFoundError:
            return None

    # Reading

    def read_bytes(self) -> bytes:
        """The object.

        Raises:
            FileNotFoundError: There is no such object.
        """
        return self.read()[0]

    def read(self) -> tuple[bytes, str | None]:
        """The object, and what stands for its content.

        Raises:
            FileNotFoundError: There is no such object.
        """
        import obstore

        with _asking(str(self)):
            found = obstore.get(self._store, self.key)
            return bytes(found.bytes()), found.meta["e_tag"]

    def read_ranges(self, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Parts of the object; less of one where the object ends before it does.

        Those that are near each other are fetched in one request, with what is between them.

        Raises:
            FileNotFoundError: There is no such object.
        """
        import obstore

        def fetch(span: list[int]) -> bytes:
            with _asking(str(self)):
                return bytes(obstore.get_range(self._store, self.key, start=span[0], end=span[1]))

        # obstore.get_ranges would do it, but for an object that is too short: it panics.
        spans: list[list[int]] = []
        places = [(0, 0)] * len(starts)  # of each part: its span, and where it begins there
        for index in sorted(range(len(starts)), key=starts.__getitem__):
            start, stop = starts[index], starts[index] + lengths[index]
            if not spans or start - spans[-1][1] > _NEAR_BYTES:
                spans.append([start, stop])
            spans[-1][1] = max(spans[-1][1], stop)
            places[index] = len(spans) - 1, start - spans[-1][0]
        found = in_parallel(fetch, spans)
        return [
            found[span][first : first + length] for (span, first), length in zip(places, lengths, strict=True)
        ]

    # Writing

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Puts the object, whatever is there."""
        import obstore

        with _asking(str(self)):
            obstore.put(self._store, self.key, data, use_multipart=False)

    @contextmanager
    def writing(self) -> Iterator[Callable[[bytes], None]]:
        """Puts the object a part at a time, for one that is larger than the memory it should take.

        Gives a function that takes the bytes that come next. The object is there, whole, when all went well,
        and else not at all; a process that is killed leaves parts which no listing names.
        """
        import obstore

        with (
            _asking(str(self)),
            obstore.open_writer(
                self._store, self.key, buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
            ) as file,
        ):

            def write(data: bytes) -> None:
                with _asking(str(self)):
                    file.write(data)

            yield write

    def swap(self, data: bytes | memoryview, e_tag: str | None) -> str | None:
        """Puts the object if what is there has this `e_tag`; for None, if nothing is there.

        Returns:
            The new object's; None if something else is there, which may be what a call that got no answer
            has put.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with _asking(str(self)):
            try:
                put = obstore.put(
                    self._store,
                    self.key,
                    data,
                    use_multipart=False,
                    mode="create" if e_tag is None else {"e_tag": e_tag},
                )
            except (AlreadyExistsError, PreconditionError):
                return None
        return put["e_tag"]

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object.

        Raises:
            FileNotFoundError: There is no such object.
        """
        if not missing_ok:
            self.stat()
        self.delete([""])

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects in the folder, given by key from here on; the empty key is the object itself."""
        import obstore

        paths = [(self / key).key if key else self.key for key in keys]
        if paths:
            with _asking(str(self)):
                obstore.delete(self._store, paths)
