"""Rows of memory that can also be seen side by side in any order, without a copy, by mapping their pages twice."""

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
MAP_FIXED = 0x10


class RowWindows:
    """
    Zeroed rows on the host that direct I/O accepts, and windows onto the first bytes of some of them.

    Args:
        rows (`int`), row_bytes (`int`): Shape of the memory.
        window_bytes (`int`): How much of each row a window shows.

    Attributes:
        memory (`torch.Tensor`): uint8 `(rows, row_bytes)`.
    """

    def __init__(self, rows: int, row_bytes: int, window_bytes: int):
        self._row_bytes, self._window_bytes = row_bytes, window_bytes
        self._file = os.memfd_create("experts", os.MFD_CLOEXEC)
        os.ftruncate(self._file, rows * row_bytes)
        self.memory = torch.frombuffer(mmap.mmap(self._file, rows * row_bytes), dtype=torch.uint8)
        self.memory = self.memory.view(rows, row_bytes)
        # The last one, because most batches of a task are sent to the experts of the batch before.
        self._known: tuple[tuple[int, ...], torch.Tensor] | None = None

    def window(self, rows: Sequence[int]) -> torch.Tensor:
        """Shared memory of `rows`, uint8 `(len(rows), window_bytes)`, for as long as the tensor lives."""
        rows, size = tuple(rows), self._window_bytes
        if self._known is not None and self._known[0] == rows:
            return self._known[1]
        # Reserves the addresses, and gives them back, with all that is mapped there by then, when nobody needs it.
        place = mmap.mmap(-1, len(rows) * size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(place))
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_POPULATE | MAP_FIXED
        for number, row in enumerate(rows):
            address = start + number * size
            if _LIBC.mmap(address, size, protection, flags, self._file, row * self._row_bytes) != address:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "a window onto experts")
        window = torch.frombuffer(place, dtype=torch.uint8).view(len(rows), size)
        self._known = rows, window
        return window

    def __del__(self):
        os.close(self._file)
