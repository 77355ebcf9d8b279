"""Token sequences to train on: packed documents, and prompts with answers."""

from collections.abc import Sequence

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .task_data import TaskExample
from .tokenization import check_end_token, encode_answers, encode_prompts


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
    Prompts with answers, each tokenized as `prompt + answer + explanation + end token`, with no loss on the prompt.

    Prompt and answer are tokenized apart, so that the prompt's tokens are those of the prompt alone, as in evaluation.

    Args:
        examples (`Sequence[TaskExample]`): Prompts and answers.
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with an end token.
        max_length (`int`, *optional*): The longest example that the model takes.
    """

    def __init__(
        self, examples: Sequence[TaskExample], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ):
        if not examples:
            raise ValueError("examples is empty: there is nothing to learn from.")
        check_end_token(tokenizer)
        self._prompts = encode_prompts(tokenizer, [row.prompt for row in examples])
        answers = encode_answers(tokenizer, [row.answer for row in examples])
        explanations = encode_answers(tokenizer, [row.explanation for row in examples])
        end = [tokenizer.eos_token_id]
        self._answers = [answer + why + end for answer, why in zip(answers, explanations, strict=True)]
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
