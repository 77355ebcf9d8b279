"""Text to tokens: nothing of a text is lost on the way, and tokens are made once."""

import os
import pickle
import subprocess
import sys

import datasets
import pytest
from transformers import AutoTokenizer

from mixturekit.trainers import tokenization
from mixturekit.trainers.text_data import load_documents
from mixturekit.trainers.tokenization import (
    END_TOKEN,
    PAD_TOKEN,
    encode_answers,
    encode_prompts,
    load_tokenizer,
    tokenize_documents,
    train_tokenizer,
)

pytestmark = pytest.mark.usefixtures("cache")
SENTENCES = ("Mary moved to the bathroom.", "John went back to the garden.", "Mary got the milk there.")


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer


def documents_of(*texts):
    return datasets.Dataset.from_dict({"text": list(texts)})


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
    pieces = list(tokenization._pieces(text, 100))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    monkeypatch.setattr(tokenization._pieces, "__defaults__", (100,))
    assert tokenize_documents(documents_of(text), tokenizer)[0]["input_ids"] == [*whole, tokenizer.eos_token_id]
    assert "".join(tokenization._pieces("x" * 250, 100)) == "x" * 250


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
        from mixturekit.trainers.tokenization import load_tokenizer, tokenize_documents, train_tokenizer
        documents = datasets.Dataset.from_dict({"text": ["the cat", "the dog"]})
        tokenize_documents(documents, load_tokenizer(sys.argv[1]))
        print(train_tokenizer(["the cat sat on the mat. " * 20, "the dog did not. 1234567890"], 300).get_vocab())
    """
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert eval(output) == tokenizer.get_vocab()
    assert tokens_in(cache) == made


@pytest.fixture(scope="module")
def line_tokenizer():
    return train_tokenizer(["\n".join([*SENTENCES, "Where is the milk?"]), " garden", "12 + 3 ="] * 5, 1000, "line")


def test_the_line_tokenizer_makes_a_sentence_one_token(line_tokenizer):
    text = "\n".join([SENTENCES[0], SENTENCES[2], "Where is the milk?"])
    tokens = [line_tokenizer.decode([token]) for token in line_tokenizer(text)["input_ids"]]
    assert tokens == [f"{SENTENCES[0]}\n", f"{SENTENCES[2]}\n", "Where is the milk?"]


@pytest.mark.parametrize("text", ["  odd \n\n spacing ", "John moved to the moon.\nWhy?", "naïve 🙂\r\n12 + 30 ="])
def test_any_text_survives_the_line_tokenizer_and_no_token_crosses_a_line(line_tokenizer, text):
    ids = line_tokenizer(text)["input_ids"]
    assert line_tokenizer.decode(ids) == text
    assert all("\n" not in line_tokenizer.decode([token])[:-1] for token in ids)


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="unit is 'syllable': choose 'word' or 'line'"):
        train_tokenizer(["text"], 300, "syllable")


def test_prompts_begin_as_the_tokenizer_begins_texts_and_answers_do_not(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begins = train_tokenizer(["the cat sat"], 300)
    end = (END_TOKEN, begins.eos_token_id)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_TOKEN} $A {END_TOKEN}", special_tokens=[end]
    )
    (prompt,), (plain,) = encode_prompts(begins, ["the cat"]), encode_answers(begins, ["the cat"])
    assert prompt == [begins.eos_token_id, *plain]
