"""What an imitation run is configured by: the policy, the levels and who teaches, and the training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .recipe_parser import RepeatableOption

ALGORITHMS = ("bc", "dagger")
ACTING = ("greedy", "sampled")


@dataclass
class PolicyArguments:
    """
    The policy: any field of `MopConfig` that should differ from its default; or a checkpoint.

    Fields that are `None` keep the default, or the value of the checkpoint.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "MoP checkpoint to continue from; otherwise a new policy is initialised."}
    )
    mop_layers: str | None = field(
        default=None, metadata={"help": 'Sizes of the experts by layer, "16,32,64;32,64,128"; size 0 is a skip.'}
    )
    mop_intermediate_dim: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    mop_router_dim: int | None = field(default=None, metadata={"help": "Width of the routers' recurrent state."})
    policy_type: str | None = field(
        default=None, metadata={"help": "pathways, or gru: the baseline with as many parameters."}
    )
    expert_norm: str | None = field(default=None, metadata={"help": "Norm in experts: layernorm, batchnorm or none."})
    encoder: str | None = field(default=None, metadata={"help": "What the image goes through: flat or bow_conv_film."})
    vision_dim: int | None = field(default=None, metadata={"help": "Channels of bow_conv_film."})
    mission_encoder: str | None = field(default=None, metadata={"help": "gru, or pretrained for a text model."})
    mission_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Text model of transformers that reads the missions, frozen."}
    )
    mission_dim: int | None = field(default=None, metadata={"help": "Width of an encoded mission."})
    routing_cost_coef: float | None = field(default=None, metadata={"help": "Weight alpha of the usage cost."})
    expert_cost_exponent: float | None = field(default=None, metadata={"help": "Cost of an expert: its size to this."})
    scale_cost_by_performance: bool | None = field(
        default=None, metadata={"help": "Whether the usage cost of a task is divided by its action loss."}
    )
    cost_epsilon: float | None = field(default=None, metadata={"help": "What is added to the action loss there."})
    detach_performance: bool | None = field(default=None, metadata={"help": "Whether no gradient flows through it."})
    normalize_routing_cost: bool | None = field(
        default=None, metadata={"help": "Whether the cost is a share of the largest that is possible."}
    )
    expert_dropout_max_prob: float | None = field(
        default=None, metadata={"help": "Probability beta with which an expert of weight 0 is dropped in training."}
    )
    expert_dropout_threshold: float | None = field(
        default=None, metadata={"help": "Weight gamma from which on no expert is dropped."}
    )


@dataclass
class EnvironmentArguments:
    """The levels, the teacher, and how many environments play at once."""

    env_id: list[str] = field(
        default_factory=lambda: ["BabyAI-GoToRedBall-v0"],
        metadata={"help": "Level, or several as tasks. May be repeated.", "action": RepeatableOption},
    )
    level_weights: list[int] | None = field(
        default=None,
        metadata={"help": "Of dagger: how many of their sum's environments play each level; otherwise one of each."},
    )
    algorithm: str = field(
        default="dagger", metadata={"help": "bc: from the bot's demonstrations; dagger: the bot labels what is seen."}
    )
    num_envs: int = field(
        default=16, metadata={"help": "Environments, or streams of demonstrations, of each process."}
    )
    unroll_len: int = field(default=32, metadata={"help": "Steps that gradient flows back through."})
    demonstrations: str | None = field(
        default=None, metadata={"help": "Of bc: Hub id, or folder of demonstrations; otherwise the bot makes them."}
    )
    num_demonstrations: int = field(
        default=20_000, metadata={"help": "Of bc: episodes that the bot makes, of all levels."}
    )
    demonstration_num_proc: int | None = field(
        default=None, metadata={"help": "Processes in which the bot makes demonstrations, which are the same in any."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder of the demonstrations that the bot makes."})
    dagger_beta_start: float = field(
        default=1.0, metadata={"help": "Of dagger: probability that the bot acts in place of the student, at first."}
    )
    dagger_beta_steps: float = field(
        default=0.2, metadata={"help": "Updates after which the student acts alone, or below 1 their share."}
    )
    student_acting: str = field(default="greedy", metadata={"help": "Of dagger: greedy or sampled."})
    eval_episodes: int = field(default=128, metadata={"help": "Held-out episodes of each level at an evaluation."})
    eval_first_seed: int = field(default=1_000_000_000, metadata={"help": "Seed of the first held-out episode."})

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm!r}: choose {' or '.join(ALGORITHMS)}.")
        if self.student_acting not in ACTING:
            raise ValueError(f"student_acting is {self.student_acting!r}: choose {' or '.join(ACTING)}.")
        lowest = ["num_envs", "unroll_len", "num_demonstrations", "eval_episodes"]
        lowest += [] if self.demonstration_num_proc is None else ["demonstration_num_proc"]
        for name in lowest:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.eval_first_seed < 0:
            raise ValueError(f"eval_first_seed is {self.eval_first_seed}: it must be at least 0.")
        if not 0 <= self.dagger_beta_start <= 1:
            raise ValueError(f"dagger_beta_start is {self.dagger_beta_start}: a probability is between 0 and 1.")
        if self.dagger_beta_steps < 0:
            raise ValueError(f"dagger_beta_steps is {self.dagger_beta_steps}: it must be at least 0.")
        self.env_id = list(dict.fromkeys(self.env_id))
        if self.level_weights is not None and self.algorithm == "bc":
            raise ValueError(
                "level_weights is for dagger: bc reads as many demonstrations of one level as of another."
            )
        if self.num_envs < len(self.env_id):
            raise ValueError(
                f"num_envs is {self.num_envs} for {len(self.env_id)} levels: each level needs an environment at least."
            )


@dataclass
class ImitationConfig(TrainingArguments):
    """
    `TrainingArguments` with the defaults of imitation in BabyAI: Adam, warm-up then cosine, clipping at 1, evaluation
    during training by success on held-out episodes, TensorBoard.
    """

    output_dir: str = field(default="out", metadata={"help": "Folder of checkpoints, logs and results."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a finished run in `output_dir` may be replaced."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to resume, or 'last' for the newest one in `output_dir`."}
    )
    max_steps: int = field(
        default=10_000, metadata={"help": "Updates: steps of the optimizer.", "aliases": ["--num_updates"]}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=0.01, metadata={"help": "Steps of warm-up, or below 1 their share."})
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Leave at 1: an update takes one unroll of all environments."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Held-out episodes played at once."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between logs."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    metric_for_best_model: str | None = field(default="success", metadata={"help": "What the best checkpoint has."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"], metadata={"help": "Trackers to report to."})
    num_threads: int = field(
        default=1, metadata={"help": "Threads of PyTorch; more than one pays only for wide policies on idle cores."}
    )
    # The unrolls come from environments, not from the columns of a data set.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off."})
    # The trainer stops at a loss that is not finite; the filter would average it away.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave off, so that NaN is seen."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_steps", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.per_device_train_batch_size != 1:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}: an update takes one unroll of "
                "all environments, so set --num_envs instead."
            )
