"""What a PPO run is configured by, beside what TRL's GRPO is."""

import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig

CRITIC_LEVELS = ("token", "prompt", "sequence")
CRITIC_FEATURES = ("policy", "ref")
KL_PLACES = ("loss", "reward")
ROUTER_REPLAY = ("off", "r2")


@dataclass
class PPOConfig(GRPOConfig):
    """
    TRL's `GRPOConfig`, with a critic (Schulman et al. 2017, arXiv 1707.06347).

    Of GRPO's own fields, `num_iterations` are PPO's epochs, `epsilon` is its clipping range, `beta` the weight of the
    KL divergence from the reference, and `num_generations` the completions of a prompt, of which one is enough.

    Raises:
        ValueError: If a value is not understood, or two of them contradict each other.
    """

    output_dir: str | None = field(default="out", metadata={"help": "Folder of checkpoints, logs and results."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a finished run in `output_dir` may be replaced."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the policy."})
    num_generations: int | None = field(
        default=1,
        metadata={"help": "Completions of each prompt; with several, their mean reward is subtracted from each."},
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Whether rewards of several completions are divided by their deviation: none, group, batch."
        },
    )
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL divergence from the reference policy."})
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Host of the vLLM server."})

    value_learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of the value head."})
    value_loss_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    value_clip_range: float | None = field(
        default=0.2, metadata={"help": "How far a value may move from the old one before its loss stops falling."}
    )
    value_backbone_gradient: bool = field(
        default=False, metadata={"help": "Whether the value loss trains the backbone and not only the head."}
    )
    critic_level: str = field(
        default="token",
        metadata={
            "help": "Of what the critic tells the value: token, the state before each token; prompt; or sequence, the "
            "finished completion, which takes the learning signal away and is there for comparison."
        },
    )
    critic_features: str = field(
        default="policy",
        metadata={"help": "Whose hidden states the critic reads: policy, or ref for the unchanging reference."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of a token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalized advantage estimation."})
    normalize_advantages: bool = field(
        default=True, metadata={"help": "Whether advantages of a rollout get mean 0 and deviation 1."}
    )
    kl_in: str = field(default="loss", metadata={"help": "Where the KL divergence is subtracted: loss or reward."})
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL divergence in nats per token that beta is adapted to; fixed beta if unset."},
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Completions over which beta adapts (Ziegler et al. 2019, arXiv 1909.08593)."},
    )
    freeze_router: bool = field(
        default=True, metadata={"help": "Whether the routers of a mixture keep their weights."}
    )
    router_replay: str = field(
        default="off",
        metadata={"help": "r2: updates use the experts that the scoring pass chose, with new weights; or off."},
    )

    def __post_init__(self):
        # TRL divides by it.
        if (self.num_generations or 0) < 1:
            raise ValueError(f"num_generations is {self.num_generations}: it must be at least 1.")
        try:
            super().__post_init__()
        except ValueError as error:
            # All that GRPO does before this has been done; what it checks after it concerns vLLM's options.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        self._check_choices()
        self._check_numbers()
        if self.critic_level == "sequence":
            warnings.warn(
                "critic_level is 'sequence': a value that knows the completion, subtracted from its reward, cancels "
                "what could be learned. Use 'token' unless you want to see that.",
                stacklevel=3,
            )

    def _check_choices(self):
        choices = {
            "critic_level": CRITIC_LEVELS,
            "critic_features": CRITIC_FEATURES,
            "kl_in": KL_PLACES,
            "router_replay": ROUTER_REPLAY,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(known)}.")
        if self.sync_ref_model:
            raise ValueError("sync_ref_model is not supported: no checkpoint has the reference that it changes.")
        if self.critic_features == "ref" and self.beta == 0:
            raise ValueError("critic_features is 'ref', but with beta 0 there is no reference; set beta or 'policy'.")
        if self.critic_features == "ref" and self.value_backbone_gradient:
            raise ValueError("value_backbone_gradient needs critic_features 'policy': the reference does not learn.")
        if self.kl_target is not None and self.beta == 0:
            raise ValueError("kl_target adapts beta, which is 0; begin with a small one such as 0.05.")
        if self.kl_in == "reward" and self.beta == 0:
            raise ValueError("kl_in is 'reward', but beta is 0; set beta or leave kl_in at 'loss'.")

    def _check_numbers(self):
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it lies between 0 and 1.")
        for name in ("value_learning_rate", "value_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0.")
        for name in ("value_clip_range", "kl_target"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0, or unset.")
        if self.kl_horizon < 1:
            raise ValueError(f"kl_horizon is {self.kl_horizon}: it must be at least 1.")
