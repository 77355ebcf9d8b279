"""How much texts repeat themselves, and how much they have to say."""

import datasets
import evaluate

_DESCRIPTION = """
Distinct n-grams over all texts (Li et al. 2016), and repetition of n-grams within each text (Welleck et al. 2020).
Words are what white space separates.
"""

_CITATION = """
@inproceedings{li2016diversity,
  title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
  author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle = {NAACL},
  year = {2016}
}
@inproceedings{welleck2020neural,
  title = {Neural Text Generation With Unlikelihood Training},
  author = {Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  booktitle = {ICLR},
  year = {2020}
}
"""

_INPUTS = """
Args:
    predictions (list of str): the texts.
Returns:
    distinct_1, distinct_2: distinct n-grams over n-grams, all texts together; 1 if none comes twice.
    repetition_4: the share of 4-grams of a text that it has said before, averaged over the texts; 0 if it never does.
    words: mean number of words.
Examples:
    >>> metric = evaluate.load("trainers/metrics/text_diversity.py")
    >>> metric.compute(predictions=["to be or not to be"])["distinct_2"]
    0.8
"""


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """The runs of `n` words."""
    return list(zip(*(words[offset:] for offset in range(n)), strict=False))


def text_diversity(texts: list[str]) -> dict[str, float]:
    """The figures of [`TextDiversity`]; texts too short for an n-gram have neither distinct nor repeated ones."""
    split = [text.split() for text in texts]

    def distinct(n: int) -> float:
        runs = [run for words in split for run in ngrams(words, n)]
        return len(set(runs)) / len(runs) if runs else 0.0

    def repeated(words: list[str]) -> float:
        runs = ngrams(words, 4)
        return 1.0 - len(set(runs)) / len(runs) if runs else 0.0

    return {
        "distinct_1": distinct(1),
        "distinct_2": distinct(2),
        "repetition_4": sum(map(repeated, split)) / len(split),
        "words": sum(map(len, split)) / len(split),
    }


class TextDiversity(evaluate.Metric):
    """[`text_diversity`] as a module of `evaluate`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions):
        if not predictions:
            raise ValueError("There are no predictions to score.")
        return text_diversity(predictions)
