"""What an evaluation of an agent is configured by."""

from dataclasses import dataclass, field
from pathlib import Path

from .atari import PREPROCESSING, check_games
from .recipe_parser import RepeatableOption
from .whole_files import check_folder

RESULTS = "eval_results.json"


@dataclass
class AgentEvaluationArguments:
    """The agent, the games, and where the results go."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint of an agent, or one of the Hub."})
    games: list[str] | None = field(
        default=None, metadata={"help": "Games; those of the training if unset.", "action": RepeatableOption}
    )
    num_episodes: int = field(default=16, metadata={"help": "Episodes of each game, each played to its end."})
    first_seed: int = field(default=2_000_000, metadata={"help": "Seed of the games and of drawn actions."})
    max_steps: int = field(default=27_000, metadata={"help": "Steps after which an episode counts as over."})
    deterministic: bool = field(default=False, metadata={"help": "Whether to take the likeliest actions, or draw."})
    tell_game: bool = field(
        default=True, metadata={"help": "Whether the agent is told the game, or has to detect it."}
    )
    preprocessing: str = field(default="current", metadata={"help": "As in the training: current or classic."})
    nvme_path: str | None = field(
        default=None, metadata={"help": "Folder of an expert store; if unset, all experts are in memory."}
    )
    video: str | None = field(default=None, metadata={"help": "GIF of an episode of the first game, with experts."})
    video_steps: int = field(default=400, metadata={"help": "Steps of the video at most."})
    output_dir: str = field(default="eval", metadata={"help": "Folder of eval_results.json."})
    overwrite: bool = field(default=False, metadata={"help": "Whether results in `output_dir` may be replaced."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave an accelerator alone."})
    num_threads: int = field(default=1, metadata={"help": "Threads of PyTorch."})

    def __post_init__(self):
        if self.games is not None:
            self.games = check_games(self.games)
        if self.preprocessing not in PREPROCESSING:
            raise ValueError(f"preprocessing is {self.preprocessing!r}: choose {' or '.join(PREPROCESSING)}.")
        for name in ("num_episodes", "max_steps", "video_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        self._check_files()

    def _check_files(self):
        check_folder(self.output_dir)
        for path in (Path(self.output_dir, RESULTS), *([Path(self.video)] if self.video else [])):
            if path.exists() and not self.overwrite:
                raise FileExistsError(f"{path} is there: choose another place, or replace it with --overwrite.")
