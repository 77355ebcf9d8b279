"""Which biases make pathways form? One architecture trained on several levels in five ways, each with several seeds.

python recipes/study_pathways.py --config recipes/babyai/study.yaml --num_seeds 3 --jobs 2 --output_dir study

The biases are those of Cook, Akarca, Costa and Achterberg (arXiv 2506.02813): a price on large experts, alpha above 0;
that price divided by the task's loss; and dropout of experts of little weight. How hard a level is comes from runs of
one small expert on that level alone. Runs that have finished are kept, so that an interrupted study goes on where it
stopped. Options that are not known here go to `recipes/train_babyai.py`, except those in which the runs differ.
"""

import argparse
import json
import statistics
from pathlib import Path

from mixturekit.trainers.study import configured, draw_measures, print_measures, run_folder, train_runs

RECIPES = Path(__file__).resolve().parent
FREE, PAID = ["--routing_cost_coef", "0"], ["--routing_cost_coef"]
# The values of the paper's own code, where they are of the same unit.
DROPOUT = ["--expert_dropout_max_prob", "0.8", "--expert_dropout_threshold", "0.1"]
KEPT = ["--expert_dropout_max_prob", "0"]
SCALED, PLAIN = ["--scale_cost_by_performance", "true"], ["--scale_cost_by_performance", "false"]
ARMS = {
    "none": (FREE, PLAIN, KEPT),
    "cost": (PAID, PLAIN, KEPT),
    "cost, scaled": (PAID, SCALED, KEPT),
    "cost, dropout": (PAID, PLAIN, DROPOUT),
    "cost, scaled, dropout": (PAID, SCALED, DROPOUT),
}
# What a bias changes is the second of these ways against the first.
CONTRASTS = {
    "routing cost": ("none", "cost"),
    "scaling by performance": ("cost", "cost, scaled"),
    "scaling by performance, with dropout": ("cost, dropout", "cost, scaled, dropout"),
    "expert dropout": ("cost", "cost, dropout"),
    "expert dropout, with scaling": ("cost, scaled", "cost, scaled, dropout"),
    "all three": ("none", "cost, scaled, dropout"),
}
MEASURES = {
    "success": "success on held-out episodes",
    "complexity": "learned pathway complexity, share of the largest possible",
    "distinctness": "how far apart the levels' pathways are, bits",
    "consistency": "correlation of the levels' pathways with those of the other seeds",
    "self_sufficiency": "success without experts of a weight below the threshold, over success with all",
    "lesion": "success without the largest expert of each layer, over success with all",
    "difficulty": "rank correlation of complexity with difficulty",
}


def main() -> None:
    """Trains what is missing, measures, prints, draws and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(RECIPES / "babyai/study.yaml"), help="YAML of the training")
    parser.add_argument("--num_seeds", type=int, default=3, help="runs of each way, at least 2")
    parser.add_argument("--routing_cost_coef", type=float, default=0.03, help="alpha, where it is above 0")
    parser.add_argument("--difficulty_steps", type=int, default=600, help="updates of the runs on one level")
    parser.add_argument("--difficulty_threshold", type=float, default=0.4, help="loss that counts as learned")
    parser.add_argument("--weight_threshold", type=float, default=0.1, help="weight below which experts are dropped")
    parser.add_argument("--num_episodes", type=int, default=128, help="held-out episodes of each level")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on one core each")
    parser.add_argument("--output_dir", default="study", help="folder of the runs and of study.json")
    arguments, options = parser.parse_known_args()
    if arguments.num_seeds < 2:
        parser.error(f"--num_seeds is {arguments.num_seeds}: consistency is between at least 2.")
    folder = Path(arguments.output_dir)
    runs = planned_runs(folder, arguments)
    own = own_options(runs, options)
    if own:
        parser.error(f"{', '.join(own)}: what the runs differ in is chosen here; set what they share in the YAML.")
    runs = {run: [*chosen, *options] for run, chosen in runs.items()}
    train_runs(RECIPES / "train_babyai.py", arguments.config, runs, has_finished, arguments.jobs)
    rows = measure(folder, arguments)
    (folder / "study.json").write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2))
    measures = {way: {name: values_of(rows, way, name) for name in MEASURES} for way in ARMS}
    print_measures(measures, MEASURES)
    print_contrasts(rows)
    draw_measures(measures, list(MEASURES), folder / "study.png")
    print(f"Figures: {folder / 'study.json'} and {folder / 'study.png'}; the policies are beside them.")


def planned_runs(folder: Path, arguments) -> dict[Path, list[str]]:
    """Folder and options of every run."""
    runs = {}
    for seed in range(arguments.num_seeds):
        for name, parts in ARMS.items():
            chosen = [option for part in parts for option in part]
            if PAID is parts[0]:
                chosen.insert(1, str(arguments.routing_cost_coef))
            runs[run_folder(folder, name, seed)] = [*chosen, "--seed", str(seed)]
        for level in configured(arguments.config, "env_id"):
            alone = ["--env_id", level, "--mop_layers", "64", "--max_steps", str(arguments.difficulty_steps)]
            runs[run_folder(folder, level, seed)] = [*alone, *FREE, *KEPT, "--seed", str(seed)]
    return runs


def own_options(runs: dict[Path, list[str]], options: list[str]) -> list[str]:
    """Those of the options to pass on that some run has a value for already, which they would replace or add to."""
    taken = {option for chosen in runs.values() for option in chosen if option.startswith("--")} | {"--num_updates"}
    given = (option.partition("=")[0] for option in options if option.startswith("--"))
    return [option for option in given if f"--{option[2:].replace('-', '_')}" in taken]


def has_finished(run: Path) -> bool:
    """Whether a policy has been trained and judged."""
    return (run / "eval_results.json").exists()


def measure(folder: Path, arguments) -> list[dict]:
    """A row of the measures for each way and seed."""
    from mixturekit.trainers.pathway_analysis import (
        TrainingRun,
        expert_use,
        learned_pathway_complexity,
        pathway_distinctness,
        rank_correlation,
        task_difficulty,
    )

    levels, seeds = configured(arguments.config, "env_id"), range(arguments.num_seeds)
    alone = [TrainingRun.read(run_folder(folder, level, seed)) for level in levels for seed in seeds]
    difficulty = task_difficulty(alone, arguments.difficulty_threshold)
    rows = []
    for name in ARMS:
        profiles = []
        for seed in seeds:
            records, shares = play(run_folder(folder, name, seed), levels, arguments)
            use, complexity = expert_use(records, "task"), learned_pathway_complexity(records)
            profiles.append(use)
            pairs = [(complexity[level]["share"], difficulty[level]["difficulty"]) for level in levels]
            rows.append(
                {
                    "way": name,
                    "seed": seed,
                    "complexity": statistics.mean(share for share, _ in pairs),
                    "distinctness": pathway_distinctness(use)["divergence"],
                    "difficulty": rank_correlation(*zip(*pairs, strict=True)),
                    "complexity_by_level": {level: complexity[level]["share"] for level in levels},
                    "difficulty_by_level": {level: difficulty[level] for level in levels},
                    **shares,
                }
            )
        for row, value in zip(rows[-len(profiles) :], consistency(profiles), strict=True):
            row["consistency"] = value
    return rows


def play(run: Path, levels: list[str], arguments):
    """Every step of one policy's held-out episodes, its success, and the share of it that is left without experts."""
    import torch

    from mixturekit.modeling import MopForActionPrediction
    from mixturekit.trainers.pathway_analysis import record_pathways
    from mixturekit.trainers.policy_evaluation import HeldOutEpisodes, PlayOptions

    torch.set_num_threads(1)
    policy = MopForActionPrediction.from_pretrained(run).eval()
    records = record_pathways(policy, levels, arguments.num_episodes, progress=run.name)
    success = statistics.mean(episode.success for episode in records.episodes)
    held_out = HeldOutEpisodes(levels, arguments.num_episodes, records.episodes[0].seed)
    ways = {
        "self_sufficiency": PlayOptions(weight_threshold=arguments.weight_threshold),
        "lesion": PlayOptions(lesion_largest=True),
    }
    left = {name: held_out.play(policy, way)[-1]["success"] for name, way in ways.items()}
    shares = {name: value / success if success else None for name, value in left.items()}
    return records, {"success": success, **shares}


def consistency(profiles: list) -> list[float | None]:
    """For each seed, how its use of experts by level correlates with that of the others, their means taken away."""
    from mixturekit.trainers.pathway_analysis import routing_consistency

    means = []
    for profile in profiles:
        pairs = [routing_consistency([profile, other])["layers"][-1] for other in profiles if other is not profile]
        values = [pair["task_specific"] for pair in pairs if pair["task_specific"] is not None]
        means.append(statistics.mean(values) if values else None)
    return means


def values_of(rows: list[dict], way: str, measure_name: str) -> list[float]:
    """What the seeds of a way have of a measure, without those that have none."""
    return [row[measure_name] for row in rows if row["way"] == way and row[measure_name] is not None]


def print_contrasts(rows: list[dict]) -> None:
    """Says what each bias changed by more than the seeds differ: all runs with it are above all without, or below."""
    print("What each bias changed; where the runs with and without it overlap, nothing is claimed:")
    for bias, (without, having) in CONTRASTS.items():
        changes = []
        for name in MEASURES:
            before, after = values_of(rows, without, name), values_of(rows, having, name)
            if before and after and (min(after) > max(before) or max(after) < min(before)):
                changes.append(f"{name} {statistics.mean(before):.2f} -> {statistics.mean(after):.2f}")
        print(f"  {bias} ({without} -> {having}): {'; '.join(changes) or 'nothing beyond the seeds'}")


if __name__ == "__main__":
    main()
