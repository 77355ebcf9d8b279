"""What an evaluation on GSM8K is configured by."""

from dataclasses import dataclass, field
from pathlib import Path

from .gsm8k import DATASET, PROMPT_FORMATS
from .recipe_parser import RepeatableOption
from .whole_files import check_folder

RESULTS = "eval_results.json"
COMPLETIONS = "completions.jsonl"

# What may differ between a run and its continuation.
_FREE = {"output_dir", "overwrite", "resume", "use_cpu"}


@dataclass
class GSM8KEvaluationArguments:
    """The model, the problems, how they are solved, and where the results go."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint, LoRA adapter, or model of the Hub."})
    dataset_name: str = field(
        default=DATASET, metadata={"help": "Problems: a Hub id, a local JSONL file, or a folder of such files."}
    )
    dataset_config: str | None = field(default="main", metadata={"help": "Configuration of a Hub data set."})
    split: str = field(default="test", metadata={"help": "Split, or a slice of one such as test[:100]."})
    num_problems: int | None = field(default=None, metadata={"help": "Problems, from the first; all if unset."})

    prompt_format: str = field(
        default="auto", metadata={"help": "plain, chat, or auto: chat where the tokenizer has a template for it."}
    )
    num_shots: int = field(default=0, metadata={"help": "Solved problems to show before each."})
    shots_name: str | None = field(
        default=None, metadata={"help": "Where these come from, its first ones; the split train of the data if unset."}
    )

    greedy: bool = field(default=True, metadata={"help": "Whether to solve each problem once, greedily."})
    num_samples: int = field(default=0, metadata={"help": "Sampled solutions of each problem, for pass@k and a vote."})
    pass_k: list[int] | None = field(
        default=None,
        metadata={
            "help": "The k of pass@k; the powers of 2 up to `num_samples` if unset.",
            "action": RepeatableOption,
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of samples."})
    top_p: float = field(default=1.0, metadata={"help": "Share of probability that samples are taken from."})
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens of the longest solution."})
    batch_size: int = field(default=16, metadata={"help": "Solutions at once, in each process."})
    seed: int = field(default=0, metadata={"help": "Seed of samples."})

    dtype: str = field(default="auto", metadata={"help": "Type of the weights: auto, float32, bfloat16 or float16."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Whether to bring linear layers and experts to 4 bits."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})

    output_dir: str = field(default="eval", metadata={"help": "Folder of the results and completions."})
    overwrite: bool = field(default=False, metadata={"help": "Whether results in `output_dir` may be replaced."})
    resume: bool = field(default=False, metadata={"help": "Whether to go on with an interrupted run in `output_dir`."})

    def __post_init__(self):
        lowest = {"num_shots": 0, "num_samples": 0, "max_new_tokens": 1, "batch_size": 1}
        lowest |= {} if self.num_problems is None else {"num_problems": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {low}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be above 0; --greedy is for the rest.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1.")
        if not self.greedy and not self.num_samples:
            raise ValueError("There is nothing to do: leave greedy on, or give num_samples.")
        if self.pass_k is None:
            self.pass_k = [2**power for power in range(self.num_samples.bit_length())]
        self.pass_k = sorted(set(self.pass_k))
        if any(not 1 <= k <= self.num_samples for k in self.pass_k):
            raise ValueError(f"pass_k is {self.pass_k}: each must be from 1 to num_samples, {self.num_samples}.")
        if self.prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"prompt_format is {self.prompt_format!r}: choose one of {', '.join(PROMPT_FORMATS)}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}: choose auto, float32, bfloat16 or float16.")
        self._check_files()

    def _check_files(self):
        check_folder(self.output_dir)
        if self.overwrite and self.resume:
            raise ValueError("Choose one of overwrite and resume: the one replaces results, the other adds to them.")
        for name in (RESULTS, COMPLETIONS):
            path = Path(self.output_dir, name)
            if path.exists() and not (self.overwrite or self.resume):
                raise FileExistsError(
                    f"{path} is there: choose another --output_dir, go on with --resume, or replace it with "
                    "--overwrite."
                )

    def settings(self) -> dict:
        """What decides the completions: a run may only be continued with the same."""
        return {name: value for name, value in vars(self).items() if name not in _FREE}
