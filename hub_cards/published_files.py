"""Which files of a run go to the Hub, what is taken out of them, and what would make them useless there.

Only what is named here is published: no optimizer, no random states, no logs with the name of a machine in theirs, and
no pickled arguments, which hold whatever token was given.
"""

import json
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

from safetensors import SafetensorError, safe_open

PUBLISHED = (
    "README.md", "LICENSE", "config.json", "generation_config.json", "adapter_config.json", "model*.safetensors",
    "adapter_model*.safetensors", "*.safetensors.index.json", "value_head.safetensors", "tokenizer*.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja",
    "configuration_*.py", "modeling_*.py", "task_arguments.json", "training_record.json",
    ".eval_results/*.yaml", "evaluation/*", "figures/*.png",
)  # fmt: skip
# What a model needs beside its weights to be loaded where this library is not.
_SIBLING = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)
_OWN_PACKAGE = re.compile(r"^\s*(?:from|import) mixturekit\b", re.MULTILINE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_SECRET = re.compile(r"token$|password|secret|api_key", re.IGNORECASE)
# Of a tokenizer, which may write them as it likes.
_WORD = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask)_token")
_OPTIMIZER = re.compile(r"(?:^|\.)(?:exp_avg|exp_avg_sq|momentum_buffer)$")


def shareable(value: object) -> object:
    """`value` of a JSON file without secrets, and with the last parts of absolute paths in their place."""
    if isinstance(value, dict):
        return {
            name: shareable(item)
            for name, item in value.items()
            if not (isinstance(item, str) and _SECRET.search(name) and not _is_word(name, item))
        }
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    return shareable_text(value) if isinstance(value, str) else value


def _is_word(name: str, text: str) -> bool:
    return bool(_WORD.fullmatch(name)) or text.startswith("<")


def shareable_text(text: str) -> str:
    """An absolute path as its last part, and any other text as it is."""
    if text.startswith(("/", "~/")) and len(text) > 1 and "\n" not in text:
        return Path(text).name
    return PureWindowsPath(text).name if re.match(r"[A-Z]:\\\w", text) else text


def stage_files(folder: str | Path, target: str | Path) -> tuple[list[str], list[str]]:
    """
    Copies what is published of a run, with paths and secrets taken out of its JSON files.

    Args:
        folder (`str` or `Path`): The run.
        target (`str` or `Path`): An empty folder.

    Returns:
        The names of the files that were copied, and of those that were not.
    """
    folder, target = Path(folder), Path(target)
    code = _code_files(folder)
    staged, left = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in code and not _is_named(name, PUBLISHED):
            left.append(name)
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json") and not name.startswith(("tokenizer.", "vocab.")):
            content = shareable(json.loads(path.read_text("utf-8")))
            place.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, place)
        staged.append(name)
    return staged, left


def comes_from_a_push(name: str, kind: str = "model") -> bool:
    """Whether a file of that name in a repository is one that a push puts there, so that the next may remove it."""
    return _is_named(name, (*PUBLISHED, "*.py") if kind == "model" else ("data/*.parquet",))


def _is_named(name: str, patterns: tuple[str, ...]) -> bool:
    # The star of fnmatch crosses folders.
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _code_files(folder: Path) -> set[str]:
    """The modules that `auto_map` names, and the siblings that they import, as far as they are there."""
    config = folder / "config.json"
    found: set[str] = set()
    if config.is_file():
        entries = json.loads(config.read_text("utf-8")).get("auto_map", {}).values()
        waiting = {f"{entry.rpartition('--')[2].split('.')[0]}.py" for entry in entries if isinstance(entry, str)}
        while waiting:
            name = waiting.pop()
            found.add(name)
            if (folder / name).is_file():
                siblings = {f"{module}.py" for module in _SIBLING.findall((folder / name).read_text("utf-8"))}
                waiting |= siblings - found
    return found


def file_problems(folder: str | Path) -> list[str]:
    """
    What would make a repository of the files in `folder` useless to a stranger, or tell more than it should.

    Returns:
        `list[str]`: A sentence for each problem.
    """
    folder = Path(folder)
    return [*_weight_problems(folder), *_code_problems(folder), *_adapter_problems(folder), *_privacy_problems(folder)]


def _weight_problems(folder: Path) -> Iterator[str]:
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        yield "There is no config.json, so this is no checkpoint."
        return
    weights = sorted(folder.glob("adapter_model*.safetensors" if is_adapter else "model*.safetensors"))
    if not weights:
        yield f"There are no weights: {'adapter_model' if is_adapter else 'model'}.safetensors is missing."
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            yield f"{index.name} names {missing[0]}, which is missing."
        odd = [path.name for path in weights if path.name not in shards]
        if odd:
            yield f"{odd[0]} is none of the shards that {index.name} names: remove one of the two."
    for path in weights:
        try:
            with safe_open(path, "pt") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            yield f"{path.name} cannot be read: {error}."
            continue
        if any(_OPTIMIZER.search(name) for name in names):
            yield f"{path.name} holds the state of an optimizer."


def _code_problems(folder: Path) -> Iterator[str]:
    for name in sorted(_code_files(folder)):
        if not (folder / name).is_file():
            yield f"config.json asks for the code of {name}, which is missing; save_pretrained writes it."
        elif _OWN_PACKAGE.search((folder / name).read_text("utf-8")):
            yield f"{name} imports mixturekit, which a stranger does not have."


def _adapter_problems(folder: Path) -> Iterator[str]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = json.loads(path.read_text("utf-8")).get("base_model_name_or_path")
    if not base or not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or Path(base).exists():
        yield (
            f"The adapter belongs to {base!r}, which is on this machine only: name a base on the Hub with "
            "--base_model, or push both in one with --merge_adapter."
        )


def _privacy_problems(folder: Path) -> Iterator[str]:
    for path in sorted(
        path for path in folder.rglob("*") if path.suffix in {".json", ".md", ".py", ".yaml", ".jsonl"}
    ):
        text = path.read_text("utf-8", errors="replace")
        if _TOKEN.search(text):
            yield f"{path.name} holds a token of the Hub."
        home = str(Path.home())
        if len(home) > 1 and f"{home}/" in text:
            yield f"{path.name} holds a path below {home}."
