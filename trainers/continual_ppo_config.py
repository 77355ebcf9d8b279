"""What a run over several games is configured by: the agent and where its experts are, the games, and the learning."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from .atari import DEFAULT_GAMES, PREPROCESSING, check_games
from .recipe_parser import RepeatableOption

DENSE = ("active", "total")
OPTIMIZERS = ("lazy", "dense")
PREFETCHES = ("none", "recency", "detector")
LEARNING_RULES = ("backpropagation", "forward_forward", "hebbian", "three_factor", "none")
FREEZING = ("never", "after_first_game", "always")


@dataclass
class AgentArguments:
    """
    The agent: any field of `TieredMoeConfig` that should differ from its default; and where its experts are.

    Fields that are `None` keep the default, or the value of the checkpoint.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint of an agent to go on from; otherwise a new one is initialised."}
    )
    expert_dim: int | None = field(default=None, metadata={"help": "Width of the stream."})
    expert_hidden_dim: int | None = field(default=None, metadata={"help": "Width inside an expert."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers of attention and experts."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of attention."})
    num_experts: int | None = field(default=None, metadata={"help": "Experts of each layer."})
    top_k: int | None = field(default=None, metadata={"help": "Experts of each token."})
    hbm_capacity: int | None = field(default=None, metadata={"help": "Experts of a layer in the fast tier."})
    dram_capacity: int | None = field(default=None, metadata={"help": "Experts of a layer in RAM, besides."})
    context_len: int | None = field(default=None, metadata={"help": "Steps that attention reaches back."})
    step_tokens: str | None = field(
        default=None, metadata={"help": "separate for three tokens a step, merged for one, which is faster."}
    )
    encoder_channels: list[int] | None = field(
        default=None, metadata={"help": "Channels of the convolutions.", "action": RepeatableOption}
    )
    routing_condition: str | None = field(
        default=None, metadata={"help": "What the router sees: content, or environment for the game as well."}
    )
    router_balancing: str | None = field(
        default=None, metadata={"help": "Balance over the tokens of each game, of all_games so far, or none."}
    )
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the balancing loss."})
    per_game_heads: bool | None = field(default=None, metadata={"help": "Whether each game has heads of its own."})
    per_game_norm: bool | None = field(default=None, metadata={"help": "Whether each game has a scale of its own."})
    dense: str | None = field(
        default=None, metadata={"help": "Baseline without experts: as many parameters as are active, or in total."}
    )
    nvme_path: str | None = field(
        default=None, metadata={"help": "Folder of the expert store; if unset, all experts are in memory."}
    )
    store_trace: str | None = field(
        default=None, metadata={"help": "File for every access to an expert, to be replayed with other policies."}
    )
    eviction_policy: str = field(default="frequency", metadata={"help": "Of the store: lru, s3fifo or frequency."})
    prefetch: str = field(
        default="detector", metadata={"help": "What is brought when a game begins: none, recency, or detector."}
    )
    prefetch_next_layer: bool = field(
        default=True,
        metadata={"help": "Whether a layer that acts asks the next router which experts to bring; of content."},
    )

    def __post_init__(self):
        if self.dense is not None and self.dense not in DENSE:
            raise ValueError(f"dense is {self.dense!r}: choose {' or '.join(DENSE)}.")
        if self.prefetch not in PREFETCHES:
            raise ValueError(f"prefetch is {self.prefetch!r}: choose one of {', '.join(PREFETCHES)}.")
        if self.dense and self.nvme_path:
            raise ValueError("A dense agent has no experts to put in a store: leave out --nvme_path or --dense.")
        if self.store_trace and not self.nvme_path:
            raise ValueError("Without --nvme_path there is no store whose accesses --store_trace could write.")


@dataclass
class GameArguments:
    """The games, how long each is learned, and how the agent is judged."""

    games: list[str] | None = field(
        default=None,
        metadata={"help": "Games in their order, builtin:catch for one that ships here.", "action": RepeatableOption},
    )
    num_games: int | None = field(
        default=None, metadata={"help": "The first so many of the games, or of a sequence of ten if none are named."}
    )
    steps_per_game: int = field(default=1_000_000, metadata={"help": "Steps in each game and cycle, in all."})
    cycles: int = field(default=1, metadata={"help": "How often the sequence of games is gone through."})
    interleaved: bool = field(
        default=False, metadata={"help": "Whether all games are learned at once, the upper bound."}
    )
    preprocessing: str = field(
        default="current", metadata={"help": "current for ALE's defaults, classic for those of the DQN of 2015."}
    )
    num_envs: int = field(default=8, metadata={"help": "Environments of each process."})
    env_threads: int | None = field(default=None, metadata={"help": "Threads of the emulator."})
    eval_episodes: int = field(default=8, metadata={"help": "Episodes of each game after each phase; 0 for none."})
    eval_max_steps: int = field(default=27_000, metadata={"help": "Steps after which such an episode counts as over."})
    eval_first_seed: int = field(default=1_000_000, metadata={"help": "Seed of those episodes."})
    tell_game: bool = field(
        default=True, metadata={"help": "Whether the agent is told the game in these episodes, or has to detect it."}
    )

    def __post_init__(self):
        self.games = check_games(self.games or DEFAULT_GAMES)
        if len(set(self.games)) < len(self.games):
            raise ValueError("A game is named twice; with --cycles 2 all are learned twice.")
        if self.num_games is not None:
            if not 1 <= self.num_games <= len(self.games):
                raise ValueError(f"num_games is {self.num_games}, and there are {len(self.games)} games.")
            self.games = self.games[: self.num_games]
        if self.preprocessing not in PREPROCESSING:
            raise ValueError(f"preprocessing is {self.preprocessing!r}: choose {' or '.join(PREPROCESSING)}.")
        for name in ("steps_per_game", "cycles", "num_envs", "eval_max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.eval_episodes < 0:
            raise ValueError(f"eval_episodes is {self.eval_episodes}: it must be at least 0.")
        if self.interleaved and self.num_envs % len(self.games):
            raise ValueError(f"num_envs is {self.num_envs}, which {len(self.games)} games cannot share evenly.")

    def phases(self) -> list[list[str]]:
        """The games of each phase: one after another, or all in one."""
        return [self.games] if self.interleaved else [[game] for _ in range(self.cycles) for game in self.games]

    def steps_of_phase(self) -> int:
        """Steps of a phase, so that interleaved learning sees as many in all."""
        return self.steps_per_game * (len(self.games) * self.cycles if self.interleaved else 1)


@dataclass
class ContinualPpoConfig:
    """
    PPO (Schulman et al. 2017, arXiv:1707.06347) with the details and defaults of CleanRL's `ppo_atari`, game after
    game, and what may be done against forgetting.
    """

    output_dir: str = field(default="out", metadata={"help": "Folder of checkpoints, logs and results."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a run in `output_dir` may be replaced."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to resume, or 'last' for the newest one in `output_dir`."}
    )
    seed: int = field(default=1, metadata={"help": "Of weights, actions and games."})
    num_steps: int = field(default=128, metadata={"help": "Steps of an environment between two updates."})
    segment_len: int = field(
        default=32, metadata={"help": "Steps that gradient flows back through; before them the cache is as it was."}
    )
    learning_rate: float = field(default=2.5e-4, metadata={"help": "At the start of each game."})
    anneal_lr: bool = field(default=True, metadata={"help": "Whether it falls to 0 within each game."})
    gamma: float = field(default=0.99, metadata={"help": "Discount of a step."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Of generalized advantage estimation."})
    num_minibatches: int = field(default=4, metadata={"help": "Updates of an epoch."})
    update_epochs: int = field(default=4, metadata={"help": "Epochs over what was played."})
    clip_coef: float = field(default=0.1, metadata={"help": "Of the surrogate objective."})
    clip_vloss: bool = field(default=True, metadata={"help": "Whether the value loss is clipped as well."})
    norm_adv: bool = field(default=True, metadata={"help": "Whether advantages are normalised in each minibatch."})
    ent_coef: float = field(default=0.01, metadata={"help": "Weight of the entropy."})
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Clips the norm of all gradients."})
    target_kl: float | None = field(default=None, metadata={"help": "Stops the epochs of an update above this KL."})
    adam_eps: float = field(default=1e-5, metadata={"help": "Epsilon of Adam."})
    optimizer: str = field(
        default="lazy", metadata={"help": "lazy updates experts that have a gradient, dense all; dense needs memory."}
    )
    expert_learning_rule: str = field(
        default="backpropagation",
        metadata={
            "help": "An experiment: how experts learn, all else by backpropagation. forward_forward, hebbian (Oja's "
            "rule), three_factor (that one with the advantage), or none, the control."
        },
    )
    freeze_experts: bool = field(
        default=False, metadata={"help": "Whether experts that a game has used most are frozen after it."}
    )
    freeze_share: float = field(
        default=0.9, metadata={"help": "Of freeze_experts: the share of a game's tokens whose experts are frozen."}
    )
    freeze_router: str = field(default="never", metadata={"help": "never, after_first_game, or always."})
    replay_coef: float = field(
        default=0.0, metadata={"help": "Weight of what the agent did in earlier games (as CLEAR); 0 for no replay."}
    )
    replay_segments: int = field(default=32, metadata={"help": "Of replay: segments that are kept of each game."})
    ewc_coef: float = field(
        default=0.0, metadata={"help": "Weight of elastic weight consolidation outside of the experts; 0 for none."}
    )
    detector_memory: int = field(default=64, metadata={"help": "Frames of each game that the detector goes over."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Whether to show no progress bar."})
    logging_steps: int = field(default=1, metadata={"help": "Updates between logs."})
    save_steps: int = field(default=100, metadata={"help": "Updates between checkpoints; each game's end has one."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    max_updates: int | None = field(
        default=None, metadata={"help": "Updates after which the run stops with a checkpoint, to be resumed."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave an accelerator alone."})
    num_threads: int = field(default=1, metadata={"help": "Threads of PyTorch; small agents want one."})

    def __post_init__(self):
        for name in ("num_steps", "segment_len", "num_minibatches", "update_epochs", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.num_steps % self.segment_len:
            raise ValueError(
                f"num_steps ({self.num_steps}) is not a multiple of segment_len ({self.segment_len}), into whose "
                "segments it is cut."
            )
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("expert_learning_rule", LEARNING_RULES),
            ("freeze_router", FREEZING),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        if self.freeze_experts and self.optimizer == "dense":
            raise ValueError("Dense Adam moves experts without a gradient: --freeze_experts needs --optimizer lazy.")

        if self.learns_locally and self.optimizer == "dense":
            raise ValueError(
                f"--expert_learning_rule {self.expert_learning_rule} changes experts that tokens go to, and dense "
                "Adam all of them: leave out --optimizer dense."
            )
        if self.learns_locally and self.replay_coef > 0:
            raise ValueError(
                f"Replay holds experts to what they did by backpropagation, which --expert_learning_rule "
                f"{self.expert_learning_rule} does without: leave out one of them."
            )

    @property
    def learns_locally(self) -> bool:
        """Whether experts learn by another rule than backpropagation."""
        return self.expert_learning_rule != "backpropagation"

    @cached_property
    def accelerator(self):
        """Of this process."""
        from accelerate import Accelerator

        return Accelerator(cpu=self.use_cpu)

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        """Of this process."""
        return self.accelerator.process_index

    @property
    def device(self):
        """Of the agent."""
        return self.accelerator.device

    def to_dict(self) -> dict[str, Any]:
        """The values, and what a card calls optimizer and schedule."""
        schedule = "linear within each game" if self.anneal_lr else "constant"
        experts = f", experts by the rule {self.expert_learning_rule}" if self.learns_locally else ""
        return {**asdict(self), "optim": f"{self.optimizer} Adam{experts}", "lr_scheduler_type": schedule}

    def check_segments(self, num_envs: int) -> None:
        """Raises `ValueError` if what is played cannot be cut into minibatches."""
        segments = num_envs * self.num_steps // self.segment_len
        if segments % self.num_minibatches:
            raise ValueError(
                f"{num_envs} environments of {self.num_steps} steps are {segments} segments of {self.segment_len}, "
                f"which {self.num_minibatches} minibatches cannot share evenly."
            )
        if self.norm_adv and num_envs * self.num_steps == self.num_minibatches:
            raise ValueError(
                f"{self.num_minibatches} minibatches of one step each: their advantages have no deviation to be "
                "normalised by; choose fewer --num_minibatches, or --norm_adv false."
            )
