"""Word problems of one step in the format of GSM8K, for training and evaluation without a network."""

import random

import datasets

from .splits import check_split, split_of

_NAMES = ("Anna", "Ben", "Clara", "David", "Ella", "Frank", "Grace", "Henry", "Ivy", "Jack")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
_STORIES = (
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+"),
    ("{name} finds {a} {things} and then {b} {things}. How many {things} does {name} find?", "+"),
    ("{name} has {a} {things} and loses {b} of them. How many {things} are left?", "-"),
    ("{name} has {a} {things} and gives {b} to {friend}. How many {things} does {name} keep?", "-"),
)


def generate_word_problems(
    num_problems: int, split: str = "train", max_number: int = 9, seed: int = 0
) -> datasets.Dataset:
    """
    Draw problems of addition and subtraction. No question is in two splits; sums of small numbers are in all of them.

    Args:
        num_problems (`int`): How many.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"` or `"test"`.
        max_number (`int`, *optional*, defaults to 9): The largest number in a question.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same problems.

    Returns:
        `datasets.Dataset`: Rows with `"question"` and `"answer"`, the solution with its `####`.

    Raises:
        ValueError: If the split is unknown, or a number is below 1.
    """
    check_split(split)
    if num_problems < 1:
        raise ValueError(f"num_problems is {num_problems}: it must be at least 1.")
    if max_number < 1:
        raise ValueError(f"max_number is {max_number}: it must be at least 1.")
    rng = random.Random(f"word problems {split} {seed}")
    rows = []
    while len(rows) < num_problems:
        story, symbol = _STORIES[int(rng.random() * len(_STORIES))]
        a, b = (1 + int(rng.random() * max_number) for _ in range(2))
        if symbol == "-" and b > a:
            a, b = b, a
        first = int(rng.random() * len(_NAMES))
        words = {
            "name": _NAMES[first],
            "friend": _NAMES[(first + 1 + int(rng.random() * (len(_NAMES) - 1))) % len(_NAMES)],
            "things": _THINGS[int(rng.random() * len(_THINGS))],
        }
        question = story.format(a=a, b=b, **words)
        if split_of(question) != split:
            continue
        result = a + b if symbol == "+" else a - b
        solution = f"{a} {symbol} {b} = <<{a}{symbol}{b}={result}>>{result}\n#### {result}"
        rows.append({"question": question, "answer": solution})
    return datasets.Dataset.from_list(rows)
