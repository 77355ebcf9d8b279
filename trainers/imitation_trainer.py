"""Imitation of BabyAI's bot, on `transformers.Trainer`: behaviour cloning and DAgger.

An update takes one unroll of all environments (or streams of demonstrations), one forward pass over `(batch, time)`
from the recurrent state that the last unroll ended with, and one step of the optimizer.
"""

import json
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import Trainer

from ..modeling import MopForActionPrediction
from .babyai import Unroll
from .durable_training import DurableTraining
from .imitation_card import CURVES, card_of_policy, imitation_record
from .imitation_config import EnvironmentArguments, ImitationConfig
from .imitation_metrics import ImitationWindow, PathwayCallback
from .policy_evaluation import HeldOutEpisodes
from .publishing import PublishingCallback, write_card
from .training_record import routing_facts
from .unroll_sources import UnrollSource
from .whole_files import write_whole, write_whole_text


class UpdateCounter(Dataset):
    """
    As many items as a run takes unrolls: `Trainer` counts its updates by a data set, and the unrolls are made later.

    Args:
        length (`int`): Unrolls of all processes.
    """

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"update": index}


class ImitationTrainer(DurableTraining, Trainer):
    """
    A `Trainer` for MoP policies that learn from BabyAI's bot.

    Beside what `Trainer` logs (`loss`, `grad_norm`, `learning_rate`) it logs `action_loss`, `routing_cost` (share of
    the largest possible), `agreement` (share of the bot's actions that the policy predicts), `frames`,
    `frames_per_second` (evaluation and saving left out), `success` and `length_ratio` of recent episodes, by level
    where there are several, `dagger_beta` and `bot_failures`; the routing goes to TensorBoard ([`PathwayCallback`]).
    Evaluation plays held-out episodes to their ends.

    Args:
        model ([`MopForActionPrediction`]): The policy.
        args ([`ImitationConfig`]): Training arguments.
        source ([`UnrollSource`]): Of this process's unrolls.
        environment_arguments ([`EnvironmentArguments`]): Levels, and held-out episodes.
        kwargs: Passed to `Trainer`.
    """

    def __init__(
        self,
        model: MopForActionPrediction,
        args: ImitationConfig,
        source: UnrollSource,
        environment_arguments: EnvironmentArguments,
        **kwargs,
    ):
        unrolls = args.max_steps * args.gradient_accumulation_steps * args.world_size
        super().__init__(
            model=model, args=args, train_dataset=UpdateCounter(unrolls), eval_dataset=UpdateCounter(1), **kwargs
        )
        self.source = source
        self.environment_arguments = environment_arguments
        self.held_out = HeldOutEpisodes(
            environment_arguments.env_id,
            environment_arguments.eval_episodes,
            environment_arguments.eval_first_seed,
            args.per_device_eval_batch_size,
        )
        self._window = ImitationWindow()
        self._pathways = PathwayCallback(self, model.config)
        self.add_callback(self._pathways)
        self.add_callback(PublishingCallback(self))

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One unroll, forward and backward."""
        self._window.start()
        return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs):
        """The next unroll in place of the counter's item."""
        unroll, state = self.source.next_unroll(self.model)
        inputs = unroll_inputs(unroll, self.model)
        return {**super()._prepare_inputs(inputs), "state": state, "output_router_weights": True}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of `Trainer`; the state goes to the source, and losses and routing to the log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.source.finish(outputs.state.detach())
        self._window.add(outputs, inputs["labels"])
        self._pathways.add(outputs.router_weights)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures of the window that `logs` is about, and of the source."""
        if "loss" in logs:
            logs |= self._window.figures(self)
            self._window = ImitationWindow()
            logs |= self._source_figures()
        super().log(logs, start_time)

    def _source_figures(self) -> dict[str, float]:
        """What the sources of all processes tell: failures and frames are sums, all else is means."""
        of_processes = gather_object([self.source.metrics()])
        names = dict.fromkeys(name for metrics in of_processes for name in metrics)
        figures = {}
        for name in names:
            values = [metrics[name] for metrics in of_processes if name in metrics]
            figures[name] = sum(values) / (1 if name == "bot_failures" else len(values))
        arguments = self.environment_arguments
        frames = self.source.num_unrolls * arguments.num_envs * arguments.unroll_len
        return {**figures, "frames": frames * self.args.world_size}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Plays the held-out episodes, greedily and to their ends.

        Returns:
            `dict[str, float]`: `eval_success`, `eval_return`, `eval_length_ratio` and further means over episodes, the
            same by level where there are several (`eval_success/BabyAI-GoToLocal-v0`), and `eval_runtime`.
        """
        self._window.pause()
        # Trainer adds its memory metrics between these two calls.
        self._memory_tracker.start()
        metrics = self.held_out.metrics(self.model, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def create_model_card(self, **kwargs) -> None:
        """Writes the card of the trained policy to `output_dir`, from the run's own figures."""
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            routing = routing_facts([self._pathways])
            record = imitation_record(model, self.args, self.environment_arguments, self.state, routing)
            write_card(self, record, CURVES, partial(card_of_policy, record, model.config))

    def _save_checkpoint(self, model, trial):
        self._window.pause()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """With the random states of each process go its environments and recurrent states."""
        super()._save_rng_state(output_dir)
        save_source(self.source, output_dir, self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_source(self.source, self.model, checkpoint, self.args.process_index)


def unroll_inputs(unroll: Unroll, policy: MopForActionPrediction) -> dict[str, torch.Tensor]:
    """What the policy's forward takes of an unroll."""
    names = ("images", "directions", "mission_index", "reset_mask", "labels", "task_ids")
    arrays = {name: torch.from_numpy(getattr(unroll, name)) for name in names}
    return {**arrays, **policy.prepare_missions(unroll.missions)}


def save_source(source: UnrollSource, folder: str | Path, process_index: int) -> None:
    """Saves the place of `source` beside a checkpoint: JSON, and safetensors for the recurrent state."""
    state, tensors = _source_files(folder, process_index)
    held = {} if source.state is None else source.state.to_dict()
    write_whole(tensors, lambda path: save_file({name: value.contiguous() for name, value in held.items()}, path))
    write_whole_text(state, json.dumps(source.state_dict()))


def load_source(source: UnrollSource, policy: MopForActionPrediction, folder: str | Path, process_index: int) -> None:
    """Puts `source` where [`save_source`] left it.

    Raises:
        FileNotFoundError: If the checkpoint was saved without it, or by fewer processes.
    """
    state, tensors = _source_files(folder, process_index)
    if not state.is_file() or not tensors.is_file():
        raise FileNotFoundError(
            f"{folder} has no environments of process {process_index} ({state.name}); resume with as many processes "
            "as before, or begin a new run from its weights with --model_name_or_path."
        )
    source.load_state_dict(json.loads(state.read_text(encoding="utf-8")))
    held = load_file(tensors)
    source.state = policy.initial_state(1).load_dict(held).to(policy.device) if held else None


def _source_files(folder: str | Path, process_index: int) -> tuple[Path, Path]:
    name = f"environments_{process_index}"
    return Path(folder, f"{name}.json"), Path(folder, f"{name}.safetensors")
