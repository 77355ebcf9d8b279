"""Configuration of MoRE, mixtures of recurrent experts, with named sizes whose variants are matched."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

EXPERT_PARAMETERS = {
    "base": ("gate_up_proj", "down_proj"),
    "more_a": (
        "adapter_state", "adapter_input", "qkv_proj", "o_proj", "attention_output_norm", "mlp_output_norm",
        "gate_up_proj", "down_proj",
    ),
    "more_b": ("up_proj", "down_proj", "gru_hidden", "gru_input"),
    "more_c": ("gate_up_proj", "down_proj", "gru_hidden", "gru_input", "branch_gate"),
    "more_d": ("gate_up_proj", "down_proj", "gru_hidden", "gru_input", "update_gate"),
}  # fmt: skip
EXPERT_TYPES = tuple(EXPERT_PARAMETERS)

# One shape per size; the widths of the experts follow from the budget that all variants of a size share.
PRESETS = {
    "debug": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
    },
    "tiny": {"vocab_size": 8192, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
    "small": {"vocab_size": 50257, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8},
    "medium": {"vocab_size": 50257, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
}
# In units of hidden_size**2: the parameters of one expert, or its multiply-accumulates for one token.
# The second is larger because four steps of a recurrent block cost four times its parameters.
MATCHED_BUDGETS = {"parameters": 10.5, "flops": 36.0}
MATCHED_SEQUENCE_LENGTH = 256


@strict
class MoreConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MoreModel`]: a decoder-only transformer whose experts are feed-forward or recurrent.

    Args:
        vocab_size (`int`, *optional*, defaults to 50257): Number of tokens.
        hidden_size (`int`, *optional*, defaults to 512): Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 1792):
            Inner width of the gated feed-forward part of an expert (all types but `more_b`).
        recurrent_size (`int`, *optional*): Width of the state of a `more_b` expert; four times `hidden_size` if unset.
        num_hidden_layers (`int`, *optional*, defaults to 6): Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 8): Attention heads, also inside `more_a` experts.
        num_key_value_heads (`int`, *optional*): Heads of keys and values; `num_attention_heads` if unset.
        head_dim (`int`, *optional*): Width of a head; `hidden_size // num_attention_heads` if unset.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the experts; gated, so SwiGLU by default.
        expert_type (`str`, *optional*, defaults to `"base"`): One of `base`, `more_a`, `more_b`, `more_c`, `more_d`.
        num_experts (`int`, *optional*, defaults to 8): Experts per layer.
        num_experts_per_tok (`int`, *optional*, defaults to 1): Experts per token.
        router_score_function (`str`, *optional*, defaults to `"softmax"`): `softmax` or `sigmoid`.
        norm_topk_prob (`bool`, *optional*, defaults to `True`):
            Whether the weights of a token's experts sum to one. With one expert per token the score itself stays the
            weight, since a weight of exactly one would give the router no gradient.
        router_balancing (`str`, *optional*, defaults to `"auxiliary_loss"`):
            `auxiliary_loss` (Switch), `bias` (DeepSeek-V3, no auxiliary loss) or `none`.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01): Weight of the balancing loss.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0): Weight of the router z-loss.
        router_bias_update_rate (`float`, *optional*, defaults to 0.001): Step of `bias` balancing.
        output_router_logits (`bool`, *optional*, defaults to `False`): Whether outputs carry the routers' logits.
        num_recurrences (`int`, *optional*, defaults to 4): Steps of the recurrent experts; `forward` may override it.
        recurrence_sampling (`str`, *optional*, defaults to `"fixed"`):
            Number of steps in training: `fixed`, `uniform` (between `min_recurrences` and `max_recurrences`) or
            `log_normal_poisson` with mean `num_recurrences` (Geiping et al. 2025, arXiv 2502.05171).
        min_recurrences (`int`, *optional*, defaults to 1): Fewest steps that sampling or early exit may take.
        max_recurrences (`int`, *optional*):
            Most steps that sampling may take; twice `num_recurrences` for `uniform` if unset.
        backprop_recurrences (`int`, *optional*): Gradient flows through this many last steps; through all if unset.
        exit_threshold (`float`, *optional*, defaults to 0.0):
            A token leaves the recurrence once its state's relative change is below this; 0 never exits.
        state_initialization (`str`, *optional*, defaults to `"zeros"`):
            First state of `more_a`: `zeros`, `learned`, or `noise` (in training; zeros in evaluation).
        state_noise_std (`float`, *optional*, defaults to 0.6): Standard deviation of that noise.
        loss_chunk_size (`int`, *optional*, defaults to 512):
            Tokens whose logits exist at once while the training loss is computed; 0 computes all logits at once.
    """

    model_type = "more"
    # Experts stay whole: the expert-parallel plan splits their number.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "router_weights", "router_indices"]
    attribute_map = {"num_local_experts": "num_experts"}

    vocab_size: int = 50257
    hidden_size: int = 512
    intermediate_size: int = 1792
    recurrent_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    expert_type: str = "base"
    num_experts: int = 8
    num_experts_per_tok: int = 1
    router_score_function: str = "softmax"
    norm_topk_prob: bool = True
    router_balancing: str = "auxiliary_loss"
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    router_bias_update_rate: float = 1e-3
    output_router_logits: bool = False

    num_recurrences: int = 4
    recurrence_sampling: str = "fixed"
    min_recurrences: int = 1
    max_recurrences: int | None = None
    backprop_recurrences: int | None = None
    exit_threshold: float = 0.0
    state_initialization: str = "zeros"
    state_noise_std: float = 0.6
    loss_chunk_size: int = 512

    def __post_init__(self, **kwargs):
        self._check_choices()
        self._check_numbers()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.recurrent_size is None:
            self.recurrent_size = 4 * self.hidden_size
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})."
            )
        # A saved causal LM records its own auto class only; this lets `AutoModel` load the same checkpoint.
        kwargs.setdefault("auto_map", {"AutoModel": "modeling_more.MoreModel"})
        super().__post_init__(**kwargs)

    def _check_choices(self):
        choices = {
            "expert_type": EXPERT_TYPES,
            "router_score_function": ("softmax", "sigmoid"),
            "router_balancing": ("auxiliary_loss", "bias", "none"),
            "recurrence_sampling": ("fixed", "uniform", "log_normal_poisson"),
            "state_initialization": ("zeros", "learned", "noise"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(allowed)}.")

    def _check_numbers(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "recurrent_size", "head_dim")
        for name in (*sizes, "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if self.hidden_size % self.num_attention_heads and self.head_dim is None:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}); change one of them or set `head_dim`."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` is {self.num_experts_per_tok}; it must lie between 1 and "
                f"`num_experts` ({self.num_experts})."
            )
        for name in ("num_recurrences", "min_recurrences", "backprop_recurrences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; a recurrent expert takes at least 1 step.")
        if self.max_recurrences is not None and self.max_recurrences < self.min_recurrences:
            raise ValueError(
                f"`max_recurrences` ({self.max_recurrences}) is below `min_recurrences` ({self.min_recurrences})."
            )
        if self.exit_threshold < 0:
            raise ValueError(f"`exit_threshold` is {self.exit_threshold}; it must be 0 (never exit) or positive.")
        if self.loss_chunk_size < 0:
            raise ValueError(
                f"`loss_chunk_size` is {self.loss_chunk_size}; it must be 0 (all logits at once) or positive."
            )

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """How transformers splits the experts over processes, which each hold some of them whole."""
        names = EXPERT_PARAMETERS[self.expert_type]
        if self.expert_type == "more_a" and self.state_initialization == "learned":
            names = (*names, "initial_state")
        plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in names}
        return {**plan, "layers.*.mlp.experts": "ep_dispatch_experts"}

    @property
    def is_recurrent(self) -> bool:
        """Whether the experts iterate, so that `num_recurrences` changes what they compute."""
        return self.expert_type != "base"

    def expert_parameters(self) -> int:
        """Number of parameters of one expert."""
        hidden, wide = self.hidden_size, self.recurrent_size
        feed_forward = 3 * hidden * self.intermediate_size
        if self.expert_type == "more_a":
            block = 2 * hidden**2 + self._attention_parameters() + feed_forward + 2 * hidden
            return block + (hidden if self.state_initialization == "learned" else 0)
        return {
            "base": feed_forward,
            "more_b": 2 * hidden * wide + 4 * wide**2,
            "more_c": feed_forward + 6 * hidden**2 + hidden,
            "more_d": feed_forward + 4 * hidden**2 + hidden,
        }[self.expert_type]

    def expert_macs(self, num_recurrences: int | None = None, sequence_length: int = 0) -> float:
        """Multiply-accumulates of one expert for one token, as the grouped implementation computes them.

        Args:
            num_recurrences (`int`, *optional*): Steps; the configured number if unset.
            sequence_length (`int`, *optional*, defaults to 0):
                Adds the attention of `more_a` over the tokens that balanced routing sends to one expert.
        """
        steps = num_recurrences or self.num_recurrences
        hidden, wide = self.hidden_size, self.recurrent_size
        feed_forward = 3 * hidden * self.intermediate_size
        if self.expert_type == "more_a":
            context = (sequence_length * self.num_experts_per_tok / self.num_experts + 1) / 2 if sequence_length else 0
            step = hidden**2 + self._attention_parameters() + feed_forward
            step += 2 * self.num_attention_heads * self.head_dim * context
            skipped = hidden**2 if self.state_initialization == "zeros" else 0
            return hidden**2 + steps * step - skipped
        return {
            "base": feed_forward,
            "more_b": 2 * hidden * wide + steps * 4 * wide**2,
            "more_c": feed_forward + 3 * steps * hidden**2 + hidden,
            "more_d": feed_forward + steps * (4 * hidden**2 + hidden),
        }[self.expert_type]

    def flops_per_token(self, sequence_length: int, num_recurrences: int | None = None) -> float:
        """Floating-point operations of a forward pass per token, head included; training takes three times as many.

        Args:
            sequence_length (`int`): Tokens per sequence, which causal attention sees half of on average.
            num_recurrences (`int`, *optional*): Steps; the configured number if unset.
        """
        attention = self._attention_parameters()
        attention += 2 * self.num_attention_heads * self.head_dim * (sequence_length + 1) / 2
        router = self.hidden_size * self.num_experts
        experts = self.num_experts_per_tok * self.expert_macs(num_recurrences, sequence_length)
        macs = self.num_hidden_layers * (attention + router + experts) + self.hidden_size * self.vocab_size
        return 2.0 * macs

    def _attention_parameters(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    @classmethod
    def from_preset(cls, size: str, expert_type: str = "base", match: str = "parameters", **overrides) -> "MoreConfig":
        """The configuration of a named size, with the expert's width chosen so that all variants cost the same.

        Args:
            size (`str`): `debug`, `tiny` (about 10 M parameters), `small` (about 45 M) or `medium` (about 160 M).
            expert_type (`str`, *optional*, defaults to `"base"`): The variant.
            match (`str`, *optional*, defaults to `"parameters"`):
                `parameters`: the variants of a size have the same number of parameters, within 3 %; `flops`: the same
                operations per token at the configured `num_recurrences` and 256 tokens, within 5 %.
            overrides: Any field of the configuration. A width that is given here is kept as it is.

        Example:

        ```python
        >>> from mixturekit.modeling import MoreConfig

        >>> MoreConfig.from_preset("tiny", expert_type="more_c").intermediate_size
        192
        ```
        """
        if size not in PRESETS:
            raise ValueError(f"Unknown preset {size!r}; choose one of {', '.join(PRESETS)}.")
        if match not in MATCHED_BUDGETS:
            raise ValueError(f"`match` is {match!r}; choose one of {', '.join(MATCHED_BUDGETS)}.")
        config = cls(**{**PRESETS[size], **overrides, "expert_type": expert_type})
        width = "recurrent_size" if expert_type == "more_b" else "intermediate_size"
        if width not in overrides:
            setattr(config, width, config._matched_width(width, match))
        return config

    def _matched_width(self, width: str, match: str) -> int:
        budget = MATCHED_BUDGETS[match] * self.hidden_size**2

        def distance(candidate: int) -> float:
            setattr(self, width, candidate)
            if match == "parameters":
                return abs(self.expert_parameters() - budget)
            return abs(self.expert_macs(sequence_length=MATCHED_SEQUENCE_LENGTH) - budget)

        # Multiples of 8 keep rows 16-byte aligned in bfloat16, as grouped matrix products on a GPU require; at
        # `debug` widths they would be too coarse to match, and alignment does not matter.
        multiple = 8 if self.hidden_size >= 128 else 4
        best = min(range(multiple, 16 * self.hidden_size, multiple), key=distance)
        if best == multiple and distance(best) > 0.05 * budget:
            raise ValueError(
                f"With num_recurrences={self.num_recurrences} even the narrowest {self.expert_type!r} expert costs "
                f"more than the others when matched by {match}; lower `num_recurrences`, or give `{width}`."
            )
        return best


__all__ = ["EXPERT_TYPES", "MATCHED_BUDGETS", "PRESETS", "MoreConfig"]
