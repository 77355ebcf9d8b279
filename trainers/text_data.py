"""Text data sets from the Hub or local files, as one document per row, and what is held out of them."""

import codecs
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEXT_SUFFIXES = {".txt", ".md", ".text", ".tokens", ".raw"}
_NOT_DATA = ("readme", "license", "dataset_info", "dataset_infos")
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test"}
_SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_HEAD_LINES = 500
_STRINGS_AND_STRUCTURE = re.compile(rb'"(?:\\.|[^"\\])*+"?|[\[\]{}]|null', re.DOTALL)
_MOST_BRACKETS = 100


def load_documents(
    dataset_name: str,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """
    Load one split of a text data set, one document per row in the column `"text"`.

    WikiText, whose rows or lines are the lines of articles, is joined to articles at its level-1 headings,
    ` = Title = `. Any other plain text file is one document, and any other data set has one document per row. Rows
    without text are left out.

    Args:
        dataset_name (`str`): A Hub id; a local file, which is text unless it ends in `.jsonl`, `.json`, `.csv` or
            `.parquet`; a folder of such files (of text, `.txt`, `.md`, `.text`, `.tokens` and `.raw`); or a folder of
            `Dataset.save_to_disk`. If every file of a folder is named after a split (`wiki.valid.tokens`,
            `test/0.txt`), these are the splits, otherwise everything local is `"train"`.
        dataset_config (`str`, *optional*): The configuration of a Hub data set, such as `"wikitext-103-raw-v1"`.
        split (`str`, *optional*, defaults to `"train"`): The split, or a slice of one such as `"train[:10%]"`.
        text_column (`str`, *optional*, defaults to `"text"`): The column that holds the text.
        cache_dir (`str`, *optional*): Where `datasets` keeps its files, its own default if not given.

    Returns:
        `datasets.Dataset`: The documents, memory-mapped.
    """
    path = local_path(dataset_name)
    if path:
        rows = _load_local(path, dataset_config, split, cache_dir)
    else:
        rows = datasets.load_dataset(dataset_name, dataset_config, split=split, cache_dir=cache_dir)
    if text_column not in rows.column_names:
        raise ValueError(
            f"text_column is {text_column!r}: {dataset_name} has only the columns {', '.join(rows.column_names)}."
        )
    feature = rows.features[text_column]
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
        raise ValueError(f"text_column is {text_column!r}: in {dataset_name} it holds {feature}, not text.")
    rows = rows.select_columns(text_column).rename_columns({text_column: "text"})
    if _is_wikitext(document_texts(rows)):
        rows = _join_articles(rows, cache_dir)
    documents = rows.filter(_have_text, input_columns="text", batched=True, desc="Leaving out empty rows")
    if len(documents) == 0:
        raise ValueError(f"{dataset_name} is empty: split {split!r} holds no text.")
    return documents


def dataset_splits(dataset_name: str, dataset_config: str | None = None) -> list[str]:
    """The names of the splits that [`load_documents`] can load."""
    path = local_path(dataset_name)
    if path is None or dataset_config:
        return datasets.get_dataset_split_names(str(path or dataset_name), dataset_config)
    if _is_saved(path):
        saved = datasets.load_from_disk(str(path))
        return list(saved) if isinstance(saved, datasets.DatasetDict) else ["train"]
    return list(_split_files(path))


def load_train_and_validation(
    dataset_name: str,
    dataset_config: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.1,
    cache_dir: str | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Load the documents to train on and those to validate on: the split `"validation"` where there is one, otherwise
    what [`split_documents`] holds out of `"train"`.
    """
    train = load_documents(dataset_name, dataset_config, "train", text_column, cache_dir)
    if "validation" not in dataset_splits(dataset_name, dataset_config):
        return split_documents(train, validation_fraction)
    return train, load_documents(dataset_name, dataset_config, "validation", text_column, cache_dir)


def split_documents(
    documents: datasets.Dataset, validation_fraction: float = 0.1
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Hold out the last documents, at least one, for validation. A data set of one document is cut inside it, at a line.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The documents to train on and the documents to validate on.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction is {validation_fraction}: choose a number between 0 and 1.")
    if len(documents) == 1:
        text = documents[0]["text"]
        cut = text.rfind("\n", 0, int(len(text) * (1.0 - validation_fraction))) + 1
        if not text[:cut].strip():
            raise ValueError(
                "The only document has too few lines to hold out the last: give validation data of its own."
            )
        return tuple(datasets.Dataset.from_dict({"text": [part]}) for part in (text[:cut], text[cut:]))
    held_out = min(max(1, round(len(documents) * validation_fraction)), len(documents) - 1)
    boundary = len(documents) - held_out
    return documents.select(range(boundary)), documents.select(range(boundary, len(documents)))


def local_path(name: str) -> Path | None:
    """The file or folder of this name, `None` for a Hub id. A slip in a path must not become a request to the Hub."""
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    suffixes = _TEXT_SUFFIXES | set(_BUILDERS) | {".gz", ".zst", ".zip"}
    looks_local = name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    if looks_local or not name or path.suffix.lower() in suffixes or ("/" in name and path.parent.is_dir()):
        raise FileNotFoundError(f"No file or folder {name!r}: check the path, or give a Hub id such as 'owner/name'.")
    return None


def check_json(path: str | Path) -> None:
    """Raises `ValueError` for a file of JSON that Arrow's reader would take, and later fail on, or end the process."""
    depth = rows = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.removeprefix(codecs.BOM_UTF8).startswith(b"["):
                # The rows are what is in that list.
                rows = 1
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not text in UTF-8: {error.reason}") from None
            for match in _STRINGS_AND_STRUCTURE.finditer(line):
                depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
                if depth > _MOST_BRACKETS:
                    raise ValueError(f"line {number} has more than {_MOST_BRACKETS} brackets that are open")
                if depth <= rows and match[0] == b"null":
                    raise ValueError(f"line {number} has null where an object is expected")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _load_local(path: Path, dataset_config: str | None, split: str, cache_dir: str | None) -> datasets.Dataset:
    if dataset_config:
        return datasets.load_dataset(str(path), dataset_config, split=split, cache_dir=cache_dir)
    available = dataset_splits(str(path))
    name = re.split(r"\W", split)[0]
    if name not in available:
        raise ValueError(f"split is {split!r}: {path} has only {', '.join(available)}.")
    if _is_saved(path):
        if split != name:
            raise ValueError(f"split is {split!r}: {path} is a saved data set, which has no slices, so give {name!r}.")
        saved = datasets.load_from_disk(str(path))
        return saved[name] if isinstance(saved, datasets.DatasetDict) else saved
    files = _split_files(path)[name]
    builder, options = _BUILDERS.get(files[0].suffix.lower(), "text"), {}
    if builder == "text":
        options["sample_by"] = "line" if all(_is_wikitext_file(file) for file in files) else "document"
    try:
        for file in files if builder == "json" else ():
            check_json(file)
        data_files = {name: [str(file) for file in files]}
        return datasets.load_dataset(builder, data_files=data_files, split=split, cache_dir=cache_dir, **options)
    except (DatasetGenerationError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"Split {split!r} of {path} cannot be read as {builder}: {reason}") from None


def _split_files(path: Path) -> dict[str, list[Path]]:
    """The data files of a file or folder, by split."""
    if path.is_file():
        files = [path]
    else:
        known = _TEXT_SUFFIXES | set(_BUILDERS)
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in known]
        files = [file for file in files if file.stem.lower() not in _NOT_DATA]
        files = [file for file in files if not any(part[0] == "." for part in file.relative_to(path).parts)]
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{path} is empty: expected text, .jsonl, .json, .csv or .parquet files with content.")
    kinds = sorted({_BUILDERS.get(file.suffix.lower(), "text") for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes files of the kinds {', '.join(kinds)}: keep one kind in a folder.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [*file.relative_to(path).parts[:-1], *re.split(r"[^a-z]+", file.name.lower())]
        named = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
        splits.setdefault(named.pop() if len(named) == 1 else "", []).append(file)
    # One file without a split in its name, and the names mean something else: dropping it would lose text in silence.
    return {"train": files} if "" in splits or path.is_file() else splits


def _is_wikitext_file(file: Path) -> bool:
    try:
        with open(file, encoding="utf-8") as lines:
            return _is_wikitext(lines)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error}): convert it, or give .jsonl, .csv or .parquet."
        ) from None


def _have_text(texts: list[str | None]) -> list[bool]:
    return [bool(text and text.strip()) for text in texts]


def document_texts(rows: datasets.Dataset) -> Iterator[str]:
    """The texts of the column `"text"` one by one, without loading them all."""
    return (text or "" for batch in rows.iter(100) for text in batch["text"])


def _neighbours(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Every line with the one before and the one after."""
    before = ""
    for line, after in itertools.pairwise(itertools.chain(lines, [""])):
        yield before, line, after
        before = line


def _is_heading(before: str, line: str, after: str) -> bool:
    """Whether a line is a level-1 heading: one equals sign on either side, alone between empty lines."""
    alone = not before.strip() and not after.strip()
    return alone and re.fullmatch(r"= (?!= )\S.*(?<! =) =", line.strip()) is not None


def _is_wikitext(lines: Iterable[str]) -> bool:
    return any(_is_heading(*neighbours) for neighbours in itertools.islice(_neighbours(lines), _HEAD_LINES))


def _join_articles(rows: datasets.Dataset, cache_dir: str | None) -> datasets.Dataset:
    # An explicit fingerprint, because the default pickles the rows.
    fingerprint = hashlib.sha256(f"articles 1 {rows._fingerprint}".encode()).hexdigest()[:16]
    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.Dataset.from_generator(
        _articles, features, cache_dir, gen_kwargs={"rows": rows}, fingerprint=fingerprint
    )


def _articles(rows: datasets.Dataset) -> Iterator[dict[str, str]]:
    """The articles of WikiText's lines. Joined, they are the lines again, each with a line end, empty ones bare."""
    article: list[str] = []
    for before, line, after in _neighbours(text.rstrip("\r\n") for text in document_texts(rows)):
        if _is_heading(before, line, after) and any(part.strip() for part in article):
            yield {"text": "".join(article)}
            article = []
        article.append(f"{line}\n" if line.strip() else "\n")
    yield {"text": "".join(article)}
