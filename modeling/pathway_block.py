"""One layer of pathways: a recurrent router, and recurrent experts of different sizes on the same input.

Shapes: time, batch, stream (`intermediate_dim`), experts; units, of all recurrent experts; width, those and the
router's. Time comes first, as recurrences want it.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_mop import MopConfig
from .pathway_recurrence import PackedGru


@dataclass
class PathwayOptions:
    """Which experts a pass leaves out, beside what dropout does in training.

    Args:
        weight_threshold (`float`, *optional*): Experts of a smaller weight; what remains is renormalised.
        lesion_largest (`bool`): The largest expert of every layer that has a choice.
    """

    weight_threshold: float | None = None
    lesion_largest: bool = False


class MopBlock(nn.Module):
    """One layer: `LayerNorm(x + sum_i w_i E_i(x))` with the weights `w` of a recurrent router."""

    def __init__(self, config: MopConfig, sizes: list[int]):
        super().__init__()
        self.config = config
        self.sizes = sizes
        self.router_dim = config.router_dim if config.is_routed else 0
        self.unit_sizes = [size for size in sizes if size > 0]
        units = sum(self.unit_sizes)
        self.gru = PackedGru(config.intermediate_dim, [size for size in (self.router_dim, *self.unit_sizes) if size])
        if config.is_routed:
            self.router = nn.Linear(config.router_dim, len(sizes))
        if config.expert_norm == "layernorm":
            self.expert_norm_weight = nn.Parameter(torch.empty(units))
            self.expert_norm_bias = nn.Parameter(torch.empty(units))
        elif config.expert_norm == "batchnorm":
            self.batch_norm = nn.BatchNorm1d(units)
        self.output_weight = nn.Parameter(torch.empty(config.intermediate_dim, units))
        self.output_bias = nn.Parameter(torch.empty(len(self.unit_sizes), config.intermediate_dim))
        self.norm = nn.LayerNorm(config.intermediate_dim)
        for name, values in self.constants().items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def constants(self) -> dict[str, list]:
        """Values of the buffers that are not saved.

        `unit_of_expert` `(experts, units)` is one where a unit is of an expert, `recurrent_experts` picks the columns
        of those with parameters, and `is_skip` those without. Products with them are faster than indexing, both ways.
        """
        pick = [[float(index == expert) for index in range(len(self.sizes))] for expert in range(len(self.sizes))]
        recurrent = [expert for expert, size in enumerate(self.sizes) if size]
        return {
            "unit_of_expert": [
                [row[expert] for expert in recurrent for _ in range(self.sizes[expert])] for row in pick
            ],
            "recurrent_experts": [[row[expert] for expert in recurrent] for row in pick],
            "is_skip": [[float(size == 0)] for size in self.sizes],
        }

    def state_names(self, layer: int) -> dict[str, tuple[int, int]]:
        """Where the router's and each recurrent expert's part of the packed state lie, by name."""
        names = [f"router_{layer}"] if self.config.is_routed else []
        names += [f"expert_{layer}_{index}" for index, size in enumerate(self.sizes) if size]
        return {name: (part.start, part.stop) for name, part in zip(names, self.gru.slices(), strict=True)}

    def forward(
        self, x: torch.Tensor, state: torch.Tensor, keep: torch.Tensor | None, options: PathwayOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Runs `x` of shape `(time, batch, stream)` from a packed state `(batch, width)`.

        Returns:
            The stream, the state after the last step, and the router's softmax `(time, batch, experts)` or `None`.
        """
        if self.config.recurrence == "published":
            return self._published(x, options)
        states = self.gru(x, state, keep, eager=self.config.recurrence_implementation == "eager")
        raw, used = self._route(states[..., : self.router_dim], options)
        units = torch.relu(self._normalize(states[..., self.router_dim :])).to(x.dtype)
        return self.norm(x + self._combine(x, units, used)), states[-1], raw

    def _route(self, router_states: torch.Tensor, options: PathwayOptions):
        """The softmax over the experts, and the weights that are left after some are dropped."""
        if not self.config.is_routed:
            return None, None
        with torch.autocast(router_states.device.type, enabled=False):
            head = (self.router.weight.float(), self.router.bias.float())
            logits = nn.functional.linear(torch.relu(router_states.float()), *head)
            raw = logits.softmax(dim=-1)
            dropped = self._dropped(raw, options)
            used = raw if dropped is None else logits.masked_fill(dropped, -torch.inf).softmax(dim=-1)
        return raw, used

    def _dropped(self, weights: torch.Tensor, options: PathwayOptions) -> torch.Tensor | None:
        """Where an expert is left out; never all experts of a step. `None` if none ever is."""
        config = self.config
        has_choice = len(self.sizes) > 1
        with_dropout = self.training and config.expert_dropout_max_prob > 0 and has_choice
        lesioned = options.lesion_largest and has_choice
        if not with_dropout and not lesioned and options.weight_threshold is None:
            return None
        weights = weights.detach()
        if lesioned:
            largest = self.sizes.index(max(self.sizes))
            weights = torch.where(torch.arange(len(self.sizes), device=weights.device) == largest, -1.0, weights)
        dropped = weights < (options.weight_threshold or 0.0)
        if with_dropout:
            highest, threshold = config.expert_dropout_max_prob, config.expert_dropout_threshold
            # Above the threshold this probability is negative.
            dropped = dropped | (torch.rand_like(weights) < highest - highest / threshold * weights)
        return dropped & (weights < weights.amax(dim=-1, keepdim=True))

    def _normalize(self, units: torch.Tensor) -> torch.Tensor:
        if self.config.expert_norm == "none" or not self.unit_sizes:
            return units
        if self.config.expert_norm == "batchnorm":
            return self.batch_norm(units.flatten(0, -2)).view_as(units)
        parts = zip(
            units.split(self.unit_sizes, dim=-1),
            self.expert_norm_weight.split(self.unit_sizes),
            self.expert_norm_bias.split(self.unit_sizes),
            strict=True,
        )
        return torch.cat([nn.functional.layer_norm(part, part.shape[-1:], *own) for part, *own in parts], dim=-1)

    def _combine(self, x: torch.Tensor, units: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """The weighted outputs of all experts: since w (W h + b) = W (w h) + w b, by one product."""
        if weights is None:
            return nn.functional.linear(units, self.output_weight, self.output_bias[0])
        weights = weights.to(x.dtype)
        mixed = nn.functional.linear(units * (weights @ self.unit_of_expert), self.output_weight)
        if 0 not in self.sizes:
            return mixed + weights @ self.output_bias
        return mixed + weights @ self.recurrent_experts @ self.output_bias + weights @ self.is_skip * x

    def _published(self, x: torch.Tensor, options: PathwayOptions):
        """The published recurrence: routers run over the batch, experts over all steps of all sequences in a row.

        A step that leaves an expert out is no part of that expert's sequence.
        """
        rows = x.transpose(0, 1)
        raw, used = self._route(_run_gru(rows, self.gru.gru_weights(0)), options)
        steps = rows.flatten(0, 1)
        units = []
        for position, expert in enumerate([index for index, size in enumerate(self.sizes) if size]):
            active = used.flatten(0, 1)[:, expert] > 0
            states = _run_gru(steps[active].unsqueeze(1), self.gru.gru_weights(1 + position)).squeeze(1)
            size = self.unit_sizes[position]
            units.append(steps.new_zeros(len(steps), size).masked_scatter(active.unsqueeze(1), states))
        units = torch.relu(self._normalize(torch.cat(units, dim=1))).view(*rows.shape[:2], -1)
        y = self.norm(rows + self._combine(rows, units, used))
        return y.transpose(0, 1), x.new_zeros(x.shape[1], self.gru.width), raw.transpose(0, 1)


def _run_gru(inputs: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """One GRU from a fresh state over `(steps, batch, input)`."""
    state = inputs.new_zeros(1, inputs.shape[1], weights[1].shape[1])
    if len(inputs) == 0:
        return inputs.new_zeros(0, *state.shape[1:])
    return torch.gru(inputs, state, weights, True, 1, 0.0, False, False, False)[0]


__all__ = ["MopBlock", "PathwayOptions"]
