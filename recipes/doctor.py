"""Says what this machine lacks for experts on disk, a sentence for each; --build compiles DeepSpeed's I/O extension.

python recipes/doctor.py --nvme_path /nvme/experts --gigabytes 100
python recipes/doctor.py --nvme_path /nvme/experts --build
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Examines the machine; fails if the store itself could not run, not for want of what is optional."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvme_path", required=True, help="folder for the experts")
    parser.add_argument("--gigabytes", type=float, default=0.0, help="space that they need")
    parser.add_argument("--build", action="store_true", help="compile DeepSpeed's I/O extension, which takes minutes")
    arguments = parser.parse_args()
    from mixturekit.modeling.deep_nvme import is_built, load_extension
    from mixturekit.trainers.disk_checks import extension_problems, folder_problems

    problems = list(folder_problems(Path(arguments.nvme_path), arguments.gigabytes))
    for problem in problems:
        print(f"Needed: {problem}")
    missing = list(extension_problems())
    if arguments.build and not missing:
        print("Compiling DeepSpeed's I/O extension ...", flush=True)
        try:
            load_extension()
        except (ImportError, RuntimeError) as error:
            missing.append(f"It does not compile: {error}")
    for problem in missing:
        print(f"For engine='deepspeed': {problem}")
    if not problems:
        engine = "pread works" if missing or not is_built() else "pread and deepspeed work"
        print(f"Experts can be kept in {arguments.nvme_path}; engine: {engine}.")
    if problems or (arguments.build and missing):
        sys.exit(1)


if __name__ == "__main__":
    main()
