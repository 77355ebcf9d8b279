"""MoP: recurrent routers send each step through recurrent experts of different sizes, and a policy acts on the result.

Shapes: batch, time, stream (`intermediate_dim`), experts of a layer, actions; missions, the distinct ones; side, cells
along one side of an image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_mop import MopConfig
from .observation_encoder import BowConvFilmVision, FlatVision, ObservationEncoder
from .pathway_block import MopBlock, PathwayOptions
from .pathway_recurrence import PackedGru
from .pathway_state import MopState


@dataclass
class MopModelOutput(ModelOutput):
    """Output of [`MopModel`].

    Args:
        last_hidden_state (`torch.FloatTensor`): The stream after the last layer, `(batch, time, stream)`.
        state ([`MopState`]): The recurrent state after the last step.
        router_weights (`tuple(torch.FloatTensor)`): Each layer's softmax, `(batch, time, experts)`, float32, before
            anything is dropped; empty without routers.
    """

    last_hidden_state: torch.FloatTensor | None = None
    state: MopState | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MopActionPredictionOutput(ModelOutput):
    """Output of [`MopForActionPrediction`].

    Args:
        loss (`torch.FloatTensor`, *optional*): Action loss plus the weighted routing cost.
        action_loss (`torch.FloatTensor`, *optional*): Cross-entropy in nats per labelled step.
        routing_cost (`torch.FloatTensor`, *optional*): Mean usage cost of the labelled steps, not yet weighted.
        logits (`torch.FloatTensor`): `(batch, time, actions)`.
        state ([`MopState`]), router_weights: As in [`MopModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    action_loss: torch.FloatTensor | None = None
    routing_cost: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    state: MopState | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None


class MopPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers has to know about MoP models."""

    config: MopConfig
    base_model_prefix = "model"
    main_input_name = "features"
    _no_split_modules = ["MopBlock"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Draws the parameters, as `torch.nn` does by default.

        | parameter | distribution |
        | --- | --- |
        | linear maps, convolutions and their biases | uniform within 1 / sqrt(inputs) |
        | output maps of experts | uniform within 1 / sqrt(size of the expert) |
        | all of a GRU of size h | uniform within 1 / sqrt(h) |
        | embeddings | normal, 1 |
        | positions of `bow_conv_film` | normal, 0.02 |
        | norms | weight one, bias zero |
        """
        if isinstance(module, (MopBlock, FlatVision, BowConvFilmVision)):
            for name, values in module.constants().items():
                init.copy_(getattr(module, name), torch.tensor(values))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            for parameter in (module.weight, module.bias):
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.GRU):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, PackedGru):
            sizes = torch.tensor(module.sizes)
            bounds = sizes.pow(-0.5).repeat_interleave(sizes)
            _init_uniform(module.input_weight, bounds.unsqueeze(1))
            _init_uniform(module.input_bias, bounds)
            _init_uniform(module.hidden_bias, bounds)
            for weight in module.hidden_weights:
                init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        elif isinstance(module, MopBlock):
            sizes = torch.tensor(module.unit_sizes, dtype=torch.long)
            _init_uniform(module.output_weight, sizes.pow(-0.5).repeat_interleave(sizes))
            _init_uniform(module.output_bias, sizes.pow(-0.5).unsqueeze(1))
            if self.config.expert_norm == "layernorm":
                init.ones_(module.expert_norm_weight)
                init.zeros_(module.expert_norm_bias)
        elif isinstance(module, BowConvFilmVision):
            init.normal_(module.position, std=0.02)
        else:
            super()._init_weights(module)


def _init_uniform(parameter: torch.Tensor, bounds: torch.Tensor):
    """Uniform within bounds that broadcast; on whole parameters, because slices do not know that they were loaded."""
    init.copy_(parameter, (2 * torch.rand_like(parameter) - 1) * bounds.to(parameter))


class MopModel(MopPreTrainedModel):
    """The layers of pathways between given features and a stream that a head reads."""

    def __init__(self, config: MopConfig):
        super().__init__(config)
        if config.task_embedding_dim:
            self.task_embedding = nn.Embedding(config.num_tasks, config.task_embedding_dim)
        self.input_projection = nn.Linear(config.input_dim + config.task_embedding_dim, config.intermediate_dim)
        self.blocks = nn.ModuleList([MopBlock(config, sizes) for sizes in config.layers])
        self.post_init()

    def initial_state(self, batch_size: int) -> MopState:
        """A fresh state of `batch_size` sequences."""
        weight = self.input_projection.weight
        return MopState(
            [weight.new_zeros(batch_size, block.gru.width) for block in self.blocks],
            [block.state_names(index) for index, block in enumerate(self.blocks)],
        )

    def forward(
        self,
        features: torch.FloatTensor,
        state: MopState | None = None,
        reset_mask: torch.BoolTensor | None = None,
        task_ids: torch.LongTensor | None = None,
        weight_threshold: float | None = None,
        lesion_largest: bool = False,
        output_router_weights: bool = True,
    ) -> MopModelOutput:
        """Runs sequences of any length.

        Args:
            features (`torch.FloatTensor` of shape `(batch, time, input)`): What the encoder saw.
            state ([`MopState`], *optional*): The state before the first step; a fresh one if unset.
            reset_mask (`torch.BoolTensor` of shape `(batch, time)`, *optional*):
                True where a step starts afresh. No gradient crosses such a step.
            task_ids (`torch.LongTensor` of shape `(batch, time)`, *optional*): For models that embed the task.
            weight_threshold (`float`, *optional*): Experts of a smaller weight are left out.
            lesion_largest (`bool`, *optional*): Whether the largest expert of every layer is left out.

        Raises:
            ValueError: If a shape does not fit, or the published recurrence is given a state.
        """
        batch, time, width = features.shape
        if width != self.config.input_dim:
            raise ValueError(f"`features` are {width} wide; this model reads {self.config.input_dim}.")
        if state is not None and state.batch_size != batch:
            raise ValueError(f"`state` holds {state.batch_size} sequences, but `features` {batch}.")
        if reset_mask is not None and reset_mask.shape != (batch, time):
            raise ValueError(f"`reset_mask` has the shape {tuple(reset_mask.shape)}, not {(batch, time)}.")
        if self.config.recurrence == "published" and not (state is None and reset_mask is None):
            raise ValueError("The published recurrence knows neither states nor resets; use `recurrence='time'`.")
        if self.config.task_embedding_dim:
            features = torch.cat([features, self.task_embedding(task_ids)], dim=-1)
        state = self.initial_state(batch) if state is None else state
        keep = None if reset_mask is None else (~reset_mask.bool()).t().unsqueeze(-1).to(state.blocks[0].dtype)
        options = PathwayOptions(weight_threshold, lesion_largest)
        x = self.input_projection(features.transpose(0, 1))
        blocks, router_weights = [], []
        for block, block_state in zip(self.blocks, state.blocks, strict=True):
            x, block_state, weights = block(x, block_state, keep, options)
            blocks.append(block_state)
            if weights is not None:
                router_weights.append(weights.transpose(0, 1))
        return MopModelOutput(
            last_hidden_state=x.transpose(0, 1),
            state=MopState(blocks, state.names),
            router_weights=tuple(router_weights) if output_router_weights else None,
        )


class MopForActionPrediction(MopPreTrainedModel):
    r"""
    A policy: encoders of minigrid's observations, the pathways, and a head over the actions.

    Example:

    ```python
    >>> import gymnasium, minigrid
    >>> from mixturekit.modeling import MopConfig, MopForActionPrediction

    >>> policy = MopForActionPrediction(MopConfig()).eval()
    >>> environment = gymnasium.make("BabyAI-GoToRedBall-v0")
    >>> observation, _ = environment.reset(seed=0)
    >>> state, done = None, False
    >>> while not done:
    ...     actions, state = policy.act([observation], state)
    ...     observation, reward, terminated, truncated, _ = environment.step(actions.item())
    ...     done = terminated or truncated
    ```
    """

    main_input_name = "images"

    def __init__(self, config: MopConfig):
        super().__init__(config)
        if config.encoder != "features":
            self.encoder = ObservationEncoder(config)
        self.model = MopModel(config)
        self.action_head = nn.Linear(config.intermediate_dim, config.num_actions)
        self.expert_costs = config.expert_costs() if config.is_routed else []
        self._encoded_missions: tuple[tuple, dict[str, torch.Tensor]] = ((), {})
        self.post_init()

    def train(self, mode: bool = True):
        """As in any module. Encoded missions are forgotten: fused optimizers change weights without a new version."""
        self._encoded_missions = ((), {})
        return super().train(mode)

    def initial_state(self, batch_size: int) -> MopState:
        """A fresh state of `batch_size` sequences."""
        return self.model.initial_state(batch_size)

    def prepare_missions(self, missions: list[str]) -> dict[str, torch.Tensor]:
        """What `forward` takes for missions: word ids, or features of a frozen text model, `(missions, ...)`."""
        return self.encoder.mission.prepare(missions)

    def forward(
        self,
        images: torch.Tensor | None = None,
        directions: torch.Tensor | None = None,
        mission_index: torch.Tensor | None = None,
        mission_input_ids: torch.Tensor | None = None,
        mission_features: torch.Tensor | None = None,
        mission_embeddings: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        state: MopState | None = None,
        reset_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        output_router_weights: bool = False,
        weight_threshold: float | None = None,
        lesion_largest: bool = False,
    ) -> MopActionPredictionOutput:
        """Predicts the action of every step.

        Args:
            images (`torch.Tensor` of shape `(batch, time, side, side, 3)`): minigrid's images.
            directions (`torch.Tensor` of shape `(batch, time)`): Where the agent faces.
            mission_index (`torch.Tensor` of shape `(batch, time)`): The row of each step's mission in what follows.
            mission_input_ids, mission_features (`torch.Tensor`): What `prepare_missions` gives.
            mission_embeddings (`torch.Tensor` of shape `(missions, mission)`, *optional*): Encoded missions instead.
            features (`torch.Tensor` of shape `(batch, time, input)`, *optional*):
                Instead of all of these, if the model has no encoder.
            state, reset_mask, weight_threshold, lesion_largest: As in [`MopModel`].
            labels (`torch.Tensor` of shape `(batch, time)`, *optional*): Actions to predict; -100 is not counted.
            task_ids (`torch.Tensor` of shape `(batch, time)`, *optional*):
                The task of each step, from 0, by whose action loss its routing cost is scaled.
        """
        if features is None:
            if mission_embeddings is None:
                missions = mission_features if mission_input_ids is None else mission_input_ids
                mission_embeddings = self.encoder.mission(missions)
            features = self.encoder(images, directions, mission_index, mission_embeddings)
        outputs = self.model(features, state, reset_mask, task_ids, weight_threshold, lesion_largest)
        logits = self.action_head(outputs.last_hidden_state)
        loss = action_loss = routing_cost = None
        if labels is not None:
            loss, action_loss, routing_cost = self._losses(logits, labels, task_ids, outputs.router_weights)
        return MopActionPredictionOutput(
            loss=loss,
            action_loss=action_loss,
            routing_cost=routing_cost,
            logits=logits,
            state=outputs.state,
            router_weights=outputs.router_weights if output_router_weights else None,
        )

    def usage_cost(self, router_weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Cost of each step, `(batch, time)`: over all layers, the weights times the costs of the experts.

        Averaged over the steps of a task it is the learned pathway complexity of section 3 of arXiv 2506.02813.
        """
        return sum(
            weights @ weights.new_tensor(costs)
            for weights, costs in zip(router_weights, self.expert_costs, strict=True)
        )

    def _losses(self, logits, labels, task_ids, router_weights):
        """Loss, action loss and usage cost: `CE + alpha mean_i U_i / (epsilon + CE_i)` over the tasks that occur.

        Equation 2 of arXiv 2506.02813, as means instead of sums, so that alpha does not depend on the number of tasks.
        """
        config = self.config
        counted = (labels != -100).flatten()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        action_loss = losses.sum() / counted.sum().clamp(min=1)
        if not router_weights:
            return action_loss, action_loss.detach().clone(), action_loss.new_zeros(())
        usage = self.usage_cost(router_weights).flatten() * counted
        routing_cost = (usage.sum() / counted.sum().clamp(min=1)).detach()
        loss = action_loss
        if config.routing_cost_coef > 0:
            tasks = torch.zeros_like(labels) if task_ids is None else task_ids
            of_task = nn.functional.one_hot(tasks.flatten(), config.num_tasks) * counted.unsqueeze(1)
            steps = of_task.sum(dim=0)
            cost = usage @ of_task.to(usage) / steps.clamp(min=1)
            if config.scale_cost_by_performance:
                performance = losses @ of_task.to(losses) / steps.clamp(min=1)
                performance = performance.detach() if config.detach_performance else performance
                cost = cost / (config.cost_epsilon + performance)
            loss = loss + config.routing_cost_coef * cost.sum() / (steps > 0).sum().clamp(min=1)
        return loss, action_loss.detach().clone(), routing_cost

    @torch.no_grad()
    def step(self, images, directions, missions: list[str], state: MopState | None = None, **kwargs):
        """One step of several environments, without gradient.

        Args:
            images (`numpy.ndarray` of shape `(batch, side, side, 3)`): Their images.
            directions (`numpy.ndarray` of shape `(batch,)`): Where their agents face.
            missions (`list[str]`): Their missions; in evaluation mode, each is encoded once.
            state ([`MopState`], *optional*): The state before this step; a fresh one if unset.
            kwargs: Further arguments of `forward`; a `reset_mask` has the shape `(batch, 1)`.

        Returns:
            The output of `forward` for sequences of length one.
        """
        return self(
            images=torch.as_tensor(np.asarray(images), device=self.device).unsqueeze(1),
            directions=torch.as_tensor(np.asarray(directions), device=self.device).long().unsqueeze(1),
            mission_index=torch.arange(len(missions), device=self.device).unsqueeze(1),
            mission_embeddings=self._mission_embeddings(missions),
            state=state,
            **kwargs,
        )

    def _mission_embeddings(self, missions: list[str]) -> torch.Tensor:
        encoder = self.encoder.mission
        if self.training:
            return encoder(*encoder.prepare(missions).values())
        version = tuple((parameter.data_ptr(), parameter._version) for parameter in encoder.parameters())
        if self._encoded_missions[0] != version:
            self._encoded_missions = (version, {})
        known = self._encoded_missions[1]
        missing = [mission for mission in dict.fromkeys(missions) if mission not in known]
        if missing:
            known.update(zip(missing, encoder(*encoder.prepare(missing).values()), strict=True))
        return torch.stack([known[mission] for mission in missions])

    def act(
        self,
        observations: list[dict],
        state: MopState | None = None,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
        output_router_weights: bool = False,
        **kwargs,
    ):
        """Chooses actions for minigrid's observations.

        Args:
            observations (`list[dict]`): Dictionaries with `image`, `direction` and `mission`, one per environment.
            state ([`MopState`], *optional*): The state that the last call returned; a fresh one if unset. Where an
                episode has ended, reset it first: `state.reset(mask)`.
            deterministic (`bool`, *optional*, defaults to `True`): The best action, or one drawn by its probability.
            generator (`torch.Generator`, *optional*): Source of the draws.
            output_router_weights (`bool`, *optional*): Whether to return the weights of each layer's experts too.
            kwargs: Further arguments of `forward`, such as `weight_threshold` or `lesion_largest`.

        Returns:
            Actions `(batch,)` on the CPU, the state after this step, and if wanted a tuple of weights
            `(batch, experts)`.
        """
        outputs = self.step(
            np.stack([observation["image"] for observation in observations]),
            np.array([observation["direction"] for observation in observations]),
            [observation["mission"] for observation in observations],
            state,
            output_router_weights=output_router_weights,
            **kwargs,
        )
        logits = outputs.logits[:, -1].float()
        if deterministic:
            actions = logits.argmax(dim=-1)
        else:
            actions = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
        if output_router_weights:
            return actions.cpu(), outputs.state, tuple(weights[:, -1] for weights in outputs.router_weights)
        return actions.cpu(), outputs.state

    def get_routing_info(self, observations: list[dict], state: MopState | None = None) -> list[dict]:
        """How the next step of `observations` is routed, from the same computation as `act`.

        Returns:
            For each layer with a router: `layer`, `expert_sizes`, `weights` `(batch, experts)` and `usage_cost`
            `(batch,)`.
        """
        _, _, layers = self.act(observations, state, output_router_weights=True)
        return [
            {
                "layer": index,
                "expert_sizes": self.config.layers[index],
                "weights": weights,
                "usage_cost": weights @ weights.new_tensor(self.expert_costs[index]),
            }
            for index, weights in enumerate(layers)
        ]


__all__ = [
    "MopActionPredictionOutput",
    "MopForActionPrediction",
    "MopModel",
    "MopModelOutput",
    "MopPreTrainedModel",
    "MopState",
]
