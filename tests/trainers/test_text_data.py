"""Text to tokens: nothing of a text is lost on the way, nothing is read twice, and bad input is named at once."""

import functools
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from transformers import AutoTokenizer

from mixturekit.trainers import text_data
from mixturekit.trainers.text_data import (
    END_TOKEN,
    PAD_TOKEN,
    AnswerDataset,
    PackedTokens,
    dataset_splits,
    generated_documents,
    load_documents,
    load_tokenizer,
    load_train_and_validation,
    pad_blocks,
    split_documents,
    tokenize_documents,
    train_tokenizer,
)

WIKITEXT = Path(os.environ.get("MIXTUREKIT_DATA", Path(__file__).parents[2] / "../shared/data")) / "wikitext/valid.txt"
ARTICLES = [
    " = One = \n\n Words . \n\n = = Part = = \n\n More words . \n\n",
    " = Two = \n\n x = y = z \n = not alone = \n\n",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Caches of its own for every test, and no way to the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat. " * 20, "the dog did not. 1234567890"], 300)


@pytest.fixture
def wikitext():
    if not WIKITEXT.exists():
        pytest.skip(f"there is no {WIKITEXT}; set MIXTUREKIT_DATA")
    return load_documents(str(WIKITEXT))


def documents_of(*texts):
    return datasets.Dataset.from_dict({"text": list(texts)})


def test_wikitext_is_split_into_its_articles(wikitext):
    assert len(wikitext) == 60
    assert wikitext[0]["text"].lstrip().startswith("= Homarus gammarus =")
    text = WIKITEXT.read_text(encoding="utf-8")
    assert re.sub(r"(?m)^ $", "", text) == "".join(wikitext["text"])
    # The 217,646 words of WikiText's literature count an end-of-line token per line.
    assert sum(len(article.split()) + article.count("\n") for article in wikitext["text"]) == 217_646


def test_the_last_tenth_of_wikitext_is_held_out(wikitext):
    train, validation = split_documents(wikitext, 0.1)
    assert train["text"][:] == wikitext["text"][:54]
    assert validation["text"][:] == wikitext["text"][54:]


@pytest.mark.parametrize("form", ["hub", "file"])
def test_only_headings_of_level_one_that_stand_alone_begin_an_article(tmp_path, form):
    lines = "".join(ARTICLES).splitlines()
    if form == "hub":
        rows = datasets.Dataset.from_dict({"text": [f"{line}\n" if line else "" for line in lines]})
        rows.to_parquet(tmp_path / "wiki.parquet")
        name = tmp_path / "wiki.parquet"
    else:
        name = tmp_path / "wiki.test.tokens"
        name.write_text("".join(f"{line or ' '}\n" for line in lines))
    assert load_documents(str(name))["text"][:] == ARTICLES


def test_a_plain_text_file_is_one_document_and_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("It was.\n\nOr so = it = seems.\n")
    assert load_documents(str(path))["text"][:] == [path.read_text()]
    path.write_text("It was not.\n")
    os.utime(path, (1, 1))
    assert load_documents(str(path))["text"][:] == ["It was not.\n"]


def test_a_folder_of_text_has_a_document_per_file(tmp_path):
    for name, text in {"b.md": "# b", "a.txt": "a", "sub/c.txt": "c", ".hidden/d.txt": "d", "README.md": "no"}.items():
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(text)
    assert sorted(load_documents(str(tmp_path / "books"))["text"]) == ["# b", "a", "c"]


@pytest.mark.parametrize("write", ["to_json", "to_csv", "to_parquet", "save_to_disk"])
def test_tables_have_a_document_per_row_and_rows_without_text_are_left_out(tmp_path, write):
    path = (
        tmp_path / {"to_json": "a.jsonl", "to_csv": "a.csv", "to_parquet": "a.parquet", "save_to_disk": "saved"}[write]
    )
    rows = datasets.Dataset.from_dict({"body": ["one\ntwo", " \n", "three", ""], "number": [1, 2, 3, 4]})
    getattr(rows, write)(str(path))
    documents = load_documents(str(path), text_column="body")
    assert documents.column_names == ["text"]
    assert documents["text"][:] == ["one\ntwo", "three"]


def test_files_named_after_splits_are_splits(tmp_path):
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "test/0.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    assert sorted(dataset_splits(str(tmp_path / "data"))) == ["test", "train", "validation"]
    assert load_documents(str(tmp_path / "data"), split="validation")["text"][:] == ["wiki.valid.tokens"]
    train, validation = load_train_and_validation(str(tmp_path / "data"))
    assert (train["text"][:], validation["text"][:]) == (["wiki.train.tokens"], ["wiki.valid.tokens"])


def test_one_file_without_a_split_in_its_name_and_none_is_lost(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("test of time.txt", "emma.txt", "persuasion.txt"):
        (folder / name).write_text(name)
    assert dataset_splits(str(folder)) == ["train"]
    assert len(load_documents(str(folder))) == 3
    train, validation = load_train_and_validation(str(folder))
    assert (len(train), len(validation)) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "options", "error", "reason"),
    [
        ("missing.txt", None, {}, FileNotFoundError, "No file or folder '.*missing.txt'"),
        ("missing/folder", None, {}, FileNotFoundError, "No file or folder"),
        ("empty.txt", "", {}, ValueError, r"empty\.txt is empty"),
        ("blank.txt", " \n\n", {}, ValueError, r"blank\.txt is empty: split 'train' holds no text"),
        ("empty.jsonl", "\n", {}, ValueError, r"Split 'train' of .*empty\.jsonl cannot be read as json"),
        ("latin.txt", "caf\xe9".encode("latin-1"), {}, ValueError, r"latin\.txt is not UTF-8 text"),
        ("broken.jsonl", '{"text": "a"}\n{"te', {}, ValueError, r"broken\.jsonl cannot be read as json"),
        ("a.csv", "body,n\nhello,1\n", {}, ValueError, "text_column is 'text': .*a.csv has only the columns body, n"),
        ("a.csv", "body,n\nhello,1\n", {"text_column": "n"}, ValueError, "text_column is 'n': .*not text"),
        ("a.txt", "text", {"split": "validation"}, ValueError, "split is 'validation': .*a.txt has only train"),
    ],
)
def test_bad_data_is_named_at_once(tmp_path, name, content, options, error, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(error, match=reason):
        load_documents(str(tmp_path / name), **options)


def test_folders_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="is empty: expected text, .jsonl"):
        load_documents(str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match="mixes files of the kinds csv, text"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["", "text.txt", "./text", "/no/such", "~/no_such", "a/b/c", "data/", r"data\text", "sub/x"]
)
@pytest.mark.parametrize("load", [load_documents, dataset_splits, load_tokenizer])
def test_a_path_that_does_not_exist_never_reaches_the_hub(tmp_path, monkeypatch, load, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for module, function in (
        (datasets, "load_dataset"),
        (datasets, "get_dataset_split_names"),
        (AutoTokenizer, "from_pretrained"),
    ):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        load(name)


def test_a_hub_id_is_asked_for_as_it_is(monkeypatch):
    def load_dataset(name, config, split, cache_dir):
        assert (name, config, split) == ("Salesforce/wikitext", "wikitext-103-raw-v1", "train[:10%]")
        return documents_of("a document")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_documents("Salesforce/wikitext", "wikitext-103-raw-v1", "train[:10%]")) == 1


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(60, 0.1, 6), (3, 0.01, 1), (2, 0.9, 1), (10, 0.25, 2)])
def test_held_out_documents_are_the_last_and_neither_part_is_empty(count, fraction, held_out):
    train, validation = split_documents(documents_of(*map(str, range(count))), fraction)
    assert len(validation) == held_out
    assert [*train["text"], *validation["text"]] == [str(index) for index in range(count)]


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {index}\n" for index in range(100))
    train, validation = split_documents(documents_of(text), 0.1)
    assert train[0]["text"] + validation[0]["text"] == text
    assert train[0]["text"].endswith("\n")
    assert len(validation[0]["text"]) == pytest.approx(0.1 * len(text), rel=0.1)
    with pytest.raises(ValueError, match="too few lines"):
        split_documents(documents_of("one line"))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5])
def test_a_senseless_validation_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction is {fraction}"):
        split_documents(documents_of("a", "b"), fraction)


@pytest.mark.parametrize(
    "text",
    [
        "the cat sat",
        "  two spaces , ' odd ' spacing .  \n\n\t",
        "12 + 345 = 357",
        "naïve Ωmega 你好 🙂\u200d🔬 \u2028 \x00 \r\n",
        f"before{END_TOKEN}after",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_of_their_own_unless_asked_otherwise(tokenizer):
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert train_tokenizer(["1234 " * 50], 300, split_digits=False).tokenize("1234") == ["1234"]


def test_a_trained_tokenizer_loads_again_with_its_special_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = "the cat, 12 🙂"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (END_TOKEN, END_TOKEN, PAD_TOKEN)
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tokenizer, tmp_path):
    bare = pickle.loads(pickle.dumps(tokenizer))
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == END_TOKEN
    bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token"):
        load_tokenizer(str(tmp_path))


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"No tokenizer could be loaded from {tmp_path}"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="vocab_size is 257: it must be at least 258"):
        train_tokenizer(["text"], 257)


def test_every_document_ends_with_the_end_token(tokenizer):
    texts = ["the cat", "sat", "on 12 mats"]
    tokens = tokenize_documents(documents_of(*texts), tokenizer)
    assert tokens.column_names == ["input_ids"]
    assert [tokenizer.decode(row) for row in tokens["input_ids"]] == [text + END_TOKEN for text in texts]


def test_a_very_long_text_is_cut_without_changing_its_tokens(tokenizer, monkeypatch):
    text = "the cat's mat.  \n\n the  1234 dogs, did not\n" * 30
    whole = tokenizer(text)["input_ids"]
    pieces = list(text_data._pieces(text, 100))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    monkeypatch.setattr(text_data._pieces, "__defaults__", (100,))
    assert tokenize_documents(documents_of(text), tokenizer)[0]["input_ids"] == [*whole, tokenizer.eos_token_id]
    assert "".join(text_data._pieces("x" * 250, 100)) == "x" * 250


def tokens_in(cache):
    return {path.name: path.stat().st_mtime_ns for path in (cache / "mixturekit_tokens").glob("*.arrow")}


def test_the_tokens_of_a_text_are_made_once(tokenizer, cache, tmp_path):
    texts = [f"the cat {index}" for index in range(20)]
    first = tokenize_documents(documents_of(*texts), tokenizer, num_proc=2)
    made = tokens_in(cache)
    assert len(made) == 2
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)  # leaves its state in the tokenizer
    for index, num_proc in enumerate((None, 1, 2)):
        documents_of(*texts).to_json(str(tmp_path / f"copy{index}.jsonl"))
        copy = load_documents(str(tmp_path / f"copy{index}.jsonl"))
        assert tokenize_documents(copy, tokenizer, num_proc)["input_ids"][:] == first["input_ids"][:]
    assert tokens_in(cache) == made
    tokenize_documents(documents_of(*texts[:-1], "another"), tokenizer)
    tokenize_documents(documents_of(*texts), train_tokenizer(["another tokenizer"], 270))
    assert len(tokens_in(cache)) == 4


def test_another_process_finds_the_tokens_and_trains_the_same_tokenizer(tokenizer, cache, tmp_path):
    """Another process hashes strings differently, which must not reach the cache or the vocabulary."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenize_documents(documents_of("the cat", "the dog"), tokenizer)
    made = tokens_in(cache)
    code = """if True:
        import sys, datasets
        from mixturekit.trainers.text_data import load_tokenizer, tokenize_documents, train_tokenizer
        documents = datasets.Dataset.from_dict({"text": ["the cat", "the dog"]})
        tokenize_documents(documents, load_tokenizer(sys.argv[1]))
        print(train_tokenizer(["the cat sat on the mat. " * 20, "the dog did not. 1234567890"], 300).get_vocab())
    """
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert eval(output) == tokenizer.get_vocab()
    assert tokens_in(cache) == made


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
    for example, (prompt, answer) in zip(AnswerDataset(pairs, tokenizer), pairs, strict=True):
        assert tokenizer.decode(example["input_ids"]) == prompt + answer + END_TOKEN
        learned = example["labels"] != -100
        assert tokenizer.decode(example["labels"][learned]) == answer + END_TOKEN
        assert torch.equal(example["input_ids"][learned], example["labels"][learned])
        # What a model is given in evaluation is what it has been trained on.
        assert example["input_ids"][~learned].tolist() == tokenizer(prompt)["input_ids"]


def test_an_example_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length is 4: the longest example has 6 tokens"):
        AnswerDataset([("1 2", " 3"), ("1", "2")], tokenizer, max_length=4)
    with pytest.raises(ValueError, match="pairs is empty"):
        AnswerDataset([], tokenizer)


def test_padding_is_on_the_right_and_has_no_label(tokenizer):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.padding_side = "left"
    examples = list(AnswerDataset([("1 2", " 3"), ("1", "2")], tokenizer))
    collate = functools.partial(pad_blocks, pad_token_id=tokenizer.pad_token_id)
    batch = collate(examples)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), torch.int64
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch["input_ids"][1].tolist() == examples[1]["input_ids"].tolist() + [tokenizer.pad_token_id] * 3
    assert batch["labels"][1].tolist() == examples[1]["labels"].tolist() + [-100] * 3
    assert torch.equal(batch["input_ids"][0], examples[0]["input_ids"])


def test_generated_data_mixes_its_tasks_in_equal_shares():
    rows = generated_documents(num_examples=100)
    assert rows.column_names == ["task", "prompt", "answer"]
    assert {task: rows["task"][:].count(task) for task in rows.unique("task")} == {
        "babi2": 34,
        "babi3": 33,
        "addition": 33,
    }
    assert {"babi2", "babi3", "addition"} == set(rows["task"][:15])
    assert all(row["answer"].startswith(" ") and not row["prompt"].endswith(" ") for row in rows)


def test_generated_splits_share_no_prompt():
    prompts = {
        split: set(generated_documents(split, num_examples=300)["prompt"]) for split in dataset_splits("generated")
    }
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


def test_generated_data_depends_on_the_seed_alone():
    assert generated_documents(num_examples=30).to_list() == generated_documents(num_examples=30).to_list()
    assert generated_documents(num_examples=30).to_list() != generated_documents(num_examples=30, seed=1).to_list()


def test_generated_data_loads_like_any_other(monkeypatch):
    monkeypatch.setattr(text_data.generated_documents, "__defaults__", ("train", 0, 30, ("babi2", "addition")))
    documents = load_documents("generated", split="validation")
    rows = generated_documents("validation")
    assert documents["text"][:] == [row["prompt"] + row["answer"] for row in rows]


@pytest.mark.parametrize("tasks", [(), ("babi4",)])
def test_unknown_tasks_are_refused(tasks):
    with pytest.raises(ValueError, match="choose from babi2, babi3, addition, subtraction, multiplication"):
        generated_documents(tasks=tasks)
