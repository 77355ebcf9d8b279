"""The five kinds of experts of MoRE, on the arithmetic of sorted rows.

Shapes: tokens = batch * seq, slots = experts per token, rows = tokens * slots sorted by expert, experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from .configuration_more import MoreConfig
from .expert_attention import ExpertAttention, apply_rotation, sort_by_expert_and_sequence
from .recurrence import GroupedLinear, LoopedLinear, RecurrenceOptions, gru_cell, gru_update, iterate


@dataclass(frozen=True)
class ExpertContext:
    """What the experts of one forward pass need to know beyond their tokens.

    Args:
        options ([`RecurrenceOptions`]): Steps, truncation and exit.
        sequence_ids (`torch.Tensor` of shape `(batch, seq)`): Document of each token within its row, -1 for padding.
        position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): Cosines and sines `(batch or 1, seq, head_dim)`.
        past_key_values ([`~transformers.Cache`], *optional*): The cache of generation.
        noisy (`bool`): Whether states may be initialised from noise, which is for training only.
    """

    options: RecurrenceOptions
    sequence_ids: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    past_key_values: Cache | None = None
    noisy: bool = False


def grouped_experts_forward(experts, hidden_states, top_k_index, top_k_weights, context=None):
    """The fast forward of [`MoreExperts`]: one grouped matrix product for all experts of a layer."""
    return experts.apply_sorted(GroupedLinear, hidden_states, top_k_index, top_k_weights, context)


class MoreExpertsInterface(ExpertsInterface):
    """Maps each experts implementation that transformers offers to one that knows recurrent experts.

    The stock implementations would run the feed-forward arithmetic on any experts with matching parameter names.
    """

    _global_mapping = dict.fromkeys(ExpertsInterface._global_mapping, grouped_experts_forward)


@use_experts_implementation(experts_interface=MoreExpertsInterface())
class MoreExperts(nn.Module):
    """What all kinds of experts share: sorting the tokens by expert, and putting the results back in place."""

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_experts = config.num_experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.context = None
        self._is_expert_parallel = False  # transformers has this from 5.21 on, and sets it where it splits experts

    def keep_context(self):
        """Gives experts their context also where transformers, which has split them over processes, hands on three
        arguments and sums a single result."""
        dispatch = self.forward

        def forward(hidden_states, top_k_index, top_k_weights, context):
            self.context = context
            try:
                return dispatch(hidden_states, top_k_index, top_k_weights), None
            finally:
                self.context = None

        self.forward = forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        context: ExpertContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | torch.Tensor:
        """The plain reference, `eager`, of [`~MoreExperts.apply_sorted`]; by default the grouped one runs instead."""
        return self.apply_sorted(LoopedLinear, hidden_states, top_k_index, top_k_weights, context)

    def apply_sorted(
        self,
        linear_class: type[LoopedLinear],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        context: ExpertContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | torch.Tensor:
        """Sorts the tokens by expert once, transforms them, and sums each token's results by weight.

        Args:
            linear_class (`type`): `GroupedLinear`, or `LoopedLinear` for the plain reference.
            hidden_states (`torch.Tensor` of shape `(tokens, hidden)`): The tokens.
            top_k_index, top_k_weights (`torch.Tensor` of shape `(tokens, slots)`): Their experts, and weights.
            context ([`ExpertContext`], *optional*):
                Recurrence, sequences, positions and cache; unset where the experts are split over processes.

        Returns:
            The mixture's output `(tokens, hidden)` and the steps of each token's experts `(tokens, slots)`, `None`
            for experts that do not iterate. With experts split over processes the output alone.
        """
        if self._is_expert_parallel:
            return self._apply_own(linear_class, hidden_states, top_k_index, top_k_weights)
        slots = top_k_index.shape[-1]
        order = self.sort(top_k_index, context)
        linear = linear_class(top_k_index.flatten()[order], self.num_experts)
        rows = hidden_states.index_select(0, order // slots)
        output, steps = self.transform(rows, linear, context, top_k_index, order)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        output = output.index_select(0, inverse).view(-1, slots, output.shape[-1])
        mixed = (output * top_k_weights.unsqueeze(-1)).sum(dim=1)
        return mixed.to(hidden_states.dtype), steps if steps is None else steps[inverse].view(-1, slots)

    def _apply_own(
        self,
        linear_class: type[LoopedLinear],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """What the experts of this process add to the output; those of others have the number `num_experts`."""
        slots = top_k_index.shape[-1]
        order = self.sort(top_k_index, self.context)
        experts = top_k_index.flatten()[order]
        # One row of others' experts, of weight zero, stays where there is no own: each parameter has its gradient.
        kept = max(1, int((experts < self.num_experts).sum()))
        order, experts = order[:kept], experts[:kept].clamp(max=self.num_experts - 1)
        rows = hidden_states.index_select(0, order // slots)
        output, _ = self.transform(rows, linear_class(experts, self.num_experts), self.context, top_k_index, order)
        output = output * top_k_weights.flatten()[order].unsqueeze(-1)
        mixed = output.new_zeros(hidden_states.shape).index_add(0, order // slots, output)
        return mixed.to(hidden_states.dtype)

    def sort(self, top_k_index: torch.Tensor, context: ExpertContext) -> torch.Tensor:
        """Order of the token-expert pairs, `(rows,)`, by expert and then by time."""
        return top_k_index.flatten().argsort(stable=True)

    def feed_forward(
        self, rows: torch.Tensor, linear: LoopedLinear, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """Gated feed-forward (SwiGLU with `silu`; Shazeer 2020, arXiv 2002.05202) of rows `(rows, hidden)`."""
        gate, up = linear(rows, gate_up).chunk(2, dim=-1)
        return linear(self.act_fn(gate) * up, down)

    def add_feed_forward(self):
        """Creates the parameters of [`~MoreExperts.feed_forward`]."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))

    def add_gru(self, width: int, merged: bool):
        """Creates a GRU's matrices for states of `width`; `merged` if state and input are one vector.

        With one vector on both sides the reset and update matrices only ever act as their sum, so that 4 blocks of
        `width**2` do the work of 6.
        """
        self.gru_hidden = nn.Parameter(torch.empty(self.num_experts, 3 * width, width))
        self.gru_input = nn.Parameter(torch.empty(self.num_experts, width if merged else 3 * width, width))


def scalar_gate(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Sigmoid of the dot product of each of `rows` with its row of `vectors`, `(rows, 1)`."""
    return (rows * vectors).sum(dim=-1, keepdim=True).sigmoid().to(rows.dtype)


def uses_later_steps(context: ExpertContext) -> bool:
    """Whether a weight that the first step has no use for gets its gradient from a later one.

    A parameter without any gradient would stop data-parallel training, so a single step computes with zeros instead.
    """
    options = context.options
    may_stop_at_first = options.num_recurrences == 1 or (options.exit_threshold > 0 and options.min_recurrences == 1)
    return not (may_stop_at_first and torch.is_grad_enabled())


class MoreFeedForwardExperts(MoreExperts):
    """`base`: gated feed-forward experts, as in Mixtral."""

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_feed_forward()

    def transform(self, rows, linear, context, top_k_index, order):
        """Maps sorted rows `(rows, hidden)` to outputs of the same shape, without steps."""
        return self.feed_forward(rows, linear, self.gate_up_proj, self.down_proj), None


class MoreRecurrentBlockExperts(MoreExperts):
    """`more_a`: a recurrent transformer block (Geiping et al. 2025, arXiv 2502.05171).

    Each step adapts state and input to one vector, attends causally to the tokens of the same sequence that the same
    expert received, and applies a gated MLP; a norm stands before and after each residual branch. The norms before a
    linear map have no weights, which that map would absorb.
    """

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        experts, hidden, attention = self.num_experts, config.hidden_size, self.num_heads * self.head_dim
        self.adapter_state = nn.Parameter(torch.empty(experts, hidden, hidden))
        self.adapter_input = nn.Parameter(torch.empty(experts, hidden, hidden))
        qkv = attention + 2 * self.num_kv_heads * self.head_dim
        self.qkv_proj = nn.Parameter(torch.empty(experts, qkv, hidden))
        self.o_proj = nn.Parameter(torch.empty(experts, hidden, attention))
        self.attention_output_norm = nn.Parameter(torch.empty(experts, hidden))
        self.mlp_output_norm = nn.Parameter(torch.empty(experts, hidden))
        self.initial_state = None
        if config.state_initialization == "learned":
            self.initial_state = nn.Parameter(torch.empty(experts, hidden))
        self.add_feed_forward()

    def sort(self, top_k_index: torch.Tensor, context: ExpertContext) -> torch.Tensor:
        """Order of the pairs by expert, then by sequence, so that attention runs within runs of rows."""
        return sort_by_expert_and_sequence(top_k_index.view(*context.sequence_ids.shape, -1), context.sequence_ids)

    def transform(self, rows, linear, context, top_k_index, order):
        """Iterates the block on sorted rows `(rows, hidden)`; returns the last states and the steps of each row."""
        routes = top_k_index.view(*context.sequence_ids.shape, -1)
        attention = ExpertAttention(
            routes, context.sequence_ids, order, linear.fast, self.config.num_hidden_layers, self.layer_idx,
            context.past_key_values,
        )  # fmt: skip
        attention.check_steps(context.options.num_recurrences)
        tokens = order // routes.shape[-1]
        cos, sin = (
            table.expand(*routes.shape[:2], -1).flatten(0, 1).index_select(0, tokens)
            for table in context.position_embeddings
        )
        injected = linear(rows, self.adapter_input) if linear.fast else rows
        norms = (self.attention_output_norm[linear.experts], self.mlp_output_norm[linear.experts])
        constants = (injected, cos, sin, *norms)
        weights = (self.adapter_state, self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj)
        adapter, *weights = map(linear.share, weights)

        skips_first = self.config.state_initialization == "zeros" and uses_later_steps(context)

        def step(state, linear, active, index):
            chosen = constants if active is None else [constant.index_select(0, active) for constant in constants]
            adapted = self._adapt(state, chosen[0], linear, adapter, index, skips_first)
            return self._block(adapted, linear, weights, attention, chosen, active, index)

        state, steps = iterate(step, self._initial_state(rows, linear, context), linear, context.options)
        attention.fill(int(steps.max()) if len(steps) else 0, context.options.num_recurrences)
        return state, steps

    def _initial_state(self, rows, linear, context):
        if self.initial_state is not None:
            return self.initial_state[linear.experts]
        if self.config.state_initialization == "noise" and context.noisy:
            return torch.randn_like(rows) * self.config.state_noise_std
        return torch.zeros_like(rows)

    def _adapt(self, state, injected, linear, adapter, index, skips_first):
        if not linear.fast:
            return linear(torch.cat((state, injected), dim=-1), torch.cat((adapter, self.adapter_input), dim=-1))
        # The input's share is the same in every step, and a first state of zeros has none.
        if skips_first and index == 0:
            return injected
        return linear(state, adapter) + injected

    def _block(self, adapted, linear, weights, attention, constants, active, index):
        qkv_proj, o_proj, gate_up, down = weights
        _, cos, sin, attention_norm, mlp_norm = constants
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = linear(self._normalize(adapted), qkv_proj).unflatten(-1, (-1, self.head_dim))
        query, key, value = qkv.split(heads, dim=1)
        query, key = apply_rotation(query, cos, sin).to(value.dtype), apply_rotation(key, cos, sin).to(value.dtype)
        attended = attention(query, key, value, active, index).flatten(1)
        state = self._normalize(adapted + linear(attended, o_proj)) * attention_norm
        return self._normalize(state + self.feed_forward(self._normalize(state), linear, gate_up, down)) * mlp_norm

    def _normalize(self, rows: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows, rows.shape[-1:], eps=self.config.rms_norm_eps)


class MoreSandwichExperts(MoreExperts):
    """`more_b`: a linear map up, a GRU that iterates on the wide state, a linear map down."""

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, config.recurrent_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, config.recurrent_size))
        self.add_gru(config.recurrent_size, merged=True)

    def transform(self, rows, linear, context, top_k_index, order):
        """Iterates on sorted rows `(rows, hidden)`; returns the outputs and the steps of each row."""
        update = gru_update if linear.fast else gru_cell
        gru_hidden, gru_input = linear.share(self.gru_hidden), linear.share(self.gru_input)

        def step(state, linear, active, index):
            return update(linear(state, gru_hidden), linear(state, gru_input), state)

        state, steps = iterate(step, self.act_fn(linear(rows, self.up_proj)), linear, context.options)
        return linear(state, self.down_proj), steps


class MoreParallelExperts(MoreExperts):
    """`more_c`: a feed-forward branch and a GRU branch that reads the same token in every step, mixed by a gate."""

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_feed_forward()
        self.add_gru(config.hidden_size, merged=False)
        self.branch_gate = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def transform(self, rows, linear, context, top_k_index, order):
        """Mixes both branches of sorted rows `(rows, hidden)`; returns the outputs and the steps of each row."""
        gru_hidden, gru_input = linear.share(self.gru_hidden), linear.share(self.gru_input)
        projected = linear(rows, gru_input)

        def plain_step(state, linear, active, index):
            chosen = rows if active is None else rows[active]
            return gru_cell(linear(state, gru_hidden), linear(chosen, gru_input), state)

        def fast_step(state, linear, active, index):
            if index == 0 and uses_later_steps(context):
                return _first_gru_state(projected)
            chosen = projected if active is None else projected.index_select(0, active)
            return gru_update(linear(state, gru_hidden), chosen, state)

        zeros = projected.new_zeros(rows.shape)
        state, steps = iterate(fast_step if linear.fast else plain_step, zeros, linear, context.options)
        # A softmax over two branches is the sigmoid of the difference of their logits.
        gate = scalar_gate(rows, self.branch_gate[linear.experts])
        output = self.feed_forward(rows, linear, self.gate_up_proj, self.down_proj)
        return gate * output + (1 - gate) * state, steps


def _first_gru_state(projected: torch.Tensor) -> torch.Tensor:
    """The state `(rows, width)` of a GRU after one step from zeros, which needs no product with the state."""
    _, update, proposal = projected.chunk(3, dim=-1)
    return torch.sigmoid(-update) * torch.tanh(proposal)


class MoreRefinementExperts(MoreExperts):
    """`more_d`: a feed-forward expert whose output a GRU refines, as far as a learned gate lets each step go."""

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_feed_forward()
        self.add_gru(config.hidden_size, merged=True)
        self.update_gate = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def transform(self, rows, linear, context, top_k_index, order):
        """Refines the outputs of sorted rows `(rows, hidden)`; returns them and the steps of each row."""
        update = gru_update if linear.fast else gru_cell
        gates = self.update_gate[linear.experts]
        gru_hidden, gru_input = linear.share(self.gru_hidden), linear.share(self.gru_input)

        def step(state, linear, active, index):
            refined = update(linear(state, gru_hidden), linear(state, gru_input), state)
            gate = scalar_gate(state, gates if active is None else gates.index_select(0, active))
            return state + gate * (refined - state)

        output = self.feed_forward(rows, linear, self.gate_up_proj, self.down_proj)
        return iterate(step, output, linear, context.options)


EXPERT_CLASSES = {
    "base": MoreFeedForwardExperts,
    "more_a": MoreRecurrentBlockExperts,
    "more_b": MoreSandwichExperts,
    "more_c": MoreParallelExperts,
    "more_d": MoreRefinementExperts,
}
