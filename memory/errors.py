"""What can go wrong with a memory store, grouped by what one would do about it.

Wrong arguments raise ValueError, TypeError or IndexError. Everything that concerns the storage itself is a
MemoryStoreError; where a built-in exception says the same, the class inherits it as well.
"""


class MemoryStoreError(Exception):
    """Base class of every error of the storage itself."""


class StoreNotFoundError(MemoryStoreError, FileNotFoundError):
    """There is nothing at the path: check the path, or create a store there."""


class StoreExistsError(MemoryStoreError, FileExistsError):
    """There is something at the path already: open it, or choose another path."""


class StoreLockedError(MemoryStoreError):
    """Another writer holds the store: wait for it, or open the store read-only."""


class StoreClosedError(MemoryStoreError, ValueError):
    """The store was closed: open it again."""


class ReadOnlyError(MemoryStoreError):
    """The store was opened with mode="r": open it with mode="r+", or fork it."""


class NoPathError(MemoryStoreError, ValueError):
    """The store lives in memory alone: copy it to a path first."""


class CommitNotFoundError(MemoryStoreError, LookupError):
    """The commit, or the pin, is not in the store, or not any more: choose one of those that are."""


class FingerprintError(MemoryStoreError, ValueError):
    """The rows were written by other weights: load those, or open the store without a fingerprint."""


class FormatError(MemoryStoreError, ValueError):
    """The path holds something else, or a store of a newer format: use the program that wrote it."""


class CorruptionError(MemoryStoreError):
    """A file of the store is damaged or missing: restore it, repair the store, or open an earlier commit."""


class StoreWriteError(MemoryStoreError, OSError):
    """The operating system refused a write: make room and try again; the last commit stands."""
