"""Configuration of MoP, mixtures of pathways: recurrent routers over recurrent experts of different sizes."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

# Every word of the missions that BabyAI's grammar gives.
# fmt: off
BABYAI_WORDS = (
    "a", "after", "and", "ball", "behind", "blue", "box", "door", "front", "go", "green", "grey", "in", "key",
    "left", "next", "object", "of", "on", "open", "pick", "purple", "put", "red", "right", "the", "then", "to",
    "up", "yellow", "you", "your",
)
# fmt: on
CHOICES = {
    "policy_type": ("pathways", "gru"),
    "expert_norm": ("layernorm", "batchnorm", "none"),
    "recurrence": ("time", "published"),
    "recurrence_implementation": ("fused", "eager"),
    "encoder": ("flat", "bow_conv_film", "features"),
    "mission_encoder": ("gru", "pretrained"),
}


def parse_layers(layers: str | list) -> list[list[int]]:
    """Sizes of the experts of each layer.

    Args:
        layers (`str` or `list`): `"32,64,128;64,128,256"`, or one such string per layer, or lists of numbers.

    Raises:
        ValueError: If there is no layer, a layer has no expert, or a size is not a whole number of at least 0.
    """
    rows = layers.split(";") if isinstance(layers, str) else list(layers)
    parsed = []
    for row in rows:
        sizes = row.split(",") if isinstance(row, str) else list(row)
        for size in sizes:
            if not str(size).strip().isdigit():
                raise ValueError(
                    f"`layers` is {layers!r}, where {str(size).strip()!r} is not the size of an expert; separate "
                    "sizes by commas and layers by semicolons, as in '32,64,128;64,128,256' (0 is a skip expert)."
                )
        parsed.append([int(size) for size in sizes])
    if not parsed or not all(parsed):
        raise ValueError(f"`layers` is {layers!r}; every layer needs at least one expert, as in '0,16,32'.")
    return parsed


@strict
class MopConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MopModel`], after "Brain-Like Processing Pathways Form in Models With Heterogeneous Experts"
    (Cook, Akarca, Costa and Achterberg 2025, arXiv 2506.02813).

    Args:
        layers (`list[list[int]]` or `str`, *optional*):
            Sizes of the experts of each layer, `[[32, 64, 128], [64, 128, 256]]` if unset. An expert of size 0 is a
            skip connection. `"32,64,128;64,128,256"` is understood too.
        intermediate_dim (`int`, *optional*, defaults to 256): Width of the stream between the layers.
        router_dim (`int`, *optional*, defaults to 64): Width of the routers' recurrent states.
        policy_type (`str`, *optional*, defaults to `"pathways"`):
            `pathways`, or `gru` for a baseline: one expert per layer, and no router.
        expert_norm (`str`, *optional*, defaults to `"layernorm"`):
            Norm inside experts: `layernorm`, `none`, or the published `batchnorm`, which makes what one environment
            does depend on the others.
        recurrence (`str`, *optional*, defaults to `"time"`):
            `time` runs the recurrence over the steps of each sequence. `published` runs routers over the batch and
            experts over the flattened batch, as the published code does; only for parity with its weights.
        recurrence_implementation (`str`, *optional*, defaults to `"fused"`):
            `fused`, or `eager`: one `torch.gru` per expert and step.
        input_dim (`int`, *optional*): Width of the features; set by the encoder, needed only for `features`.
        encoder (`str`, *optional*, defaults to `"flat"`):
            What turns observations into features: `flat` (one-hot), `bow_conv_film` (in the manner of BabyAI 1.1, Hui
            et al. 2020, arXiv 2007.12770), or `features` for a model whose caller gives features.
        view_size (`int`, *optional*, defaults to 7): Cells along one side of an observation's image.
        cell_values (`list[int]`, *optional*): Number of objects, colours and states that a cell can show.
        empty_object (`int`, *optional*, defaults to 1):
            Object code of an empty cell, which is what an agent with free hands holds.
        vision_dim (`int`, *optional*, defaults to 64): Channels of `bow_conv_film`.
        mission_encoder (`str`, *optional*, defaults to `"gru"`):
            `gru`: word embeddings and a GRU that learn with the policy. `pretrained`: a frozen text model of
            transformers and a projection that learns.
        mission_model_name_or_path (`str`, *optional*): The text model of `pretrained`.
        mission_feature_dim (`int`, *optional*): Width of that model's states; read from its configuration if unset.
        mission_vocabulary (`list[str]`, *optional*): Words of `gru`; those of BabyAI if unset.
        word_dim (`int`, *optional*, defaults to 32): Width of word embeddings.
        mission_dim (`int`, *optional*, defaults to 128): Width of an encoded mission.
        num_actions (`int`, *optional*, defaults to 7): Number of actions.
        num_tasks (`int`, *optional*, defaults to 1): Tasks that the routing cost is scaled for, each by itself.
        task_names (`list[str]`, *optional*): Their names.
        task_embedding_dim (`int`, *optional*, defaults to 0):
            Width of an embedding of the task beside the features; 0 leaves the task unknown to the model.
        routing_cost_coef (`float`, *optional*, defaults to 0.0): Weight alpha of the routing cost.
        expert_cost_exponent (`float`, *optional*, defaults to 2.0): An expert of size h costs h to this power.
        normalize_routing_cost (`bool`, *optional*, defaults to `True`):
            Whether the cost is divided by that of always using the largest experts, so that alpha means the same for
            all sizes.
        scale_cost_by_performance (`bool`, *optional*, defaults to `True`):
            Whether a task's cost is divided by `cost_epsilon` plus its action loss.
        cost_epsilon (`float`, *optional*, defaults to 0.01): That epsilon.
        detach_performance (`bool`, *optional*, defaults to `False`):
            Whether no gradient flows through the divisor. With it, a high cost rewards a higher action loss a little.
        expert_dropout_max_prob (`float`, *optional*, defaults to 0.0):
            Probability beta of dropping an expert of weight 0, in training.
        expert_dropout_threshold (`float`, *optional*, defaults to 0.1):
            Weight gamma from which on an expert is never dropped; below, beta falls linearly.
    """

    model_type = "mop"

    layers: list | str | None = None
    intermediate_dim: int = 256
    router_dim: int = 64
    policy_type: str = "pathways"
    expert_norm: str = "layernorm"
    recurrence: str = "time"
    recurrence_implementation: str = "fused"
    input_dim: int | None = None
    encoder: str = "flat"
    view_size: int = 7
    cell_values: list | None = None
    empty_object: int = 1
    vision_dim: int = 64
    mission_encoder: str = "gru"
    mission_model_name_or_path: str | None = None
    mission_feature_dim: int | None = None
    mission_vocabulary: list | None = None
    word_dim: int = 32
    mission_dim: int = 128
    num_actions: int = 7
    num_tasks: int = 1
    task_names: list | None = None
    task_embedding_dim: int = 0
    routing_cost_coef: float = 0.0
    expert_cost_exponent: float = 2.0
    normalize_routing_cost: bool = True
    scale_cost_by_performance: bool = True
    cost_epsilon: float = 1e-2
    detach_performance: bool = False
    expert_dropout_max_prob: float = 0.0
    expert_dropout_threshold: float = 0.1

    def __post_init__(self, **kwargs):
        # Of two classes, which `AutoModel` takes for a new model.
        self.architectures = self.architectures or ["MopForActionPrediction"]
        self.layers = parse_layers([[32, 64, 128], [64, 128, 256]] if self.layers is None else self.layers)
        self.cell_values = self.cell_values or [11, 6, 3]
        self.mission_vocabulary = self.mission_vocabulary or list(BABYAI_WORDS)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(allowed)}.")
        self._check_numbers()
        if self.encoder != "features":
            self.input_dim = self._observation_dim()
            if self.mission_encoder == "pretrained" and self.mission_feature_dim is None:
                self.mission_feature_dim = AutoConfig.from_pretrained(self.mission_model_name_or_path).hidden_size
        super().__post_init__(**kwargs)

    def _check_numbers(self):
        for name in ("intermediate_dim", "router_dim", "view_size", "vision_dim", "word_dim", "mission_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        for name in ("num_actions", "num_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.encoder == "features" and not self.input_dim:
            raise ValueError("`encoder` is 'features', so `input_dim` must say how wide the features are.")
        if self.encoder != "features" and self.mission_encoder == "pretrained" and not self.mission_model_name_or_path:
            raise ValueError(
                "`mission_encoder` is 'pretrained', so `mission_model_name_or_path` must name a text model."
            )
        if self.policy_type == "gru" and any(len(sizes) != 1 or sizes[0] < 1 for sizes in self.layers):
            raise ValueError(
                f"`policy_type` is 'gru', whose layers have one expert of size 1 or more, not {self.layers}."
            )
        if self.recurrence == "published" and not (self.is_routed and all(map(any, self.layers))):
            raise ValueError(
                "`recurrence` is 'published', which needs `policy_type='pathways'` and an expert of size 1 or more in "
                f"every layer, not {self.policy_type!r} and {self.layers}."
            )
        if not 0 <= self.expert_dropout_max_prob <= 1:
            raise ValueError(
                f"`expert_dropout_max_prob` is {self.expert_dropout_max_prob}; it must lie between 0 and 1."
            )
        if self.expert_dropout_threshold <= 0 or self.cost_epsilon <= 0:
            raise ValueError(
                f"`expert_dropout_threshold` ({self.expert_dropout_threshold}) and `cost_epsilon` "
                f"({self.cost_epsilon}) must be above 0."
            )
        if self.task_names is not None and len(self.task_names) != self.num_tasks:
            raise ValueError(f"`task_names` has {len(self.task_names)} names for {self.num_tasks} tasks.")

    def _observation_dim(self) -> int:
        vision = self.vision_dim if self.encoder == "bow_conv_film" else self.view_size**2 * sum(self.cell_values)
        # Four directions, and whether the agent carries something.
        return vision + 4 + 1 + self.mission_dim

    @property
    def is_routed(self) -> bool:
        """Whether layers have routers."""
        return self.policy_type == "pathways"

    def expert_costs(self) -> list[list[float]]:
        """Cost of each expert of each layer, `size ** expert_cost_exponent`; 0 in layers that have no choice.

        Divided by the cost of always using the largest experts if `normalize_routing_cost`.
        """
        costs = [
            [float(size) ** self.expert_cost_exponent if size and len(sizes) > 1 else 0.0 for size in sizes]
            for sizes in self.layers
        ]
        largest = sum(max(layer) for layer in costs)
        scale = largest if self.normalize_routing_cost and largest > 0 else 1.0
        return [[cost / scale for cost in layer] for layer in costs]

    def block_parameters(self) -> int:
        """Number of parameters of the layers, without encoder and heads."""
        total = 0
        norm = 0 if self.expert_norm == "none" else 2
        for sizes in self.layers:
            total += 2 * self.intermediate_dim
            if self.is_routed:
                total += _gru_parameters(self.intermediate_dim, self.router_dim) + (self.router_dim + 1) * len(sizes)
            for size in filter(None, sizes):
                total += _gru_parameters(self.intermediate_dim, size) + norm * size
                total += (size + 1) * self.intermediate_dim
        return total

    def matched_gru(self) -> "MopConfig":
        """The GRU baseline with as many layers, whose parameter count is the nearest."""
        target = self.block_parameters()
        baseline = copy.deepcopy(self)
        baseline.policy_type, baseline.recurrence = "gru", "time"
        baseline.expert_dropout_max_prob = baseline.routing_cost_coef = 0.0

        def distance(size: int) -> int:
            baseline.layers = [[size]] * len(self.layers)
            return abs(baseline.block_parameters() - target)

        size = min(range(1, 2 + sum(map(sum, self.layers)) + self.router_dim), key=distance)
        baseline.layers = [[size] for _ in self.layers]
        return baseline


def _gru_parameters(inputs: int, size: int) -> int:
    return 3 * size * (inputs + size + 2)


__all__ = ["BABYAI_WORDS", "MopConfig", "parse_layers"]
