"""Perplexity of texts under a causal language model: with a sliding window, and by position in the sequence."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .metrics.corpus_perplexity import corpus_perplexity

IGNORED = -100


class _Window(NamedTuple):
    document: int
    start: int  # of the inputs
    first_target: int
    stop: int  # of inputs and targets


@dataclass
class TextScore:
    """
    What a model says of some texts.

    Args:
        nats (`float`): Total negative log-likelihood.
        tokens (`int`): Tokens of the texts, all of them predicted once.
        words (`int`): Words, and one end-of-line token for each line, of the texts as they were given.
        bytes (`int`): UTF-8 bytes of the texts as they were given.
        documents (`int`): Number of texts.
    """

    nats: float
    tokens: int
    words: int
    bytes: int
    documents: int

    def figures(self) -> dict[str, float]:
        """Perplexity per token and per word, and bits per byte."""
        return corpus_perplexity(self.nats, self.tokens, self.words, self.bytes)


def count_words(text: str) -> int:
    """Words and ends of lines: WikiText's literature counts each `<eos>` that ends a line as a word."""
    return len(text.split()) + text.count("\n")


def detokenize_wikitext(text: str) -> str:
    """
    Text as people write it from WikiText's word-level form: `@-@` joined, no space before punctuation, none inside
    brackets and quotation marks. `<unk>` stays.
    """
    for mark in ("-", ",", "."):
        text = text.replace(f" @{mark}@ ", mark)
    # Before punctuation, which may follow a quotation, and line by line, because some line lacks a mark.
    text = "\n".join(map(_join_quotations, text.split("\n")))
    text = re.sub(r""" ([,.;:!?%)\]}]|'(?:s|t|re|ve|ll|d|m))(?=[\s"])""", r"\1", text)
    return re.sub(r" ([(\[{$£]) ", r" \1", text)


def _join_quotations(line: str) -> str:
    *pieces, last = line.split(' " ')
    # Every second mark closes a quotation.
    return "".join(piece + (' "', '" ')[index % 2] for index, piece in enumerate(pieces)) + last


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int = 256,
    stride: int | None = None,
    batch_size: int = 8,
    num_recurrences: int | None = None,
    detokenize: bool = False,
) -> TextScore:
    """
    The negative log-likelihood of texts, each on its own, its first token given the token that begins documents.

    A window of at most `window` tokens slides over a text by `stride` tokens, and each token is predicted once, from
    at least `window - stride` tokens before it. A stride as long as the window is the cheapest and the least kind.

    Args:
        model (`PreTrainedModel`): A causal language model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): The texts.
        window (`int`, *optional*, defaults to 256): Tokens that the model reads at once.
        stride (`int`, *optional*): Tokens that each window predicts; half of the window if unset.
        batch_size (`int`, *optional*, defaults to 8): Windows at once.
        num_recurrences (`int`, *optional*): Steps of recurrent experts; for MoRE models only.
        detokenize (`bool`, *optional*, defaults to `False`): Scores [`detokenize_wikitext`] of the texts. Words and
            bytes are always those of the texts as given.

    Raises:
        ValueError: If the window is longer than the model takes, the stride does not fit it, or a text is empty.
    """
    stride = max(1, window // 2) if stride is None else stride
    _check_window(model, window, stride)
    encoded = [_encode(tokenizer, detokenize_wikitext(text) if detokenize else text) for text in texts]
    if not encoded or not all(len(ids) > 1 for ids in encoded):
        raise ValueError("A text is empty: there is nothing to predict.")
    windows = [
        _Window(document, *bounds)
        for document, ids in enumerate(encoded)
        for bounds in _slide(len(ids) - 1, window, stride)
    ]
    state = PartialState()
    mine = windows[state.process_index :: state.num_processes]
    nats = 0.0
    starts = range(0, len(mine), batch_size)
    for start in tqdm(starts, desc="Perplexity", leave=False, disable=not state.is_main_process):
        inputs, targets = [], []
        for document, begin, first, stop in mine[start : start + batch_size]:
            ids = encoded[document]
            inputs.append(torch.tensor(ids[begin:stop]))
            target = torch.tensor(ids[begin + 1 : stop + 1])
            target[: first - begin] = IGNORED
            targets.append(target)
        nats += token_nats(model, inputs, targets, num_recurrences).double().sum().item()
    return TextScore(
        nats=math.fsum(gather_object([nats])),
        tokens=sum(len(ids) - 1 for ids in encoded),
        words=sum(map(count_words, texts)),
        bytes=sum(len(text.encode()) for text in texts),
        documents=len(encoded),
    )


def perplexity_by_position(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int,
    bucket: int,
    max_sequences: int = 64,
    batch_size: int = 4,
    num_recurrences: int | None = None,
    detokenize: bool = False,
) -> list[dict[str, float]]:
    """
    Perplexity per token by how much context there is before it. A model that uses its context gets better with
    position; one that fails beyond its training length gets worse there.

    Args:
        model (`PreTrainedModel`): A causal language model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Texts; the beginnings of those with more than `length` tokens count, and if none is
            that long, sequences cut from all of them, one after the other.
        length (`int`): Tokens of a sequence.
        bucket (`int`): Positions that are averaged.
        max_sequences (`int`, *optional*, defaults to 64): Sequences at most.
        batch_size (`int`, *optional*, defaults to 4): Sequences at once.
        num_recurrences (`int`, *optional*): Steps of recurrent experts; for MoRE models only.
        detokenize (`bool`, *optional*, defaults to `False`): Scores [`detokenize_wikitext`] of the texts.

    Returns:
        One dictionary per bucket, `first` and `last` position (from 1), `perplexity` and `tokens`.
    """
    _check_window(model, length, length)
    encoded = [_encode(tokenizer, detokenize_wikitext(text) if detokenize else text) for text in texts]
    sequences = [ids[: length + 1] for ids in encoded if len(ids) > length]
    if not sequences:
        stream = [token for ids in encoded for token in ids]
        sequences = [stream[start : start + length + 1] for start in range(0, len(stream) - length, length)]
    if not sequences:
        total = sum(map(len, encoded))
        raise ValueError(f"The texts have only {total} tokens: there is no sequence of {length} to look at.")
    state = PartialState()
    mine = torch.tensor(sequences[:max_sequences])[state.process_index :: state.num_processes]
    sums = torch.zeros(length, dtype=torch.float64)
    # There may be fewer sequences than processes.
    batches = mine.split(batch_size) if len(mine) else ()
    for batch in tqdm(batches, desc="By position", leave=False, disable=not state.is_main_process):
        nats = token_nats(model, list(batch[:, :-1]), list(batch[:, 1:]), num_recurrences)
        sums += nats.double().sum(dim=0).cpu()
    total = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(dim=0)
    count = min(len(sequences), max_sequences)
    return [
        {
            "first": start + 1,
            "last": start + len(part),
            "perplexity": math.exp(part.mean().item() / count),
            "tokens": count * len(part),
        }
        for start, part in zip(range(0, length, bucket), total.split(bucket), strict=True)
    ]


@torch.no_grad()
def token_nats(
    model: PreTrainedModel,
    inputs: list[torch.Tensor],
    targets: list[torch.Tensor],
    num_recurrences: int | None = None,
) -> torch.Tensor:
    """
    The negative log-likelihood of each target, in nats.

    Args:
        model (`PreTrainedModel`): A causal language model.
        inputs (`list[torch.Tensor]`): Token ids of the sequences, of any lengths; padded on the right.
        targets (`list[torch.Tensor]`): The token that follows each of them, or -100 where none is asked for.
        num_recurrences (`int`, *optional*): Steps of recurrent experts; for MoRE models only.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq)`, 0 where no target is asked for.
    """
    options = {} if num_recurrences is None else {"num_recurrences": num_recurrences}
    ids = pad_sequence(inputs, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True).to(model.device)
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(model.device)
    # What counts begins somewhere, and logits over a large vocabulary cost more than the model.
    kept = ids.shape[1] - int((labels != IGNORED).any(dim=0).nonzero()[0])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept, **options).logits
    nats = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels[:, -kept:], ignore_index=IGNORED, reduction="none"
    )
    return torch.nn.functional.pad(nats, (ids.shape[1] - kept, 0))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text after the token that begins documents."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [first, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _slide(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over tokens: start of the inputs, first target and stop; the first window predicts all of its own."""
    done = 0
    while done < num_tokens:
        stop = min(done + (stride if done else window), num_tokens)
        yield max(0, stop - window), done, stop
        done = stop


def _check_window(model: PreTrainedModel, window: int, stride: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window < 1 or (limit is not None and window > limit):
        raise ValueError(
            f"The window is {window} tokens: the model takes 1 to {'any number' if limit is None else limit}."
        )
    if not 1 <= stride <= window:
        raise ValueError(f"The stride is {stride} tokens: choose 1 to the window, {window}.")
