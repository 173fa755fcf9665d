"""The memory store: everything that a model has read, by layer and stream."""

from xlroute.memory.compact import CompactReport
from xlroute.memory.damage import Damage
from xlroute.memory.disk import DiskUsage
from xlroute.memory.errors import (
    CommitNotFoundError,
    CorruptionError,
    FingerprintError,
    FormatError,
    MemoryStoreError,
    NoPathError,
    ReadOnlyError,
    StoreClosedError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
    StoreWriteError,
)
from xlroute.memory.index import IndexKind, MemoryIndex
from xlroute.memory.info import CommitInfo, MemoryInfo
from xlroute.memory.layer import MemoryLayer
from xlroute.memory.layout import Eviction
from xlroute.memory.repair import RepairReport, StreamLoss
from xlroute.memory.routes import RouteCounts
from xlroute.memory.s3 import S3Path
from xlroute.memory.store import MemoryStore
from xlroute.memory.verify import VerifyReport

__all__ = [
    "CommitInfo",
    "CommitNotFoundError",
    "CompactReport",
    "CorruptionError",
    "Damage",
    "DiskUsage",
    "Eviction",
    "FingerprintError",
    "FormatError",
    "IndexKind",
    "MemoryIndex",
    "MemoryInfo",
    "MemoryLayer",
    "MemoryStore",
    "MemoryStoreError",
    "NoPathError",
    "ReadOnlyError",
    "RepairReport",
    "RouteCounts",
    "S3Path",
    "StoreClosedError",
    "StoreExistsError",
    "StoreLockedError",
    "StoreNotFoundError",
    "StoreWriteError",
    "StreamLoss",
    "VerifyReport",
]
