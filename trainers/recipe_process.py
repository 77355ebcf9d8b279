"""How the process of a recipe ends: with one sentence at a mistake of its user's, and out of its process group."""

import atexit
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_in_one_sentence(needs: str | None = None, interrupted: str | None = None) -> Iterator[None]:
    """
    Ends the process with one sentence, and no traceback, at an error that the user can mend.

    These are values, files and numbers that are not finite. A library that is not installed is one too: its error says
    so itself if it names no module, and otherwise `needs` does.

    Args:
        needs (`str`, *optional*): The extra of mixturekit that has what the recipe imports.
        interrupted (`str`, *optional*): What Ctrl-C leaves behind; without it, Ctrl-C ends in a traceback.
    """
    try:
        yield
    except ImportError as error:
        if error.name is None:
            sys.exit(str(error))
        if needs is None:
            raise
        sys.exit(f"{str(error).rstrip('.')}. The extra mixturekit[{needs}] has what this recipe needs.")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        sys.exit(f"Interrupted: {interrupted}")


def leave_process_group_at_exit() -> None:
    """Has the process leave its group before it exits: Gloo's threads now and then abort one that has not."""
    from accelerate import PartialState

    atexit.register(lambda: PartialState().destroy_process_group())
