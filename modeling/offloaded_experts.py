"""Puts the fused experts of a transformers MoE model behind an [`ExpertStore`], without a change of the model's code.

The experts' own forward runs on the weights of the fast tier, with slots for expert ids. Where a batch needs more
experts than that tier holds, it runs in waves, and the backward pass brings the experts of each wave back.

Shapes: tokens = batch * seq, top_k = experts per token, rows = tokens * top_k, slots = of the fast tier.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import cached_file, extract_commit_hash

from .expert_files import MANIFEST, read_manifest
from .expert_store import ExpertStore, ExpertStoreConfig
from .expert_tiers import Hold
from .more_experts import MoreExperts, MoreRecurrentBlockExperts
from .offloaded_checkpoints import expert_weights, save_offloaded
from .routing_statistics import find_recorded


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """
    The modules that hold all experts of a layer, by their names in the model.

    Their parameters are `(num_experts, ...)`, at least one of them a matrix per expert.

    Raises:
        ValueError: If there are none, or their experts differ in number, size or type.
    """
    found = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        number = getattr(module, "num_experts", None)
        if any(part.ndim == 3 and len(part) == number for part in parameters.values()):
            if any(len(part) != number for part in parameters.values()):
                raise ValueError(f"{name} has parameters that are not per expert, and cannot be offloaded.")
            found[name] = module
    if not found:
        raise ValueError(f"{type(model).__name__} has no fused experts to offload.")
    kinds = {
        (
            module.num_experts,
            *((name, part.shape, part.dtype) for name, part in module.named_parameters(recurse=False)),
        )
        for module in found.values()
    }
    if len(kinds) > 1 or len({part.dtype for part in module.parameters(recurse=False)}) > 1:
        raise ValueError(f"The experts of {type(model).__name__} differ in number, size or type between its layers.")
    return found


def offload_experts(
    model: PreTrainedModel, config: ExpertStoreConfig, device: str | torch.device | None = None
) -> ExpertStore:
    """
    Moves the experts of a model to a store, from which its forward and backward passes fetch them.

    The model has no parameters for experts any more. Their gradients are in the store, until `model.zero_grad()`, and
    [`LazyAdamW`] updates them. `save_pretrained` writes the ordinary checkpoint, one layer at a time, and
    `num_parameters` counts them still.

    Args:
        model ([`~transformers.PreTrainedModel`]): With fused experts `(experts, out, in)`: any mixture of
            transformers that has them, or MoRE. Its weights may be on disk by a `device_map`.
        config ([`ExpertStoreConfig`]): Folder and capacities. If the folder has a checkpoint, its experts replace
            those of the model.
        device (`str` or `torch.device`, *optional*): Of the fast tier; that of the model if unset.

    Returns:
        [`ExpertStore`]: To be kept open as long as the model is used.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from mixturekit.modeling.expert_store import ExpertStoreConfig
    >>> from mixturekit.modeling.offloaded_experts import offload_experts

    >>> small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=64, intermediate_size=32, num_local_experts=16, **small))
    >>> store = offload_experts(model, ExpertStoreConfig(tempfile.mkdtemp(), fast_capacity=4, ram_capacity=4))
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4).shape
    torch.Size([1, 7])
    >>> store.close()
    ```
    """
    experts = find_experts(model)
    first = next(iter(experts.values()))
    parts = dict(first.named_parameters(recurse=False))
    store = ExpertStore(
        config,
        {name: tuple(part.shape[1:]) for name, part in parts.items()},
        len(experts),
        first.num_experts,
        next(iter(parts.values())).dtype,
        torch.device(device) if device is not None else _device(model),
        f"{type(model).__name__} ({model.config.model_type})",
    )
    try:
        filled = bool(store.files.infos)
        routers = _next_routers(model, experts) if config.prefetch_next_layer else [None] * len(experts)
        for layer, (name, module) in enumerate(experts.items()):
            if not filled:
                weights = expert_weights(model, name, module)
                for expert in range(store.num_experts):
                    store.write_weights(layer, expert, {part: weights[part][expert] for part in weights})
            # Of a `device_map`; it would take the forward along when it goes later.
            remove_hook_from_module(module)
            for part in parts:
                delattr(module, part)
            # Nothing is left in it to be drawn.
            module._is_hf_initialized = True
            module.forward = OffloadedExperts(module, store, layer, routers[layer])
        if not filled:
            store.checkpoint()
    except BaseException:
        store.close()
        raise
    model.save_pretrained = save_offloaded(model, store, list(experts))
    model.zero_grad = partial(_zero_grad, model.zero_grad, store)
    model.num_parameters = partial(_num_parameters, model.num_parameters, store)
    return store


def initialize_offloaded(
    model_config: PreTrainedConfig,
    config: ExpertStoreConfig,
    model_class: type = AutoModelForCausalLM,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, ExpertStore]:
    """
    A new model whose experts need not fit in memory: they are drawn one layer at a time, and go to the store.

    Args:
        model_config ([`~transformers.PreTrainedConfig`]): Of the model.
        config ([`ExpertStoreConfig`]), model_class (`type`), device (`str` or `torch.device`): As in
            [`load_offloaded`].

    Returns:
        `tuple[PreTrainedModel, ExpertStore]`: In training mode, as a new model is.
    """
    with torch.device("meta"):
        model = model_class.from_config(model_config)
    store = offload_experts(model, config, device)
    model.to_empty(device=device)
    model.init_weights()
    return model, store


def load_offloaded(
    name_or_path: str | Path,
    config: ExpertStoreConfig,
    /,
    model_class: type = AutoModelForCausalLM,
    device: str | torch.device = "cpu",
    **kwargs,
) -> tuple[PreTrainedModel, ExpertStore]:
    """
    Loads a checkpoint whose experts need not fit in memory: they go to the store, one layer at a time.

    Args:
        name_or_path (`str` or `Path`): A Hub id or a folder with an ordinary checkpoint.
        config ([`ExpertStoreConfig`]): As in [`offload_experts`]. While the folder is filled for the first time, a
            second copy of the experts may be needed beside it.
        model_class (`type`, *optional*, defaults to `AutoModelForCausalLM`): The Auto class that loads the model; it
            also builds it without weights, which classes of models do not offer.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Of the rest, and of the fast tier.
        kwargs: Further arguments of `from_pretrained`, among them a `config` for the model.

    Returns:
        `tuple[PreTrainedModel, ExpertStore]`: In evaluation mode, as from `from_pretrained`.

    Raises:
        ValueError: If the folder was filled from another checkpoint, or from one that has changed since.
    """
    place = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    source = _source(name_or_path, place)
    filled = Path(config.nvme_path, MANIFEST).exists()
    if filled and read_manifest(Path(config.nvme_path)).get("source") != source:
        raise ValueError(f"{config.nvme_path} was not filled from {source[0]} as it is now: use another folder.")
    trust = {"trust_remote_code": kwargs.get("trust_remote_code")}
    with torch.device("meta"):
        model_config = kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **place, **trust)
        skeleton = model_class.from_config(model_config, **trust)
    Path(config.nvme_path).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=config.nvme_path, prefix="loading-") as folder:
        # A name, because accelerate hands it to safetensors, which takes no `torch.device`.
        places = _device_map(skeleton, set(find_experts(skeleton)), str(device))
        model = model_class.from_pretrained(name_or_path, device_map=places, offload_folder=folder, **kwargs)
        store = offload_experts(model, config)
    if not filled:
        store.files.source = source
        store.checkpoint()
    remove_hook_from_module(model, recurse=True)
    del model.hf_device_map
    return model, store


def offloaded_parameters(model: nn.Module) -> int:
    """How many parameters of a model are in a store, where `model.parameters()` does not find them."""
    stores = {module.forward.store for module in model.modules() if isinstance(module.forward, OffloadedExperts)}
    return sum(map(_parameters_in, stores))


class OffloadedExperts:
    """
    The forward of one layer's experts, on the fast tier of a store.

    Args:
        module (`nn.Module`): The experts, without their parameters.
        store ([`ExpertStore`]): Where those are.
        layer (`int`): Number of the layer in the store.
        next_router (`nn.Module`, *optional*): The router of the next layer. If given, what it would choose for the
            tokens of this layer is asked for ahead of time when no gradients are computed.
    """

    def __init__(self, module: nn.Module, store: ExpertStore, layer: int, next_router: nn.Module | None = None):
        self.module, self.store, self.layer, self.next_router = module, store, layer, next_router
        self.forward = module.forward
        # Autograd runs the backward of what has an input with gradients, which the experts' inputs may not have.
        self.anchor = torch.empty(0, device=store.device, requires_grad=True)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args, **kwargs) -> Any:
        """As the module's own forward: `(tokens, hidden)`, and indices and weights `(tokens, top_k)`."""
        experts = top_k_index.unique().tolist()
        waves = self._plan(experts)
        attends = isinstance(self.module, MoreRecurrentBlockExperts)
        if attends and not self._fits(experts):
            raise ValueError(
                f"A batch needs {len(experts)} experts of layer {self.layer} at once, because more_a experts attend "
                f"to all of their tokens, but the fast tier has room for {self.store.room(self.layer, experts)}: "
                "raise fast_capacity, or pass fewer tokens."
            )
        if len(waves) == 1 or attends:
            output = self._at_once(experts, hidden_states, top_k_index, top_k_weights, *args, **kwargs)
        else:
            output = self._in_waves(waves, hidden_states, top_k_index, top_k_weights, *args, **kwargs)
        if self.next_router is not None and not torch.is_grad_enabled() and not self.next_router.training:
            # Not called, because hooks would take it for a decision.
            self.store.prefetch(self.layer + 1, self.next_router.forward(hidden_states)[2].unique().tolist())
        return output

    def _fits(self, experts: list[int]) -> bool:
        return len(experts) <= self.store.room(self.layer, experts)

    def _plan(self, experts: list[int]) -> list[list[int]]:
        """The experts of each wave. Two waves have room at a time: one computes, and one arrives."""
        room = self.store.room(self.layer, experts)
        half = max(1, self.store.config.fast_capacity // 2)
        if torch.is_grad_enabled():
            # The same however often it is asked, because gradient checkpointing runs this twice. Layers that share
            # their slots leave each other some.
            fits = len(experts) <= room - (half if self.store.config.shared_pool else 0)
            parts, size = [experts], len(experts) if fits else max(1, min(half, room))
        else:
            # Those in the fast tier first: they compute while the others arrive.
            present = self.store.resident(self.layer).intersection(experts)
            parts = [[expert for expert in experts if (expert in present) is there] for there in (True, False)]
            size = len(experts) if len(experts) <= room else max(1, room // 2)
        return [part[start : start + size] for part in parts for start in range(0, len(part), size)]

    def _at_once(self, experts, hidden_states, top_k_index, top_k_weights, *args, **kwargs) -> Any:
        hold = self.store.hold(self.layer, experts)
        slots = hold.wait()
        weights = self.store.weights(self.layer)
        if torch.is_grad_enabled():
            weights, slots = self.store.side_by_side(self.layer, slots)
            held = _HeldWeights.apply(self.anchor, self, hold, experts, slots, weights)
            weights = dict(zip(weights, held, strict=True))
        index = self._slots_of(experts, slots, top_k_index)
        with self._placed(weights), self._cached_routes(experts, slots, *args):
            output = self.forward(hidden_states, index, top_k_weights, *args, **kwargs)
        if not torch.is_grad_enabled():
            hold.release()
        return output

    def _in_waves(self, waves, hidden_states, top_k_index, top_k_weights, *args, **kwargs) -> Any:
        tokens, top_k = top_k_index.shape
        flat = top_k_index.flatten()

        def compute(weights: dict[str, Tensor], rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
            # Mixed below, all waves in one sum, as transformers' grouped implementation does.
            with self._placed(weights):
                output = self.forward(rows, slots[:, None], rows.new_ones(len(rows), 1), *args, **kwargs)
            return output if isinstance(output, tuple) else (output, None)

        outputs, places, steps = [], [], []
        for experts, hold in self._holds(waves):
            place = torch.isin(flat, torch.tensor(experts, device=flat.device)).nonzero().squeeze(1)
            rows, index = hidden_states[place // top_k], flat[place]
            if torch.is_grad_enabled():
                output, taken = _Wave.apply(self.anchor, rows, index, self, experts, hold, compute)
            else:
                slots = self._slots_of(experts, hold.wait(), index)
                output, taken = compute(self.store.weights(self.layer), rows, slots)
            outputs.append(output)
            places.append(place)
            steps.append(taken)
        order = torch.cat(places).argsort()
        mixed = torch.cat(outputs)[order].view(tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
        mixed = mixed.sum(dim=1).to(hidden_states.dtype)
        if not isinstance(self.module, MoreExperts):
            return mixed
        return mixed, None if steps[0] is None else torch.cat(steps)[order].view(tokens, top_k)

    def _holds(self, waves: list[list[int]]) -> Iterator[tuple[list[int], Hold]]:
        """Each wave with a hold on it; the next one is on its way already where there is room."""
        hold = None
        for number, experts in enumerate(waves):
            hold = hold or self.store.hold(self.layer, experts)
            following = waves[number + 1] if number + 1 < len(waves) else []
            next_hold = self.store.hold(self.layer, following) if following and self._fits(following) else None
            yield experts, hold
            hold.release()
            hold = next_hold

    def _slots_of(self, experts: list[int], slots: list[int], index: Tensor) -> Tensor:
        table = torch.zeros(self.store.num_experts, dtype=index.dtype)
        table[experts] = torch.tensor(slots, dtype=index.dtype)
        return table.to(index.device)[index]

    @contextmanager
    def _placed(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Gives the module weights `(slots, ...)` for the time of a call."""
        module, number = self.module, self.module.num_experts
        module.__dict__.update(weights)
        module.num_experts = len(next(iter(weights.values())))
        try:
            yield
        finally:
            module.num_experts = number
            for name in weights:
                del module.__dict__[name]

    @contextmanager
    def _cached_routes(self, experts: list[int], slots: list[int], context: Any = None) -> Iterator[None]:
        """Tells more_a experts the routes of earlier tokens, which they cache, in slots for the time of a call."""
        cache = context.past_key_values if isinstance(self.module, MoreRecurrentBlockExperts) else None
        if cache is None:
            yield
            return
        number = self.module.config.num_hidden_layers + self.module.layer_idx
        capacity = self.store.config.fast_capacity
        # Experts that are not there get numbers that no slot has.
        table = torch.arange(self.store.num_experts) + capacity
        table[experts] = torch.tensor(slots)
        inverse = torch.zeros(capacity + self.store.num_experts, dtype=torch.long)
        inverse[table] = torch.arange(self.store.num_experts)
        self._rename_cached(cache, number, table)
        yield
        self._rename_cached(cache, number, inverse)

    @staticmethod
    def _rename_cached(cache: Cache, number: int, table: Tensor) -> None:
        if len(cache.layers) > number and cache.layers[number].get_seq_length() > 0:
            routes = cache.layers[number].keys
            cache.layers[number].keys = table.to(routes.device)[routes]

    def _take_gradients(self, experts: list[int], slots: list[int], names: list[str], gradients: tuple) -> None:
        if self.store.config.training:
            for expert, slot in zip(experts, slots, strict=True):
                parts = {name: part[slot] for name, part in zip(names, gradients, strict=True)}
                if len(gradients[0]) > len(experts):
                    # The gradients of the slots that this batch does not use need not stay.
                    parts = {name: part.clone() for name, part in parts.items()}
                self.store.add_gradient(self.layer, expert, parts)


class _HeldWeights(torch.autograd.Function):
    """The weights of a fast tier, whose gradients go to the store; held until the backward pass, or as long as it."""

    @staticmethod
    def forward(ctx, anchor, owner, hold, experts, slots, weights):
        ctx.owner, ctx.hold, ctx.experts, ctx.slots, ctx.names = owner, hold, experts, slots, list(weights)
        return tuple(part.detach() for part in weights.values())

    @staticmethod
    def backward(ctx, *gradients):
        if ctx.hold.released:
            raise RuntimeError("The experts of this graph have left the fast tier: it has one backward pass only.")
        ctx.owner._take_gradients(ctx.experts, ctx.slots, ctx.names, gradients)
        ctx.hold.release()
        return None, None, None, None, None, None


class _Wave(torch.autograd.Function):
    """Some experts on their rows; the backward pass fetches them again, and computes again."""

    @staticmethod
    def forward(ctx, anchor, rows, index, owner, experts, hold, compute):
        ctx.owner, ctx.experts, ctx.compute = owner, experts, compute
        device = rows.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
        ctx.save_for_backward(rows, index)
        slots = owner._slots_of(experts, hold.wait(), index)
        # Recurrent experts compute differently where gradients are wanted.
        with torch.enable_grad():
            output, steps = compute(owner.store.weights(owner.layer), rows.detach().requires_grad_(), slots)
        if steps is not None:
            ctx.mark_non_differentiable(steps)
        return output.detach(), steps

    @staticmethod
    def backward(ctx, gradient, _):
        rows, index = ctx.saved_tensors
        owner, store = ctx.owner, ctx.owner.store
        with store.held(owner.layer, ctx.experts, counted=False) as slots:
            rows = rows.detach().requires_grad_()
            weights, slots = store.side_by_side(owner.layer, slots)
            weights = {name: part.detach().requires_grad_() for name, part in weights.items()}
            with torch.enable_grad(), torch.autocast(rows.device.type, **ctx.autocast):
                output, _ = ctx.compute(weights, rows, owner._slots_of(ctx.experts, slots, index))
            wanted = [rows, *weights.values()] if store.config.training else [rows]
            grad_rows, *parts = torch.autograd.grad(output, wanted, gradient, materialize_grads=True)
            owner._take_gradients(ctx.experts, slots, list(weights), parts)
        return None, grad_rows, None, None, None, None, None


def _next_routers(model: PreTrainedModel, experts: dict[str, nn.Module]) -> list[nn.Module | None]:
    """The router of the layer after each one's."""
    routers = {name.rpartition(".")[0]: module for name, (module, _) in find_recorded(model, "router_logits").items()}
    own = [routers.get(name.rpartition(".")[0]) for name in experts]
    return [*own[1:], None]


def _device_map(module: nn.Module, experts: set[str], device: str | torch.device, prefix: str = "") -> dict:
    """Experts to the disk and all else to the device, without a place for any module that has both."""
    places = {f"{prefix}{name}": device for name, _ in module.named_parameters(recurse=False)}
    places.update({f"{prefix}{name}": device for name, _ in module.named_buffers(recurse=False)})
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in experts:
            places[path] = "disk"
        elif any(expert.startswith(f"{path}.") for expert in experts):
            places.update(_device_map(child, experts, device, f"{path}."))
        else:
            places[path] = device
    return places


def _zero_grad(zero_rest: Callable[[bool], None], store: ExpertStore, set_to_none: bool = True) -> None:
    zero_rest(set_to_none)
    store.clear_gradients()


def _num_parameters(count_rest: Callable[..., int], store: ExpertStore, only_trainable: bool = False, **kwargs) -> int:
    frozen = only_trainable and not store.config.training
    return count_rest(only_trainable, **kwargs) + (0 if frozen else _parameters_in(store))


def _parameters_in(store: ExpertStore) -> int:
    return store.num_layers * store.num_experts * sum(prod(shape) for _, shape in store.layout.parameters)


def _source(name_or_path: str | Path, place: dict[str, Any]) -> list:
    """A checkpoint, and what tells it from an earlier one there: when it was written, or its commit on the Hub."""
    files = sorted(Path(name_or_path).glob("*.safetensors"))
    if files:
        return [str(Path(name_or_path).resolve()), max(file.stat().st_mtime_ns for file in files)]
    return [str(name_or_path), extract_commit_hash(cached_file(name_or_path, "config.json", **place), None)]


def _device(model: PreTrainedModel) -> torch.device:
    return next((part.device for part in model.parameters() if part.device.type != "meta"), torch.device("cpu"))
