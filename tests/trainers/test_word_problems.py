"""Generated word problems: right, repeatable, and no question in two splits."""

import re

import pytest

from mixturekit.trainers.gsm8k import correctness_reward
from mixturekit.trainers.splits import SPLITS
from mixturekit.trainers.word_problems import generate_word_problems


def test_every_solution_solves_its_question():
    for row in generate_word_problems(300, max_number=30, seed=1):
        first, second = map(int, re.findall(r"\d+", row["question"]))
        loses = "are left" in row["question"] or "keep" in row["question"]
        assert row["answer"].endswith(f"\n#### {first - second if loses else first + second}")
        assert correctness_reward([""], [row["answer"]], [row["answer"]]) == [1.0]


def test_the_same_seed_gives_the_same_problems_and_more_of_them_begin_alike():
    few, many = generate_word_problems(20, seed=3), generate_word_problems(40, seed=3)
    assert few.to_list() == many.to_list()[:20]
    assert few.to_list() != generate_word_problems(20, seed=4).to_list()


def test_no_question_is_in_two_splits():
    questions = [set(generate_word_problems(2000, split)["question"]) for split in SPLITS]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]


def test_numbers_stay_within_the_limit_and_results_are_not_negative():
    rows = generate_word_problems(300, max_number=3)
    assert {int(number) for row in rows for number in re.findall(r"\d+", row["question"])} == {1, 2, 3}
    assert all("-" not in row["answer"].rpartition("####")[2] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_problems": 0}, "num_problems is 0"),
        ({"num_problems": 1, "split": "tests"}, "split is 'tests'"),
        ({"num_problems": 1, "max_number": 0}, "max_number is 0"),
    ],
)
def test_bad_arguments_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_word_problems(**arguments)
