"""Says what this machine lacks for experts on disk, a sentence for each; --build compiles DeepSpeed's I/O extension.

python recipes/doctor.py --nvme_path /nvme/experts --gigabytes 100
python recipes/doctor.py --nvme_path /nvme/experts --build
"""

import argparse
import ctypes.util
import errno
import importlib.util
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def main() -> None:
    """Examines the machine; fails if the store itself could not run, not for want of what is optional."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvme_path", required=True, help="folder for the experts")
    parser.add_argument("--gigabytes", type=float, default=0.0, help="space that they need")
    parser.add_argument("--build", action="store_true", help="compile DeepSpeed's I/O extension, which takes minutes")
    arguments = parser.parse_args()
    problems = list(folder_problems(Path(arguments.nvme_path), arguments.gigabytes))
    for problem in problems:
        print(f"Needed: {problem}")
    missing = list(extension_problems())
    if arguments.build and not missing:
        from mixturekit.modeling.deep_nvme import load_extension

        print("Compiling DeepSpeed's I/O extension ...", flush=True)
        try:
            load_extension()
        except (ImportError, RuntimeError) as error:
            missing.append(f"It does not compile: {error}")
    for problem in missing:
        print(f"For engine='deepspeed': {problem}")
    if not problems:
        engine = "pread works" if missing or not is_ready() else "pread and deepspeed work"
        print(f"Experts can be kept in {arguments.nvme_path}; engine: {engine}.")
    if problems or (arguments.build and missing):
        sys.exit(1)


def folder_problems(folder: Path, gigabytes: float) -> Iterator[str]:
    """What is wrong with the disk."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"{existing} is no folder that can be written to."
        return
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        yield f"{existing} has {free:.1f} GB free, and {gigabytes:.1f} are asked for."
    from mixturekit.modeling.block_io import BLOCK, PreadEngine, aligned_buffer, as_memory

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
    """What DeepSpeed's I/O extension needs and this machine lacks; nothing if it is built already."""
    if is_ready():
        return
    if importlib.util.find_spec("deepspeed") is None:
        yield "DeepSpeed is not installed: pip install mixturekit[offload]."
    if shutil.which("ninja") is None:
        yield "ninja is missing: pip install ninja, or apt-get install ninja-build."
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


def is_ready() -> bool:
    """Whether the extension is there to be loaded."""
    from mixturekit.modeling.deep_nvme import is_built

    return is_built()


if __name__ == "__main__":
    main()
