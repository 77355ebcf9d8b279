"""
Shows which pathways through its experts a MoP policy takes in BabyAI, on held-out episodes that it plays greedily.

    python recipes/report_pathways.py --model_name_or_path out --num_episodes 64 --output report.html

Writes one page that opens without a network, and all its numbers as `pathways.json` beside it. Other arguments:
`--env_id BabyAI-GoToLocal-v0 ...` (the levels of the training if unset), `--other_seeds out_1 out_2` (checkpoints of
the same layers, for routing consistency), `--difficulty_runs run_1 run_2 ...` (runs that learned one level each) and
`--difficulty_threshold 0.25` (the loss that they have to stay below), `--weight_thresholds 0.1 0.2`, `--first_seed`,
`--num_envs`, `--overwrite`, `--use_cpu` and `--num_threads`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from mixturekit.trainers.recipe_parser import RepeatableOption, parse_recipe
from mixturekit.trainers.recipe_process import errors_in_one_sentence
from mixturekit.trainers.whole_files import check_folder

NUMBERS = "pathways.json"


def _several(text: str, **options) -> dict:
    return {"help": text, "action": RepeatableOption, **options}


@dataclass
class ReportArguments:
    """The arguments of this recipe."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint of a MoP policy, or one of the Hub."})
    env_id: list[str] | None = field(default=None, metadata=_several("Levels; those of the training if unset."))
    other_seeds: list[str] = field(
        default_factory=list, metadata=_several("Checkpoints of the same layers, from trainings with other seeds.")
    )
    difficulty_runs: list[str] = field(
        default_factory=list, metadata=_several("Folders of runs of train_babyai.py that learned one level each.")
    )
    difficulty_threshold: float = field(
        default=0.25, metadata={"help": "Action loss below which a level counts as learned."}
    )
    num_episodes: int = field(default=64, metadata={"help": "Episodes of each level, each played to its end."})
    first_seed: int = field(default=1_000_000_000, metadata={"help": "Seed of the first episode; the next follow."})
    num_envs: int = field(default=64, metadata={"help": "Episodes played at once."})
    weight_thresholds: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
        metadata=_several("Weights below which experts are dropped, for the self-sufficiency curve."),
    )
    output: str = field(default="report.html", metadata={"help": "The page to write."})
    overwrite: bool = field(default=False, metadata={"help": "Whether a report that is there may be replaced."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})
    num_threads: int = field(default=1, metadata={"help": "Threads of PyTorch."})

    def __post_init__(self):
        for name in ("num_episodes", "num_envs", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1.")
        if self.first_seed < 0:
            raise ValueError("--first_seed must be at least 0.")
        if self.difficulty_threshold <= 0:
            raise ValueError("--difficulty_threshold must be above 0.")
        if any(not 0 <= threshold <= 1 for threshold in self.weight_thresholds):
            raise ValueError("--weight_thresholds must lie between 0 and 1.")
        if len({self.model_name_or_path, *self.other_seeds}) <= len(self.other_seeds):
            raise ValueError("--other_seeds names a checkpoint twice, or that of --model_name_or_path.")
        for folder in self.difficulty_runs:
            if not Path(folder).is_dir():
                raise ValueError(f"There is no folder {folder}.")
        for source in (self.model_name_or_path, *self.other_seeds):
            # A model of the Hub is owner/name; anything else can only be a folder.
            if not Path(source).is_dir() and len(Path(source).parts) != 2:
                raise ValueError(f"There is no folder {source}.")
        if Path(self.output).suffix.lower() != ".html":
            raise ValueError(f"--output is {self.output}: its name must end in .html.")
        check_folder(Path(self.output).parent)
        there = [path.name for path in (Path(self.output), Path(self.output).with_name(NUMBERS)) if path.exists()]
        if there and not self.overwrite:
            raise ValueError(f"{Path(self.output).parent} has a report ({', '.join(there)}): add --overwrite.")
        self.env_id = self.env_id and list(dict.fromkeys(self.env_id))


def load(arguments: ReportArguments):
    """The policy, its levels, the other policies by name, and the difficulty of tasks; all is checked before."""
    from mixturekit.trainers.pathway_analysis import TrainingRun, task_difficulty
    from mixturekit.trainers.policy_evaluation import load_evaluated_policy
    from mixturekit.trainers.policy_evaluation_config import PolicyEvaluationArguments

    def load_one(source, levels):
        options = {"env_id": levels, "use_cpu": arguments.use_cpu, "overwrite": True}
        options["output_dir"] = str(Path(arguments.output).parent)
        return load_evaluated_policy(PolicyEvaluationArguments(source, **options))

    runs = [TrainingRun.read(folder) for folder in arguments.difficulty_runs]
    difficulty = task_difficulty(runs, arguments.difficulty_threshold)
    policy, levels = load_one(arguments.model_name_or_path, arguments.env_id)
    # All now: a report of an hour would else be lost for a folder that is named last.
    others = {source: load_one(source, levels)[0] for source in arguments.other_seeds}
    for source, other in {arguments.model_name_or_path: policy, **others}.items():
        if not other.config.is_routed:
            raise ValueError(f"{source} is a GRU baseline, which has no routers and so no pathways.")
        if other.config.layers != policy.config.layers:
            raise ValueError(
                f"{source} has the layers {other.config.layers}, and {arguments.model_name_or_path} "
                f"{policy.config.layers}: consistency is between checkpoints of the same layers."
            )
    strangers = sorted(set(difficulty) - set(levels))
    if strangers:
        raise ValueError(f"--difficulty_runs has runs of {', '.join(strangers)}, which this report is not about.")
    return policy, levels, others, difficulty


def report(arguments: ReportArguments) -> None:
    """Load, play, write."""
    import torch

    from mixturekit.trainers.pathway_analysis import expert_use, record_pathways, self_sufficiency
    from mixturekit.trainers.pathway_report import pathway_findings, write_pathway_report
    from mixturekit.trainers.policy_evaluation import HeldOutEpisodes

    torch.set_num_threads(arguments.num_threads)
    policy, levels, others, difficulty = load(arguments)
    seeds = (levels, arguments.num_episodes, arguments.first_seed, arguments.num_envs)
    records = record_pathways(policy, *seeds, progress="pathways")
    profiles = {
        name: expert_use(record_pathways(other, *seeds, progress=name), "task") for name, other in others.items()
    }
    plays = self_sufficiency(policy, HeldOutEpisodes(*seeds, progress=True), arguments.weight_thresholds)
    findings = pathway_findings(records, arguments.model_name_or_path, profiles, difficulty, plays)
    write_pathway_report(records, findings, arguments.output)
    for level, outcome in findings["episodes"].items():
        share = findings["complexity"][level]["share"]
        print(f"{level}: success {outcome['success']:.1%}, complexity {share:.1%} of the largest possible")
    print(f"Report: {arguments.output}")
    print(f"Its numbers: {Path(arguments.output).with_name(NUMBERS)}")


def main() -> None:
    """Parse the arguments, and say in one sentence what is wrong with them."""
    with errors_in_one_sentence():
        (arguments,) = parse_recipe((ReportArguments,), description=__doc__)
        report(arguments)


if __name__ == "__main__":
    main()
