"""What a run of reinforcement learning on GSM8K is configured by, beside [`PPOConfig`]."""

from dataclasses import dataclass, field

from .gsm8k import DATASET, PROMPT_FORMATS

ALGORITHMS = ("ppo", "grpo")
GENERATED = "generated"


@dataclass
class GSM8KModelArguments:
    """The policy and its adapters."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Causal language model, of the Hub or a folder; a small Phi-MoE is built if unset."},
    )
    value_head: str | None = field(
        default=None, metadata={"help": "Folder of an earlier run whose value head to begin with."}
    )
    nvme_path: str | None = field(
        default=None, metadata={"help": "Folder on a disk for what DeepSpeed offloads there."}
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the weights: auto, float32, bfloat16 or float16."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Whether to bring linear layers and experts to 4 bits."}
    )
    use_peft: bool = field(default=True, metadata={"help": "Whether to train LoRA adapters and not all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, times their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters' inputs."})
    lora_experts: bool = field(default=True, metadata={"help": "Whether experts have adapters, too."})

    def __post_init__(self):
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}: choose auto, float32, bfloat16 or float16.")
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("load_in_4bit needs use_peft: weights in 4 bits cannot be trained.")
        if self.load_in_4bit and self.lora_experts:
            raise ValueError("load_in_4bit needs --lora_experts false: experts in 4 bits cannot carry adapters.")
        if self.load_in_4bit and self.model_name_or_path is None:
            raise ValueError("load_in_4bit is for a model that is loaded; name one with --model_name_or_path.")


@dataclass
class GSM8KDataArguments:
    """The problems, the rewards, and the algorithm."""

    train_file: str = field(
        default=DATASET,
        metadata={
            "help": "Problems to learn from: a Hub id, a local JSONL file, or 'generated' for one-step problems."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Problems to judge by, likewise; the split test of train_file if unset."}
    )
    dataset_config: str | None = field(default="main", metadata={"help": "Configuration of a Hub data set."})
    num_train_problems: int | None = field(default=None, metadata={"help": "The first problems only; all if unset."})
    num_eval_problems: int | None = field(default=None, metadata={"help": "The first problems only; all if unset."})
    max_number: int = field(default=9, metadata={"help": "Of generated problems: the largest number in a question."})
    prompt_format: str = field(
        default="auto", metadata={"help": "plain, chat, or auto: chat where the tokenizer has a template for it."}
    )
    algorithm: str = field(default="ppo", metadata={"help": "ppo, or grpo: TRL's own trainer, without a critic."})
    marker_bonus: bool = field(default=True, metadata={"help": "Whether a marked answer earns 0.05."})
    length_penalty_tokens: int | None = field(
        default=None, metadata={"help": "Tokens above which a completion costs 0.05; never if unset."}
    )
    warm_start_steps: int = field(default=0, metadata={"help": "Steps of supervised training on solutions before."})
    warm_start_learning_rate: float = field(default=3e-3, metadata={"help": "Its peak learning rate."})
    warm_start_batch_size: int = field(default=32, metadata={"help": "Solutions of one of its steps."})
    eval_batch_size: int = field(
        default=64, metadata={"help": "Solutions at once in the evaluation before and after."}
    )

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm!r}: choose {' or '.join(ALGORITHMS)}.")
        if self.prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"prompt_format is {self.prompt_format!r}: choose one of {', '.join(PROMPT_FORMATS)}.")
        if self.warm_start_steps < 0:
            raise ValueError(f"warm_start_steps is {self.warm_start_steps}: it must be at least 0.")
        if self.train_file == GENERATED and self.num_train_problems is None:
            self.num_train_problems = 4000
        if (self.eval_file or self.train_file) == GENERATED and self.num_eval_problems is None:
            self.num_eval_problems = 200
        for name in ("num_train_problems", "num_eval_problems", "eval_batch_size", "warm_start_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
