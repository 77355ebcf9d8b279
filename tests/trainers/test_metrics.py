"""The metrics, loaded from their files as `evaluate` loads any."""

import math
from pathlib import Path

import evaluate
import pytest

from mixturekit.trainers.metrics.answer_accuracy import first_word, whole_number, wilson_interval
from mixturekit.trainers.metrics.text_diversity import text_diversity

METRICS = Path(__file__).parents[2] / "trainers" / "metrics"


def load(name):
    return evaluate.load(str(METRICS / f"{name}.py"))


def test_accuracy_is_the_share_of_right_first_words_with_its_interval():
    said = ["kitchen", "Garden.", "office and then", "hall"]
    right = ["kitchen", "garden", "office", "hallway"]
    result = load("answer_accuracy").compute(predictions=said, references=right)
    assert result["accuracy"] == 0.75 and result["count"] == 4
    assert result["low"] == pytest.approx(0.3006, abs=1e-4) and result["high"] == pytest.approx(0.9544, abs=1e-4)


def test_accuracy_of_numbers_reads_spaced_digits_and_only_the_first_line():
    said = ["4 0 5", "405\n12 + 1 = 13", "405 or so", "-405", ""]
    result = load("answer_accuracy").compute(predictions=said, references=["405"] * 5, match="number")
    assert result["accuracy"] == 0.4


def test_saying_nothing_is_never_right():
    metric = load("answer_accuracy")
    for match in ("word", "number"):
        assert metric.compute(predictions=["", " \n"], references=["", "..."], match=match)["accuracy"] == 0


def test_a_narrower_confidence_gives_a_narrower_interval():
    options = {"predictions": ["a", "b", "c"], "references": ["a", "b", "d"]}
    wide, narrow = (load("answer_accuracy").compute(**options, confidence=share) for share in (0.99, 0.5))
    assert wide["low"] < narrow["low"] < narrow["accuracy"] < narrow["high"] < wide["high"]


def test_an_unknown_kind_of_match_is_refused():
    with pytest.raises(ValueError, match="match is 'letter': choose 'word' or 'number'"):
        load("answer_accuracy").compute(predictions=["a"], references=["a"], match="letter")


@pytest.mark.parametrize(
    "correct, count, low, high",
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_the_interval_is_wilsons(correct, count, low, high):
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_interval_holds_the_share_and_is_the_same_from_both_sides(count):
    for correct in range(count + 1):
        low, high = wilson_interval(correct, count)
        assert 0 <= low <= correct / count <= high <= 1 and low < high
        assert wilson_interval(count - correct, count) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    "text, word",
    [("Kitchen.", "kitchen"), (" garden\nthe", "garden"), ("no, never", "no"), ("n,w", "n,w"), ("...", ""), ("", "")],
)
def test_the_first_word_has_no_punctuation_after_it(text, word):
    assert first_word(text) == word


@pytest.mark.parametrize(
    "text, number",
    [
        (" 405", 405), ("4 0 5\n", 405), ("007", 7), ("4.5", None), ("+5", None), ("1_000", None), ("٣", None),
        ("five", None), ("", None),
    ],
)  # fmt: skip
def test_a_whole_number_has_nothing_but_digits(text, number):
    assert whole_number(text) == number


def test_perplexities_come_from_totals_and_not_from_means_of_texts():
    counts = [{"tokens": 2, "words": 1, "bytes": 4}, {"tokens": 6, "words": 3, "bytes": 28}]
    nats = [2 * math.log(4), 6 * math.log(2)]
    result = load("corpus_perplexity").compute(predictions=nats, references=counts)
    assert result["perplexity"] == pytest.approx(2 ** (10 / 8))
    assert result["word_perplexity"] == pytest.approx(2 ** (10 / 4))
    assert result["bits_per_byte"] == pytest.approx(10 / 32)


def test_a_perplexity_that_no_float_holds_is_infinite():
    counts = [{"tokens": 2000, "words": 1, "bytes": 4000}]
    result = load("corpus_perplexity").compute(predictions=[2000 * math.log(3)], references=counts)
    assert result["perplexity"] == pytest.approx(3) and result["word_perplexity"] == math.inf


def test_distinct_counts_over_all_texts_and_repetition_within_each():
    result = load("text_diversity").compute(predictions=["a b c d a b c d", "a b c d e"])
    assert result["distinct_1"] == pytest.approx(5 / 13)
    assert result["distinct_2"] == pytest.approx(5 / 11)
    # abcd, bcda, cdab, dabc, abcd; and abcd, bcde.
    assert result["repetition_4"] == pytest.approx((1 / 5 + 0) / 2)
    assert result["words"] == 6.5


def test_a_text_that_says_one_thing_is_nearly_all_repetition():
    assert text_diversity(["the " * 103])["repetition_4"] == pytest.approx(0.99)
    assert text_diversity(["the " * 100])["distinct_1"] == 0.01


def test_texts_without_words_are_neither_distinct_nor_repeated():
    nothing = {"distinct_1": 0, "distinct_2": 0, "repetition_4": 0, "words": 0}
    assert load("text_diversity").compute(predictions=["", " "]) == nothing


@pytest.mark.parametrize("name", ["answer_accuracy", "corpus_perplexity", "text_diversity"])
def test_no_predictions_at_all_are_refused_in_a_sentence(name):
    references = {} if name == "text_diversity" else {"references": []}
    with pytest.raises(ValueError, match="There are no predictions to score."):
        load(name).compute(predictions=[], **references)


@pytest.mark.parametrize("name", ["answer_accuracy", "corpus_perplexity", "text_diversity"])
def test_every_metric_says_what_it_takes_and_gives(name):
    metric = load(name)
    assert metric.description.strip() and "Returns:" in metric.inputs_description
