"""Addition, subtraction and multiplication of numbers of any length, as text for a language model."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from .splits import check_split, split_of

SYMBOLS = {"addition": "+", "subtraction": "-", "multiplication": "*"}


@dataclass(frozen=True)
class ArithmeticProblem:
    """
    One problem, `left` and `right` being its operands.

    Args:
        operation (`str`): `"addition"`, `"subtraction"` or `"multiplication"`.
        left (`int`): The first operand.
        right (`int`): The second operand.
    """

    operation: str
    left: int
    right: int

    @property
    def result(self) -> int:
        """The right answer."""
        if self.operation == "addition":
            return self.left + self.right
        if self.operation == "subtraction":
            return self.left - self.right
        return self.left * self.right


def format_problem(
    problem: ArithmeticProblem, reverse_answer: bool = False, spaced_digits: bool = False
) -> tuple[str, str]:
    """
    The prompt and the answer of a problem as text, the same for training and for evaluation.

    Args:
        problem (`ArithmeticProblem`): The problem.
        reverse_answer (`bool`, *optional*, defaults to `False`): Writes the least significant digit first. A model
            then needs only the digits and the carry at hand for each digit that it writes, which makes addition
            learnable from few examples (Lee et al. 2023, "Teaching Arithmetic to Small Transformers",
            arXiv:2307.03381).
        spaced_digits (`bool`, *optional*, defaults to `False`): Puts a space between digits, so that any tokenizer
            sees them one by one.

    Example:

    ```python
    >>> from mixturekit.trainers.arithmetic import ArithmeticProblem, format_problem

    >>> format_problem(ArithmeticProblem("addition", 347, 58))
    ('347 + 58 =', ' 405')
    >>> format_problem(ArithmeticProblem("addition", 347, 58), reverse_answer=True, spaced_digits=True)
    ('3 4 7 + 5 8 =', ' 5 0 4')
    ```
    """
    join = " ".join if spaced_digits else "".join
    answer = str(problem.result)[::-1] if reverse_answer else str(problem.result)
    prompt = f"{join(str(problem.left))} {SYMBOLS[problem.operation]} {join(str(problem.right))} ="
    return prompt, f" {join(answer)}"


def parse_answer(text: str, reverse_answer: bool = False) -> int | None:
    """
    The number on the first line of a model's answer, digits spaced or not; `None` if the line is no whole number.

    `reverse_answer` says that the least significant digit comes first.
    """
    digits = text.strip().partition("\n")[0].replace(" ", "")
    # int() alone would also take "1_000", "+5" and digits of other scripts.
    if not (digits.isascii() and digits.isdecimal()):
        return None
    return int(digits[::-1] if reverse_answer else digits)


def generate_problems(
    operation: str,
    num_problems: int,
    split: str = "train",
    seed: int = 0,
    *,
    min_digits: int = 1,
    max_digits: int = 3,
    at_most: bool = False,
) -> list[ArithmeticProblem]:
    """
    Generate distinct problems. Each operand's number of digits is drawn first, all lengths being equally likely, so
    that short numbers are not rare; once the problems of some lengths run out, the others fill up.

    No problem is in two splits: the unordered pair of operands decides its split (see [`~splits.split_of`]), so that
    `58 + 347` is never held out from a model that trains on `347 + 58`. Subtraction puts the larger operand first.

    Args:
        operation (`str`): `"addition"`, `"subtraction"` or `"multiplication"`.
        num_problems (`int`): How many problems.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"` or `"test"`.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same problems on every machine.
        min_digits (`int`, *optional*, defaults to `1`): Digits of the shortest operand.
        max_digits (`int`, *optional*, defaults to `3`): Digits of the longest operand.
        at_most (`bool`, *optional*, defaults to `False`): Returns all problems there are where these are fewer.

    Returns:
        `list[ArithmeticProblem]`: `num_problems` problems, no two of them equal.
    """
    check_split(split)
    if operation not in SYMBOLS:
        raise ValueError(f"operation is {operation!r}: choose one of {', '.join(SYMBOLS)}.")
    if min_digits < 1:
        raise ValueError(f"min_digits is {min_digits}: numbers have at least 1 digit.")
    if max_digits < min_digits:
        raise ValueError(f"max_digits is {max_digits}: it must not be below min_digits ({min_digits}).")

    rng = random.Random(f"{operation} {split} {seed}")
    low, high = 0 if min_digits == 1 else 10 ** (min_digits - 1), 10**max_digits
    expected = (high - low) ** 2 * (0.8 if split == "train" else 0.1) / (2 if operation == "subtraction" else 1)
    # Where a good part of the split is asked for, drawing until enough distinct pairs turn up takes long, or forever.
    pairs = (
        _shuffled_pairs(rng, low, high) if num_problems > expected / 8 else _drawn_pairs(rng, min_digits, max_digits)
    )
    problems: dict[ArithmeticProblem, None] = {}
    for left, right in pairs:
        if len(problems) >= num_problems:
            break
        larger, smaller = max(left, right), min(left, right)
        if split_of(f"{larger} {smaller}") == split:
            pair = (larger, smaller) if operation == "subtraction" else (left, right)
            problems[ArithmeticProblem(operation, *pair)] = None
    if len(problems) < num_problems and not at_most:
        raise ValueError(
            f"num_problems is {num_problems}: split {split!r} has only {len(problems)} distinct problems of "
            f"{operation} with {min_digits} to {max_digits} digits, so ask for fewer or raise max_digits."
        )
    return list(problems)


def _drawn_pairs(rng: random.Random, min_digits: int, max_digits: int) -> Iterator[tuple[int, int]]:
    """Random pairs without end; they repeat."""
    while True:
        yield _number(rng, min_digits, max_digits), _number(rng, min_digits, max_digits)


def _number(rng: random.Random, min_digits: int, max_digits: int) -> int:
    # Of all methods of Random, Python promises the same numbers in every version for random() alone.
    length = min_digits + int(rng.random() * (max_digits - min_digits + 1))
    lowest = 0 if length == 1 else 1
    number = lowest + int(rng.random() * (10 - lowest))
    for _ in range(length - 1):
        number = number * 10 + int(rng.random() * 10)
    return number


def _shuffled_pairs(rng: random.Random, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Every pair of numbers from `low` up to `high`, drawn without replacement with the chances of `_drawn_pairs`."""
    size = high - low
    # How many numbers are as long as this one: `_drawn_pairs` draws it that many times less often.
    peers = [10 if number < 10 else 9 * 10 ** (len(str(number)) - 1) for number in range(low, high)]

    def waiting_time(pair: int) -> float:
        # Sorting by exponential waiting times is weighted drawing without replacement.
        return -math.log(1.0 - rng.random()) * peers[pair // size] * peers[pair % size]

    for pair in sorted(range(size * size), key=waiting_time):
        yield low + pair // size, low + pair % size
