"""Studies: several agents, each trained with several seeds by a recipe, and what they show side by side."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from rich.table import Table
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map

from .wide_console import wide_console

# What each agent has of each measure, a value for each seed.
Measures = Mapping[str, Mapping[str, Sequence[float]]]


def configured(config: str | Path, name: str):
    """What a YAML configuration has under a name."""
    return yaml.safe_load(Path(config).read_text(encoding="utf-8"))[name]


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where the run of an agent with a seed is."""
    return folder / f"{name.translate(str.maketrans(' :', '--', ','))}_{seed}"


def train_runs(
    recipe: Path,
    config: str | Path,
    runs: Mapping[Path, Sequence[str]],
    finished: Callable[[Path], bool],
    jobs: int = 1,
) -> None:
    """
    Trains what has not finished, each run on one core; what it prints goes to a file beside its folder.

    Runs that were stopped go on from their last checkpoint.

    Args:
        recipe (`Path`): The script.
        config (`str` or `Path`): Its configuration.
        runs (`Mapping[Path, Sequence[str]]`): Options of each folder.
        finished (`Callable[[Path], bool]`): Whether the run in a folder is complete.
        jobs (`int`, *optional*, defaults to 1): Runs at once.

    Raises:
        SystemExit: If one has failed.
    """
    missing = {run: options for run, options in runs.items() if not finished(run)}
    before = len(runs) - len(missing)
    if before:
        print(f"{before} of {len(runs)} runs have finished before", flush=True)

    def train(run: Path) -> None:
        begun = any(run.glob("checkpoint-*"))
        command = [sys.executable, str(recipe), "--config", str(config), "--output_dir", str(run), *missing[run]]
        command += ["--resume_from_checkpoint", "last"] if begun else ["--overwrite_output_dir"]
        log = run.parent / f"{run.name}.log"
        run.parent.mkdir(parents=True, exist_ok=True)
        tqdm.write(f"training {run.name}")
        with open(log, "a", encoding="utf-8") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if subprocess.run(command, stdout=file, stderr=file, env=environment).returncode:
                raise SystemExit(f"{' '.join(command)} failed; see {log}")

    thread_map(train, missing, max_workers=jobs, total=len(runs), initial=before, desc="runs", unit="run")


def summary(values: Sequence[float]) -> str:
    """Mean and range as text."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def print_measures(measures: Measures, names: Mapping[str, str]) -> None:
    """
    Prints mean, lowest and highest of every measure, a row for each agent.

    Args:
        measures (`Measures`): By agent and measure.
        names (`Mapping[str, str]`): What the measures are, in the order of the columns.
    """
    table = Table(title="Mean over seeds (lowest to highest)")
    table.add_column("agent")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for agent, row in measures.items():
        table.add_row(agent, *(summary(row[name]) for name in names))
    console = wide_console(220)
    console.print(table)
    for name, meaning in names.items():
        console.print(f"{name.replace('_', ' ')}: {meaning}")


def draw_measures(measures: Measures, names: Sequence[str], path: Path) -> None:
    """Draws every measure as a PNG file, a row for each agent, a dot for each seed and a line at their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.6 + 0.3 * len(measures)
    figure, axes = pyplot.subplots(1, len(names), figsize=(2 + 2.4 * len(names), height), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for place, row in enumerate(measures.values()):
            colour = f"C{place % 10}"
            axis.scatter(row[name], [place] * len(row[name]), s=18, alpha=0.6, color=colour)
            if row[name]:
                axis.scatter([statistics.mean(row[name])], [place], marker="|", s=220, color=colour)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(measures)), list(measures))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
