"""LoRA and 4-bit weights that reach the experts of a mixture, which transformers keeps in fused parameters.

A fused parameter holds a matrix of all experts, `(experts, out, in)`, and is no module: tools that look for linear
layers pass it by without a word. What is here finds it from the model, for any mixture of transformers and for MoRE.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

# Registers the models: otherwise loading one of their checkpoints asks to run the code beside it.
from .. import modeling as _modeling  # noqa: F401

PARTS = ("experts", "feed-forward", "attention", "router", "embeddings", "head", "adapters", "other")


def fused_expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The fused weights of experts, `(experts, out, in)` or `(experts, in, out)`, by their names in the model."""
    return {
        f"{name}.{parameter_name}" if name else parameter_name: parameter
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def quantized_expert_names(model: nn.Module) -> list[str]:
    """The names of fused weights that [`quantize_experts`] has brought to 4 bits."""
    marks = (".parametrizations.", ".original")
    names = [name for name, _ in model.named_parameters() if marks[0] in name and name.endswith(marks[1])]
    return [name.replace(marks[0], ".").removesuffix(marks[1]) for name in names]


def expert_lora_config(
    model: PreTrainedModel,
    r: int = 16,
    lora_alpha: int = 32,
    target_modules: Sequence[str] | str | None = None,
    target_parameters: Sequence[str] | str | None = None,
    **options,
) -> LoraConfig:
    """
    The configuration of LoRA (Hu et al. 2021, arXiv:2106.09685) whose names all match something in the model.

    Args:
        model (`PreTrainedModel`): The model, before it has an adapter.
        r (`int`, *optional*, defaults to 16): Rank, per expert. Of a fused `gate_up_proj` the two halves share it.
        lora_alpha (`int`, *optional*, defaults to 32): Scale of the adapter, times `r`.
        target_modules (`Sequence[str]` or `str`, *optional*): Names of linear layers; if unset or `"all-linear"`,
            those of attention and feed-forward layers, shared experts among them. An empty list is none.
        target_parameters (`Sequence[str]` or `str`, *optional*): Names of fused weights, such as
            `experts.gate_up_proj`; if unset, all that are not in 4 bits. An empty list is none.
        options: Further fields of `LoraConfig`.

    Returns:
        `peft.LoraConfig`

    Raises:
        ValueError: If a name matches nothing, or what it matches cannot be trained.

    Example:

    ```python
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from mixturekit.trainers.expert_adapters import expert_lora_config

    >>> small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=64, intermediate_size=32, num_local_experts=4, **small))
    >>> sorted(expert_lora_config(model).target_parameters)
    ['experts.down_proj', 'experts.gate_up_proj']
    ```
    """
    fused = fused_expert_parameters(model)
    if target_modules is None or target_modules == "all-linear":
        modules = _layer_names(model, ("Attention", "MLP", "Mlp", "FeedForward"))
    else:
        modules = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        _check_modules(modules, model, fused)
    if target_parameters is None:
        parameters = _short_names(fused)
    else:
        parameters = [target_parameters] if isinstance(target_parameters, str) else list(target_parameters)
        _check_parameters(parameters, model, fused)
    if not modules and not parameters:
        raise ValueError(f"LoRA finds nothing to adapt in {type(model).__name__}: name modules or parameters.")
    if parameters and options.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout is {options['lora_dropout']}: adapters of fused expert weights take none, so set it to 0, "
            "or leave the experts out with target_parameters=[]."
        )
    if any(_matches(name, target) for name in _packed_modules(model) for target in modules):
        options.setdefault("exclude_modules", r".*\.parametrizations\..*")
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=modules,
        target_parameters=parameters,
        **{"task_type": "CAUSAL_LM", **options},
    )


def _layer_names(model: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """The names that linear layers have within modules whose class ends so."""
    return sorted(
        {
            name
            for module in model.modules()
            if type(module).__name__.endswith(endings)
            for name, layer in module.named_children()
            if _is_plain_linear(layer)
        }
    )


def _is_plain_linear(module: nn.Module) -> bool:
    if type(module) in (nn.Linear, Conv1D):
        return True
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


def _packed_modules(model: nn.Module) -> list[str]:
    """Modules that hold a weight in 4 bits; one may have the name of a linear layer elsewhere, such as `down_proj`."""
    return [name for name, _ in model.named_modules() if ".parametrizations." in name]


def _short_names(names: Iterable[str]) -> list[str]:
    """`experts.gate_up_proj` for the weight of each layer."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_modules(targets: list[str], model: nn.Module, fused: dict[str, nn.Parameter]) -> None:
    modules = dict(model.named_modules())
    for target in targets:
        matched = [module for name, module in modules.items() if _matches(name, target)]
        if not matched:
            experts = _short_names([*fused, *quantized_expert_names(model)])
            hint = f"; the experts are in {', '.join(experts)}, for target_parameters" if experts else ""
            known = ", ".join(_layer_names(model, ("Attention", "MLP", "Mlp", "FeedForward")))
            raise ValueError(
                f"target_modules has {target!r}, which {type(model).__name__} does not: it has {known}{hint}."
            )
        for module in matched:
            # PEFT would wrap it as a linear layer, and break on what a router returns.
            if isinstance(module, nn.Linear) and not _is_plain_linear(module):
                raise ValueError(
                    f"target_modules has {target!r}, but {type(module).__name__} does more than a linear layer: "
                    f"give '{target}.weight' to target_parameters instead."
                )


def _check_parameters(targets: list[str], model: nn.Module, fused: dict[str, nn.Parameter]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for target in targets:
        if any(_matches(name, target) for name in quantized_expert_names(model)):
            raise ValueError(
                f"target_parameters has {target!r}, which is in 4 bits, where LoRA cannot train it: load the model "
                "without load_in_4bit, or leave the experts out with target_parameters=[]."
            )
        if not any(_matches(name, target) for name in names):
            known = ", ".join(_short_names(fused)) or "no fused expert weights"
            raise ValueError(
                f"target_parameters has {target!r}, which {type(model).__name__} does not: it has {known}."
            )


@contextmanager
def merged_adapters(model: nn.Module, keep_on: str | torch.device = "cpu") -> Iterator[None]:
    """
    Merges the active LoRA adapters into the weights for a while, such as for generation, which is several times faster
    than with the adapters of experts beside them. Afterwards the weights are the same to the bit: they are put back,
    not computed back, since `(w + d) - d` is not `w` in floating point.

    The price is a copy of the adapted weights, on `keep_on`: the memory of the host, or the weights' own device where
    it has room. Layers whose adapter is off or merged already are left as they are, and so are quantised ones, where
    merging is not exact, and weights that are spread over processes.

    Args:
        model (`nn.Module`): A model with adapters, or without any.
        keep_on (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the copy waits.
    """
    originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    merged: list[LoraLayer] = []
    try:
        for layer in model.modules():
            if not isinstance(layer, LoraLayer) or not _can_merge(layer):
                continue
            for weight in _adapted_weights(layer):
                if id(weight) not in originals:
                    originals[id(weight)] = weight, weight.detach().to(keep_on, copy=True)
            merged.append(layer)
            with torch.no_grad():
                layer.merge()
        yield
    finally:
        for layer in merged:
            layer.merged_adapters.clear()
        for weight, original in originals.values():
            weight.data.copy_(original)


def _adapted_weights(layer: LoraLayer) -> list[nn.Parameter]:
    if isinstance(layer, ParamWrapper):
        return [layer.get_param()]
    return list(layer.get_base_layer().parameters(recurse=False))


def _can_merge(layer: LoraLayer) -> bool:
    if layer.merged or layer.disable_adapters or not set(layer.active_adapters) & set(layer.lora_A):
        return False
    # Weights of DeepSpeed's ZeRO-3, which numbers them, are whole now and empty later.
    return all(
        weight.is_floating_point() and not isinstance(weight, DTensor) and not hasattr(weight, "ds_id")
        for weight in _adapted_weights(layer)
    )


def load_causal_lm(
    name_or_path: str, dtype: str | torch.dtype = "auto", load_in_4bit: bool = False, **options
) -> PreTrainedModel:
    """
    Load a causal language model by the classes of transformers and of this library, never by code beside the weights.

    Args:
        name_or_path (`str`): A Hub id or a folder.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Type of the weights that are not in 4 bits.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Brings linear layers and experts to 4 bits (NF4 of
            Dettmers et al. 2023, arXiv:2305.14314), and keeps routers, embeddings, head and norms as they are.
        options: Further arguments of `from_pretrained`.

    Raises:
        ImportError: If 4 bits are asked for without bitsandbytes.
        ValueError: If the model cannot be loaded.
    """
    if load_in_4bit:
        if not is_bitsandbytes_available():
            raise ImportError("load_in_4bit needs bitsandbytes: pip install bitsandbytes.")
        compute_dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, torch.bfloat16)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_or_path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if load_in_4bit:
        quantize_experts(model)
        _keep_packing(model)
    return model


def quantize_experts(model: nn.Module, quant_type: str = "nf4") -> int:
    """
    Bring the fused weights of experts to 4 bits, one after the other, in place. bitsandbytes itself knows linear
    layers only, and leaves the largest part of a mixture as it is. Each use of a weight unpacks it for the time of one
    layer, and gradients flow through to what is before and after it.

    Args:
        model (`nn.Module`): The model, on the device where it stays.
        quant_type (`str`, *optional*, defaults to `"nf4"`): `"nf4"` or `"fp4"`.

    Returns:
        `int`: The bytes that this saves.

    Raises:
        ValueError: If the experts have an adapter, which 4-bit weights would lose.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ValueError("The experts have LoRA adapters, which cannot train on 4-bit weights: quantise without them.")
    before = sum(bytes_by_part(model).values())
    for name in fused_expert_parameters(model):
        owner, _, parameter_name = name.rpartition(".")
        replace_parameter_4bit(model.get_submodule(owner), parameter_name, quant_type=quant_type)
    return before - sum(bytes_by_part(model).values())


def _keep_packing(model: nn.Module) -> None:
    """
    Keeps 4-bit linear layers trainable on a CPU: in evaluation bitsandbytes packs their weights for instructions of
    that CPU, for good, and in training it then fails.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def bytes_by_part(model: nn.Module) -> dict[str, int]:
    """The bytes of weights and buffers in each of [`PARTS`] that the model has; shared weights count once."""
    parts = _parts(model)
    sizes: Counter[str] = Counter()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        pieces = name.split(".")
        prefixes = (".".join(pieces[:length]) for length in range(len(pieces) - 1, 0, -1))
        part = next((parts[prefix] for prefix in prefixes if prefix in parts), "other")
        part = "adapters" if any(piece.startswith("lora_") for piece in pieces) else part
        sizes[part] += tensor.numel() * tensor.element_size()
    for name, module in model.named_modules():
        for state in _quantization_states(module):
            prefixes = (name.rsplit(".", count)[0] for count in range(name.count(".") + 1))
            part = next((parts[prefix] for prefix in prefixes if prefix in parts), "other")
            sizes[part] += _state_bytes(state)
    return {part: sizes[part] for part in PARTS if sizes[part]}


def memory_report(model: nn.Module) -> str:
    """A line for people: the sizes of [`bytes_by_part`], and their sum."""
    sizes = bytes_by_part(model)
    shown = ", ".join(f"{part} {_readable(size)}" for part, size in sizes.items())
    return f"Weights {_readable(sum(sizes.values()))}: {shown}."


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def _parts(model: nn.Module) -> dict[str, str]:
    """The part that each module belongs to, by name; what is within a module belongs to the same one."""
    parts = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Router" in kind:
            parts[name] = "router"
        elif kind.endswith("Attention"):
            parts[name] = "attention"
        elif kind.endswith(("MLP", "Mlp", "FeedForward")):
            parts[name] = "feed-forward"
        elif module is model.get_input_embeddings():
            parts[name] = "embeddings"
        elif module is model.get_output_embeddings():
            parts[name] = "head"
    for name in (*fused_expert_parameters(model), *quantized_expert_names(model)):
        parts[name.rpartition(".")[0]] = "experts"
    return parts


def _quantization_states(module: nn.Module) -> list:
    """The scales that bitsandbytes keeps beside packed weights; they are neither parameters nor buffers."""
    if not is_bitsandbytes_available():
        return []
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    if isinstance(module, Linear4bit):
        return [module.weight.quant_state] if module.weight.quant_state is not None else []
    return [module.quant_state] if isinstance(module, Bnb4bitParametrization) else []


def _state_bytes(state) -> int:
    size = sum(tensor.numel() * tensor.element_size() for tensor in (state.absmax, state.code))
    return size + (_state_bytes(state.state2) if state.nested else 0)
