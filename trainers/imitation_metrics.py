"""What is summed between two logs of an imitation run: losses, agreement with the bot, and what the routers did."""

import time

import torch
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..modeling import MopConfig
from .routing_callback import RoutingCallback


class ImitationWindow:
    """Losses, agreement and speed since the last log, on the policy's device."""

    def __init__(self):
        self._sums: Tensor | None = None  # (5,): updates, action loss, routing cost, agreements, labels
        self._frames = 0
        self._elapsed = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Lets the clock run."""
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, for what is not training."""
        self._elapsed = self._seconds()
        self._started = None

    def _seconds(self) -> float:
        return self._elapsed + (0.0 if self._started is None else time.perf_counter() - self._started)

    @torch.no_grad()
    def add(self, outputs, labels: Tensor) -> None:
        """
        Takes one forward pass.

        Args:
            outputs (`MopActionPredictionOutput`): Of the policy.
            labels (`torch.Tensor` of shape `(batch, time)`): The bot's actions, -100 where it has none.
        """
        agreements = (outputs.logits.argmax(-1) == labels).sum()
        cost = outputs.routing_cost
        values = [1.0, outputs.action_loss, 0.0 if cost is None else cost, agreements, (labels >= 0).sum()]
        values = torch.stack([torch.as_tensor(value, device=labels.device).float() for value in values])
        self._sums = values if self._sums is None else self._sums + values
        self._frames += labels.numel()

    def figures(self, trainer: Trainer) -> dict[str, float]:
        """Means over the window and all processes; every process has to ask."""
        if self._sums is None:
            return {}
        seconds = self._seconds()
        frames = torch.tensor([float(self._frames)], device=self._sums.device)
        sums = trainer.accelerator.reduce(torch.cat([self._sums, frames]), reduction="sum").tolist()
        updates, loss, cost, agreements, labels, frames = sums
        return {
            "action_loss": loss / updates,
            "routing_cost": cost / updates,
            "agreement": agreements / max(labels, 1.0),
            "frames_per_second": frames / seconds,
        }


class PathwayCallback(RoutingCallback):
    """
    As [`RoutingCallback`], for MoP policies, whose routers give every expert a share of every step:

    - `routing/layer_{i}/expert_load`: histogram, the mean weight of each expert; expert `e` is the bucket around `e`.
    - `routing/layer_{i}/entropy`: entropy of the weights in nats, mean over steps.
    - `routing/layer_{i}/usage_cost`: weights times costs of the experts, as a share of the largest possible.

    The trainer hands over the weights of each update ([`PathwayCallback.add`]).

    Args:
        trainer (`Trainer`): The trainer to report for.
        config ([`MopConfig`]): Of the policy.
    """

    def __init__(self, trainer: Trainer, config: MopConfig):
        super().__init__(trainer)
        self._costs = [torch.tensor(costs) for costs in config.expert_costs()]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        """Starts a window; there is nothing to hook."""
        self._window = PathwayWindow(self._costs)

    def add(self, router_weights: tuple[Tensor, ...] | None) -> None:
        """Takes the weights `(batch, time, experts)` of each layer, of one update."""
        if router_weights:
            self._window.add(router_weights)


class PathwayWindow:
    """
    Sums of routing weights and entropies by layer.

    Args:
        costs (`list[torch.Tensor]`): Cost of each expert, by layer.
    """

    def __init__(self, costs: list[Tensor]):
        self._costs = costs
        self._sums: Tensor | None = None  # (layers, experts + 2), padded to the layer with most experts

    @torch.no_grad()
    def add(self, router_weights: tuple[Tensor, ...]) -> None:
        """Counts the weights `(batch, time, experts)` of each layer."""
        widest = max(weights.shape[-1] for weights in router_weights)
        rows = []
        for weights in router_weights:
            flat = weights.detach().flatten(0, -2).float()  # (batch * time, experts)
            entropy, steps = torch.special.entr(flat).sum(), flat.new_tensor(float(len(flat)))
            padding = flat.new_zeros(widest - flat.shape[-1])
            rows.append(torch.cat([entropy[None], steps[None], flat.sum(0), padding]))
        sums = torch.stack(rows)
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(self, trainer: Trainer) -> dict[int, "LayerPathways"]:
        """The statistics of the window over all processes, by layer; every process has to ask."""
        if self._sums is None:
            return {}
        sums = trainer.accelerator.reduce(self._sums, reduction="sum").cpu()
        return {
            layer: LayerPathways(row, costs) for layer, (row, costs) in enumerate(zip(sums, self._costs, strict=True))
        }

    def reset(self) -> None:
        """Starts an empty window."""
        self._sums = None


class LayerPathways:
    """
    What one layer's router did in a window.

    Args:
        sums (`torch.Tensor` of shape `(experts + 2,)`): A row of [`PathwayWindow`].
        costs (`torch.Tensor` of shape `(experts,)`): Cost of each expert.
    """

    def __init__(self, sums: Tensor, costs: Tensor):
        self._entropy, self._steps = sums[:2].tolist()
        self._costs = costs
        self.counts = sums[2 : 2 + len(costs)]

    @property
    def collapse(self) -> str | None:
        """The metric that shows that one expert got all the weight though there are others, if it did."""
        entropy = self._entropy / self._steps
        return f"entropy is {entropy:.4f} nats" if entropy < 1e-3 and len(self.counts) > 1 else None

    def scalars(self) -> dict[str, float]:
        """The scalar metrics by name."""
        weights, largest = self.counts / self._steps, self._costs.max().item()
        usage = (weights * self._costs).sum().item() / largest if largest else 0.0
        return {"entropy": self._entropy / self._steps, "usage_cost": usage}
