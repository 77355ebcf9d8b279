"""Accuracy of the five variants on bAbI against the number of recurrences at inference, over several seeds.

python recipes/benchmarks/babi_comparison.py --babi_data data/babi --max_steps 2500 --output_dir babi_comparison

Every model is trained by `recipes/train_more.py` with `recipes/more/babi.yaml`, and questioned by
`recipes/evaluate_more.py` on the held-out questions. Runs that have finished are kept, so that an interrupted
comparison goes on where it stopped. Options of the training that are not known here are passed on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]
VARIANTS = ("base", "more_a", "more_b", "more_c", "more_d")
RECURRENCES = (1, 2, 4, 8)


def main() -> None:
    """Trains and questions what is missing, then prints one table, and draws and writes what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--babi_data", required=True, help="folder with the original bAbI files")
    parser.add_argument("--task", default="babi2", help="the task to train and to question on")
    parser.add_argument("--max_steps", type=int, default=2500, help="training steps of each model")
    parser.add_argument("--num_seeds", type=int, default=3, help="models of each variant")
    parser.add_argument("--jobs", type=int, default=1, help="models that train at once, on one core each")
    parser.add_argument("--output_dir", default="babi_comparison", help="folder of the runs and of comparison.json")
    arguments, options = parser.parse_known_args()
    folder = Path(arguments.output_dir)
    runs = [(variant, seed) for seed in range(arguments.num_seeds) for variant in VARIANTS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda run: train_and_question(folder, *run, arguments, options), runs))
    rows = [
        {"variant": variant, "seed": seed, **result} for (variant, seed), result in zip(runs, results, strict=True)
    ]
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2))
    print_table(rows, arguments)
    draw(rows, arguments.task, folder / "comparison.png")
    print(f"Figures: {folder / 'comparison.json'} and {folder / 'comparison.png'}; the models are beside them.")


def train_and_question(folder: Path, variant: str, seed: int, arguments, options: list[str]) -> dict:
    """The parameters, training time and accuracies of one model."""
    run = folder / f"{variant}-{seed}"
    data = ["--babi_data", arguments.babi_data]
    if not (run / "eval_results.json").exists():
        command = ["train_more.py", "--config", str(RECIPES / "more/babi.yaml"), "--task", arguments.task, *data]
        command += ["--expert_type", variant, "--seed", str(seed), "--max_steps", str(arguments.max_steps)]
        launch([*command, "--output_dir", str(run), "--overwrite_output_dir", *options], run)
    results = run / "eval" / "eval_results.json"
    if not results.exists():
        command = ["evaluate_more.py", "--model_name_or_path", str(run), "--tasks", arguments.task, *data, "--use_cpu"]
        depths = list(map(str, RECURRENCES))
        command += ["--num_recurrences", *depths, "--batch_size", "64", "--output_dir", str(results.parent)]
        launch(command, run)
    report = json.loads(results.read_text())
    accuracy = {
        str(record["num_recurrences"]): record["value"]
        for record in report["results"]
        if record["metric"] == "generation_accuracy"
    }
    seconds = json.loads((run / "train_results.json").read_text())["train_runtime"]
    return {"parameters": report["parameters"], "seconds": seconds, "accuracy": accuracy}


def launch(command: list[str], run: Path) -> None:
    """Runs a recipe on one core; what it prints goes to a file beside the run."""
    print(f"{run.name}: {command[0]}", flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.parent / f"{run.name}.log"
    with open(log, "a", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        line = [sys.executable, str(RECIPES / command[0]), *command[1:]]
        if subprocess.run(line, stdout=file, stderr=file, env=environment).returncode:
            raise SystemExit(f"{' '.join(line)} failed; see {log}")


def by_depth(rows: list[dict], variant: str) -> dict[str, list[float]]:
    """The accuracies of a variant's seeds by number of recurrences."""
    chosen = [row["accuracy"] for row in rows if row["variant"] == variant]
    return {depth: [accuracy[depth] for accuracy in chosen] for depth in chosen[0]}


def print_table(rows: list[dict], arguments) -> None:
    """Prints mean, lowest and highest accuracy of each variant by number of recurrences."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{arguments.task}, held out: accuracy in % after {arguments.max_steps} steps, mean (range)")
    for column in ("variant", "parameters", "minutes", *(f"recurrences: {depth}" for depth in RECURRENCES)):
        table.add_column(column, justify="right")
    for variant in VARIANTS:
        chosen = [row for row in rows if row["variant"] == variant]
        minutes = statistics.mean(row["seconds"] for row in chosen) / 60
        cells = [
            f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
            for values in by_depth(rows, variant).values()
        ]
        table.add_row(variant, f"{chosen[0]['parameters']:,}", f"{minutes:.1f}", *cells)
    Console(width=140).print(table)


def draw(rows: list[dict], task: str, path: Path) -> None:
    """Draws the mean accuracy of each variant, and that of each seed, against the number of recurrences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for variant in VARIANTS:
        accuracies = by_depth(rows, variant)
        if "None" in accuracies:
            axis.axhline(statistics.mean(accuracies["None"]), color="grey", linestyle="--", label=variant)
            continue
        depths = list(map(int, accuracies))
        line = axis.plot(
            depths, [statistics.mean(values) for values in accuracies.values()], marker="o", label=variant
        )
        for depth, values in zip(depths, accuracies.values(), strict=True):
            axis.scatter([depth] * len(values), values, color=line[0].get_color(), alpha=0.4, s=12)
    axis.set_xscale("log", base=2)
    axis.set_xticks(RECURRENCES, list(map(str, RECURRENCES)))
    axis.minorticks_off()
    axis.set_xlabel("recurrences at inference")
    axis.set_title(f"{task}: held-out accuracy")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
