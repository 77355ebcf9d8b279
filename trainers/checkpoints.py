"""Checkpoints of a training run that are whole or not there, and are known to be whole before they are loaded."""

import json
import mmap
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from .whole_files import write_whole_text

MANIFEST = "checkpoint_manifest.json"
# Of a run's folder: where a checkpoint is written before it gets its name. What begins so is not pushed to the Hub.
UNFINISHED = "_unfinished"
# What a checkpoint holds of an expert store, whose records have checksums of their own.
EXPERTS = "experts"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def parameters_digest(shapes: Iterable) -> str:
    """What tells the parameters of a model from another's, by their shapes, with names or without, in any order."""
    return xxh3_64_hexdigest(repr(sorted(shapes)).encode())


def seal_checkpoint(folder: str | Path, parameters: str) -> None:
    """
    Brings all files of a checkpoint to the disk, then lists them with sizes and checksums in its manifest.

    Args:
        folder (`str` or `Path`): The checkpoint, complete.
        parameters (`str`): By [`parameters_digest`], for [`check_checkpoint`].
    """
    folder = Path(folder)
    files = {}
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "xxh3_64": _checksum(path, name)}
    write_whole_text(folder / MANIFEST, json.dumps({"parameters": parameters, "files": files}, indent=1) + "\n")
    for place in (folder / MANIFEST, *{path.parent for path in _files(folder)}):
        _flush(place)


def publish_checkpoint(unfinished: str | Path, folder: str | Path) -> None:
    """Gives a sealed checkpoint its name, in place of what may have had it; at any moment one of them is whole."""
    unfinished, folder = Path(unfinished), Path(folder)
    if folder.exists():
        replaced = unfinished.with_name(f"replaced-{folder.name}")
        os.rename(folder, replaced)
        os.rename(unfinished, folder)
        shutil.rmtree(replaced)
    else:
        os.rename(unfinished, folder)
    _flush(folder.parent)


def rotate_checkpoints(newest: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """
    Removes checkpoints of a run, so that at most `limit` are left: first those of later steps, which a resumed run has
    left behind, then the oldest. Each loses its name before its files.

    Args:
        newest (`str` or `Path`): The checkpoint that was written last, which stays.
        limit (`int`, *optional*): All stay if unset or 0.
        best (`str` or `Path`, *optional*): Another that stays.
    """
    newest = Path(newest)
    kept, present = {newest, best and Path(best)}, checkpoints_of(newest.parent)
    later = [path for path in present if _step(path) > _step(newest)]
    removable = [path for path in (*later, *reversed(present[len(later) :])) if path not in kept]
    for path in removable[: max(0, len(present) - limit)] if limit else ():
        removed = newest.parent / UNFINISHED / path.name
        removed.parent.mkdir(exist_ok=True)
        os.rename(path, removed)
        shutil.rmtree(removed.parent)


def check_checkpoint(folder: str | Path, parameters: str | None = None) -> str | None:
    """
    What is wrong with a checkpoint.

    Args:
        folder (`str` or `Path`): The checkpoint.
        parameters (`str`, *optional*): Those of the model that it is for; any model's if unset.

    Returns:
        `str`, *optional*: The end of a sentence that begins with the checkpoint; `None` if it is whole.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        listed, of_model = manifest["files"], manifest["parameters"]
        expected = {name: (int(facts["size"]), facts["xxh3_64"]) for name, facts in listed.items()}
    except FileNotFoundError:
        return f"has no {MANIFEST}: it was not written to its end"
    # Whatever a damaged file makes of JSON.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return f"has a {MANIFEST} that cannot be read"
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has a {name} of {path.stat().st_size:,} bytes where {size:,} were written"
        if _checksum(path, name) != checksum:
            return f"has a {name} whose content is not what was written"
    if parameters is not None and of_model != parameters:
        return "is of a model with other parameters"
    return None


def newest_checkpoint(
    folder: str | Path, parameters: str | None = None, up_to: str | Path | None = None
) -> Path | None:
    """
    The newest whole checkpoint of a run; those that are newer but not whole are named in a warning.

    Args:
        folder (`str` or `Path`): The run.
        parameters (`str`, *optional*): As in [`check_checkpoint`].
        up_to (`str` or `Path`, *optional*): A checkpoint, whose later ones are left out.
    """
    found = checkpoints_of(folder)
    if up_to is not None and _CHECKPOINT.fullmatch(Path(up_to).name):
        found = [checkpoint for checkpoint in found if _step(checkpoint) <= _step(Path(up_to))]
    for checkpoint in found:
        problem = check_checkpoint(checkpoint, parameters)
        if problem is None:
            return checkpoint
        warnings.warn(f"{checkpoint} {problem}; it is skipped.", stacklevel=2)
    return None


def checkpoints_of(folder: str | Path) -> list[Path]:
    """All that are called checkpoints in the folder of a run, whole or not, the newest first."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((path for path in found if _CHECKPOINT.fullmatch(path.name)), key=_step, reverse=True)


def remove_checkpoints(folder: str | Path) -> None:
    """Removes those of a run that another one replaces: what this one cannot finish would seem to go on from them."""
    for checkpoint in checkpoints_of(folder):
        shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(_CHECKPOINT.fullmatch(checkpoint.name)[1])


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path


def _checksum(path: Path, name: str) -> str | None:
    if name.startswith(f"{EXPERTS}/"):
        return None
    if path.stat().st_size == 0:
        return xxh3_64_hexdigest(b"")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxh3_64_hexdigest(content)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
