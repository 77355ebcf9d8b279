"""What a language-modelling run is configured by: the model, the data and the training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .recipe_parser import RepeatableOption
from .task_data import DEFAULT_TASKS, KEPT_ARGUMENTS, TaskArguments


@dataclass
class ModelArguments:
    """
    The model: a named size, a variant, and any field of `MoreConfig` that should differ; or a checkpoint.

    Fields that are `None` keep the value of the preset.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "MoRE checkpoint to continue from; otherwise a new model is initialised."}
    )
    preset: str = field(default="tiny", metadata={"help": "Size: debug, tiny, small or medium."})
    match: str = field(
        default="parameters", metadata={"help": "What the variants of a size share: parameters or flops."}
    )
    expert_type: str = field(default="base", metadata={"help": "base, more_a, more_b, more_c or more_d."})
    num_recurrences: int | None = field(default=None, metadata={"help": "Steps of the recurrent experts."})
    recurrence_sampling: str | None = field(
        default=None, metadata={"help": "Steps in training: fixed, uniform or log_normal_poisson."}
    )
    min_recurrences: int | None = field(default=None, metadata={"help": "Fewest steps of sampling and early exit."})
    max_recurrences: int | None = field(default=None, metadata={"help": "Most steps of sampling."})
    backprop_recurrences: int | None = field(
        default=None, metadata={"help": "Last steps that gradient flows through."}
    )
    exit_threshold: float | None = field(default=None, metadata={"help": "Relative change at which a token exits."})
    state_initialization: str | None = field(default=None, metadata={"help": "more_a: zeros, learned or noise."})
    num_experts: int | None = field(default=None, metadata={"help": "Experts per layer; 1 gives a dense model."})
    num_experts_per_tok: int | None = field(default=None, metadata={"help": "Experts per token."})
    router_score_function: str | None = field(default=None, metadata={"help": "softmax or sigmoid."})
    router_balancing: str | None = field(default=None, metadata={"help": "auxiliary_loss, bias or none."})
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the balancing loss."})
    router_z_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the router z-loss."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the feed-forward part."})
    recurrent_size: int | None = field(default=None, metadata={"help": "Width of the state of more_b."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Decoder layers."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Heads of keys and values."})
    hidden_act: str | None = field(default=None, metadata={"help": "Activation of the experts."})
    tie_word_embeddings: bool | None = field(default=None, metadata={"help": "Whether head and embeddings are one."})


@dataclass
class DataArguments(TaskArguments):
    """The text or the tasks, the tokenizer, and how both are cut into sequences."""

    dataset_name: str = field(
        default="generated",
        metadata={"help": "Text: Hub id, local file or folder; or 'generated' for stories and sums, see --task."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Last documents held out where the data set has no validation split."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens per sequence."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer from the Hub or a folder."})
    train_tokenizer: bool = field(
        default=False, metadata={"help": "Trains a byte-level BPE tokenizer on the training documents."}
    )
    tokenizer_unit: str = field(
        default="word", metadata={"help": "What a token of the trained tokenizer never crosses: word or line."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Vocabulary of the trained tokenizer, and of a new model."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    task: list[str] = field(
        default_factory=lambda: list(DEFAULT_TASKS),
        metadata={
            "help": "Of 'generated': babi1 to babi20, addition, subtraction, multiplication, or arithmetic for these "
            "three; 'babi2:3' gives a task three shares. May be repeated.",
            "action": RepeatableOption,
        },
    )
    supporting_facts: bool = field(
        default=False,
        metadata={"help": "Whether answers to stories go on with the facts that they follow from."},
    )
    num_renamings: int = field(
        default=0,
        metadata={
            "help": "Copies of each training story, unless it is generated, in which people, places and objects swap "
            "names."
        },
    )
    num_examples: int = field(default=20_000, metadata={"help": "Training examples of all generated tasks."})
    num_validation_examples: int = field(default=300, metadata={"help": "Held-out examples of all generated tasks."})

    def for_evaluation(self) -> dict:
        """How tasks were made and written, and text cut and held out."""
        return {name: getattr(self, name) for name in KEPT_ARGUMENTS}


@dataclass
class LanguageModelingConfig(TrainingArguments):
    """
    `TrainingArguments` with the defaults of language-model pretraining: AdamW with weight decay on matrices, warm-up
    then cosine, clipping at 1, evaluation during training, TensorBoard.
    """

    output_dir: str = field(default="out", metadata={"help": "Folder of checkpoints, logs and results."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a finished run in `output_dir` may be replaced."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to resume, or 'last' for the newest one in `output_dir`."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of matrices."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second-moment decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps of warm-up, or below 1 their share."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between logs."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"], metadata={"help": "Trackers to report to."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation needs the loss alone."})
    # The trainer stops at a loss that is not finite; the filter would average it away.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave off, so that NaN is seen."})
