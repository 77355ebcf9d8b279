"""What an evaluation of a language model is configured by."""

from dataclasses import dataclass, field
from pathlib import Path

from .recipe_parser import RepeatableOption
from .task_data import TASKS
from .whole_files import check_folder

EVALUATIONS = ("perplexity", "generation", *TASKS)


@dataclass
class EvaluationArguments:
    """The model, the tasks, and where the results go."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint, LoRA adapter, or model of the Hub."})
    tasks: list[str] = field(
        default_factory=lambda: ["perplexity", "babi2", "babi3", "arithmetic", "generation"],
        metadata={
            "help": "Of perplexity, generation, babi1 to babi20, addition, subtraction, multiplication, and "
            "arithmetic for these three.",
            "action": RepeatableOption,
        },
    )
    num_recurrences: list[int] | None = field(
        default=None, metadata={"help": "Steps of recurrent experts to try; the model's own if unset."}
    )
    output_dir: str = field(default="eval", metadata={"help": "Folder of the results."})
    overwrite: bool = field(default=False, metadata={"help": "Whether results in `output_dir` may be replaced."})
    batch_size: int = field(default=16, metadata={"help": "Questions or windows at once."})
    seed: int = field(default=0, metadata={"help": "Seed of sums, solved examples and samples."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights: auto, float32, bfloat16 or float16."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})
    update_model_card: bool = field(
        default=False, metadata={"help": "Whether to add the results to the card of a checkpoint on this machine."}
    )

    dataset_name: str | None = field(
        default=None, metadata={"help": "Text for perplexity: a Hub id, a local file or folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the text; without one, what is held out where there is only one."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "What is held out of the only split; that of the training where it is known."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    max_documents: int | None = field(default=None, metadata={"help": "Documents to score; all if unset."})
    sequence_length: int = field(
        default=256, metadata={"help": "Tokens of the window, and the length that the model was trained on."}
    )
    stride: int | None = field(default=None, metadata={"help": "Tokens that each window adds; half of it if unset."})
    detokenize: bool = field(
        default=False, metadata={"help": "Whether to write WikiText's word-level form as people do before scoring it."}
    )

    split: str = field(default="test", metadata={"help": "Split of stories and sums: train, validation or test."})
    num_questions: int = field(
        default=1000, metadata={"help": "Questions of each bAbI task, or as many as there are."}
    )
    num_shots: int = field(default=0, metadata={"help": "Solved examples before each question."})
    digits: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "Digits of the operands, each on its own."}
    )
    num_problems: int = field(default=200, metadata={"help": "Sums of each operation and number of digits."})

    prompts_file: str | None = field(default=None, metadata={"help": "Prompts to continue, one on each line."})
    num_samples: int = field(default=2, metadata={"help": "Continuations of each prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a continuation."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy."})

    csv: str | None = field(
        default=None, metadata={"help": "File of questions and answers, one row each, for a language model to judge."}
    )
    sample: int = field(default=0, metadata={"help": "Question whose routes are drawn beside the CSV file."})

    def __post_init__(self):
        unknown = [task for task in self.tasks if task not in EVALUATIONS]
        if unknown:
            raise ValueError(f"tasks has {unknown[0]!r}: choose of perplexity, generation and {', '.join(TASKS)}.")
        if "perplexity" in self.tasks and self.dataset_name is None:
            raise ValueError("The task 'perplexity' needs a text: name it with --dataset_name.")
        lowest = {
            "batch_size": 1, "sequence_length": 2, "num_questions": 1, "num_shots": 0, "num_problems": 1,
            "num_samples": 1, "max_new_tokens": 1, "temperature": 0, "sample": 0,
        }  # fmt: skip
        lowest |= {name: 1 for name in ("stride", "max_documents") if getattr(self, name) is not None}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {low}.")
        if self.stride is not None and self.stride > self.sequence_length:
            raise ValueError(f"stride is {self.stride}: it must be at most sequence_length, {self.sequence_length}.")
        for name in ("num_recurrences", "digits"):
            if any(value < 1 for value in getattr(self, name) or ()):
                raise ValueError(f"{name} is {getattr(self, name)}: each must be at least 1.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}: choose auto, float32, bfloat16 or float16.")
        self._check_files()

    def _check_files(self):
        check_folder(self.output_dir)
        if self.prompts_file is not None and not Path(self.prompts_file).is_file():
            raise FileNotFoundError(f"There is no file {self.prompts_file} with prompts.")
        results = Path(self.output_dir, "eval_results.json")
        if results.exists() and not self.overwrite:
            raise FileExistsError(f"{results} is there: choose another --output_dir, or replace it with --overwrite.")
        if self.csv is not None and Path(self.csv).exists() and not self.overwrite:
            raise FileExistsError(f"{self.csv} is there: choose another --csv, or replace it with --overwrite.")
