"""Sequences to train on: nothing is lost or read twice, and only answers have a loss."""

import functools
import pickle
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pytest
import torch

from mixturekit.trainers.task_data import TaskExample
from mixturekit.trainers.token_datasets import AnswerDataset, PackedTokens, pad_blocks
from mixturekit.trainers.tokenization import END_TOKEN

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer


def documents_of(*texts):
    return datasets.Dataset.from_dict({"text": list(texts)})


def examples_of(*pairs, explanation=""):
    return [TaskExample("babi2", "", prompt, prompt, answer, explanation=explanation) for prompt, answer in pairs]


def random_documents(count, longest, seed=0):
    generator = np.random.default_rng(seed)
    rows = [generator.integers(0, 300, generator.integers(1, longest)).tolist() for _ in range(count)]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"input_ids": rows}, features=features)


@pytest.mark.parametrize("sequence_length", [2, 7, 64, 10_000])
@pytest.mark.parametrize("view", ["whole", "shuffled", "selected", "concatenated", "sliced"])
def test_packing_keeps_every_token_in_order(view, sequence_length):
    documents = random_documents(40, 30)
    documents = {
        "whole": lambda: documents,
        "shuffled": lambda: documents.shuffle(seed=1),
        "selected": lambda: documents.select([5, 3, 39, 3]),
        "concatenated": lambda: datasets.concatenate_datasets([documents, random_documents(9, 50, seed=2)]),
        "sliced": lambda: documents.select(range(7, 21)),
    }[view]()
    blocks = PackedTokens(documents, sequence_length)
    tokens = [token for row in documents["input_ids"] for token in row]
    if len(tokens) % sequence_length == 1:
        tokens.pop()
    assert [token for block in blocks for token in block["input_ids"].tolist()] == tokens
    assert [len(block["input_ids"]) for block in blocks][:-1] == [sequence_length] * (len(blocks) - 1)
    assert 2 <= len(blocks[len(blocks) - 1]["input_ids"]) <= sequence_length


def test_a_block_is_two_int64_tensors_of_their_own(tokenizer):
    block = PackedTokens(random_documents(4, 20), 8)[0]
    assert block.keys() == {"input_ids", "labels"}
    assert block["input_ids"].dtype == block["labels"].dtype == torch.int64
    assert torch.equal(block["input_ids"], block["labels"])
    block["labels"][:] = -100
    assert (block["input_ids"] >= 0).all()


def test_reading_a_block_leaves_the_corpus_on_disk(tmp_path):
    random_documents(40, 50_000).save_to_disk(tmp_path / "corpus")
    documents = datasets.load_from_disk(tmp_path / "corpus").shuffle(seed=0)
    allocated = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    blocks = PackedTokens(documents, 128)
    total = sum(block["labels"].numel() for block in (blocks[0], blocks[len(blocks) // 2]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 256
    assert blocks.num_tokens * 4 > 3_000_000
    assert peak + pyarrow.total_allocated_bytes() - allocated < 100_000
    assert len(pickle.dumps(blocks)) < 100_000
    assert torch.equal(pickle.loads(pickle.dumps(blocks))[7]["input_ids"], blocks[7]["input_ids"])


def test_a_senseless_packing_is_refused():
    with pytest.raises(ValueError, match="sequence_length is 1"):
        PackedTokens(random_documents(2, 5), 1)
    with pytest.raises(ValueError, match="documents is empty"):
        PackedTokens(random_documents(2, 5).select([]), 8)


def test_only_the_answer_and_its_end_have_a_loss(tokenizer):
    pairs = [("the cat sat on", " the mat"), ("12 + 3 =", " 15")]
    for example, (prompt, answer) in zip(AnswerDataset(examples_of(*pairs), tokenizer), pairs, strict=True):
        assert tokenizer.decode(example["input_ids"]) == prompt + answer + END_TOKEN
        learned = example["labels"] != -100
        assert tokenizer.decode(example["labels"][learned]) == answer + END_TOKEN
        assert torch.equal(example["input_ids"][learned], example["labels"][learned])
        # What a model is given in evaluation is what it has been trained on.
        assert example["input_ids"][~learned].tolist() == tokenizer(prompt)["input_ids"]


def test_an_example_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length is 4: the longest example has 6 tokens"):
        AnswerDataset(examples_of(("1 2", " 3"), ("1", "2")), tokenizer, max_length=4)
    with pytest.raises(ValueError, match="examples is empty"):
        AnswerDataset([], tokenizer)


def test_padding_is_on_the_right_and_has_no_label(tokenizer):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.padding_side = "left"
    examples = list(AnswerDataset(examples_of(("1 2", " 3"), ("1", "2")), tokenizer))
    collate = functools.partial(pad_blocks, pad_token_id=tokenizer.pad_token_id)
    batch = collate(examples)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), torch.int64
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch["input_ids"][1].tolist() == examples[1]["input_ids"].tolist() + [tokenizer.pad_token_id] * 3
    assert batch["labels"][1].tolist() == examples[1]["labels"].tolist() + [-100] * 3
    assert torch.equal(batch["input_ids"][0], examples[0]["input_ids"])


def test_an_explanation_follows_the_answer_and_is_learned(tokenizer):
    pair = ("Where is the cat?", " mat")
    (plain,) = AnswerDataset(examples_of(pair), tokenizer)
    (explained,) = AnswerDataset(examples_of(pair, explanation="\nthe cat sat\n"), tokenizer)
    assert tokenizer.decode(explained["input_ids"]) == "Where is the cat? mat\nthe cat sat\n" + END_TOKEN
    length = len(plain["input_ids"]) - 1
    assert torch.equal(explained["input_ids"][:length], plain["input_ids"][:length])
    assert torch.equal(explained["labels"][:length], plain["labels"][:length])
    assert torch.equal(explained["labels"][length:], explained["input_ids"][length:])
