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
