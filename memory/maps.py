"""Files as memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


class FileMap:
    """The first bytes of an open file as memory, for reading, for as long as anyone refers to `data`.

    Python's `mmap` would hold a descriptor of the file, of which a process has 1,024 by default.

    Args:
        file: Descriptor of the file; it can be closed afterwards.
        size: Bytes, at least 1 and at most as many as the file has.

    Attributes:
        data: The bytes, [size].

    Raises:
        OSError: The operating system refused.
    """

    def __init__(self, file: int, size: int) -> None:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        memory = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(memory, _libc.munmap, address, size)
        self._address: int = address
        self.data: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
        self.data.flags.writeable = False

    def advise(self, advice: int, start: int = 0, stop: int | None = None) -> None:
        """Tells the operating system how bytes `start` to `stop` will be used: one of `mmap.MADV_*`."""
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        stop = self.data.size if stop is None else stop
        _libc.madvise(self._address + start, stop - start, advice)
