"""Train a feed-forward and a recurrent mixture on generated stories and sums, and show what recurrence bought.

python recipes/demo_more.py --output_dir demo
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

VARIANTS = ("base", "more_c")
RECURRENCES = (1, 2, 4, 8)
TASKS = {"babi2": "two facts", "babi3": "three facts", "addition": "addition"}
RECIPES = Path(__file__).resolve().parent


def main() -> None:
    """Trains both variants, prints a table of held-out accuracy and writes a routing report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo", help="folder of both runs and of the results")
    parser.add_argument("--max_steps", type=int, help="training steps of each variant; those of the recipe if unset")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    train_side_by_side(folder, ["--max_steps", str(arguments.max_steps)] if arguments.max_steps else [])
    examples = held_out()
    results = {variant: answer(folder / variant, examples) for variant in VARIANTS}
    (folder / "accuracy.json").write_text(json.dumps(results, indent=2))
    print_table(results)
    write_routing_report(folder / VARIANTS[-1], examples, folder / "routing.html")
    print(f"Routing of a held-out story: {folder / 'routing.html'} (opens in a browser, needs no network)")
    print(f"Accuracies: {folder / 'accuracy.json'}; checkpoints: {', '.join(str(folder / name) for name in results)}")


def train_side_by_side(folder: Path, options: list[str]) -> None:
    """Trains all variants by the quickstart recipe, one core each: models this small gain nothing from a second."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Training {' and '.join(VARIANTS)}; their curves: tensorboard --logdir {folder}", flush=True)
    processes = {}
    for variant in VARIANTS:
        command = [sys.executable, str(RECIPES / "train_more.py"), "--config", str(RECIPES / "more/quickstart.yaml")]
        command += [
            "--expert_type",
            variant,
            "--output_dir",
            str(folder / variant),
            "--overwrite_output_dir",
            *options,
        ]
        # The progress bar of the slowest is enough.
        log = None if variant == VARIANTS[-1] else open(folder / f"{variant}.log", "w", encoding="utf-8")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes[variant] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for variant, process in processes.items():
        if process.wait() != 0:
            for other in processes.values():
                other.kill()
            sys.exit(f"Training {variant} failed; see the lines above and {folder}/*.log.")


def held_out():
    """The quickstart's stories and sums for tests; by those for validation its best checkpoints are chosen."""
    from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.task_data import mix_examples, parse_task_weights

    quickstart = ["--config", str(RECIPES / "more/quickstart.yaml")]
    _, data, _ = parse_recipe((ModelArguments, DataArguments, LanguageModelingConfig), quickstart)
    return mix_examples(parse_task_weights(data.task), data, "test", data.num_validation_examples)


def answer(checkpoint: Path, examples: list) -> dict:
    """Held-out accuracy of `checkpoint` by recurrences and task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixturekit.trainers.question_answering import QuestionAnswerer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    accuracy = {}
    for steps in RECURRENCES if model.config.is_recurrent else (1,):
        answerer = QuestionAnswerer(model, tokenizer, num_recurrences=steps)
        batches = (examples[start : start + 64] for start in range(0, len(examples), 64))
        answers = [answered for batch in batches for answered in answerer(batch)]
        accuracy[steps] = shares([(answered.example.task, answered.is_correct) for answered in answers])
    return {"parameters": model.num_parameters(), "accuracy": accuracy, "guess": guess(examples)}


def shares(results: list[tuple[str, bool]]) -> dict[str, float]:
    """The share of right answers by task."""
    by_task = {task: [right for name, right in results if name == task] for task in TASKS}
    return {task: sum(rights) / len(rights) for task, rights in by_task.items()}


def guess(examples: list) -> dict[str, float]:
    """Accuracy of naming the last place of a two-fact story, the first of a three-fact story, and no sum."""
    from mixturekit.trainers.babi import PLACES

    results = []
    for example in examples:
        named = [word.strip(".?") for word in example.prompt.split() if word.strip(".?") in PLACES]
        guessed = {"babi2": named[-1:], "babi3": named[:1], "addition": []}[example.task]
        results.append((example.task, guessed == [example.answer.strip()]))
    return shares(results)


def print_table(results: dict) -> None:
    """Prints held-out accuracy by variant and number of recurrences."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out accuracy: exact answers, in %")
    for column in ("variant", "parameters", "recurrences", *TASKS.values()):
        table.add_column(column, justify="right")
    guessed = results[VARIANTS[0]]["guess"]
    table.add_row("last or first place", "-", "-", *(f"{100 * guessed[task]:.1f}" for task in TASKS))
    for variant, result in results.items():
        for steps, accuracy in result["accuracy"].items():
            shares = [f"{100 * accuracy[task]:.1f}" for task in TASKS]
            table.add_row(
                variant, f"{result['parameters']:,}", "-" if len(result["accuracy"]) == 1 else str(steps), *shares
            )
    Console().print(table)


def write_routing_report(checkpoint: Path, examples: list, path: Path) -> None:
    """Writes the routes of a held-out story through `checkpoint` as one HTML file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixturekit.trainers.routes import record_routes
    from mixturekit.trainers.routing_report import write_report

    story = next(example for example in examples if example.task == "babi2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    write_report(record_routes(model, tokenizer, story.prompt + story.answer), path)


if __name__ == "__main__":
    main()
