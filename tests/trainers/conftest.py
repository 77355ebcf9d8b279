"""What the tests of data share: caches of their own, and a small tokenizer."""

import datasets
import pytest

from mixturekit.trainers.tokenization import train_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Caches of its own for every test, and no way to the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of few merges."""
    return train_tokenizer(["the cat sat on the mat. " * 20, "the dog did not. 1234567890"], 300)


@pytest.fixture(scope="session")
def write_babi():
    """Writes questions in the original format; one whose facts begin with those of the one before goes on with it."""

    def write(questions, path):
        told, number, line_of_fact = (), 0, []
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for question in questions:
                if question.facts[: len(told)] != told:
                    told, number, line_of_fact = (), 0, []
                for fact in question.facts[len(told) :]:
                    number += 1
                    line_of_fact.append(number)
                    file.write(f"{number} {fact}\n")
                number += 1
                supporting = " ".join(str(line_of_fact[index]) for index in question.supporting)
                # The original files have a space after the question mark.
                file.write(f"{number} {question.question} \t{question.answer}\t{supporting}\n")
                told = question.facts

    return write
