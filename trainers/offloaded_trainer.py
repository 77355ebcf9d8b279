"""`transformers.Trainer` for models whose experts are in a store.

Beside the ordinary files, a checkpoint has the records of all experts, with their optimizer state, in `experts`, and
all other weights under the names that the model has for them in `rest.safetensors`. Records that have not changed
since the last checkpoint are linked to it, not copied.
"""

from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from ..modeling.expert_store import ExpertStore
from ..modeling.lazy_adamw import LazyAdamW, clip_grad_norm_
from .checkpoints import EXPERTS
from .durable_training import DurableTraining
from .task_data import save_task_arguments
from .zero_offload import check_leaf_blocks

REST = "rest.safetensors"


def check_store_arguments(args: TrainingArguments) -> None:
    """Raises `ValueError` if experts in a store cannot be trained so; it takes no model to know."""
    if args.world_size > 1:
        raise ValueError(f"A store has one user at a time: train in one process, not in {args.world_size}.")
    if args.fp16:
        raise ValueError("Gradients in a store are not scaled for float16: choose bf16=True, or float32.")
    if args.save_only_model and args.load_best_model_at_end:
        raise ValueError("The best experts come from the records of its checkpoint: set save_only_model=False.")
    if Trainer.get_optimizer_cls_and_kwargs(args)[0] is not torch.optim.AdamW:
        raise ValueError(f"Experts in a store are trained by AdamW, not by optim={args.optim!r}.")


class OffloadedTrainer(DurableTraining, Trainer):
    """
    A `Trainer` that also updates, clips, saves and resumes the experts of a store; without one it is a `Trainer`.

    The experts that tokens were sent to are updated by [`LazyAdamW`], all else as the arguments say. `max_grad_norm`
    and the logged `grad_norm` are of both together.

    Args:
        store ([`ExpertStore`], *optional*): What `offload_experts`, `load_offloaded` or `initialize_offloaded` of
            `mixturekit.modeling` returned with the model. It is not closed.
        task_arguments (`dict`, *optional*): What is left with every model that is saved, for its evaluation; see
            [`save_task_arguments`].
        args, kwargs: Those of `Trainer`.

    Raises:
        ValueError: If a store is to be trained by several processes, in float16, or by another optimizer than AdamW.
    """

    def __init__(self, *args, store: ExpertStore | None = None, task_arguments: dict | None = None, **kwargs):
        self.store, self.task_arguments = store, task_arguments
        super().__init__(*args, **kwargs)
        if store is not None:
            check_store_arguments(self.args)
            if not store.config.training:
                raise ValueError("The store was opened with training=False, which keeps no optimizer state.")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer for both: the groups of `Trainer`, after that of the experts."""
        chosen = self.optimizer
        super().create_optimizer(model)
        if self.store is None or chosen is not None:
            return self.optimizer
        if type(self.optimizer) is not torch.optim.AdamW:
            raise ValueError(f"Experts in a store are trained by AdamW, not by {type(self.optimizer).__name__}.")
        defaults = self.optimizer.defaults
        # Which of them decay is decided by the same rule as for experts in memory, which goes by names and shapes.
        experts = nn.Module()
        for name, shape in self.store.layout.parameters:
            weight = torch.empty(self.store.num_experts, *shape, device="meta")
            experts.register_parameter(name, nn.Parameter(weight))
        decayed = self.get_decay_parameter_names(experts)
        self.optimizer = LazyAdamW(
            self.store,
            self.optimizer.param_groups,
            lr=defaults["lr"],
            betas=defaults["betas"],
            eps=defaults["eps"],
            weight_decay=self.args.weight_decay,
            no_decay=[name for name, _ in self.store.layout.parameters if name not in decayed],
        )
        return self.optimizer

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `Trainer.train`; raises `ValueError` if DeepSpeed would give experts wrong gradients."""
        if self.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
            check_leaf_blocks(self.model)
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with what the evaluation of the model has to know."""
        folder = Path(output_dir or self.args.output_dir)
        # Before the model, because with it everything in the folder may be pushed.
        if self.task_arguments is not None and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_task_arguments(self.task_arguments, folder)
        super().save_model(output_dir, _internal_call)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if self.store is None:
            return super()._clip_grad_norm(model)
        return clip_grad_norm_(model.parameters(), self.store, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None):
        if self.store is not None and grad_norm is None:
            return clip_grad_norm_(model.parameters(), self.store, float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.store is not None:
            save_model(self.model, str(Path(output_dir, REST)))
            # Waited for, because `Trainer` may then remove the checkpoint that unchanged records are linked to, and
            # because what has a `trainer_state.json` should be whole.
            self.store.checkpoint(Path(output_dir, EXPERTS), {"step": self.state.global_step}).result()

    def _checkpoint_published(self, folder: Path) -> None:
        if self.store is not None:
            self.store.checkpoint_moved(folder / EXPERTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.store is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.store is None:
            super()._load_best_model()
        else:
            self._restore(self.state.best_model_checkpoint)

    def _restore(self, checkpoint: str) -> None:
        for name in (EXPERTS, REST):
            if not Path(checkpoint, name).exists():
                raise FileNotFoundError(f"{checkpoint} has no {name}: it is not of a run with its experts in a store.")
        load_model(self.model, Path(checkpoint, REST))
        self.store.restore(Path(checkpoint, EXPERTS))
