"""Arithmetic: right answers, honest splits, and text that a model can learn from."""

import hashlib

import pytest

from mixturekit.trainers.arithmetic import SYMBOLS, ArithmeticProblem, format_problem, generate_problems, parse_answer
from mixturekit.trainers.splits import SPLITS


@pytest.fixture(params=SYMBOLS)
def operation(request):
    return request.param


def test_the_text_of_a_problem_is_true(operation):
    for problem in generate_problems(operation, 200, max_digits=4):
        prompt, answer = format_problem(problem)
        assert prompt.endswith(" =")
        assert eval(prompt.removesuffix(" =")) == int(answer) == problem.result
        assert answer[0] == " "


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, ("347 + 58 =", " 405")),
        ({"reverse_answer": True}, ("347 + 58 =", " 504")),
        ({"spaced_digits": True}, ("3 4 7 + 5 8 =", " 4 0 5")),
        ({"reverse_answer": True, "spaced_digits": True}, ("3 4 7 + 5 8 =", " 5 0 4")),
    ],
)
def test_the_four_ways_to_write_a_problem(options, text):
    assert format_problem(ArithmeticProblem("addition", 347, 58), **options) == text


@pytest.mark.parametrize("reverse_answer", [False, True])
@pytest.mark.parametrize("spaced_digits", [False, True])
def test_a_written_answer_is_read_back(operation, reverse_answer, spaced_digits):
    for problem in generate_problems(operation, 50, "test"):
        _, answer = format_problem(problem, reverse_answer, spaced_digits)
        assert parse_answer(f"{answer}\n1 + 1 = 2", reverse_answer) == problem.result


@pytest.mark.parametrize("text", ["", " ", "\n12", "twelve", "4 + 1", "1_000", "+5", "4.0", "٣"])
def test_what_is_no_number_is_not_read_as_one(text):
    assert parse_answer(text) == (12 if text == "\n12" else None)


@pytest.mark.parametrize("max_digits", [2, 3, 12])
def test_splits_share_no_pair_of_operands_in_any_order_operation_or_seed(max_digits):
    pairs = {
        split: {
            frozenset((problem.left, problem.right))
            for operation in SYMBOLS
            for seed in (0, 1)
            for problem in generate_problems(operation, 150, split, seed, max_digits=max_digits)
        }
        for split in SPLITS
    }
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["validation"] & pairs["test"]


def test_the_splits_of_a_small_range_are_all_of_its_problems():
    sizes = {"train": 0, "validation": 0, "test": 0}
    for split in SPLITS:
        with pytest.raises(ValueError, match=f"split '{split}' has only") as error:
            generate_problems("addition", 10_001, split, max_digits=2)
        sizes[split] = int(str(error.value).split("has only ")[1].split()[0])
        assert len(set(generate_problems("addition", sizes[split], split, max_digits=2))) == sizes[split]
    assert sum(sizes.values()) == 100**2
    assert sizes["train"] == pytest.approx(8_000, abs=200)


def test_problems_are_distinct_and_every_length_is_equally_frequent(operation):
    problems = generate_problems(operation, 800, min_digits=3, max_digits=5)
    assert len(set(problems)) == 800
    lengths = [len(str(number)) for problem in problems for number in (problem.left, problem.right)]
    assert {length: lengths.count(length) for length in (3, 4, 5)} == pytest.approx(
        dict.fromkeys((3, 4, 5), 533), abs=80
    )


def test_short_numbers_run_out_before_long_ones():
    problems = generate_problems("addition", 2_000, max_digits=2)
    short = [problem for problem in problems if max(problem.left, problem.right) < 10]
    single = [problem for problem in problems if min(problem.left, problem.right) < 10]
    assert len(short) > 80
    assert len(single) > 1_000


def test_operands_have_the_digits_asked_for(operation):
    for problem in generate_problems(operation, 100, min_digits=4, max_digits=20):
        assert 4 <= len(str(problem.left)) <= 20
        assert 4 <= len(str(problem.right)) <= 20


def test_subtraction_stays_above_zero():
    assert all(problem.result >= 0 for problem in generate_problems("subtraction", 500))


def test_generation_is_the_same_everywhere():
    text = repr(
        [
            format_problem(problem)
            for operation in SYMBOLS
            for split in SPLITS
            for count, max_digits in ((20, 9), (30, 2))
            for problem in generate_problems(operation, count, split, seed=3, max_digits=max_digits)
        ]
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "050aa9d3c8e7a7fa"


def test_another_seed_gives_other_problems(operation):
    assert generate_problems(operation, 50, seed=0) == generate_problems(operation, 50, seed=0)
    assert generate_problems(operation, 50, seed=0) != generate_problems(operation, 50, seed=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"operation": "division"}, "operation is 'division': choose one of addition, subtraction, multiplication"),
        ({"split": "dev"}, "split is 'dev': choose one of train, validation, test"),
        ({"min_digits": 0}, "min_digits is 0: numbers have at least 1 digit"),
        ({"min_digits": 4}, r"max_digits is 3: it must not be below min_digits \(4\)"),
        ({"num_problems": 101, "max_digits": 1}, "num_problems is 101: split 'train' has only 88 distinct problems"),
    ],
)
def test_bad_options_are_refused_with_one_clear_sentence(options, reason):
    with pytest.raises(ValueError, match=reason):
        generate_problems(**{"operation": "addition", "num_problems": 10, **options})


def test_a_split_with_fewer_problems_gives_what_it_has_only_if_asked_for():
    with pytest.raises(ValueError, match="has only"):
        generate_problems("addition", 1000, "test", max_digits=1)
    few = generate_problems("addition", 1000, "test", max_digits=1, at_most=True)
    assert 0 < len(few) < 100
    assert len(set(few)) == len(few)
