"""Configuration of tiered MoE agents: a causal transformer that plays, with more experts than fit in fast memory."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

CHOICES = {
    "step_tokens": ("separate", "merged"),
    "routing_condition": ("content", "environment"),
    "router_balancing": ("game", "all_games", "none"),
}
# Kernel and stride of each convolution, after Mnih et al. (2015).
CONVOLUTIONS = ((8, 4), (4, 2), (3, 1))
# The detector averages four by four pixels, and its kernel is five wide.
SMALLEST_FRAME = 20


@strict
class TieredMoeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TieredMoeModel`], a causal transformer over the steps of a game in the manner of the Decision
    Transformer (Chen et al. 2021, arXiv:2106.01345), whose feed-forward layers are mixtures of many experts.

    Args:
        games (`list[str]`, *optional*): The games, in the order of their numbers.
        own_actions (`list[list[int]]`, *optional*): For each game the actions that do something; all if unset.
        num_actions (`int`, *optional*, defaults to 18): Actions of the head, which all games share.
        frame_size (`int`, *optional*, defaults to 84): Pixels along one side of a frame.
        frame_stack (`int`, *optional*, defaults to 4): Frames of an observation.
        center_frames (`bool`, *optional*, defaults to `True`): Whether the mean brightness of a frame is taken off
            its pixels, so that what moves is not lost beside a bright background.
        encoder_channels (`list[int]`, *optional*): Channels of the two or three convolutions, `[32, 64, 64]` if unset.
        expert_dim (`int`, *optional*, defaults to 512): Width of the stream, and so of what an expert takes and gives.
        expert_hidden_dim (`int`, *optional*, defaults to 2048): Width inside an expert.
        num_layers (`int`, *optional*, defaults to 6): Layers of attention and experts.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads of attention.
        num_experts (`int`, *optional*, defaults to 256): Experts of each layer.
        top_k (`int`, *optional*, defaults to 2): Experts of each token.
        hbm_capacity (`int`, *optional*, defaults to 32): Experts of each layer in the fast tier of a store.
        dram_capacity (`int`, *optional*, defaults to 128): Experts of each layer in RAM, besides.
        context_len (`int`, *optional*, defaults to 32): Steps that attention reaches back, in each layer.
        step_tokens (`str`, *optional*, defaults to `"separate"`): `separate` for three tokens a step (the last action,
            its reward, what is seen), `merged` for one that is their sum, at a third of the cost.
        hidden_act (`str`, *optional*, defaults to `"relu"`): Activation of experts.
        routing_condition (`str`, *optional*, defaults to `"content"`): What the router sees: `content` for the token,
            `environment` for the token and an embedding of the game, which an [`EnvironmentDetector`] names where the
            caller does not.
        router_balancing (`str`, *optional*, defaults to `"game"`): Over what the load of experts is balanced: the
            tokens of each `game`, those of `all_games` so far, or `none`.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01): Weight of the balancing loss.
        per_game_heads (`bool`, *optional*, defaults to `False`): Whether each game has its own action and value heads.
        per_game_norm (`bool`, *optional*, defaults to `False`): Whether each game has its own scale in the last norm.
        detector_channels (`int`, *optional*, defaults to 16): Width of the [`EnvironmentDetector`].
        rms_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of norms.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of normal draws.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of attention weights.
        rope_parameters (`dict`, *optional*): Of rotary positions, which count the tokens of an episode.

    Raises:
        ValueError: If a field is out of range, or capacities are in the wrong order.
    """

    model_type = "tiered_moe"
    attribute_map = {
        "hidden_size": "expert_dim",
        "intermediate_size": "expert_hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_experts_per_tok": "top_k",
        "num_key_value_heads": "num_attention_heads",
        "num_local_experts": "num_experts",
    }

    games: list | None = None
    own_actions: list | None = None
    num_actions: int = 18
    frame_size: int = 84
    frame_stack: int = 4
    center_frames: bool = True
    encoder_channels: list | None = None
    expert_dim: int = 512
    expert_hidden_dim: int = 2048
    num_layers: int = 6
    num_attention_heads: int = 8
    num_experts: int = 256
    top_k: int = 2
    hbm_capacity: int = 32
    dram_capacity: int = 128
    context_len: int = 32
    step_tokens: str = "separate"
    hidden_act: str = "relu"
    routing_condition: str = "content"
    router_balancing: str = "game"
    router_aux_loss_coef: float = 0.01
    per_game_heads: bool = False
    per_game_norm: bool = False
    detector_channels: int = 16
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    attention_bias: bool = False
    max_position_embeddings: int = 131_072
    rope_parameters: RopeParameters | dict | None = None

    def __post_init__(self, **kwargs):
        # Of two classes, which `AutoModel` takes for a new model.
        self.architectures = self.architectures or ["TieredMoeForActorCritic"]
        self.games = self.games or ["game"]
        self.own_actions = self.own_actions or [list(range(self.num_actions)) for _ in self.games]
        self.encoder_channels = self.encoder_channels or [32, 64, 64]
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        self._check_numbers()
        super().__post_init__(**kwargs)

    def _check_numbers(self):
        for name in (
            "num_actions", "frame_size", "frame_stack", "expert_dim", "expert_hidden_dim", "num_layers",
            "num_attention_heads", "num_experts", "top_k", "hbm_capacity", "context_len", "detector_channels",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.top_k > self.num_experts:
            raise ValueError(f"`top_k` is {self.top_k}, but a layer has {self.num_experts} experts (`num_experts`).")
        if self.top_k > self.hbm_capacity:
            raise ValueError(
                f"`top_k` is {self.top_k}, but the fast tier holds {self.hbm_capacity} experts of a layer: raise "
                "`hbm_capacity`, or no token could have all of its experts at once."
            )
        if not self.hbm_capacity <= self.dram_capacity:
            raise ValueError(
                f"`hbm_capacity` ({self.hbm_capacity}) is above `dram_capacity` ({self.dram_capacity}): the tiers are "
                "in the wrong order, fast memory is the smaller one."
            )
        if self.expert_dim % (2 * self.num_attention_heads):
            raise ValueError(
                f"`expert_dim` ({self.expert_dim}) must be an even multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if not 1 <= len(self.encoder_channels) <= len(CONVOLUTIONS) or min(self.encoder_channels) < 1:
            raise ValueError(f"`encoder_channels` is {self.encoder_channels}: give one to three numbers above 0.")
        if self.encoder_side < 1:
            raise ValueError(f"`frame_size` is {self.frame_size}, which leaves nothing after the convolutions.")
        if self.frame_size < SMALLEST_FRAME:
            raise ValueError(f"`frame_size` is {self.frame_size}, but the detector needs at least {SMALLEST_FRAME}.")
        if len(self.own_actions) != len(self.games):
            raise ValueError(f"`own_actions` has {len(self.own_actions)} lists for {len(self.games)} games.")

    @property
    def encoder_side(self) -> int:
        """Places along one side after the convolutions."""
        side = self.frame_size
        for (kernel, stride), _ in zip(CONVOLUTIONS, self.encoder_channels, strict=False):
            side = (side - kernel) // stride + 1 if side >= kernel else 0
        return side

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return 3 if self.step_tokens == "separate" else 1

    @property
    def head_dim(self) -> int:
        """Width of a head of attention."""
        return self.expert_dim // self.num_attention_heads

    def dense(self, parameters: str) -> "TieredMoeConfig":
        """
        The agent with one feed-forward layer in place of each mixture.

        Args:
            parameters (`str`): `active` for as many parameters as a token uses here, `total` for as many as there are.
        """
        factors = {"active": self.top_k, "total": self.num_experts}
        if parameters not in factors:
            raise ValueError(f"A dense agent has the `active` or the `total` parameters, not {parameters!r}.")
        baseline = copy.deepcopy(self)
        baseline.expert_hidden_dim = self.expert_hidden_dim * factors[parameters]
        baseline.num_experts = baseline.top_k = 1
        baseline.routing_condition, baseline.router_balancing = "content", "none"
        return baseline


__all__ = ["TieredMoeConfig"]
