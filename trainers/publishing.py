"""What a run leaves in its folder for the Hub: the record, pictures and card, and code beside the weights."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .card_figures import FOLDER, draw_curve
from .shared_card import draw_routing
from .task_data import TASK_FILE
from .training_record import save_training_record

CARD = "README.md"

logger = logging.getLogger(__name__)


def write_card(trainer: Trainer, record: dict, curves: dict[str, str], make_card: Callable[..., ModelCard]) -> None:
    """
    Saves the record of a run, its pictures and its card to `output_dir`.

    Args:
        trainer (`Trainer`): Of the run.
        record (`dict`): By [`training_record`].
        curves (`dict[str, str]`): What is drawn of the log, and what it is called.
        make_card (`Callable`): Takes the folder and the name of the repository.
    """
    # Only trainers that push have it.
    upload = vars(trainer).get("push_in_progress")
    if upload is not None and not upload.is_done():
        # It reads what would be written here; the next push writes it anew.
        return
    folder = Path(trainer.args.output_dir)
    save_training_record(record, folder)
    draw_curve(trainer.state.log_history, curves, folder / FOLDER / "training.png")
    draw_routing(record, folder)
    repository = trainer.hub_model_id or trainer.args.hub_model_id or str(folder)
    try:
        make_card(folder=folder, repository=repository).save(folder / CARD)
    except ValueError as error:
        # A perplexity that is not finite yet is no reason to end a training.
        logger.warning("The card of %s could not be written: %s", folder, error)


class PublishingCallback(TrainerCallback):
    """
    Completes what `Trainer` pushes during training. It copies configuration and weights of the newest checkpoint to
    `output_dir` and uploads that; without the model's code, the critic, what an evaluation has to know and a card
    beside them, nobody could use it.

    Args:
        trainer (`Trainer`): Whose `create_model_card` writes the card.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_push_begin(self, args, state, control, **kwargs) -> None:
        """Copies and writes what is missing."""
        if not self.trainer.is_world_process_zero():
            return
        # An upload that goes on reads these files, and would get some of this revision and some of the next.
        self.trainer._finish_current_push()
        checkpoint = get_last_checkpoint(args.output_dir)
        if checkpoint is not None:
            for pattern in ("*.py", "value_head.safetensors", TASK_FILE):
                for path in Path(checkpoint).glob(pattern):
                    shutil.copyfile(path, Path(args.output_dir, path.name))
        self.trainer.create_model_card()
