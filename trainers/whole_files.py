"""Files that are whole at any moment, also when the process that writes them is killed, and folders for them."""

import os
from collections.abc import Callable
from pathlib import Path


def nearest_existing(path: str | Path) -> Path:
    """What is there of a path: itself, or the nearest of the folders that it would be in."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_folder(folder: str | Path) -> None:
    """Raises `NotADirectoryError` if `folder`, or what it would be made in, is a file."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder, because {existing} is a file: choose another.")


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """
    Writes a file beside `path` and then puts it there, so that nobody finds a part of it.

    Args:
        path (`str` or `Path`): The file; its folder is made if it is missing.
        write (`Callable[[Path], object]`): Writes the file that it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{path}.part")
    write(aside)
    os.replace(aside, path)


def write_whole_text(path: str | Path, text: str) -> None:
    """The same for a text."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))
