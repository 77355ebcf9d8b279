"""Files that are whole at any moment, also when the process that writes them is killed."""

import os
from collections.abc import Callable
from pathlib import Path


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
