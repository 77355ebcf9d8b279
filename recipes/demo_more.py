"""Train a feed-forward and a recurrent mixture on generated stories and sums, and show what recurrence bought.

python recipes/demo_more.py --output_dir demo
"""

import argparse
import json
from pathlib import Path

VARIANTS = ("base", "more_c")
RECURRENCES = (1, 2, 4, 8)
TASKS = {"babi2": "two facts", "babi3": "three facts", "addition": "addition"}


def main() -> None:
    """Trains both variants, prints a table of held-out accuracy and writes a routing report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo", help="folder of both runs and of the results")
    parser.add_argument("--max_steps", type=int, help="training steps of each variant; those of the recipe if unset")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    results = {variant: train_and_answer(variant, folder / variant, arguments.max_steps) for variant in VARIANTS}
    (folder / "accuracy.json").write_text(json.dumps(results, indent=2))
    print_table(results)
    write_routing_report(folder / VARIANTS[-1], folder / "routing.html")
    print(f"Routing of a held-out story: {folder / 'routing.html'} (opens in a browser, needs no network)")
    print(f"Accuracies: {folder / 'accuracy.json'}; checkpoints: {', '.join(str(folder / name) for name in results)}")


def train_and_answer(variant: str, folder: Path, max_steps: int | None) -> dict:
    """Trains `variant` by the quickstart recipe; returns its held-out accuracy by recurrences and task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixturekit.trainers.language_evaluation import answer_accuracy
    from mixturekit.trainers.language_modeling import generate_examples, train_language_model
    from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.text_data import AnswerDataset

    quickstart = Path(__file__).parent / "more" / "quickstart.yaml"
    options = ["--config", str(quickstart), "--expert_type", variant, "--output_dir", str(folder)]
    options += ["--overwrite_output_dir", *(["--max_steps", str(max_steps)] if max_steps else [])]
    model_arguments, data_arguments, config = parse_recipe(
        (ModelArguments, DataArguments, LanguageModelingConfig), options
    )
    print(f"Training {variant}; its curves: tensorboard --logdir {folder}")
    metrics = train_language_model(model_arguments, data_arguments, config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = generate_examples(data_arguments, "validation")
    held_out = AnswerDataset(zip(rows["prompt"], rows["answer"], strict=True), tokenizer)
    accuracy = {
        steps: answer_accuracy(model, held_out, rows["task"], tokenizer.pad_token_id, steps)
        for steps in (RECURRENCES if model.config.is_recurrent else (1,))
    }
    return {"eval_loss": metrics["eval_loss"], "parameters": metrics["parameters"], "accuracy": accuracy}


def print_table(results: dict) -> None:
    """Prints held-out accuracy by variant and number of recurrences."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out accuracy: exact answers, in %")
    for column in ("variant", "parameters", "recurrences", *TASKS.values()):
        table.add_column(column, justify="right")
    for variant, result in results.items():
        for steps, accuracy in result["accuracy"].items():
            shares = [f"{100 * accuracy[task]:.1f}" for task in TASKS]
            table.add_row(variant, f"{result['parameters']:,}", "-" if variant == "base" else str(steps), *shares)
    Console().print(table)


def write_routing_report(checkpoint: Path, path: Path) -> None:
    """Writes the routes of a held-out story through `checkpoint` as one HTML file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixturekit.trainers.routing_report import record_routes, write_report
    from mixturekit.trainers.text_data import generated_documents

    story = next(row for row in generated_documents("validation", num_examples=30) if row["task"] == "babi2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    write_report(record_routes(model, tokenizer, story["prompt"] + story["answer"]), path)


if __name__ == "__main__":
    main()
