"""What a machine lacks for a model on disk, a sentence for each thing, with what to do about it."""

import ctypes.util
import errno
import importlib.util
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..modeling.block_io import BLOCK, PreadEngine, aligned_buffer, as_memory
from ..modeling.deep_nvme import is_built
from .whole_files import nearest_existing


def folder_problems(folder: Path, gigabytes: float = 0.0) -> Iterator[str]:
    """What is wrong with the disk of `folder`, which need not exist yet, or its free space."""
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"{existing} is no folder that can be written to."
        return
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        yield f"{existing} has {free:.1f} GB free, and {gigabytes:.1f} are asked for."
    engine = PreadEngine(threads=1)
    with tempfile.NamedTemporaryFile(dir=existing) as file:
        try:
            descriptor = engine.open(Path(file.name), BLOCK)
            engine.write(descriptor, 0, [as_memory(aligned_buffer(1, BLOCK)[0])]).result()
        except OSError as error:
            hint = "set direct_io=False, or choose another disk" if error.errno == errno.EINVAL else error.strerror
            yield f"{existing} takes no direct I/O (O_DIRECT): {hint}."
        finally:
            engine.close()
    with open("/proc/mounts", encoding="utf-8") as file:
        mounts = [line.split()[1:3] for line in file]
    _, kind = max((len(point), kind) for point, kind in mounts if existing.is_relative_to(point))
    if kind in ("tmpfs", "ramfs"):
        yield f"{existing} is in memory, so that nothing is gained: choose a folder on a disk."


def extension_problems() -> Iterator[str]:
    """What DeepSpeed's I/O extension needs and this machine lacks: to be loaded, and unless it is there, compiled."""
    if importlib.util.find_spec("deepspeed") is None:
        yield "DeepSpeed is not installed: pip install mixturekit[offload]."
    if shutil.which("ninja") is None:
        # An environment that is not activated may have it all the same.
        yield "ninja is not in PATH: activate the environment, pip install ninja, or apt-get install ninja-build."
    if is_built():
        return
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        yield "a C++ compiler is missing: apt-get install g++."
    headers = [Path(folder, "libaio.h") for folder in ("/usr/include", "/usr/local/include")]
    if not any(path.exists() for path in headers):
        yield "the headers of libaio are missing: apt-get install libaio-dev."
    elif ctypes.util.find_library("aio") is None:
        yield "libaio itself is missing: apt-get install libaio-dev."
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    # Root may lock what it likes.
    if limit != resource.RLIM_INFINITY and limit < 2**30 and os.geteuid() != 0:
        yield f"only {limit / 2**20:.0f} MiB of RAM may be locked, and its buffers are: raise `ulimit -l`."
