"""Training of causal language models with routed experts, on `transformers.Trainer`."""

import math
import time
from dataclasses import replace
from functools import partial

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .language_modeling_card import CURVES, card_of_language_model, language_model_record
from .offloaded_trainer import OffloadedTrainer
from .publishing import PublishingCallback, write_card
from .routing_callback import RoutingCallback
from .token_datasets import pad_blocks
from .training_record import routing_facts
from .zero_offload import prepare_for_zero3


class RouterBiasCallback(TrainerCallback):
    """Lets a MoRE model with `router_balancing="bias"` move its biases after each optimizer step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Moves the biases; models with other balancing are left alone."""
        model.update_router_bias()


class LanguageModelingTrainer(OffloadedTrainer):
    """
    A `Trainer` for MoRE models that keeps the losses apart and reports routing.

    Beside what `Trainer` logs (`loss`, `grad_norm`, `learning_rate`, `eval_loss`) it logs `lm_loss` (nats per token),
    `aux_loss` (balancing, unweighted), `perplexity` and `eval_perplexity` (of the language-modelling loss alone) and
    `tokens_per_second` (real tokens of all processes, evaluation and saving left out). `eval_loss` is in nats per
    token of the whole evaluation, however it is cut into batches.

    Arguments are those of [`OffloadedTrainer`]. Without a `data_collator`, examples are padded on the
    right by the tokenizer's padding token ([`pad_blocks`]).
    """

    def __init__(self, *args, data_collator=None, processing_class=None, **kwargs):
        if data_collator is None and processing_class is not None:
            data_collator = partial(pad_blocks, pad_token_id=processing_class.pad_token_id)
        super().__init__(*args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        if self.is_deepspeed_enabled:
            # ZeRO-3 also needs the same order of modules on all processes, whose experts may take different steps.
            prepare_for_zero3(self.model, self.accelerator.state.deepspeed_plugin)
        if self.accelerator.is_fsdp2 and (plugin := self.accelerator.state.fsdp_plugin).mixed_precision_policy:
            # The default rounds losses, and the number of labels that they are divided by, to bfloat16's three digits.
            exact = {"output_dtype": None, "cast_forward_inputs": False}
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)
        self._window = _Window()
        # Of the evaluation under way.
        self._nats, self._labels = 0.0, 0
        self.add_callback(RouterBiasCallback())
        self.add_callback(RoutingCallback(self))
        self.add_callback(PublishingCallback(self))
        self.card_facts = {"dataset": "its training data", "prompt": "The"}

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices: all but norms, and what is one vector per expert."""
        vectors = ("_norm", "_gate", "initial_state")
        names = super().get_decay_parameter_names(model)
        dims = {name: parameter.dim() for name, parameter in model.named_parameters(remove_duplicate=False)}
        return [name for name in names if dims[name] > 1 and not name.endswith(vectors)]

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward pass."""
        self._window.start(self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        mask = inputs.get("attention_mask")
        self._window.tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of `Trainer`; the language-modelling and the balancing loss are kept for the log."""
        if not model.training:
            # Without this, evaluation would hold the logits of a whole batch to throw them away.
            inputs = {**inputs, "labels": self._without_repeats(inputs["labels"]), "return_logits": False}
            # Of the batches of all processes, with what fills them up.
            num_items_in_batch = None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._window.add("lm_loss", outputs.lm_loss)
            self._window.add("aux_loss", outputs.aux_loss)
        else:
            labels = (inputs["labels"][:, 1:] != -100).sum().item()
            self._nats, self._labels = self._nats + loss.item() * labels, self._labels + labels
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds losses, perplexity and speed of the window that `logs` is about."""
        if "loss" in logs:
            steps = self.state.global_step - self._window.first_step
            sums = {name: self.accelerator.reduce(total, "sum") for name, total in self._window.sums.items()}
            logs |= {name: total.item() / steps for name, total in sums.items()}
            logs["perplexity"] = _perplexity(logs["lm_loss"])
            tokens = torch.as_tensor(self._window.tokens, device=self.args.device)
            logs["tokens_per_second"] = self.accelerator.reduce(tokens, "sum").item() / self._window.seconds()
            self._window = _Window()
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, whose loss is a mean of batches, with the loss and perplexity per token."""
        self._window.pause()
        self._nats, self._labels = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nats, labels = (sum(counts) for counts in zip(*gather_object([(self._nats, self._labels)]), strict=True))
        loss = nats / max(1, labels)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = _perplexity(loss)
        return output

    def _without_repeats(self, labels: torch.Tensor) -> torch.Tensor:
        # With several processes the last batches are filled up with examples that have been there already.
        progress = self.accelerator.gradient_state
        if not progress.end_of_dataloader or progress.remainder <= 0:
            return labels
        rows = torch.arange(len(labels), device=labels.device) + self.accelerator.process_index * len(labels)
        return labels.masked_fill(rows[:, None] >= progress.remainder, -100)

    def create_model_card(self, dataset: str | None = None, prompt: str | None = None, **kwargs) -> None:
        """Writes the card of the trained model to `output_dir`, from the run's own figures.

        Args:
            dataset (`str`, *optional*): Hub id or name of the data set; that of `card_facts` if unset.
            prompt (`str`, *optional*): What the example on the card continues; that of `card_facts` if unset.
        """
        given = {"dataset": dataset, "prompt": prompt}
        self.card_facts |= {name: value for name, value in given.items() if value is not None}
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            facts, routing = self.card_facts, routing_facts(self.callback_handler.callbacks)
            record = language_model_record(model, self.args, self.state, facts["dataset"], facts["prompt"], routing)
            write_card(self, record, CURVES, partial(card_of_language_model, record, model.config))

    def _save_checkpoint(self, model, trial):
        self._window.pause()
        super()._save_checkpoint(model, trial)


class _Window:
    """What has been summed since the last log."""

    def __init__(self):
        self.first_step: int | None = None
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: int | torch.Tensor = 0
        self._elapsed = 0.0
        self._started: float | None = None

    def start(self, step: int):
        if self.first_step is None:
            self.first_step = step
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self):
        self._elapsed = self.seconds()
        self._started = None

    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._elapsed + running

    def add(self, name: str, value: torch.Tensor | None):
        if value is not None:
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
