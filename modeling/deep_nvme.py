"""DeepNVMe, the engine of ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857), behind the interface of a store.

It reports success for writes that did not happen, and ends the process for reads beyond a file. What could go wrong is
therefore checked before each operation, space is allocated when a file is opened, and what a disk does wrong all the
same shows in the checksum of a record when it is read.
"""

import errno
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from .block_io import BLOCK, PreadEngine


def is_built() -> bool:
    """Whether DeepSpeed is installed and has its I/O extension, so that using it compiles nothing."""
    # It loads a compiler's settings, which takes a second that most programs need not spend.
    from torch.utils.cpp_extension import get_default_build_root

    installed = importlib.util.find_spec("deepspeed")
    if installed is None:
        return False
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    places = ((root, "**/async_io/async_io.so"), (Path(installed.origin).parent, "ops/aio/async_io_op*.so"))
    return any(any(Path(folder).glob(pattern)) for folder, pattern in places)


def load_extension() -> ModuleType:
    """
    The extension; it is compiled if that has not been done yet, which takes minutes.

    Raises:
        ImportError: If DeepSpeed is not installed.
        RuntimeError: If it cannot be compiled here.
    """
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder
    except ImportError as error:
        raise ImportError("The deepspeed engine needs DeepSpeed: pip install mixturekit[offload].") from error
    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        raise RuntimeError("DeepSpeed's I/O extension needs the headers of libaio: apt-get install libaio-dev.")
    return builder.load(verbose=False)


class DeepNvmeEngine(PreadEngine):
    """
    One handle of DeepNVMe per thread, since waiting for a handle waits for all that it does.

    Args:
        threads (`int`, *optional*, defaults to 2): Operations in flight.
        block_size (`int`, *optional*, defaults to 1 MiB): Bytes of each request to the disk.
        queue_depth (`int`, *optional*, defaults to 8): Requests of one operation in flight.

    Raises:
        ImportError, RuntimeError: As [`load_extension`], or what making a handle raises.
    """

    def __init__(self, threads: int = 2, block_size: int = 2**20, queue_depth: int = 8):
        extension, options = load_extension(), (block_size, queue_depth, False, True, 1)
        # Not in the threads, of which nobody would hear that it failed, while all wait for their operations.
        self._handles = [extension.aio_handle(*options) for _ in range(threads)]
        super().__init__(threads, direct=True)

    def _work(self) -> None:
        handle = self._handles.pop()
        self._run(lambda *job: self._transfer_by(handle, *job))

    def _transfer_by(self, handle, operation, descriptor: int, offset: int, buffers: list[memoryview]) -> None:
        path = self._paths[descriptor]
        for buffer in buffers:
            tensor = torch.frombuffer(buffer, dtype=torch.uint8)
            if offset % BLOCK or len(buffer) % BLOCK or tensor.data_ptr() % BLOCK:
                raise OSError(errno.EINVAL, f"Invalid argument: {path} takes whole blocks of {BLOCK} bytes.")
            if offset + len(buffer) > os.fstat(descriptor).st_size:
                raise OSError(errno.EIO, f"{path} ends at byte {os.fstat(descriptor).st_size}, within a record.")
            move = handle.sync_pread if operation is os.preadv else handle.sync_pwrite
            if move(tensor, str(path), offset) != 1:
                raise OSError(errno.EIO, f"DeepNVMe could not move {len(buffer)} bytes at {offset} of {path}.")
            offset += len(buffer)
