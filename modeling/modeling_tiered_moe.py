"""An agent for many games: frames through convolutions, steps through causal attention, tokens through many experts.

Shapes: batch, time (steps), tokens of a step, seq = time * tokens of a step, hidden (`expert_dim`), experts, slots =
experts of a token, actions, games.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_tiered_moe import CONVOLUTIONS, TieredMoeConfig
from .environment_detector import EnvironmentDetector
from .routing import TopKRouter
from .tiered_moe_state import TieredMoeState


@dataclass
class TieredMoeModelOutput(ModelOutput):
    """Output of [`TieredMoeModel`].

    Args:
        last_hidden_state (`torch.FloatTensor`): The stream where a step is seen, `(batch, time, hidden)`.
        state ([`TieredMoeState`]): After the last step.
        environment_ids (`torch.LongTensor`): Games of the steps, `(batch, time)`, given or detected.
        router_logits, router_weights, router_indices (`tuple(torch.Tensor)`, *optional*): Of each layer,
            `(batch * seq, experts)` and `(batch * seq, slots)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    state: TieredMoeState | None = None
    environment_ids: torch.LongTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None


@dataclass
class TieredMoeActorCriticOutput(TieredMoeModelOutput):
    """Output of [`TieredMoeForActorCritic`].

    Args:
        logits (`torch.FloatTensor`): Of the actions, `(batch, time, actions)`; the lowest number for those that do
            nothing in the game.
        values (`torch.FloatTensor`): Of the states, `(batch, time)`.
    """

    logits: torch.FloatTensor | None = None
    values: torch.FloatTensor | None = None


class TieredMoeEncoder(nn.Module):
    """Convolutions of a stack of frames, and a map to the stream."""

    def __init__(self, config: TieredMoeConfig):
        super().__init__()
        self.center = config.center_frames
        channels = [config.frame_stack, *config.encoder_channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels[n], channels[n + 1], *CONVOLUTIONS[n]) for n in range(len(config.encoder_channels))
        )
        self.projection = nn.Linear(channels[-1] * config.encoder_side**2, config.hidden_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Features `(frames, hidden)` of uint8 `(frames, stack, side, side)`."""
        first, *others = self.convolutions
        # Pixel after pixel, in which order the gradient of the first weights takes a fifth of the time on a CPU; the
        # weights are scaled, because they are fewer than the pixels.
        frames = frames.contiguous(memory_format=torch.channels_last)
        pixels = frames.to(first.weight.dtype)
        if self.center:
            pixels = pixels - pixels.mean(dim=(2, 3), keepdim=True)
        features = F.relu(F.conv2d(pixels, first.weight / 255, first.bias, first.stride))
        for convolution in others:
            features = F.relu(convolution(features))
        return F.relu(self.projection(features.flatten(1)))


@use_experts_implementation(has_gate=False)
class TieredMoeExperts(nn.Module):
    """All experts of a layer: two maps with an activation between them."""

    def __init__(self, config: TieredMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The plain reference, `eager`; by default a grouped product runs instead."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            inner = self.act_fn(F.linear(hidden_states[token], self.up_proj[expert]))
            weighted = F.linear(inner, self.down_proj[expert]) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output


class TieredMoeSparseMoeBlock(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: TieredMoeConfig):
        super().__init__()
        self.gate = TopKRouter(config.hidden_size, config.num_experts, config.top_k)
        self.experts = TieredMoeExperts(config)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """Sends `(batch, seq, hidden)` through experts; the router sees `condition`, of the same shape, as well."""
        tokens = hidden_states.flatten(0, 1)
        routed = tokens if condition is None else tokens + condition.flatten(0, 1)
        _, weights, indices = self.gate(routed)
        return self.experts(tokens, indices, weights).view_as(hidden_states)


class TieredMoeDecoderLayer(nn.Module):
    """Pre-norm attention, then a mixture of experts."""

    def __init__(self, config: TieredMoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = TieredMoeSparseMoeBlock(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Transforms `(batch, seq, hidden)`; `kwargs` are those of the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), condition)


class TieredMoePreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers has to know about these agents."""

    config: TieredMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["TieredMoeDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "router_weights": OutputRecorder(TopKRouter, index=1),
        "router_indices": OutputRecorder(TopKRouter, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        """Draws the parameters.

        | parameter | distribution |
        | --- | --- |
        | convolutions and map of the encoder | orthogonal, gain sqrt(2), as in CleanRL's PPO; biases zero |
        | action head, value head | orthogonal, gain 0.01 and 1; biases zero |
        | attention, routers, embeddings of actions and rewards | normal, `initializer_range` |
        | experts | normal, `initializer_range`, the second map divided by sqrt(2 * layers) |
        | embeddings of games | normal, 1, as wide as the normed tokens that they stand beside |
        | norms, games' scales | one |
        | detector | orthogonal, biases and memories zero |
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TieredMoeEncoder):
            for part in (*module.convolutions, module.projection):
                init.orthogonal_(part.weight, math.sqrt(2))
                init.zeros_(part.bias)
        elif isinstance(module, TopKRouter):
            init.normal_(module.weight, std=std)
        elif isinstance(module, TieredMoeExperts):
            init.normal_(module.up_proj, std=std)
            init.normal_(module.down_proj, std=std / math.sqrt(2 * self.config.num_layers))
        elif isinstance(module, EnvironmentDetector):
            for part, gain in ((module.convolution, math.sqrt(2)), (module.classifier, 1.0)):
                init.orthogonal_(part.weight, gain)
                init.zeros_(part.bias)
            for memory in (module.usage, module.recent, module.last_belief):
                init.zeros_(memory)
        elif isinstance(module, TieredMoeModel):
            if module.game_embedding is not None:
                init.normal_(module.game_embedding.weight)
            if module.game_scale is not None:
                init.ones_(module.game_scale)
        elif isinstance(module, TieredMoeForActorCritic):
            for head, gain in ((module.action_head, 0.01), (module.value_head, 1.0)):
                init.orthogonal_(head.weight, gain)
                init.zeros_(head.bias)
            init.copy_(module.action_masks, _action_masks(self.config))


class TieredMoeModel(TieredMoePreTrainedModel):
    """The agent without heads."""

    def __init__(self, config: TieredMoeConfig):
        super().__init__(config)
        self.encoder = TieredMoeEncoder(config)
        # One more than there are actions, for the step before the first.
        self.action_embedding = nn.Embedding(config.num_actions + 1, config.hidden_size)
        self.reward_embedding = nn.Linear(1, config.hidden_size)
        conditioned = config.routing_condition == "environment"
        self.game_embedding = nn.Embedding(len(config.games), config.hidden_size) if conditioned else None
        self.layers = nn.ModuleList([TieredMoeDecoderLayer(config, index) for index in range(config.num_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        scale = torch.ones(len(config.games), config.hidden_size)
        self.game_scale = nn.Parameter(scale) if config.per_game_norm else None
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.detector = EnvironmentDetector(
            len(config.games), config.num_layers, config.num_experts, config.detector_channels, config.frame_size
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        frames: torch.ByteTensor,
        previous_actions: torch.LongTensor,
        rewards: torch.FloatTensor,
        starts: torch.BoolTensor,
        state: TieredMoeState | None = None,
        environment_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> TieredMoeModelOutput:
        """Runs the steps of a sequence, which goes on from `state`.

        Args:
            frames (`torch.ByteTensor` of shape `(batch, time, stack, side, side)`): What is seen.
            previous_actions (`torch.LongTensor` of shape `(batch, time)`): What was done before; not read at starts.
            rewards (`torch.FloatTensor` of shape `(batch, time)`): What that gave; not read at starts.
            starts (`torch.BoolTensor` of shape `(batch, time)`): Whether a step is the first of its episode.
            state ([`TieredMoeState`], *optional*): That the last call returned; a fresh one if unset.
            environment_ids (`torch.LongTensor` of shape `(batch,)` or `(batch, time)`, *optional*): Number of the
                game in `config.games`. If unset, the detector names it wherever the agent makes use of it.
            output_router_logits, output_router_weights, output_router_indices (`bool`, *optional*): Whether the
                output has these fields.
        """
        batch, time = starts.shape
        if state is None:
            state = TieredMoeState.initial(self.config, batch, frames.device)
        games = self._games(frames, environment_ids)
        tokens = self._embed(frames, previous_actions, rewards, starts)
        per_step = self.config.tokens_per_step
        following, positions, visible = state.begin_call(starts, per_step)
        # Added to the scores of attention, which all implementations understand.
        mask = torch.where(visible, 0.0, torch.finfo(tokens.dtype).min)[:, None].to(tokens.dtype)
        condition = None
        if self.game_embedding is not None:
            condition = self.game_embedding(games).repeat_interleave(per_step, dim=1)
        hidden_states = tokens
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                condition,
                attention_mask=mask,
                past_key_values=following,
                position_embeddings=self.rotary_emb(hidden_states, positions),
                **kwargs,
            )
        seen = self.norm(hidden_states.view(batch, time, per_step, -1)[:, :, -1])
        if self.game_scale is not None:
            seen = seen * self.game_scale[games]
        return TieredMoeModelOutput(last_hidden_state=seen, state=following, environment_ids=games)

    def _games(self, frames: torch.Tensor, environment_ids: torch.Tensor | None) -> torch.Tensor:
        batch, time = frames.shape[:2]
        if environment_ids is not None:
            return environment_ids.view(batch, -1).expand(batch, time)
        if len(self.config.games) == 1:
            return torch.zeros(batch, time, dtype=torch.long, device=frames.device)
        with torch.no_grad():
            return self.detector(frames.flatten(0, 1)).argmax(dim=-1).view(batch, time)

    def _embed(self, frames, previous_actions, rewards, starts) -> torch.Tensor:
        """Tokens `(batch, seq, hidden)`: of each step the last action, its reward, and what is seen."""
        seen = self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        action = self.action_embedding(previous_actions.masked_fill(starts, self.config.num_actions))
        reward = self.reward_embedding(rewards.masked_fill(starts, 0.0).to(seen.dtype).unsqueeze(-1))
        if self.config.step_tokens == "merged":
            return seen + action + reward
        return torch.stack([action, reward, seen], dim=2).flatten(1, 2)


class TieredMoeForActorCritic(TieredMoePreTrainedModel):
    r"""
    The agent with an action head and a value head.

    Example:

    ```python
    >>> import torch
    >>> from mixturekit.modeling import TieredMoeConfig, TieredMoeForActorCritic

    >>> config = TieredMoeConfig(expert_dim=64, expert_hidden_dim=64, num_layers=2, num_experts=8, hbm_capacity=4)
    >>> agent = TieredMoeForActorCritic(config)
    >>> frames = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    >>> actions, state = agent.act(frames)
    >>> actions, state = agent.act(frames, state, actions, rewards=torch.zeros(3), starts=torch.zeros(3).bool())
    >>> actions.shape
    torch.Size([3])
    ```
    """

    def __init__(self, config: TieredMoeConfig):
        super().__init__(config)
        self.model = TieredMoeModel(config)
        heads = len(config.games) if config.per_game_heads else 1
        self.action_head = nn.Linear(config.hidden_size, heads * config.num_actions)
        self.value_head = nn.Linear(config.hidden_size, heads)
        self.action_masks = nn.Buffer(torch.empty(len(config.games), config.num_actions, dtype=torch.bool))
        self.post_init()

    @can_return_tuple
    def forward(
        self, frames, previous_actions, rewards, starts, state=None, environment_ids=None, **kwargs
    ) -> TieredMoeActorCriticOutput:
        """Scores the actions and values of the steps of a sequence; arguments as of [`TieredMoeModel`]."""
        outputs = self.model(frames, previous_actions, rewards, starts, state, environment_ids, **kwargs)
        games = outputs.environment_ids
        logits = self._of_game(self.action_head(outputs.last_hidden_state), games)
        values = self._of_game(self.value_head(outputs.last_hidden_state), games).squeeze(-1)
        logits = logits.float().masked_fill(~self.action_masks[games], torch.finfo(torch.float32).min)
        return TieredMoeActorCriticOutput(**outputs, logits=logits, values=values.float())

    def _of_game(self, scores: torch.Tensor, games: torch.Tensor) -> torch.Tensor:
        if not self.config.per_game_heads:
            return scores
        by_game = scores.unflatten(-1, (len(self.config.games), -1))
        return by_game.take_along_dim(games[:, :, None, None], dim=2).squeeze(2)

    @torch.no_grad()
    def act(
        self,
        frames: torch.ByteTensor,
        state: TieredMoeState | None = None,
        previous_actions: torch.LongTensor | None = None,
        rewards: torch.FloatTensor | None = None,
        starts: torch.BoolTensor | None = None,
        environment_ids: torch.LongTensor | None = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.LongTensor, TieredMoeState]:
        """Chooses an action in each environment.

        Args:
            frames (`torch.ByteTensor` of shape `(batch, stack, side, side)`): What is seen.
            state ([`TieredMoeState`], *optional*): That the last call returned.
            previous_actions, rewards, starts (`torch.Tensor` of shape `(batch,)`, *optional*): What was done, what it
                gave, and where an episode has begun since; not needed in the first call.
            environment_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): As in [`TieredMoeModel`].
            deterministic (`bool`, *optional*, defaults to `False`): The best action, or one drawn by its probability.
            generator (`torch.Generator`, *optional*): Source of the draws.
        """
        batch, device = len(frames), frames.device
        outputs = self(
            frames[:, None],
            torch.zeros(batch, 1, dtype=torch.long, device=device) if state is None else previous_actions[:, None],
            torch.zeros(batch, 1, device=device) if state is None else rewards[:, None],
            torch.ones(batch, 1, dtype=torch.bool, device=device) if state is None else starts[:, None],
            state,
            environment_ids,
        )
        logits = outputs.logits[:, -1]
        if deterministic:
            return logits.argmax(dim=-1), outputs.state
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1), outputs.state

    def balancing_loss(
        self,
        outputs: TieredMoeActorCriticOutput,
        mean_of_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        How unevenly experts are used (Fedus et al. 2021, arXiv:2101.03961), mean over layers; `top_k` is even.

        Over the tokens of each game by itself, or with `router_balancing="all_games"` against the use of each expert
        in all games so far, which the detector remembers. 0 without balancing.

        Args:
            outputs ([`TieredMoeActorCriticOutput`]): With `router_logits` and `router_indices`.
            mean_of_processes (`Callable`, *optional*): If given, the mean of a tensor over the processes that share a
                batch; the mean of their gradients is then that of one process with all of it.
        """
        if self.config.router_balancing == "none":
            return outputs.values.new_zeros(())
        shared = mean_of_processes or (lambda part: part)
        num_experts = self.config.num_experts
        scores = torch.stack(outputs.router_logits).float().softmax(dim=-1)
        if self.config.router_balancing == "all_games":
            usage = shared(self.model.detector.usage.sum(dim=0))
            share = usage / usage.sum(dim=-1, keepdim=True).clamp(min=1e-9)
            return num_experts * self.config.top_k * (scores.mean(dim=1) * share).sum(dim=-1).mean()
        games = outputs.environment_ids.repeat_interleave(self.config.tokens_per_step, dim=1).flatten()
        of_game = F.one_hot(games, len(self.config.games)).to(scores.dtype)
        picked = F.one_hot(torch.stack(outputs.router_indices), num_experts).sum(dim=2).to(scores.dtype)
        # (layers, games, experts), sums over tokens
        load, tokens = shared(torch.einsum("tg,lte->lge", of_game, picked)), shared(of_game.sum(dim=0))
        importance = torch.einsum("tg,lte->lge", of_game, scores)
        uneven = num_experts * (load * importance).sum(dim=-1) / tokens.square().clamp(min=1e-9)
        return uneven.mean(dim=0).sum() / (tokens > 0).sum()


def _action_masks(config: TieredMoeConfig) -> torch.Tensor:
    """Which actions each game has, `(games, actions)`."""
    masks = torch.zeros(len(config.games), config.num_actions, dtype=torch.bool)
    for game, actions in enumerate(config.own_actions):
        masks[game, actions] = True
    return masks


__all__ = [
    "TieredMoeActorCriticOutput",
    "TieredMoeForActorCritic",
    "TieredMoeModel",
    "TieredMoeModelOutput",
    "TieredMoePreTrainedModel",
    "TieredMoeState",
]
