"""Perplexity per token and per word, and bits per byte, of texts whose log-likelihoods are known."""

import math

import datasets
import evaluate

_DESCRIPTION = """
Perplexity per token, perplexity per word and bits per byte, all from the total negative log-likelihood of some texts.
Perplexity per token depends on the tokenizer; the other two compare models of different tokenizers.
"""

_INPUTS = """
Args:
    predictions (list of float): negative log-likelihood of each text, in nats.
    references (list of dict): `tokens`, `words` and `bytes` of each text.
Returns:
    perplexity: exp(nats / tokens).
    word_perplexity: exp(nats / words).
    bits_per_byte: nats / (bytes * ln 2).
Examples:
    >>> metric = evaluate.load("trainers/metrics/corpus_perplexity.py")
    >>> metric.compute(predictions=[6.931471805599453], references=[{"tokens": 10, "words": 5, "bytes": 20}])
    {'perplexity': 2.0, 'word_perplexity': 4.0, 'bits_per_byte': 0.5}
"""


def corpus_perplexity(nats: float, tokens: int, words: int, num_bytes: int) -> dict[str, float]:
    """The three figures from the totals of a corpus; infinite where a number is too large for a float."""

    def power(exponent: float) -> float:
        return math.exp(exponent) if exponent < 700 else math.inf

    return {
        "perplexity": power(nats / tokens),
        "word_perplexity": power(nats / words),
        "bits_per_byte": nats / (num_bytes * math.log(2)),
    }


class CorpusPerplexity(evaluate.Metric):
    """[`corpus_perplexity`] as a module of `evaluate`."""

    def _info(self):
        counts = {name: datasets.Value("int64") for name in ("tokens", "words", "bytes")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64"), "references": counts}),
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("There are no predictions to score.")
        totals = (sum(reference[name] for reference in references) for name in ("tokens", "words", "bytes"))
        return corpus_perplexity(sum(predictions), *totals)
