"""Splits of generated data that cannot share an example."""

import hashlib

SPLITS = ("train", "validation", "test")


def split_of(key: str) -> str:
    """
    The split that an example belongs to: eight tenths train, one tenth validation, one tenth test.

    It depends on `key` alone, so that no example can be in two splits, whatever the seeds, sizes and options of the
    calls that drew it.
    """
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return SPLITS[max(0, bucket - 7)]


def check_split(split: str) -> None:
    """Raise a `ValueError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: choose one of {', '.join(SPLITS)}.")
