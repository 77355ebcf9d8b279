"""Reads and writes of aligned blocks that pass the page cache by, with an error for each operation that fails.

Sizes, offsets and addresses are bytes; with direct I/O all three are multiples of [`BLOCK`].
"""

import errno
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch

BLOCK = 4096
# What waits for a demand waits for the model itself, so nothing else may stand in its way.
DEMAND, PREFETCH, WRITE_BACK = range(3)


def round_up(size: int, multiple: int = BLOCK) -> int:
    """`size`, or the next multiple above it."""
    return -(-size // multiple) * multiple


def aligned_buffer(rows: int, row_bytes: int, pinned: bool = False) -> torch.Tensor:
    """
    Zeroed memory that direct I/O accepts.

    Args:
        rows (`int`), row_bytes (`int`): Its shape; `row_bytes` is a multiple of [`BLOCK`].
        pinned (`bool`, *optional*, defaults to `False`): Lock the pages, which copies to an accelerator need to
            run beside the program.

    Returns:
        `torch.Tensor`: uint8 `(rows, row_bytes)`, each row aligned to [`BLOCK`].
    """
    if pinned or rows == 0:
        return torch.zeros(rows, row_bytes, dtype=torch.uint8, pin_memory=pinned and rows > 0)
    return torch.frombuffer(mmap.mmap(-1, rows * row_bytes), dtype=torch.uint8).view(rows, row_bytes)


def as_memory(row: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the host, shared with it."""
    return memoryview(row.numpy())


class BlockEngine(Protocol):
    """What a store needs of its disk: every operation completes on its own, and fails with its own error."""

    def open(self, path: Path, size: int) -> int:
        """Opens a file of `size` bytes, with all its space allocated; returns its descriptor."""

    def read(self, descriptor: int, offset: int, buffers: Sequence[memoryview], priority: int = DEMAND) -> Future:
        """Fills `buffers` one after the other from `offset` on."""

    def write(self, descriptor: int, offset: int, buffers: Sequence[memoryview], priority: int = WRITE_BACK) -> Future:
        """Writes `buffers` one after the other from `offset` on."""

    def sync(self, descriptor: int) -> None:
        """Returns once everything written to the file would survive a loss of power."""

    def close(self) -> None:
        """Finishes what was asked for, and closes the files."""


class PreadEngine:
    """
    `preadv` and `pwritev` on a few threads, which reach the rate of the disk for blocks of a MiB and more.

    Args:
        threads (`int`, *optional*, defaults to 2): Operations in flight; more only add latency on one disk.
        direct (`bool`, *optional*, defaults to `True`): Pass the page cache by (`O_DIRECT`). Without it the system
            keeps what was read in memory that the tiers above do not account for.

    Raises:
        OSError: From [`~PreadEngine.open`] if there is no space or the file system has no direct I/O; from the
            `Future` of an operation that failed.
    """

    def __init__(self, threads: int = 2, direct: bool = True):
        self.direct = direct
        self._paths: dict[int, Path] = {}
        self._order = itertools.count()
        self._queue: queue.PriorityQueue = queue.PriorityQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def open(self, path: Path, size: int) -> int:
        """Opens a file of `size` bytes, with all its space allocated; returns its descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
        try:
            descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            message = f"The file system of {path.parent} has no direct I/O (O_DIRECT): choose another folder, or"
            raise OSError(errno.EINVAL, f"{message} set direct_io=False to go through the page cache.") from error
        try:
            _allocate(descriptor, path, size)
        except BaseException:
            os.close(descriptor)
            raise
        self._paths[descriptor] = path
        return descriptor

    def read(self, descriptor: int, offset: int, buffers: Sequence[memoryview], priority: int = DEMAND) -> Future:
        """Fills `buffers` one after the other from `offset` on."""
        return self._submit(os.preadv, descriptor, offset, buffers, priority)

    def write(self, descriptor: int, offset: int, buffers: Sequence[memoryview], priority: int = WRITE_BACK) -> Future:
        """Writes `buffers` one after the other from `offset` on."""
        return self._submit(os.pwritev, descriptor, offset, buffers, priority)

    def sync(self, descriptor: int) -> None:
        """Returns once everything written to the file would survive a loss of power."""
        os.fdatasync(descriptor)

    def close(self) -> None:
        """Finishes what was asked for, and closes the files."""
        for _ in self._threads:
            self._queue.put((WRITE_BACK + 1, next(self._order), None))
        for thread in self._threads:
            thread.join()
        self._threads = []
        for descriptor in self._paths:
            os.close(descriptor)
        self._paths.clear()

    def _submit(self, operation, descriptor, offset, buffers, priority) -> Future:
        future = Future()
        if not self._threads:
            raise ValueError("The engine is closed.")
        self._queue.put((priority, next(self._order), (future, operation, descriptor, offset, list(buffers))))
        return future

    def _work(self) -> None:
        self._run(self._transfer)

    def _run(self, transfer: Callable[..., None]) -> None:
        while (job := self._queue.get()[2]) is not None:
            future, operation, descriptor, offset, buffers = job
            try:
                transfer(operation, descriptor, offset, buffers)
            # Whatever it is belongs to the one who waits for this operation.
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            # Until the next job they would keep an error, and what its traceback keeps.
            del job, future

    def _transfer(self, operation, descriptor: int, offset: int, buffers: list[memoryview]) -> None:
        while buffers:
            moved = operation(descriptor, buffers, offset)
            if moved <= 0:
                raise OSError(errno.EIO, f"{self._paths[descriptor]} ends at byte {offset}, within a record.")
            offset += moved
            # The system may move a part only: a signal, or more than 2 GiB at once.
            while buffers and moved >= len(buffers[0]):
                moved -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][moved:]


def _allocate(descriptor: int, path: Path, size: int) -> None:
    # Asked for first, because allocating in vain would fill the disk for everyone for a while.
    missing = size - os.fstat(descriptor).st_blocks * 512
    disk = os.statvfs(path.parent)
    free = disk.f_bavail * disk.f_frsize
    if missing > free:
        needed = f"{path} needs {missing / 2**20:.1f} MiB more, but its disk has {free / 2**20:.1f} MiB left."
        raise OSError(errno.ENOSPC, needed)
    os.posix_fallocate(descriptor, 0, size)
