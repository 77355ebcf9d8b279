"""Sending a folder to the Hub: one revision, or none; and what can go wrong in a sentence each."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from ..hub_cards import card_problems
from ..hub_cards.published_files import comes_from_a_push, file_problems
from .hub_contents import CARD, Contents
from .hub_push_config import PushArguments

# Whatever the version of huggingface_hub speaks HTTP with, this is how it says that nobody is there.
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "WriteError", "RemoteProtocolError")


class PushError(Exception):
    """A push that failed, and why, in a sentence."""


def problems_of(contents: Contents, kind: str) -> list[str]:
    """All that is wrong with the files and the card, a sentence each."""
    files = file_problems(contents.folder) if kind == "model" else []
    return [*files, *card_problems((contents.folder / CARD).read_text("utf-8"), contents.folder, kind)]


def push(contents: Contents, arguments: PushArguments) -> str:
    """
    Makes a revision of the files, and then one of the card that names the first.

    Args:
        contents ([`Contents`]): The files.
        arguments ([`PushArguments`]): The repository.

    Returns:
        The id of the revision with the files.

    Raises:
        PushError: If the Hub does not take it; what was there before is still there, and whole, unless it is only the
            card that was not taken, or the collection.
    """
    api, name, kind = HfApi(token=arguments.token), arguments.repo_id, arguments.kind
    with _sentences(name, api.endpoint):
        user = api.whoami()["name"]
    with _sentences(name, api.endpoint, user):
        head = _head(api, name, kind)
        if head is not None and not arguments.update and not _is_empty(api, name, kind):
            raise PushError(f"{name} is on the Hub already: give it a new revision with --update, or choose another.")
        if head is None:
            api.create_repo(name, repo_type=kind, private=arguments.private)
        message = arguments.commit_message or f"{'Update' if head else 'Upload'} {kind}"
        # One commit and not upload_folder, which may make several: whoever loads in between would get a mixture.
        commit = api.create_commit(
            name, _operations(api, contents, name, kind), commit_message=message, repo_type=kind, parent_commit=head
        )
    contents.write_card(commit.oid)
    card = CommitOperationAdd(CARD, contents.folder / CARD)
    landed = f"{name} has the files already, as revision {commit.oid}: run the same command again with --update."
    with _sentences(name, api.endpoint, user, landed):
        api.create_commit(name, [card], commit_message="Pin the revision on the card", repo_type=kind)
    if arguments.collection:
        with _sentences(arguments.collection, api.endpoint, user, landed):
            api.add_collection_item(arguments.collection, name, kind, exists_ok=True)
    return commit.oid


def _head(api: HfApi, name: str, kind: str) -> str | None:
    """The newest revision, `None` if there is no such repository."""
    try:
        return api.repo_info(name, repo_type=kind).sha
    except RepositoryNotFoundError:
        return None


def _is_empty(api: HfApi, name: str, kind: str) -> bool:
    """Whether there is nothing but what the Hub puts into a new repository, as after an upload that was cut off."""
    return set(api.list_repo_files(name, repo_type=kind)) <= {".gitattributes"}


def _operations(api: HfApi, contents: Contents, name: str, kind: str) -> list:
    files = contents.files()
    there = api.list_repo_files(name, repo_type=kind)
    # Shards and modules of an earlier revision would be loaded with those of this one.
    stale = [path for path in there if path not in files and comes_from_a_push(path, kind)]
    added = [CommitOperationAdd(path, source) for path, source in files.items()]
    return [*added, *(CommitOperationDelete(path) for path in stale)]


@contextlib.contextmanager
def _sentences(name: str, endpoint: str, user: str | None = None, landed: str = "") -> Iterator[None]:
    """Turns what huggingface_hub raises into a sentence that says what to do, and one of what is there already."""
    state = landed or f"{name} is as before; run the same command again."
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PushError("There is no token of the Hub: log in with `hf auth login`, or give --token.") from error
    except HfHubHTTPError as error:
        raise PushError(f"{_refusal(error, name, user).rstrip('.')}. {landed}".strip()) from error
    except RuntimeError as error:
        # Of an upload; a commit is made after all of them.
        raise PushError(f"{str(error).rstrip('.')}. {state}") from error
    except Exception as error:
        if type(error).__name__ not in _UNREACHABLE:
            raise
        raise PushError(f"{endpoint} cannot be reached ({error}). {state}") from error


def _refusal(error: HfHubHTTPError, name: str, user: str | None) -> str:
    status = error.response.status_code if error.response is not None else 0
    if status == 401 and user is None:
        return "The Hub did not accept the token: log in with `hf auth login`, or give another with --token."
    if status in (401, 403):
        return f"{user} may not write to {name}: choose a name of your own, or a token that may write."
    if status == 409:
        return f"{name} is on the Hub already: give it a new revision with --update, or choose another."
    if status == 412:
        return f"Somebody else has changed {name} in the meantime: run the same command again."
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return f"The Hub refused {name}: {reason.strip()}"


def describe(contents: Contents, arguments: PushArguments, problems: list[str]) -> Iterator[str]:
    """What a dry run prints, line by line."""
    yield f"{arguments.kind} {arguments.repo_id}, {'private' if arguments.private else 'public'}:"
    for name, path in contents.files().items():
        yield f"  {_size(path):>10}  {name}"
    if contents.left:
        places = dict.fromkeys(name.split("/")[0] + "/" * ("/" in name) for name in contents.left)
        yield f"Stays here: {', '.join(places)}"
    yield "The card:"
    yield from (f"  {line}".rstrip() for line in (contents.folder / CARD).read_text("utf-8").splitlines())
    yield from problems or ["Files and card are in order."]


def _size(path: Path) -> str:
    size = path.stat().st_size
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
