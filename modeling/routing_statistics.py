"""What routers do: the statistics of their decisions, and hooks that read them from any transformers MoE model.

Shapes:
    tokens   batch * seq, in the order in which the router sees them
    experts  the routed experts of one layer
    top_k    the experts that one token uses

`mask` is always (tokens,), true for real tokens and false for padding; without one, every token counts.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SCORES = ("softmax", "sigmoid", "probabilities")


class Routing(NamedTuple):
    """
    One call of one router.

    Args:
        logits (`torch.Tensor` of shape `(tokens, experts)`): What the router computed for every expert.
        weights (`torch.Tensor` of shape `(tokens, top_k)`): The weights that mix the outputs of the chosen experts.
        indices (`torch.LongTensor` of shape `(tokens, top_k)`): The chosen experts.
        mask (`torch.BoolTensor` of shape `(tokens,)`, *optional*): True for real tokens.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor
    mask: Tensor | None


def expert_counts(indices: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many of the assignments in `indices` (tokens, top_k) each expert received, as int64 (experts,)."""
    if mask is None:
        ones = torch.ones_like(indices, dtype=torch.int64)
    else:
        ones = mask.to(torch.int64)[:, None].expand_as(indices)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=indices.device)
    # bincount and indices[mask] would both wait for the accelerator; integers add up to the same in any order.
    return counts.scatter_add_(0, indices.reshape(-1).long(), ones.reshape(-1))


def expert_load(counts: Tensor) -> Tensor:
    """The fraction of all assignments that each expert received; `counts` as from [`expert_counts`]."""
    return counts / counts.sum().clamp(min=1)


def load_balance_cv(counts: Tensor) -> Tensor:
    """
    The coefficient of variation of the expert loads: standard deviation over mean.

    The standard deviation is that of a population, because the experts of a layer are all there are: 0 is a perfect
    balance, and `sqrt(experts - 1)` is one expert that takes everything. It is 0 when there is no token.
    """
    load = expert_load(counts)
    return load.std(correction=0) * len(load)


def dead_experts(counts: Tensor) -> Tensor:
    """How many experts received no token."""
    return (counts == 0).sum()


def router_probabilities(logits: Tensor, scores: str = "softmax") -> Tensor:
    """
    A probability per expert, in float32.

    Args:
        logits (`torch.Tensor` of shape `(tokens, experts)`): The router's logits.
        scores (`str`, defaults to `"softmax"`): `"softmax"` over the experts; `"sigmoid"` for routers that score each
            expert on its own (DeepSeek-V3 and its kin), whose scores are divided by their sum; `"probabilities"` for
            routers that record probabilities as their logits (Gemma 4).
    """
    if scores == "softmax":
        return logits.float().softmax(dim=-1)
    if scores == "sigmoid":
        # log-sigmoid and softmax are the sigmoids over their sum, without 0 / 0 where every sigmoid underflows.
        return nn.functional.logsigmoid(logits.float()).softmax(dim=-1)
    if scores == "probabilities":
        return logits.float()
    raise ValueError(f"scores must be one of {', '.join(SCORES)}, not {scores!r}.")


def token_entropies(logits: Tensor, scores: str = "softmax") -> Tensor:
    """The entropy in nats of each token's [`router_probabilities`], of shape `(tokens,)`."""
    return torch.special.entr(router_probabilities(logits, scores)).sum(dim=-1)


def router_entropy(logits: Tensor, mask: Tensor | None = None, scores: str = "softmax") -> Tensor:
    """
    The router's entropy in nats, averaged over the real tokens.

    0 means that every token is sure of one expert, `ln(experts)` that the router does not tell experts apart.
    """
    return masked_mean(token_entropies(logits, scores), mask)


def mean_recurrence_steps(steps: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of `steps` (tokens, top_k), the recurrences that experts ran, over real tokens and their slots."""
    return masked_mean(steps.float().mean(dim=-1), mask)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of `values` (tokens,) over the real tokens; 0 when there is none."""
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    # where, not a product: padding may hold nan.
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


@torch.compiler.disable  # reads values; once per run, so a break in the graph costs nothing
def infer_scores(routing: Routing, num_tokens: int = 256) -> str:
    """
    Which of the `scores` of [`router_probabilities`] a router uses, told from the weights that it gave.

    A router's weights are its scores at the chosen experts, up to a factor per token (renormalisation) or one factor
    for all (top-1, scaling). Softmax and sigmoid are told apart by that; where the weights fit neither, or are all one
    as with renormalised top-1, the answer is `"softmax"`. Waits for the accelerator: call it once, not at every step.
    """
    logits, weights, indices = (part[:num_tokens].float() for part in routing[:3])
    if (logits >= 0).all() and torch.allclose(logits.sum(dim=-1), torch.ones_like(logits[:, 0]), atol=1e-2):
        return "probabilities"

    def misfit(scores: Tensor) -> float:
        ratio = weights / scores.gather(-1, indices.long()).clamp(min=1e-12)
        centre = ratio.mean(dim=-1, keepdim=True) if ratio.shape[-1] > 1 else ratio.mean()
        return ((ratio - centre).abs() / centre).mean().item()

    # Rounding to bfloat16 leaves a misfit of about 0.002.
    fits_sigmoid = misfit(logits.sigmoid()) < min(0.01, misfit(logits.softmax(dim=-1)))
    return "sigmoid" if fits_sigmoid and weights.min() < weights.max() else "softmax"


def find_recorded(model: nn.Module, key: str) -> dict[str, tuple[nn.Module, int]]:
    """
    The modules whose outputs a transformers model declares under `key` in its `_can_record_outputs`.

    Follows the rules of `transformers.utils.output_capturing`: a declaration is a class, the end of a module's name,
    an `OutputRecorder`, or a list of those, and holds within the submodel that declares it.

    Returns:
        `dict[str, tuple[nn.Module, int]]`: For each module's name, in the order of the model, the module and the
        position of `key` in its output.
    """
    found = {}
    for owner_name, owner in model.named_modules():
        # Wrappers (DDP, PEFT) and plain layers declare nothing.
        declared = getattr(owner, "_can_record_outputs", None) or {}
        specs = declared.get(key, [])
        for spec in specs if isinstance(specs, list) else [specs]:
            for name, module in owner.named_modules(prefix=owner_name):
                if _declares(spec, name, module):
                    found[name] = (module, 1 if isinstance(spec, type | str) else spec.index)
    # JetMoe declares both an attention and the router inside it: the innermost one decides.
    return {name: entry for name, entry in found.items() if not any(n.startswith(f"{name}.") for n in found)}


def _declares(spec: Any, name: str, module: nn.Module) -> bool:
    if isinstance(spec, type):
        return isinstance(module, spec)
    if isinstance(spec, str):
        return name.endswith(spec)
    matches = (spec.target_class is not None and isinstance(module, spec.target_class)) or (
        spec.class_name is not None and name.endswith(spec.class_name)
    )
    return matches and (spec.layer_name is None or f".{spec.layer_name.strip('.')}." in f".{name}.")


def layer_numbers(names: list[str]) -> list[int]:
    """The layer of each module: the first number in its name, or its position where two modules share that number."""
    numbers = [next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in names]
    return numbers if max(Counter(numbers).values(), default=1) == 1 else list(range(len(names)))


class RoutingRecorder:
    """
    Reads every router of a transformers MoE model while the model runs, with forward hooks.

    Routers are what the model declares as `router_logits` in `_can_record_outputs`, recurrent experts what it
    declares as `recurrence_steps`. A router that returns `(logits, weights, indices)` is read as it is; for one that
    returns its logits only, the top `num_experts_per_tok` of their softmax stand in. Only calls from within the
    forward of the model that owns the router count, so what gradient checkpointing computes again in the backward
    pass does not.

    Padding is what the `attention_mask` (batch, seq) of that forward marks; with another kind of mask, or none, every
    token is real.

    Args:
        model (`nn.Module`): A transformers model, bare or wrapped (DDP, FSDP, PEFT).
        on_routing (`Callable[[int, Routing], None]`): Receives the layer and the decision of its router.
        on_steps (`Callable[[int, Tensor, Tensor | None], None]`, *optional*): Receives the layer, the recurrence
            steps of shape `(tokens, top_k)` and the mask.
        training_only (`bool`, defaults to `False`): Skip forwards in evaluation mode or without gradients.

    Example:

    ```python
    with RoutingRecorder(model, on_routing=lambda layer, routing: print(layer, routing.indices)):
        model(**inputs)
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        on_routing: Callable[[int, Routing], None],
        on_steps: Callable[[int, Tensor, Tensor | None], None] | None = None,
        training_only: bool = False,
    ):
        self.model = model
        self.on_routing = on_routing
        self.on_steps = on_steps
        self.training_only = training_only
        self.routers = find_recorded(model, "router_logits")
        self.recurrent_experts = find_recorded(model, "recurrence_steps") if on_steps is not None else {}
        if not self.routers:
            raise ValueError(
                f"{type(model).__name__} has no router: it is not a mixture of experts, or does not declare "
                "`router_logits` in `_can_record_outputs`."
            )
        self._handles: list[RemovableHandle] = []
        # The mask of each submodel whose forward is running; a submodel that is not in it is not being recorded.
        self._running: dict[str, Tensor | None] = {}

    def __enter__(self) -> "RoutingRecorder":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def attach(self) -> None:
        """Register the hooks, once."""
        self.remove()
        modules = dict(self.model.named_modules())
        declaring = [name for name, module in modules.items() if getattr(module, "_can_record_outputs", None)]
        owners = set()
        for recorded, make_hook in (
            (self.routers, self._make_router_hook),
            (self.recurrent_experts, self._make_steps_hook),
        ):
            layers = layer_numbers(list(recorded))
            for layer, (name, (module, index)) in zip(layers, recorded.items(), strict=True):
                owner = max((o for o in declaring if o == "" or name.startswith(f"{o}.")), key=len)
                owners.add(owner)
                # First in line, because expert parallelism rewrites the indices in a hook of its own.
                hook = make_hook(layer, index, owner, modules[owner])
                self._handles.append(module.register_forward_hook(hook, prepend=True))
        for owner in owners:
            self._watch_owner(owner, modules[owner])

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def _watch_owner(self, name: str, owner: nn.Module) -> None:
        parameters = list(inspect.signature(owner.forward).parameters)
        position = parameters.index("attention_mask") if "attention_mask" in parameters else len(parameters)

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # Asked here and not in the router: reentrant checkpointing runs the layers without gradients.
            if self.training_only and not (module.training and torch.is_grad_enabled()):
                return
            mask = args[position] if position < len(args) else kwargs.get("attention_mask")
            self._running[name] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            self._running.pop(name, None)

        self._handles.append(owner.register_forward_pre_hook(enter, with_kwargs=True))
        # Also after a forward that raised, whose mask no later one may meet.
        self._handles.append(owner.register_forward_hook(leave, always_call=True))

    def _make_router_hook(self, layer: int, index: int, owner_name: str, owner: nn.Module) -> Callable:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if owner_name in self._running:
                logits, weights, indices = _read_router(output, index, owner)
                mask = _flat_mask(self._running[owner_name], logits)
                self.on_routing(layer, Routing(logits, weights, indices, mask))

        return hook

    def _make_steps_hook(self, layer: int, index: int, owner_name: str, owner: nn.Module) -> Callable:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if owner_name in self._running and output[index] is not None:
                steps = output[index].detach()
                self.on_steps(layer, steps, _flat_mask(self._running[owner_name], steps))

        return hook


def _read_router(output: Any, index: int, owner: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and indices of a router's output, whose logits are at `index`."""
    if isinstance(output, tuple) and index == 0 and len(output) >= 3:
        return output[0].detach(), output[1].detach(), output[2].detach()
    logits = output[index] if isinstance(output, tuple) else output
    logits = logits.detach().flatten(0, -2)  # (batch, seq, experts) -> (tokens, experts)
    # Dbrx and a few older configs have another name for it, or none.
    top_k = getattr(owner.config.get_text_config(), "num_experts_per_tok", None)
    if top_k is None:
        raise ValueError(
            f"The routers of {type(owner).__name__} return logits only, and its config does not say how many experts "
            "a token uses: set config.num_experts_per_tok."
        )
    weights, indices = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    return logits, weights, indices


def _flat_mask(mask: Tensor | None, routed: Tensor) -> Tensor | None:
    """(batch, past + seq) -> (tokens,), for a router's output whose first dimension is tokens."""
    if mask is None:
        return None
    seq, remainder = divmod(routed.shape[0], mask.shape[0])
    if remainder or seq > mask.shape[1]:
        raise ValueError(
            f"A router saw {routed.shape[0]} tokens, which does not fit the attention_mask's {tuple(mask.shape)}."
        )
    return mask[:, mask.shape[1] - seq :].reshape(-1).to(device=routed.device, dtype=torch.bool)
