"""Does an agent of many experts forget less than others? One sequence of games, several agents, each with some seeds.

python recipes/study_continual.py --config recipes/atari/study.yaml --num_seeds 3 --jobs 2 --output_dir study_continual

Runs that have finished are kept, so that an interrupted study goes on where it stopped. What 1 means on the scale of a
game is what agents reach that learn this game alone, in runs of their own. Options that are not known here go to
`recipes/train_atari.py`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
STORE = ["--nvme_path", "{run}/store"]
CONDITIONED = ["--routing_condition", "environment"]
ARMS = {
    "experts": [*STORE, *CONDITIONED],
    "experts, content only": [*STORE, "--routing_condition", "content"],
    "experts, in memory": CONDITIONED,
    "experts, dense Adam": [*CONDITIONED, "--optimizer", "dense"],
    "experts, frozen after use": [*STORE, *CONDITIONED, "--freeze_experts", "true"],
    "experts, router frozen": [*STORE, *CONDITIONED, "--freeze_router", "after_first_game"],
    "experts, heads by game": [*STORE, *CONDITIONED, "--per_game_heads", "true", "--per_game_norm", "true"],
    "experts, replay": [*STORE, *CONDITIONED, "--replay_coef", "1.0"],
    "experts, EWC": [*STORE, *CONDITIONED, "--ewc_coef", "1000.0"],
    "experts, forward-forward": [*STORE, *CONDITIONED, "--expert_learning_rule", "forward_forward"],
    "experts, Hebbian": [*STORE, *CONDITIONED, "--expert_learning_rule", "hebbian"],
    "experts, three factors": [*STORE, *CONDITIONED, "--expert_learning_rule", "three_factor"],
    "experts, as drawn": [*STORE, *CONDITIONED, "--expert_learning_rule", "none"],
    "dense, as many active": ["--dense", "active"],
    "dense, as many in total": ["--dense", "total"],
    # Environments that five games can share.
    "all games at once": [*STORE, *CONDITIONED, "--interleaved", "true", "--num_envs", "20"],
}
COLUMNS = {
    "final": "score at the end",
    "learned": "score when learned",
    "forgetting": "forgetting",
    "forward": "forward transfer",
    "information": "information, of what is possible",
    "acting": "hits, acting",
    "updating": "hits, updating",
    "memory": "fast memory, of all",
}


def main() -> None:
    """Trains what is missing, measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(RECIPES / "atari/study.yaml"), help="YAML of the training")
    parser.add_argument("--games", nargs="+", help="games; those of the configuration if unset")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="agents; all if unset")
    parser.add_argument("--num_seeds", type=int, default=3, help="runs of each agent")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on one core each")
    parser.add_argument("--output_dir", default="study_continual", help="folder of the runs and of study.json")
    arguments, options = parser.parse_known_args()
    folder, seeds = Path(arguments.output_dir), range(1, arguments.num_seeds + 1)
    games = arguments.games or games_of(arguments.config)
    runs = {single_run(folder, game, seed): ["--games", game, *CONDITIONED] for game in games for seed in seeds}
    runs |= {
        folder / f"{arm.replace(', ', '_').replace(' ', '-')}_{seed}": ["--games", *games, *ARMS[arm]]
        for arm in arguments.arms
        for seed in seeds
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in pool.map(lambda run: train(run[0], [*run[1], *options], arguments.config), runs.items()):
            pass
    reference, areas = single_scores(folder, games, seeds)
    rows = {}
    for arm in arguments.arms:
        name = arm.replace(", ", "_").replace(" ", "-")
        found = [measure(load(folder / f"{name}_{seed}"), reference, areas) for seed in seeds]
        rows[arm] = {column: [one[column] for one in found if one[column] is not None] for column in COLUMNS}
    verdicts = expected_results(rows)
    report = {"settings": vars(arguments) | {"options": options}, "single": reference, "rows": rows}
    (folder / "study.json").write_text(json.dumps(report | {"verdicts": verdicts}, indent=2) + "\n")
    print_rows(rows, verdicts)
    print(f"Figures: {folder / 'study.json'}; the runs are beside it.")


def games_of(config: str) -> list[str]:
    """The games that the configuration names."""
    import yaml

    return yaml.safe_load(Path(config).read_text(encoding="utf-8"))["games"]


def single_run(folder: Path, game: str, seed: int) -> Path:
    """Of an agent that learns one game alone."""
    return folder / f"single_{game.replace(':', '-')}_{seed}"


def train(run: Path, options: list[str], config: str) -> None:
    """A run, unless it has finished."""
    if (run / "continual_results.json").exists() and load(run)["finished"]:
        return
    options = [option.format(run=run) for option in options]
    command = [sys.executable, str(RECIPES / "train_atari.py"), "--config", config, "--output_dir", str(run)]
    resumed = ["--resume_from_checkpoint", "last"] if list(run.glob("checkpoint-*")) else ["--overwrite_output_dir"]
    seed = run.name.rpartition("_")[2]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "train.log").open("a") as log:
        finished = subprocess.run(
            [*command, "--seed", seed, *options, *resumed], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if finished.returncode:
        sys.exit(f"{run} has failed; see {run / 'train.log'}")
    # Of a finished run nothing of the store is needed.
    shutil.rmtree(run / "store", ignore_errors=True)
    print(f"{run.name} is done", flush=True)


def load(run: Path) -> dict:
    """The results of a run."""
    return json.loads((run / "continual_results.json").read_text(encoding="utf-8"))


def single_scores(folder: Path, games: list[str], seeds: range) -> tuple[dict[str, float], dict[str, float]]:
    """
    For each game what counts as 1, and on that scale the area under the curves of agents that learn it alone.

    1 is the return of these agents, mean over seeds, and for games that ship here at least that which shows mastery:
    beside an agent that has not learned a game, noise would look like triumph and ruin.
    """
    import numpy as np

    from mixturekit.trainers.atari import BUILTIN
    from mixturekit.trainers.builtin_games import BUILTIN_GAMES
    from mixturekit.trainers.continual_results import learning_areas

    reference, areas = {}, {}
    for game in games:
        runs = [load(single_run(folder, game, seed)) for seed in seeds]
        reached = statistics.mean(run["evaluations"][-1][0]["return"] for run in runs)
        mastered = BUILTIN_GAMES[game.removeprefix(BUILTIN)].solved_return if game.startswith(BUILTIN) else reached
        reference[game] = max(reached, mastered)
        scale = np.array([reference[game]])
        areas[game] = statistics.mean(learning_areas(run, scale).get(game, 0.0) for run in runs)
    return reference, areas


def measure(results: dict, reference: dict[str, float], areas: dict[str, float]) -> dict[str, float | None]:
    """The columns of a run."""
    from mixturekit.trainers.continual_metrics import forward_transfer
    from mixturekit.trainers.continual_results import retention_metrics

    metrics = retention_metrics(results, reference)
    transfers = [forward_transfer(area, areas[game]) for game, area in metrics.get("areas", {}).items()]
    layers = results["specialisation"] if results["settings"]["agent"]["dense"] is None else []
    switches = [switch for switch in results["switches"] if "acting_hit_rate" in switch]
    memory = results["memory"]
    scores = [metrics["scores"][n + 1][results["games"].index(phase[0])] for n, phase in enumerate(results["phases"])]
    # Games without a scale have no score.
    learned = [score for score in scores if score is not None]
    return {
        "final": metrics["final_score"],
        "learned": statistics.mean(learned) if learned and len(results["phases"]) > 1 else None,
        "forgetting": metrics.get("average_forgetting"),
        "forward": statistics.mean(transfers) if transfers and len(results["phases"]) > 1 else None,
        "information": statistics.mean(layer["normalised"] for layer in layers) if layers else None,
        "acting": statistics.mean(switch["acting_hit_rate"] for switch in switches) if switches else None,
        "updating": statistics.mean(switch["updating_hit_rate"] for switch in switches) if switches else None,
        "memory": memory["fast_bytes"] / memory["all_bytes"] if switches else None,
    }


def expected_results(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
    """The four results that were expected of experts in tiers, what was measured, and whether it held."""
    experts = rows.get("experts")
    if experts is None:
        return {}
    mean = {column: statistics.mean(values) if values else None for column, values in experts.items()}
    dense = {arm: statistics.mean(row["forgetting"]) for arm, row in rows.items() if arm.startswith("dense")}
    accesses = [min(pair) for pair in zip(experts["acting"], experts["updating"], strict=True)]
    verdicts = {
        "more than 80 % of accesses hit the fast tier": (
            f"acting {mean['acting']:.1%}, updating {mean['updating']:.1%}", statistics.mean(accesses) > 0.8
        ),
        "experts specialise in games": (
            f"{mean['information']:.1%} of the possible information above chance", mean["information"] > 0.1
        ),
        "fast memory holds a part of the experts": (f"{mean['memory']:.1%} of them", mean["memory"] < 0.5),
    }  # fmt: skip
    if dense:
        others = ", ".join(f"{value:.2f} {arm}" for arm, value in dense.items())
        less = all(mean["forgetting"] < value for value in dense.values())
        verdicts["less is forgotten than by dense agents"] = (f"{mean['forgetting']:.2f} against {others}", less)
    return {name: {"measured": measured, "held": held} for name, (measured, held) in verdicts.items()}


def print_rows(rows: dict[str, dict[str, list[float]]], verdicts: dict[str, dict]) -> None:
    """The table, means and standard deviations over seeds, and what held."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Mean over seeds, with standard deviation")
    table.add_column("agent")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for arm, row in rows.items():
        table.add_row(arm, *(_spread(row[column]) for column in COLUMNS))
    expected = Table(title="What was expected")
    for title in ("expected", "measured", "held"):
        expected.add_column(title)
    for name, verdict in verdicts.items():
        expected.add_row(name, verdict["measured"], "yes" if verdict["held"] else "no")
    console = Console()
    if not console.is_terminal:
        # A log has no width, and rich would take 80 columns.
        console.width = 170
    console.print(table)
    console.print(expected)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
