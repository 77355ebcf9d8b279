"""Text data sets: nothing of a text is lost on the way, and bad input is named at once."""

import os
import re
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from mixturekit.trainers.text_data import (
    dataset_splits,
    load_documents,
    load_train_and_validation,
    split_documents,
)
from mixturekit.trainers.tokenization import load_tokenizer

pytestmark = pytest.mark.usefixtures("cache")
WIKITEXT = Path(os.environ.get("MIXTUREKIT_DATA", Path(__file__).parents[2] / "../shared/data")) / "wikitext/valid.txt"
ARTICLES = [
    " = One = \n\n Words . \n\n = = Part = = \n\n More words . \n\n",
    " = Two = \n\n x = y = z \n = not alone = \n\n",
]


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
