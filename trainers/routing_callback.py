"""Routing metrics during any training of any transformers MoE model."""

import logging
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..modeling.routing_statistics import (
    Routing,
    RoutingRecorder,
    dead_experts,
    expert_counts,
    expert_load,
    infer_scores,
    load_balance_cv,
    token_entropies,
)

logger = logging.getLogger(__name__)


class RoutingCallback(TrainerCallback):
    """
    Writes what the routers did since the last log, whenever the `Trainer` logs its training loss (`logging_steps`):

    - `routing/layer_{i}/expert_load`: histogram, the fraction of the assignments that each expert received; expert `e`
      is the bucket around `e`.
    - `routing/layer_{i}/entropy`: the router's entropy in nats, mean over tokens.
    - `routing/layer_{i}/load_balance_cv`: standard deviation over mean of the loads; 0 is a perfect balance.
    - `routing/layer_{i}/dead_experts`: experts that received no token.
    - `routing/layer_{i}/mean_recurrence_steps`: recurrences that an expert ran, mean over tokens and their experts;
      for recurrent experts only.

    All go to the run of the trainer's own `TensorBoardCallback`, under exactly these names. Every other tracker in
    `report_to` (trackio, wandb, ...) receives the scalars the way it receives the loss, so with its prefix `train/`.
    The progress bar and `trainer.state.log_history` stay as they are; `callback.metrics` holds the latest scalars.

    A layer whose tokens all go to the same experts is warned of, once until it recovers.

    Counts are of training forwards only, of real tokens only (`attention_mask`), over all processes, and each token
    once, with or without gradient checkpointing. Between two logs nothing waits for the accelerator. A window that a
    checkpoint cuts in two is counted from the checkpoint on when the training resumes, as the loss is.

    Args:
        trainer (`Trainer`): The trainer to report for.
        scores (`str`, *optional*): `"softmax"`, `"sigmoid"` or `"probabilities"`, how the entropy turns logits into
            probabilities (see [`~modeling.routing_statistics.router_probabilities`]). By default it is told from
            the router's weights in the first forward.

    Example:

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    trainer.add_callback(RoutingCallback(trainer))
    trainer.train()
    ```
    """

    def __init__(self, trainer: Trainer, scores: str | None = None):
        # The trainer, because only its list of callbacks leads to the SummaryWriter of the run: a second writer in
        # the same folder is a file that TensorBoard stops following.
        self.trainer = trainer
        self.scores = scores
        self.metrics: dict[str, float] = {}
        self.loads: dict[int, list[float]] = {}
        self._collapsed: set[int] = set()
        self._window: RoutingWindow | None = None
        self._remove_hooks: weakref.finalize | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        """Hook the routers."""
        self.detach()
        self._window = RoutingWindow(self.scores)
        recorder = RoutingRecorder(model, self._window.add_routing, self._window.add_steps, training_only=True)
        recorder.attach()
        # on_train_end does not come when a training fails, so the hooks also go when the trainer does.
        self._remove_hooks = weakref.finalize(self, recorder.remove)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        """Write the window and start the next, if these are the logs of a training window or of the end."""
        if self._window is None or not ("loss" in logs or "train_loss" in logs):
            return
        # Every process takes part, and in the same order.
        layers = self._window.reduce(self.trainer)
        self._window.reset()
        if not layers or not state.is_world_process_zero:
            return
        self.metrics = {
            f"routing/layer_{layer}/{name}": value
            for layer, statistics in layers.items()
            for name, value in statistics.scalars().items()
        }
        self.loads = {layer: expert_load(statistics.counts).tolist() for layer, statistics in layers.items()}
        self._warn_of_collapse(layers, state.global_step)
        self._write_tensorboard(layers, state.global_step)
        others = tuple(set(INTEGRATION_TO_CALLBACK.values()) - {TensorBoardCallback})
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, others):
                callback.on_log(args, state, control, logs=dict(self.metrics), **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Remove the hooks."""
        self.detach()

    def detach(self) -> None:
        """Remove the hooks, which the next `trainer.train()` puts back. To be called only if a training has failed."""
        if self._remove_hooks is not None:
            self._remove_hooks()
            self._remove_hooks = self._window = None

    def _warn_of_collapse(self, layers: dict[int, "LayerStatistics"], step: int) -> None:
        collapsed = {layer: sign for layer, statistics in layers.items() if (sign := statistics.collapse)}
        for layer in sorted(collapsed.keys() - self._collapsed):
            logger.warning(
                "routing/layer_%d/%s at step %d: the router chooses the same experts for all. A larger balancing "
                "loss, or a lower learning rate, usually helps.",
                layer, collapsed[layer], step,
            )  # fmt: skip
        self._collapsed = set(collapsed)

    def _write_tensorboard(self, layers: dict[int, "LayerStatistics"], step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in self.metrics.items():
                    callback.tb_writer.add_scalar(name, value, step)
                for layer, statistics in layers.items():
                    write_load_histogram(
                        callback.tb_writer, f"routing/layer_{layer}/expert_load", statistics.counts, step
                    )
                callback.tb_writer.flush()


class RoutingWindow:
    """
    The sums of a logging window, on the routers' devices.

    Per layer one vector: the assignments of each expert, the sum of the tokens' entropies, the number of tokens, the
    sum of the recurrence steps and their number. Sums of integers stay exact in float64.

    Args:
        scores (`str`, *optional*): As for [`RoutingCallback`].
    """

    def __init__(self, scores: str | None = None):
        self.scores = scores
        self._sums: dict[int, Tensor] = {}  # (experts + 4,)

    def add_routing(self, layer: int, routing: Routing) -> None:
        """Count one decision of a layer's router."""
        if self.scores is None:
            self.scores = infer_scores(routing)
        logits, _, indices, mask = routing
        num_experts = logits.shape[-1]
        if layer not in self._sums:
            # MPS has no float64.
            dtype = torch.float32 if logits.device.type == "mps" else torch.float64
            self._sums[layer] = torch.zeros(num_experts + 4, dtype=dtype, device=logits.device)
        if mask is None:
            mask = torch.ones_like(indices[:, 0], dtype=torch.bool)
        sums = self._sums[layer]
        sums[:num_experts] += expert_counts(indices, num_experts, mask)
        sums[-4] += torch.where(mask, token_entropies(logits, self.scores), 0).sum()
        sums[-3] += mask.sum()

    def add_steps(self, layer: int, steps: Tensor, mask: Tensor | None) -> None:
        """Count the recurrence steps (tokens, top_k) of a layer, whose router came before."""
        if mask is None:
            mask = torch.ones_like(steps[:, 0], dtype=torch.bool)
        sums = self._sums[layer]
        sums[-2] += torch.where(mask[:, None], steps, 0).sum()
        sums[-1] += mask.sum() * steps.shape[-1]

    def reduce(self, trainer: Trainer) -> dict[int, "LayerStatistics"]:
        """The statistics of the window over all processes, by layer; empty if no token was routed."""
        if not self._sums:
            return {}
        layers = sorted(self._sums)
        # One collective and one copy for the whole model; the layers may lie on several devices.
        flat = torch.cat([self._sums[layer].to(trainer.args.device) for layer in layers])
        flat = trainer.accelerator.reduce(flat, reduction="sum").cpu()
        statistics = flat.split([len(self._sums[layer]) for layer in layers])
        reduced = {layer: LayerStatistics(sums) for layer, sums in zip(layers, statistics, strict=True)}
        return {layer: statistics for layer, statistics in reduced.items() if statistics.num_tokens > 0}

    def reset(self) -> None:
        """Start an empty window."""
        for sums in self._sums.values():
            sums.zero_()


class LayerStatistics:
    """
    What one layer's router did in a window.

    Args:
        sums (`torch.Tensor` of shape `(experts + 4,)`): A layer's sums as [`RoutingWindow`] holds them.
    """

    def __init__(self, sums: Tensor):
        self.counts = sums[:-4]
        self.entropy_sum, self.num_tokens, self.steps_sum, self.num_steps = sums[-4:].tolist()

    @property
    def collapse(self) -> str | None:
        """The metric that shows that all tokens went to the same experts though there are others, if they did."""
        experts_per_token = round(self.counts.sum().item() / self.num_tokens)
        dead = (self.counts == 0).sum().item()
        if dead and experts_per_token == len(self.counts) - dead:
            return f"dead_experts is {dead} of {len(self.counts)}"
        return None

    def scalars(self) -> dict[str, float]:
        """The scalar metrics by name."""
        scalars = {
            "entropy": self.entropy_sum / self.num_tokens,
            "load_balance_cv": load_balance_cv(self.counts).item(),
            "dead_experts": dead_experts(self.counts).item(),
        }
        if self.num_steps > 0:
            scalars["mean_recurrence_steps"] = self.steps_sum / self.num_steps
        return scalars


def write_load_histogram(writer: SummaryWriter, tag: str, counts: Tensor, step: int) -> None:
    """
    Write the expert load as a TensorBoard histogram over expert ids, one bucket per expert.

    Expert `e` is the bucket from `e - 0.5` to `e + 0.5`; its height is the fraction of the assignments.
    """
    load = expert_load(counts).double().numpy()
    experts = np.arange(len(load))
    used = experts[load > 0]
    writer.add_histogram_raw(
        tag,
        # TensorBoard drops empty buckets at both ends, and takes these for the outer edges of what is left.
        min=float(used[0]) - 0.5,
        max=float(used[-1]) + 0.5,
        num=float(load.sum()),
        sum=float((load * experts).sum()),
        sum_squares=float((load * experts**2).sum()),
        bucket_limits=(experts + 0.5).tolist(),
        bucket_counts=load.tolist(),
        global_step=step,
    )
