"""Mixtures of experts under DeepSpeed's ZeRO-3, with parameters and optimizer on a disk (ZeRO-Infinity).

What DeepSpeed 0.19.8 does wrong without a word, and is set right or refused here:
- Experts that no token was sent to are given gradients of earlier steps, and of nothing, with the optimizer on a disk,
  unless the block that they are in is a z3 leaf module, which is fetched and reduced as a whole.
- With the optimizer on a disk, a resumed run goes on with other moments, steps and master weights than were saved.
"""

from pathlib import Path

from accelerate.utils import DeepSpeedPlugin
from torch import nn
from transformers import TrainingArguments

from .disk_checks import extension_problems, folder_problems


def check_zero_offload(config: TrainingArguments, nvme_path: str | None) -> bool:
    """
    Makes sure, before any work, that DeepSpeed will do what its configuration says, and gives it the folder.

    Args:
        config (`TrainingArguments`): Those of the run.
        nvme_path (`str`, *optional*): Folder on the disk; `accelerate launch` loses the one of its configuration.

    Returns:
        Whether parameters or the optimizer are to be on a disk.

    Raises:
        ValueError: If something is missing that DeepSpeed needs for a disk, or the run is to be resumed with its
            optimizer there.
    """
    if config.deepspeed_plugin is None:
        return False
    places = _offloaded_parts(config.deepspeed_plugin)
    for place in places:
        place["nvme_path"] = nvme_path or place.get("nvme_path")
        # What accelerate makes of a folder that is not set.
        if place["nvme_path"] in (None, "none"):
            raise ValueError("DeepSpeed needs a folder on a disk: name it with --nvme_path.")
    if config.resume_from_checkpoint and _offloaded_parts(config.deepspeed_plugin, "offload_optimizer"):
        raise ValueError(
            "DeepSpeed does not restore an optimizer that it keeps on a disk: start anew from the weights with "
            "--model_name_or_path, or let `accelerate launch --offload_optimizer_device cpu` keep it in RAM."
        )
    if places:
        problems = [*folder_problems(Path(places[0]["nvme_path"])), *extension_problems()]
        if problems:
            raise ValueError("DeepSpeed cannot offload here: " + " ".join(problems))
    return bool(places)


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules with an `experts` inside, as transformers and remote code name them."""
    return [module for module in model.modules() if "experts" in dict(module.named_children())]


def prepare_for_zero3(model: nn.Module, plugin: DeepSpeedPlugin) -> None:
    """Makes the blocks of experts z3 leaf modules, and DeepSpeed's buffers large enough for them."""
    from deepspeed.utils import set_z3_leaf_modules

    blocks = expert_blocks(model)
    if blocks:
        set_z3_leaf_modules(model, list({type(block) for block in blocks}))
    for place in _offloaded_parts(plugin, "offload_param"):
        # A leaf is fetched as a whole while the next one is.
        place["buffer_count"] = max([5, *(2 * len(list(block.parameters())) for block in blocks)])
        place["buffer_size"] = max(parameter.numel() for parameter in model.parameters())


def check_leaf_blocks(model: nn.Module) -> None:
    """
    Refuses to train a mixture of experts under ZeRO-3 with wrong gradients.

    Raises:
        ValueError: If a block of experts is no leaf module.
    """
    from deepspeed.utils import z3_leaf_module

    for block in expert_blocks(model):
        if not z3_leaf_module(block):
            raise ValueError(
                f"Under ZeRO-3 the experts of {type(block).__name__} would be given stale gradients at steps in which "
                "no token is sent to them: call prepare_for_zero3(model, plugin), which makes it a leaf module."
            )


def _offloaded_parts(plugin: DeepSpeedPlugin, *parts: str) -> list[dict]:
    zero = plugin.deepspeed_config["zero_optimization"]
    places = [zero.get(part, {}) for part in parts or ("offload_param", "offload_optimizer")]
    return [place for place in places if place.get("device") == "nvme"]
