"""Text to tokens: documents from the Hub, local files or the generators, tokenizers, and data sets to train on."""

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Registers the models: otherwise loading the tokenizer of one of their checkpoints asks to run the code beside it.
from .. import modeling as _modeling  # noqa: F401
from .arithmetic import SYMBOLS, format_problem, generate_problems
from .babi import TASKS, format_question, generate_stories
from .splits import SPLITS, check_split

GENERATED = "generated"
END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"

_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEXT_SUFFIXES = {".txt", ".md", ".text", ".tokens", ".raw"}
_NOT_DATA = ("readme", "license", "dataset_info", "dataset_infos")
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test"}
_SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_HEAD_LINES = 500
_PIECE_LENGTH = 1 << 18


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
            `.parquet`; a folder of such files (of text, `.txt`, `.md`, `.text`, `.tokens` and `.raw`); a folder of
            `Dataset.save_to_disk`; or `"generated"`, the tasks of [`generated_documents`]. If every file of a folder
            is named after a split (`wiki.valid.tokens`, `test/0.txt`), these are the splits, otherwise everything
            local is `"train"`.
        dataset_config (`str`, *optional*): The configuration of a Hub data set, such as `"wikitext-103-raw-v1"`.
        split (`str`, *optional*, defaults to `"train"`): The split, or a slice of one such as `"train[:10%]"`.
        text_column (`str`, *optional*, defaults to `"text"`): The column that holds the text.
        cache_dir (`str`, *optional*): Where `datasets` keeps its files, its own default if not given.

    Returns:
        `datasets.Dataset`: The documents, memory-mapped.
    """
    if dataset_name == GENERATED:
        rows = generated_documents(split)
        return datasets.Dataset.from_dict({"text": [row["prompt"] + row["answer"] for row in rows]})
    path = _local_path(dataset_name)
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
    if _is_wikitext(_texts(rows)):
        rows = _join_articles(rows, cache_dir)
    documents = rows.filter(_have_text, input_columns="text", batched=True, desc="Leaving out empty rows")
    if len(documents) == 0:
        raise ValueError(f"{dataset_name} is empty: split {split!r} holds no text.")
    return documents


def dataset_splits(dataset_name: str, dataset_config: str | None = None) -> list[str]:
    """The names of the splits that [`load_documents`] can load."""
    if dataset_name == GENERATED:
        return list(SPLITS)
    path = _local_path(dataset_name)
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


def generated_documents(
    split: str = "train",
    seed: int = 0,
    num_examples: int = 10_000,
    tasks: Sequence[str] = ("babi2", "babi3", "addition"),
    *,
    max_facts: int = 6,
    num_people: int = 2,
    num_places: int = 4,
    num_objects: int = 2,
    num_wordings: int = 1,
    max_digits: int = 3,
    reverse_answer: bool = False,
) -> datasets.Dataset:
    """
    The data that needs no download: short stories with questions, and arithmetic, shuffled, in equal shares. The world
    of the stories is small by default, so that a small model learns them in minutes.

    Args:
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"` or `"test"`; they share no example.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same rows on every machine.
        num_examples (`int`, *optional*, defaults to `10000`): Rows of all tasks together.
        tasks (`Sequence[str]`, *optional*): Of `babi2`, `babi3`, `addition`, `subtraction` and `multiplication`.
        max_facts (`int`, *optional*, defaults to `6`): See [`~babi.generate_stories`], also for the next four.
        num_people (`int`, *optional*, defaults to `2`): People in the stories.
        num_places (`int`, *optional*, defaults to `4`): Places.
        num_objects (`int`, *optional*, defaults to `2`): Objects.
        num_wordings (`int`, *optional*, defaults to `1`): Ways to say the same thing.
        max_digits (`int`, *optional*, defaults to `3`): See [`~arithmetic.generate_problems`].
        reverse_answer (`bool`, *optional*, defaults to `False`): See [`~arithmetic.format_problem`].

    Returns:
        `datasets.Dataset`: Rows of `task`, `prompt` and `answer`.
    """
    check_split(split)
    unknown = [task for task in tasks if task not in (*TASKS, *SYMBOLS)]
    if unknown or not tasks:
        raise ValueError(f"tasks is {list(tasks)}: choose from {', '.join((*TASKS, *SYMBOLS))}.")
    world = dict(num_people=num_people, num_places=num_places, num_objects=num_objects, num_wordings=num_wordings)
    rows = []
    for index, task in enumerate(tasks):
        share = num_examples // len(tasks) + (index < num_examples % len(tasks))
        if task in TASKS:
            questions = generate_stories(task, share, split, seed, max_facts=max_facts, **world)
            pairs = [format_question(question) for question in questions]
        else:
            problems = generate_problems(task, share, split, seed, max_digits=max_digits)
            pairs = [format_problem(problem, reverse_answer) for problem in problems]
        rows += [{"task": task, "prompt": prompt, "answer": answer} for prompt, answer in pairs]
    # A hash orders the rows the same way in every version of Python and numpy, which their shuffles do not promise.
    rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['prompt']}".encode()).digest())
    return datasets.Dataset.from_list(rows)


def _local_path(name: str) -> Path | None:
    """The file or folder of this name, `None` for a Hub id. A slip in a path must not become a request to the Hub."""
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    suffixes = _TEXT_SUFFIXES | set(_BUILDERS) | {".gz", ".zst", ".zip"}
    looks_local = name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    if looks_local or not name or path.suffix.lower() in suffixes or ("/" in name and path.parent.is_dir()):
        raise FileNotFoundError(f"No file or folder {name!r}: check the path, or give a Hub id such as 'owner/name'.")
    return None


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


def _texts(rows: datasets.Dataset) -> Iterator[str]:
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
    for before, line, after in _neighbours(text.rstrip("\r\n") for text in _texts(rows)):
        if _is_heading(before, line, after) and any(part.strip() for part in article):
            yield {"text": "".join(article)}
            article = []
        article.append(f"{line}\n" if line.strip() else "\n")
    yield {"text": "".join(article)}


def train_tokenizer(
    documents: datasets.Dataset | Iterable[str],
    vocab_size: int,
    split_digits: bool = True,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer. It decodes to the very text that it encoded, and the same documents give the same
    tokenizer.

    Args:
        documents (`datasets.Dataset` or `Iterable[str]`): Texts, or a data set with a column `"text"`.
        vocab_size (`int`): Entries of the vocabulary, at least 258: the bytes, `<|endoftext|>` (end and beginning of a
            document) and `<|pad|>`. A small text may give fewer entries than asked for.
        split_digits (`bool`, *optional*, defaults to `True`): Makes every digit a token of its own, which arithmetic
            needs.
        show_progress (`bool`, *optional*, defaults to `False`): Shows progress bars.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"vocab_size is {vocab_size}: it must be at least {len(alphabet) + 2}, 256 bytes and 2 marks."
        )
    texts = _texts(documents) if isinstance(documents, datasets.Dataset) else documents
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=alphabet,
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(map(_pieces, texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer from the Hub or a folder, ready to separate and to pad documents: one without a padding token,
    such as GPT-2's, pads with its end token.
    """
    source = str(_local_path(name_or_path) or name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer could be loaded from {name_or_path}: {str(error).splitlines()[0]}") from error
    _check_end_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no end token: set its eos_token.")


def tokenize_documents(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """
    Tokenize documents, each with the end token after it. The result is kept on disk under a hash of the texts and of
    the tokenizer, so that doing it again, from any process and any copy of the data, only opens a file.

    Args:
        documents (`datasets.Dataset`): Rows with the column `"text"`.
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with an end token.
        num_proc (`int`, *optional*): Processes. Without it, a fast tokenizer uses the threads of one process.
        cache_dir (`str`, *optional*): Where the tokens are kept, the cache of `datasets` if not given.

    Returns:
        `datasets.Dataset`: One row per document, the column `"input_ids"`, memory-mapped.
    """
    _check_end_token(tokenizer)
    fingerprint = _content_hash(documents, tokenizer)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "mixturekit_tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return documents.map(
        _encode,
        input_columns="text",
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "end": tokenizer.eos_token_id},
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        num_proc=num_proc and min(num_proc, len(documents)),
        # The default hash covers the tokenizer's padding state, which changes as it is used, and the time of the
        # files.
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        desc="Tokenizing",
    )


def _content_hash(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.blake2b(b"tokens 1", digest_size=16)
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"padding": None, "truncation": None, "end": tokenizer.eos_token_id}
        digest.update(json.dumps(state, sort_keys=True).encode())
    else:
        digest.update(datasets.fingerprint.Hasher.hash(tokenizer).encode())
    for text in _texts(documents):
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int) -> dict[str, list[np.ndarray]]:
    rows = [array("i") for _ in texts]
    pieces = [(row, piece) for row, text in zip(rows, texts, strict=True) for piece in _pieces(text)]
    for start in range(0, len(pieces), 64):
        group = pieces[start : start + 64]
        # Without `verbose=False` it warns of documents that are longer than the model's context.
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = tokenizer([piece for _, piece in group], **options)["input_ids"]
        for (row, _), ids in zip(group, encoded, strict=True):
            row.extend(ids)
    for row in rows:
        row.append(end)
    return {"input_ids": [np.asarray(row, dtype=np.int32) for row in rows]}


def _pieces(text: str, length: int = _PIECE_LENGTH) -> Iterator[str]:
    """
    Cut a very long text, because a tokenizer needs about 150 bytes of memory per character. Cuts are at single spaces
    between words, where the pattern of byte-level tokenizers cuts too, so that the tokens stay the same.
    """
    start = 0
    while len(text) - start > length:
        cut = start + length
        while cut > start + 1 and not re.fullmatch(r"\S \S", text[cut - 1 : cut + 2]):
            cut -= 1
        cut = cut if cut > start + 1 else start + length
        yield text[start:cut]
        start = cut
    yield text[start:]


class PackedTokens(torch.utils.data.Dataset):
    """
    Documents one after the other, cut into blocks of `sequence_length` tokens: no token is padding, and none is lost.
    Only the last block may be shorter; a last block of a single token is left out, as it has nothing to predict.

    The tokens stay on disk: a block reads only its own.

    Args:
        documents (`datasets.Dataset`): What [`tokenize_documents`] returns.
        sequence_length (`int`): Tokens in a block, at least 2.
    """

    def __init__(self, documents: datasets.Dataset, sequence_length: int):
        if sequence_length < 2:
            raise ValueError(f"sequence_length is {sequence_length}: a block needs at least 2 tokens to predict one.")
        if len(documents) == 0:
            raise ValueError("documents is empty: there is nothing to pack.")
        self.documents = documents
        self.sequence_length = sequence_length
        chunks = [chunk for chunk in documents.data.column("input_ids").chunks if len(chunk)]
        offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        # Views into the memory map, not copies.
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        chunk_of = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        starts = np.concatenate([offset[:-1] for offset in offsets])
        lengths = np.concatenate([np.diff(offset) for offset in offsets])
        # select(), filter() and shuffle() leave the rows as they are and keep a list of indices.
        rows = slice(None) if documents._indices is None else documents._indices.column(0).to_numpy()
        self._chunk_of, self._starts = chunk_of[rows], starts[rows]
        self._ends = np.cumsum(lengths[rows], dtype=np.int64)

    def __reduce__(self):
        # Pickling the views, as worker processes do, would copy the corpus.
        return type(self), (self.documents, self.sequence_length)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        full, rest = divmod(self.num_tokens, self.sequence_length)
        return full + (rest > 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        position = index * self.sequence_length
        stop = min(position + self.sequence_length, self.num_tokens)
        document = int(np.searchsorted(self._ends, position, side="right"))
        parts = []
        while position < stop:
            take = min(stop, int(self._ends[document])) - position
            document_start = int(self._ends[document - 1]) if document else 0
            start = int(self._starts[document]) + position - document_start
            parts.append(self._values[self._chunk_of[document]][start : start + take])
            position += take
            document += 1
        input_ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}


class AnswerDataset(torch.utils.data.Dataset):
    """
    Prompts with answers, each tokenized as `prompt + answer + end token`, with the loss on the last two only.

    Prompt and answer are tokenized apart, so that the prompt's tokens are those of the prompt alone, as in evaluation.

    Args:
        pairs (`Iterable[tuple[str, str]]`): Prompts and answers, as `format_question` and `format_problem` give them.
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with an end token.
        max_length (`int`, *optional*): The longest example that the model takes.
    """

    def __init__(
        self, pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ):
        pairs = list(pairs)
        if not pairs:
            raise ValueError("pairs is empty: there is nothing to learn from.")
        _check_end_token(tokenizer)
        prompts, answers = map(list, zip(*pairs, strict=True))
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        self._prompts = tokenizer(prompts, **options)["input_ids"]
        self._answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers, **options)["input_ids"]]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(self._prompts, self._answers, strict=True))
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"max_length is {max_length}: the longest example has {longest} tokens, so raise it to that."
            )

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        prompt, answer = self._prompts[index], self._answers[index]
        labels = [-100] * len(prompt) + answer
        return {"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor(labels)}


def pad_blocks(features: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Collate examples of different lengths, padded on the right whatever side the tokenizer pads for generation. Labels
    are padded with -100. Give it to a `Trainer` as `functools.partial(pad_blocks, pad_token_id=...)`.
    """
    input_ids = [feature["input_ids"] for feature in features]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence([feature["labels"] for feature in features], batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
    }
