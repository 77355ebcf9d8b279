"""Where tables are printed."""

from rich.console import Console


def wide_console(width: int = 160) -> Console:
    """
    The terminal as wide as it is, or a log that is wide enough: it has no width, and rich would take 80 columns.

    Args:
        width (`int`, *optional*, defaults to 160): Columns of a log.
    """
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
