"""What keeps a run of days from losing more than the work since its last checkpoint."""

import errno
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import CONFIG_NAME

from .checkpoints import (
    UNFINISHED,
    check_checkpoint,
    newest_checkpoint,
    parameters_digest,
    publish_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
)

_STATE = "trainer_state.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DurableTraining:
    """
    To be put before a `transformers.Trainer` among the bases of a class.

    - A checkpoint is written aside, brought to the disk and then named, so that it is whole or not there. If it cannot
      be written, the earlier ones stay, and so they do if a weight is not finite.
    - A checkpoint that is damaged, or of another model, is not resumed from; the one before it is.
    - All weights of a checkpoint are loaded. `Trainer` itself goes by names, and misses the experts of mixtures that
      transformers saves one by one and holds fused.
    - A run that was killed between its last update and its end has nothing left to learn when it is resumed.
    - SIGTERM and SIGINT end the run after the update under way and a checkpoint, with the exit code 128 + signal; the
      second one ends it at once.
    - A loss or a gradient that is not finite ends the run with the number of the update.
    - The token of the Hub is in no file.
    """

    def __init__(self, *args, **kwargs):
        self._saves_aside = False
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = HubToken(self.args.hub_token)
        callback = StopOnSignal(self)
        self._signals = callback.listener
        self.add_callback(callback)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """
        As `Trainer.train`, from the newest checkpoint up to `resume_from_checkpoint` that is whole and of this model.

        Raises:
            ValueError: If there is none.
            SystemExit: After a signal.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no checkpoint to resume from.")
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except OSError as error:
            # Of a log or a picture: what a checkpoint raises says so itself, and has no number.
            if error.errno not in _FULL:
                raise
            where = f"the disk of {self.args.output_dir} is full ({error})"
            raise OSError(f"Training stopped as {where}; {self._kept()}.") from error
        finally:
            self._signals.restore()
        if self._signals.signal is not None:
            place = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self._signals.end_run(place, self.is_world_process_zero())
        return result

    def _run_epoch(self, *args, **kwargs) -> None:
        # `Trainer` counts after an update only: a run killed after its last checkpoint would make one too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if self._signals.agree(self.accelerator):
            # `Trainer` would load it, and with room for one checkpoint remove the one that this run goes on from.
            self.state.best_model_checkpoint = None
        result = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        return result

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As `Trainer.training_step`; raises `FloatingPointError` if the loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite(f"the loss of step {self.state.global_step + 1} is {loss}"))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # The scaler of float16 skips such steps and goes on.
        if norm is not None and not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):
            raise FloatingPointError(
                self._not_finite(f"the gradient of step {self.state.global_step + 1} has the norm {float(norm)}")
            )
        return norm

    def _not_finite(self, what: str) -> str:
        return f"Training stopped: {what}; {self._kept()}. A lower learning rate or a longer warm-up usually helps."

    def _kept(self) -> str:
        checkpoint = newest_checkpoint(self.args.output_dir)
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"

    def _whole_checkpoint(self, checkpoint: str | Path) -> str:
        problem = check_checkpoint(checkpoint, self._parameters())
        if problem is None:
            return str(checkpoint)
        earlier = newest_checkpoint(Path(checkpoint).parent, self._parameters(), up_to=checkpoint)
        if earlier is None:
            raise ValueError(f"{checkpoint} {problem}, and there is no earlier one to resume from.")
        return str(earlier)

    def _parameters(self) -> str:
        # Wrappers change the names. Under ZeRO-3 a parameter is empty and knows its shape.
        model = self.accelerator.unwrap_model(self.model)
        return parameters_digest(tuple(getattr(value, "ds_shape", value.shape)) for value in model.parameters())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled or not Path(resume_from_checkpoint, CONFIG_NAME).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not Path(best, CONFIG_NAME).is_file():
            super()._load_best_model()
        else:
            self._load_weights(best)

    def _load_weights(self, folder: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        loaded, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        if missing := report["missing_keys"]:
            raise ValueError(f"{folder} lacks {len(missing)} weights of this model, such as {min(missing)}.")
        model.load_state_dict(loaded.state_dict())

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self._saves_aside else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A push reads the folder for long after it has been renamed.
        if not self._saves_aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        self._check_weights()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run = Path(self._get_output_dir(trial))
        unfinished, final = run / UNFINISHED / name, run / name
        try:
            if self.args.should_save:
                # What an earlier process was writing when it was killed.
                shutil.rmtree(unfinished.parent, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._saves_aside = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saves_aside = False
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(unfinished):
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / _STATE))
                seal_checkpoint(unfinished, self._parameters())
                publish_checkpoint(unfinished, final)
                unfinished.parent.rmdir()
                self._checkpoint_published(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            # Before room is made.
            full = " as the disk is full" if _is_full(error, run) else ""
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            raise OSError(f"{final} could not be written{full} ({error}); {self._kept()}.") from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(final, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _checkpoint_published(self, folder: Path) -> None:
        """For those who need to know when a checkpoint has its name."""

    def _check_weights(self) -> None:
        # A step that overflowed shows in its weights before it shows in a loss: never let it become a checkpoint.
        # Under ZeRO-3 a parameter is empty, and each process has a share of it in `ds_tensor`.
        shares = {name: getattr(value, "ds_tensor", value) for name, value in self.model.named_parameters()}
        floating = {name: share for name, share in shares.items() if share.is_floating_point()}
        names = gather_object([name for name, share in floating.items() if not torch.isfinite(share).all()])
        if names:
            where = f"{names[0]} has values that are not finite after step {self.state.global_step}"
            raise FloatingPointError(self._not_finite(where))


class HubToken(str):
    """A token that is pickled as `None`: `Trainer` saves its arguments beside every model, and uploads them."""

    def __reduce__(self):
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> "HubToken":
        return self


class SignalListener:
    """Notes SIGTERM and SIGINT, the first of which ends nothing; the second one does what it always does."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def listen(self) -> None:
        """Begins, where Python allows it: in the main thread."""
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # A process that a shell has put into the background ignores SIGINT, and still should.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)

    def agree(self, accelerator: Accelerator) -> int | None:
        """The signal that any of the processes has noted; all of them have to ask."""
        if accelerator.num_processes > 1:
            numbers = torch.tensor([self.signal or 0], device=accelerator.device)
            self.signal = int(accelerator.gather(numbers).max()) or None
        return self.signal

    def end_run(self, checkpoint: Path, is_main_process: bool) -> NoReturn:
        """Says where the checkpoint is, and leaves with the exit code 128 + signal."""
        if is_main_process:
            name = signal.Signals(self.signal).name
            print(f"{name}: stopped at {checkpoint}; go on with --resume_from_checkpoint last", file=sys.stderr)
        raise SystemExit(128 + self.signal)

    def restore(self) -> None:
        """Listens no more."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame) -> None:
        self.signal = number
        self.restore()


class StopOnSignal(TrainerCallback):
    """
    Ends a training with a checkpoint after the update in which SIGTERM or SIGINT came.

    Args:
        trainer (`Trainer`): Of the training. With several processes a signal to any of them stops all.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.listener = SignalListener()

    def on_train_begin(self, args, state, control, **kwargs):
        """Listens."""
        self.listener.listen()

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint and the end."""
        if self.listener.agree(self.trainer.accelerator):
            control.should_save = control.should_training_stop = True
        return control


def _is_full(error: Exception, folder: Path) -> bool:
    # torch and safetensors tell it in their own words, or not at all.
    told = getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)
    return told or shutil.disk_usage(folder).free < 1 << 20
