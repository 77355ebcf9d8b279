"""Held-out perplexity of the five variants, a dense model and a trigram model, on one text at one budget.

python recipes/benchmarks/wikitext_comparison.py --dataset_name wiki.valid.txt --max_steps 300 --output_dir comparison

Every model is trained by `recipes/train_more.py` with `recipes/more/wikitext_cpu.yaml`; runs that have finished are
kept, so that an interrupted comparison goes on where it stopped. The trigram model reads the same tokens. Options that
are not known here go to `recipes/train_more.py`.
"""

import argparse
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]
RUNS = {
    "dense": ["--expert_type", "base", "--num_experts", "1"],
    **{name: ["--expert_type", name] for name in ("base", "more_a", "more_b", "more_c", "more_d")},
}


def main() -> None:
    """Trains what is missing, then prints one table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="text whose last documents are held out")
    parser.add_argument("--max_steps", type=int, default=300, help="training steps of each model")
    parser.add_argument("--output_dir", default="comparison", help="folder of the runs and of comparison.json")
    arguments, training_options = parser.parse_known_args()
    folder = Path(arguments.output_dir)
    shared = ["--config", str(RECIPES / "more/wikitext_cpu.yaml"), "--dataset_name", arguments.dataset_name]
    shared += ["--max_steps", str(arguments.max_steps), *training_options]
    rows = []
    for name, options in RUNS.items():
        if not (folder / name / "eval_results.json").exists():
            command = [sys.executable, str(RECIPES / "train_more.py"), *options, *shared]
            command += ["--output_dir", str(folder / name), "--overwrite_output_dir"]
            subprocess.run(command, check=True)
        rows.append(read_run(name, folder / name))
    train, validation = token_streams(shared, folder / "base")
    rows.append({"model": "trigram", "perplexity": TrigramModel(train).perplexity(validation)})
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2))
    print_table(rows, arguments.max_steps)
    print(f"Figures are in {folder / 'comparison.json'}, the trained models in the folders beside it.")


def read_run(name: str, folder: Path) -> dict:
    """The figures that a finished run left behind."""
    from mixturekit.modeling import MoreConfig

    evaluation = json.loads((folder / "eval_results.json").read_text())
    training = json.loads((folder / "train_results.json").read_text())
    config = MoreConfig.from_pretrained(folder)
    return {
        "model": name,
        "parameters": evaluation["parameters"],
        "mflops_per_token": config.flops_per_token(256) / 1e6,
        "perplexity": evaluation["eval_perplexity"],
        "steps": evaluation["steps"],
        "training_seconds": training["train_runtime"],
    }


def token_streams(options: list[str], checkpoint: Path) -> tuple[list[int], list[int]]:
    """The tokens that runs with these options trained on and were judged on."""
    from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
    from mixturekit.trainers.offload_arguments import OffloadArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.text_data import load_train_and_validation
    from mixturekit.trainers.tokenization import load_tokenizer, tokenize_documents

    _, data, *_ = parse_recipe((ModelArguments, DataArguments, LanguageModelingConfig, OffloadArguments), options)
    tokenizer = load_tokenizer(str(checkpoint))
    return tuple(
        [token for row in tokenize_documents(part, tokenizer) for token in row["input_ids"]]
        for part in load_train_and_validation(
            data.dataset_name, data.dataset_config, data.text_column, data.validation_fraction
        )
    )


class TrigramModel:
    """Interpolated Kneser-Ney trigrams (Chen and Goodman 1999) with one discount for all orders."""

    def __init__(self, tokens: list[int], discount: float = 0.75):
        self.discount = discount
        self.vocabulary = max(tokens) + 1
        trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
        # Lower orders count in how many contexts a token appears, not how often.
        bigrams = Counter((second, third) for _, second, third in trigrams)
        unigrams = Counter(third for _, third in bigrams)
        self.orders = [self._order(grams) for grams in (trigrams, bigrams)]
        self.unigrams, self.unigram_total = unigrams, sum(unigrams.values())

    @staticmethod
    def _order(grams: Counter) -> tuple[Counter, dict, dict]:
        totals, types = defaultdict(int), defaultdict(int)
        for gram, count in grams.items():
            totals[gram[:-1]] += count
            types[gram[:-1]] += 1
        return grams, totals, types

    def probability(self, context: tuple[int, int], token: int) -> float:
        """Probability of `token` after the two tokens of `context`."""
        unseen = self.discount * len(self.unigrams) / self.unigram_total / self.vocabulary
        probability = max(self.unigrams[token] - self.discount, 0.0) / self.unigram_total + unseen
        for order, (grams, totals, types) in reversed(list(enumerate(self.orders))):
            history = context[order:]
            if totals.get(history):
                share = max(grams[(*history, token)] - self.discount, 0.0)
                probability = (share + self.discount * types[history] * probability) / totals[history]
        return probability

    def perplexity(self, tokens: list[int]) -> float:
        """Perplexity per token, of every token that has two before it."""
        grams = zip(tokens, tokens[1:], tokens[2:], strict=False)
        losses = [-math.log(self.probability((first, second), third)) for first, second, third in grams]
        return math.exp(sum(losses) / len(losses))


def print_table(rows: list[dict], steps: int) -> None:
    """One line per model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Held-out perplexity per token after {steps} steps")
    for column in ("model", "M parameters", "MFLOP/token", "perplexity", "training seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        trained = "parameters" in row
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.2f}" if trained else "-",
            f"{row['mflops_per_token']:.1f}" if trained else "-",
            f"{row['perplexity']:.1f}",
            f"{row['training_seconds']:.0f}" if trained else "-",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
