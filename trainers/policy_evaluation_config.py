"""What an evaluation of a policy is configured by."""

from dataclasses import dataclass, field
from pathlib import Path

from .imitation_config import ACTING
from .recipe_parser import RepeatableOption
from .whole_files import check_folder

RESULTS = "eval_results.json"


@dataclass
class PolicyEvaluationArguments:
    """The policy, the levels and seeds, and where the results go."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint of a MoP policy, or one of the Hub."})
    env_id: list[str] | None = field(
        default=None,
        metadata={"help": "Levels; those of the training if unset. May be repeated.", "action": RepeatableOption},
    )
    num_episodes: int = field(default=512, metadata={"help": "Episodes of each level, each played to its end."})
    first_seed: int = field(default=1_000_000_000, metadata={"help": "Seed of the first episode; the next follow."})
    decoding: list[str] = field(
        default_factory=lambda: list(ACTING), metadata={"help": "greedy, sampled or both.", "action": RepeatableOption}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampled actions."})
    num_envs: int = field(default=64, metadata={"help": "Episodes played at once."})
    self_sufficiency: bool = field(
        default=False, metadata={"help": "Whether to drop experts below a weight, for each of `weight_thresholds`."}
    )
    weight_thresholds: list[float] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
        metadata={
            "help": "Of self_sufficiency: weights below which an expert is dropped.",
            "action": RepeatableOption,
        },
    )
    lesion: bool = field(default=False, metadata={"help": "Whether to play without the largest expert of each layer."})
    video: str | None = field(default=None, metadata={"help": "GIF file of one episode with its routing weights."})
    video_seed: int | None = field(default=None, metadata={"help": "Seed of that episode; the first one if unset."})
    output_dir: str = field(default="eval", metadata={"help": "Folder of the results."})
    overwrite: bool = field(default=False, metadata={"help": "Whether results in `output_dir` may be replaced."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})
    num_threads: int = field(default=1, metadata={"help": "Threads of PyTorch."})

    def __post_init__(self):
        for name in ("num_episodes", "num_envs", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        for name in ("first_seed", "video_seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0.")
        unknown = [way for way in self.decoding if way not in ACTING]
        if unknown:
            raise ValueError(f"decoding has {unknown[0]!r}: choose of {', '.join(ACTING)}.")
        if any(not 0 <= threshold <= 1 for threshold in self.weight_thresholds):
            raise ValueError(f"weight_thresholds is {self.weight_thresholds}: weights lie between 0 and 1.")
        if self.env_id is not None:
            self.env_id = list(dict.fromkeys(self.env_id))
        self._check_files()

    def _check_files(self):
        check_folder(self.output_dir)
        if self.video is not None and Path(self.video).suffix.lower() != ".gif":
            raise ValueError(f"video is {self.video}: its name must end in .gif.")
        for path in (Path(self.output_dir, RESULTS), *([Path(self.video)] if self.video else [])):
            if path.exists() and not self.overwrite:
                raise FileExistsError(f"{path} is there: choose another place, or replace it with --overwrite.")
