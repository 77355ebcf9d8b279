"""Accuracy of short answers, with a confidence interval."""

import math
from statistics import NormalDist

import datasets
import evaluate

_DESCRIPTION = """
The share of predictions that are the reference: the same first word, apart from upper and lower case and from
punctuation after it, or the same whole number. With Wilson's interval, which holds for few examples and near 0 and 1.
"""

_CITATION = """
@article{wilson1927probable,
  title = {Probable Inference, the Law of Succession, and Statistical Inference},
  author = {Wilson, Edwin B.},
  journal = {Journal of the American Statistical Association},
  volume = {22},
  number = {158},
  pages = {209--212},
  year = {1927}
}
"""

_INPUTS = """
Args:
    predictions (list of str): what the model said; only its first line counts.
    references (list of str): the right answers.
    match (str): "word" compares first words, "number" whole numbers, whose digits may be spaced.
    confidence (float): of the interval, 0.95 by default.
Returns:
    accuracy, low, high: shares from 0 to 1.
    count: number of predictions.
Examples:
    >>> metric = evaluate.load("trainers/metrics/answer_accuracy.py")
    >>> metric.compute(predictions=["Kitchen.", "garden"], references=["kitchen", "office"])["accuracy"]
    0.5
"""


def first_word(text: str) -> str:
    """The first word of `text` in lower case, without the punctuation after it; empty if there is none."""
    words = text.split(maxsplit=1)
    return words[0].rstrip(".,;:!?\"')").lower() if words else ""


def whole_number(text: str) -> int | None:
    """The number on the first line of `text`, digits spaced or not; `None` if the line is no whole number."""
    digits = text.strip().partition("\n")[0].replace(" ", "")
    # int() alone would also take "1_000", "+5" and digits of other scripts.
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def wilson_interval(correct: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a share of which `correct` of `count` were seen (Wilson 1927, equation 1, solved for the share)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, square = correct / count, z * z / count
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


class AnswerAccuracy(evaluate.Metric):
    """The share of right answers as a module of `evaluate`."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, match="word", confidence=0.95):
        if not predictions:
            raise ValueError("There are no predictions to score.")
        readers = {"word": first_word, "number": whole_number}
        if match not in readers:
            raise ValueError(f"match is {match!r}: choose 'word' or 'number'.")
        read = readers[match]
        pairs = zip(predictions, references, strict=True)
        correct = sum(read(said) == read(right) and read(said) not in ("", None) for said, right in pairs)
        low, high = wilson_interval(correct, len(references), confidence)
        return {"accuracy": correct / len(references), "low": low, "high": high, "count": len(references)}
