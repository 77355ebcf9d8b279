"""Ordinary checkpoints of models whose experts are in a store, one layer at a time."""

import json
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import OffloadedWeightsLoader, offload_weight, save_offload_index
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .expert_store import ExpertStore


def expert_weights(model: PreTrainedModel, name: str, module: nn.Module) -> dict[str, Tensor]:
    """
    The fused weights of the experts `module`, called `name` in the model, wherever a `device_map` has put them; those
    of a new model on the meta device are drawn.
    """
    if next(module.parameters(recurse=False)).is_meta and not hasattr(model, "hf_device_map"):
        module.to_empty(device="cpu", recurse=False)
        model._initialize_weights(module)
    weights = dict(module.named_parameters(recurse=False))
    for part, weight in weights.items():
        if weight.device.type == "meta":
            weights[part] = load_offloaded_parameter(model, f"{name}.{part}")
    return {part: weight.detach() for part, weight in weights.items()}


def save_offloaded(model: PreTrainedModel, store: ExpertStore, names: list[str]) -> Callable[..., None]:
    """
    A `save_pretrained` that writes what transformers would write of the model with its experts in memory.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model without them.
        store ([`ExpertStore`]): Its experts.
        names (`list[str]`): The module of each layer of the store.

    Returns:
        `Callable`: With the arguments of `save_pretrained`. Each layer of experts is a shard of its own, and in memory
        while it is written.
    """
    save_rest = model.save_pretrained

    def save_pretrained(save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        if push_to_hub:
            raise ValueError("Experts in a store are saved first and then pushed: call push_to_hub on the model.")
        folder = Path(save_directory)
        # Of an earlier checkpoint, whose shards are about to go.
        (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
        save_rest(save_directory, **kwargs)
        shards = _shards(folder)
        original = kwargs.get("save_original_format", True)
        total = sum((folder / shard).stat().st_size for shard in shards)
        count = len(shards) + len(names)
        weight_map = {}
        for number, (shard, keys) in enumerate(shards.items()):
            target = f"model-{number + 1:05}-of-{count:05}.safetensors"
            (folder / shard).rename(folder / target)
            weight_map.update(dict.fromkeys(keys, target))
        for layer, name in enumerate(names):
            tensors = _fused(store, layer, name)
            if original:
                tensors = revert_weight_conversion(model, tensors)
            tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
            target = f"model-{len(shards) + layer + 1:05}-of-{count:05}.safetensors"
            save_file(tensors, folder / target, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, target))
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    return save_pretrained


def export_offload_folder(store: ExpertStore, names: list[str], folder: str | Path) -> None:
    """
    Writes experts as accelerate's disk offload has them: a file per fused weight, and an index.

    Args:
        store ([`ExpertStore`]): The experts.
        names (`list[str]`): The module of each layer of the store, such as `model.layers.0.mlp.experts`.
        folder (`str` or `Path`): Where to. An index that is there already is replaced.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    index: dict[str, dict] = {}
    for layer, name in enumerate(names):
        for key, weight in _fused(store, layer, name).items():
            offload_weight(weight, key, str(folder), index)
    save_offload_index(index, str(folder))


def import_offload_folder(store: ExpertStore, names: list[str], folder: str | Path) -> None:
    """
    Takes the experts of a store from a folder of accelerate's disk offload, one at a time.

    Args:
        store ([`ExpertStore`]), names (`list[str]`), folder (`str` or `Path`): As in [`export_offload_folder`].

    Raises:
        KeyError: If the folder lacks one of the weights.
    """
    loader = OffloadedWeightsLoader(save_folder=str(folder))
    for layer, name in enumerate(names):
        weights = {part: loader[f"{name}.{part}"] for part, _ in store.layout.parameters}
        for expert in range(store.num_experts):
            store.write_weights(layer, expert, {part: weight[expert] for part, weight in weights.items()})


def _fused(store: ExpertStore, layer: int, name: str) -> dict[str, Tensor]:
    """All experts of a layer as the model would hold them: `(experts, ...)` by their names in the model."""
    fused: dict[str, Tensor] = {}
    for expert in range(store.num_experts):
        for part, weight in store.read_weights(layer, expert).items():
            key = f"{name}.{part}"
            if key not in fused:
                fused[key] = weight.new_empty(store.num_experts, *weight.shape)
            fused[key][expert] = weight
    return fused


def _shards(folder: Path) -> dict[str, list[str]]:
    """The files of weights in a folder, each with the names in it."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = [SAFE_WEIGHTS_NAME]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    shards = {}
    for file in files:
        with safe_open(folder / file, "pt") as weights:
            shards[file] = list(weights.keys())
    return shards
