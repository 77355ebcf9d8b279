"""Tokenizers, trained or loaded, and documents turned into tokens."""

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Registers the models: otherwise loading the tokenizer of one of their checkpoints asks to run the code beside it.
from .. import modeling as _modeling  # noqa: F401
from .text_data import document_texts, local_path

END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"

_PIECE_LENGTH = 1 << 18


def train_tokenizer(
    documents: datasets.Dataset | Iterable[str],
    vocab_size: int,
    unit: str = "word",
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
        unit (`str`, *optional*, defaults to `"word"`): What a token never crosses: `"word"` as in GPT-2, or `"line"`,
            which makes whole sentences tokens where a text has few different ones, as the bAbI stories do.
        split_digits (`bool`, *optional*, defaults to `True`): Makes every digit a token of its own, which arithmetic
            needs.
        show_progress (`bool`, *optional*, defaults to `False`): Shows progress bars.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if unit not in ("word", "line"):
        raise ValueError(f"unit is {unit!r}: choose 'word' or 'line'.")
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"vocab_size is {vocab_size}: it must be at least {len(alphabet) + 2}, 256 bytes and 2 marks."
        )
    texts = document_texts(documents) if isinstance(documents, datasets.Dataset) else documents
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    lines = [pre_tokenizers.Split("\n", behavior="merged_with_previous")] if unit == "line" else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=unit == "word")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*lines, *digits, byte_level])
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


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer from the Hub or a folder, ready to separate and to pad documents: one without a padding token,
    such as GPT-2's, pads with its end token. `trust_remote_code` runs code that comes with it.
    """
    source = str(local_path(name_or_path) or name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer could be loaded from {name_or_path}: {str(error).splitlines()[0]}") from error
    check_end_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if documents cannot be separated, because the tokenizer has no end token."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no end token: set its eos_token.")


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts, with the token that begins texts where the tokenizer adds one, but never an end token."""
    encoded = tokenizer(list(prompts), return_attention_mask=False, verbose=False)["input_ids"]
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in encoded]


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of answers: apart from their prompts, so that these have the tokens that they have in evaluation."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(answers), **options)["input_ids"]


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
    check_end_token(tokenizer)
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
    for text in document_texts(documents):
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
