"""`completions.jsonl`, the solutions that an evaluation on GSM8K leaves: a row for each, and its columns."""

import json
from collections.abc import Iterator
from pathlib import Path

COLUMNS = {
    "problem": ("int64", "number of the problem in its split"),
    "decoding": ("string", "greedy or sampled"),
    "sample": ("int64", "number of the solution to the problem"),
    "question": ("string", "the problem"),
    "completion": ("string", "the solution"),
    "answer": ("string", "the number that is right"),
    "extracted": ("string", "the number that was read from the solution, if there is one"),
    "exact": ("bool", "whether these are equal"),
    "strict_match": ("bool", "whether lm-eval's filter of that name takes it for right"),
    "flexible_extract": ("bool", "whether lm-eval's filter of that name takes it for right"),
    "marked": ("bool", "whether the solution marks its answer"),
    "tokens": ("int64", "length of the solution"),
    "finished": ("bool", "whether it came to its end"),
}
_TYPES = {"int64": int, "string": str, "bool": bool}


def read_completions(path: Path) -> Iterator[dict]:
    """
    The rows of a file.

    Raises:
        ValueError: If a line has no row. What a killed process, or a full disk, left of the last one is no line.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, cannot be read: {error}.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is no solution but {str(row)[:50]!r}.")
        for name, (kind, _) in COLUMNS.items():
            value = row.get(name)
            # A solution may lack a number. And True is an integer to Python.
            if type(value) is not _TYPES[kind] and not (name == "extracted" and value is None):
                raise ValueError(f"{path}, line {number}: {name} is {str(value)[:50]!r} and not of type {kind}.")
        yield row


def read_report(path: Path) -> dict:
    """
    The report that lies beside the rows.

    Raises:
        ValueError: If it is none.
    """
    try:
        report = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict):
        raise ValueError(f"{path} has no settings: it is no report of evaluate_gsm8k.py.")
    return report
