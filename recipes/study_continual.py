"""Does an agent of many experts forget less than others? One sequence of games, several agents, each with some seeds.

python recipes/study_continual.py --config recipes/atari/study.yaml --num_seeds 3 --jobs 2 --output_dir study_continual

Runs that have finished are kept, so that an interrupted study goes on where it stopped. What 1 means on the scale of a
game is what agents reach that learn this game alone, in runs of their own. Options that are not known here go to
`recipes/train_atari.py`.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path

from mixturekit.trainers.study import configured, draw_measures, print_measures, run_folder, summary, train_runs

RECIPES = Path(__file__).resolve().parent
STORE = ["--nvme_path", "{run}/store"]
CONDITIONED = ["--routing_condition", "environment"]
HEADS = ["--per_game_heads", "true", "--per_game_norm", "true"]
ARMS = {
    "experts": [*STORE, *CONDITIONED],
    "experts, content only": [*STORE, "--routing_condition", "content"],
    "experts, in memory": CONDITIONED,
    "experts, dense Adam": [*CONDITIONED, "--optimizer", "dense"],
    "experts, frozen after use": [*STORE, *CONDITIONED, "--freeze_experts", "true"],
    "experts, router frozen": [*STORE, *CONDITIONED, "--freeze_router", "after_first_game"],
    "experts, heads by game": [*STORE, *CONDITIONED, *HEADS],
    "experts, replay": [*STORE, *CONDITIONED, "--replay_coef", "1.0"],
    "experts, EWC": [*STORE, *CONDITIONED, "--ewc_coef", "1000.0"],
    "experts, forward-forward": [*STORE, *CONDITIONED, "--expert_learning_rule", "forward_forward"],
    "experts, Hebbian": [*STORE, *CONDITIONED, "--expert_learning_rule", "hebbian"],
    "experts, three factors": [*STORE, *CONDITIONED, "--expert_learning_rule", "three_factor"],
    "experts, as drawn": [*STORE, *CONDITIONED, "--expert_learning_rule", "none"],
    "dense, as many active": ["--dense", "active"],
    "dense, as many in total": ["--dense", "total"],
    "dense, as many active, heads by game": ["--dense", "active", *HEADS],
    "dense, as many in total, heads by game": ["--dense", "total", *HEADS],
    # Environments that five games can share.
    "all games at once": [*STORE, *CONDITIONED, "--interleaved", "true", "--num_envs", "20"],
}
DENSE = ("dense, as many active", "dense, as many in total")
MEASURES = {
    "learned": "score of each game when it had just been learned, 0 for random actions and 1 for mastery",
    "final": "score after the last game, mean over games",
    "forgetting": "how much of their score games have lost since they were learned",
    "forward_transfer": "how much sooner games are learned than alone, as Continual World defines it",
    "information": "what experts tell about the game, above chance and of what is possible",
    "acting_hits": "share of the experts asked for while acting that fast memory had",
    "updating_hits": "the same while updating",
    "fast_memory": "share of the experts that has room in fast memory",
}


def main() -> None:
    """Trains what is missing, measures, prints, draws and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(RECIPES / "atari/study.yaml"), help="YAML of the training")
    parser.add_argument("--games", nargs="+", help="games; those of the configuration if unset")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="agents; all if unset")
    parser.add_argument("--num_seeds", type=int, default=3, help="runs of each agent")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on one core each")
    parser.add_argument("--output_dir", default="study_continual", help="folder of the runs and of study.json")
    arguments, options = parser.parse_known_args()
    folder, seeds = Path(arguments.output_dir), range(1, arguments.num_seeds + 1)
    games = arguments.games or configured(arguments.config, "games")
    runs = {}
    for seed in seeds:
        for game in games:
            runs[single_run(folder, game, seed)] = ["--games", game, *CONDITIONED, "--seed", str(seed)]
    for arm in arguments.arms:
        for seed in seeds:
            run = run_folder(folder, arm, seed)
            own = [option.format(run=run) for option in ARMS[arm]]
            runs[run] = ["--games", *games, *own, "--seed", str(seed)]
    runs = {run: [*chosen, *options] for run, chosen in runs.items()}
    train_runs(RECIPES / "train_atari.py", arguments.config, runs, has_finished, arguments.jobs)
    for run in runs:
        # Of a finished run nothing of the store is needed.
        shutil.rmtree(run / "store", ignore_errors=True)
    reference, areas = single_scores(folder, games, seeds)
    found = {arm: [load(run_folder(folder, arm, seed)) for seed in seeds] for arm in arguments.arms}
    measures = {}
    for arm, results in found.items():
        each = [measure(one, reference, areas) for one in results]
        measures[arm] = {name: [one[name] for one in each if one[name] is not None] for name in MEASURES}
    verdicts = expected_results(measures)
    report = {"settings": vars(arguments) | {"options": options}, "single": reference, "measures": measures}
    (folder / "study.json").write_text(json.dumps(report | {"verdicts": verdicts}, indent=2) + "\n")
    print_measures(measures, MEASURES)
    print_verdicts(verdicts)
    draw_measures(measures, list(MEASURES), folder / "study.png")
    draw_retention(found, reference, folder / "retention.png")
    print(f"Figures: study.json, study.png and retention.png in {folder}; the runs are beside them.")


def single_run(folder: Path, game: str, seed: int) -> Path:
    """Of an agent that learns one game alone."""
    return run_folder(folder, f"single {game}", seed)


def has_finished(run: Path) -> bool:
    """Whether an agent has learned all its games."""
    return (run / "continual_results.json").exists() and load(run)["finished"]


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
        "learned": statistics.mean(learned) if learned and len(results["phases"]) > 1 else None,
        "final": metrics["final_score"],
        "forgetting": metrics.get("average_forgetting"),
        "forward_transfer": statistics.mean(transfers) if transfers and len(results["phases"]) > 1 else None,
        "information": statistics.mean(layer["normalised"] for layer in layers) if layers else None,
        "acting_hits": statistics.mean(switch["acting_hit_rate"] for switch in switches) if switches else None,
        "updating_hits": statistics.mean(switch["updating_hit_rate"] for switch in switches) if switches else None,
        "fast_memory": memory["fast_bytes"] / memory["all_bytes"] if switches else None,
    }


def expected_results(measures: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
    """
    The four results that were expected of experts in tiers, what was measured, and whether it held.

    Of forgetting something is claimed only where no seed contradicts it.
    """
    experts = measures.get("experts")
    if experts is None:
        return {}
    mean = {name: statistics.mean(values) if values else None for name, values in experts.items()}
    accesses = [min(pair) for pair in zip(experts["acting_hits"], experts["updating_hits"], strict=True)]
    verdicts = {
        "more than 80 % of accesses hit the fast tier": (
            f"acting {mean['acting_hits']:.1%}, updating {mean['updating_hits']:.1%}", statistics.mean(accesses) > 0.8
        ),
        "experts specialise in games": (
            f"{mean['information']:.1%} of the possible information above chance", mean["information"] > 0.1
        ),
        "fast memory holds a part of the experts": (f"{mean['fast_memory']:.1%} of them", mean["fast_memory"] < 0.5),
    }  # fmt: skip
    for heads, addition in (("", ""), (", heads by game", ", all with heads by game")):
        own = measures.get(f"experts{heads}")
        dense = {arm: measures[arm]["forgetting"] for size in DENSE if (arm := size + heads) in measures}
        if own and dense and own["forgetting"] and all(dense.values()):
            less = all(max(own["forgetting"]) < min(values) for values in dense.values())
            others = ", ".join(f"{summary(values)} {arm}" for arm, values in dense.items())
            measured = f"{summary(own['forgetting'])} against {others}"
            verdicts[f"less is forgotten than by dense agents{addition}"] = (measured, less)
    return {name: {"measured": measured, "held": held} for name, (measured, held) in verdicts.items()}


def print_verdicts(verdicts: dict[str, dict]) -> None:
    """What was expected, and what held."""
    from rich.table import Table

    from mixturekit.trainers.wide_console import wide_console

    table = Table(title="What was expected")
    for title in ("expected", "measured", "held"):
        table.add_column(title)
    for name, verdict in verdicts.items():
        table.add_row(name, verdict["measured"], "yes" if verdict["held"] else "no")
    wide_console(220).print(table)


def draw_retention(found: dict[str, list[dict]], reference: dict[str, float], path: Path) -> None:
    """Draws the score on each game after each phase, mean over seeds, a matrix for each agent, as a PNG file."""
    import matplotlib
    import numpy as np

    from mixturekit.trainers.continual_results import retention_metrics

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = min(4, len(found))
    tall = -(-len(found) // wide)
    figure, axes = pyplot.subplots(tall, wide, figsize=(3.4 * wide, 3 * tall), squeeze=False, layout="constrained")
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (arm, results) in zip(axes.flat, found.items(), strict=False):
        scores = np.mean([np.array(retention_metrics(one, reference)["scores"], float) for one in results], axis=0)
        games = [game.rpartition(":")[2] for game in results[0]["games"]]
        phases = ["+".join(game.rpartition(":")[2] for game in phase) for phase in results[0]["phases"]]
        image = axis.imshow(scores, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, column in np.ndindex(scores.shape):
            value = scores[row, column]
            shown = "-" if np.isnan(value) else f"{value:.2f}"
            axis.text(column, row, shown, ha="center", va="center", color="white" if value > 0.6 else "black")
        axis.set_xticks(range(len(games)), games, rotation=30, ha="right")
        axis.set_yticks(range(len(phases) + 1), ["before", *(phase if len(phase) < 16 else "all" for phase in phases)])
        axis.set_title(arm, fontsize=10)
    figure.suptitle("Score on each game (columns) after each phase (rows), mean over seeds", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
