"""Routing that stays the same between the pass that scores a completion and those that learn from it.

Reinforcement learning compares probabilities of the same tokens under two passes. Routers that sample experts in
training mode make them differ by more than learning does, and in low precision a tie falls now here, now there. So
routers and the blocks around them are kept as in evaluation, and the experts of the scoring pass can be replayed:
recorded there, and used with newly computed weights in the update (the method R2 of arXiv 2510.11370).

Shapes: tokens, batch * seq; top_k, the experts of a token; layers, those that have a router.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from ..modeling.routing_statistics import Routing, find_recorded, infer_scores, router_probabilities


def keep_routing_deterministic(model: nn.Module) -> list[nn.Module]:
    """
    Keeps routers, and the blocks that call them, as in evaluation, whatever mode the model is in: Phi-MoE's sample
    experts and shake their input in training mode. Dropout elsewhere is left alone.

    Returns:
        `list[nn.Module]`: The routers, in the order of the layers; none for a model that is no mixture of experts.
    """
    modules, routers = dict(model.named_modules()), find_recorded(model, "router_logits")
    for name, (router, _) in routers.items():
        for module in (router, modules[name.rpartition(".")[0]]):
            # Trainers call train() whenever they like, so ask at each call.
            module.register_forward_pre_hook(_as_in_evaluation, prepend=True)
    return [router for router, _ in routers.values()]


def check_replayable(model: nn.Module) -> None:
    """Raises `ValueError` if the model has no routers whose choices could be replayed."""
    if not find_recorded(model, "router_logits"):
        raise ValueError(f"router_replay is on, but {type(model).__name__} is no mixture of experts.")


def _as_in_evaluation(module: nn.Module, _args: tuple) -> None:
    module.training = False


class RouterReplay:
    """
    Records which experts routers choose, and has them choose the same again.

    Args:
        routers (`list[nn.Module]`): Routers that return logits, weights and indices.

    Raises:
        ValueError: When first used, at a router whose weights are computed in a way that is not known here.
    """

    def __init__(self, routers: list[nn.Module]):
        self.routers = routers
        self._recorded: list[list[Tensor]] = [[] for _ in routers]
        self._replayed: list[Tensor] | None = None
        self._recording = False
        self._agreements: list[Tensor] = []
        self._weights_of: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}
        for layer, router in enumerate(routers):
            # Before hooks of expert parallelism, which number experts anew.
            router.register_forward_hook(self._make_hook(layer), prepend=True)

    def record(self) -> None:
        """From here on, remember the choices of every pass."""
        self._recording, self._replayed = True, None
        self._recorded = [[] for _ in self.routers]

    def stop(self) -> None:
        """From here on, leave the routers alone."""
        self._recording, self._replayed = False, None

    def recorded(self, batch_size: int) -> Tensor:
        """The choices since [`RouterReplay.record`], `(batch, seq, layers, top_k)`, and stop recording."""
        layers = [torch.cat(parts).unflatten(0, (batch_size, -1)) for parts in self._recorded]
        self.stop()
        self._recorded = [[] for _ in self.routers]
        return torch.stack(layers, dim=2)

    def replay(self, choices: Tensor) -> None:
        """From here on, choose as in `choices` of shape `(batch, seq, layers, top_k)`, also when layers are computed
        again in the backward pass."""
        self._recording = False
        self._replayed = [layer.flatten(0, 1).long() for layer in choices.unbind(dim=2)]

    def agreement(self) -> float | None:
        """Share of experts that would have been chosen again since the last call; `None` if nothing was replayed."""
        shares, self._agreements = self._agreements, []
        return torch.stack(shares).mean().item() if shares else None

    def _make_hook(self, layer: int) -> Callable:
        def hook(router: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]):
            logits, weights, indices = output[:3]
            if layer not in self._weights_of and (self._recording or self._replayed is not None):
                self._weights_of[layer] = weights_of(router, logits, weights, indices)
            if self._recording:
                # A byte is enough to tell 256 experts apart.
                self._recorded[layer].append(indices.to(torch.uint8 if logits.shape[-1] <= 256 else torch.int16))
            if self._replayed is None:
                return output
            chosen = self._replayed[layer]
            same = (indices.unsqueeze(-1) == chosen.unsqueeze(-2)).any(dim=-1)
            self._agreements.append(same.float().mean())
            new_weights = self._weights_of[layer](logits, chosen).to(weights.dtype)
            return (logits, new_weights, chosen.to(indices.dtype), *output[3:])

        return hook


def weights_of(
    router: nn.Module, logits: Tensor, weights: Tensor, indices: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """
    How a router weighs the experts it chose, as a function of its logits and any choice; found from one of its own.

    Raises:
        ValueError: If neither softmax nor sigmoid, renormalised or not, nor Phi-MoE's sparse mixer gives its weights.
    """
    if isinstance(router, PhimoeTopKRouter):
        return lambda logits, chosen: sparse_mixer_weights(logits, chosen, router.router_jitter_noise)
    scores = infer_scores(Routing(logits, weights, indices, None))
    for normalized in (True, False):

        def weigh(logits: Tensor, chosen: Tensor, normalized: bool = normalized) -> Tensor:
            if scores == "softmax":
                picked = router_probabilities(logits).gather(-1, chosen)
            else:
                picked = logits.float().sigmoid().gather(-1, chosen)
            return picked / picked.sum(dim=-1, keepdim=True) if normalized else picked

        if torch.allclose(weigh(logits, indices).float(), weights.float(), atol=1e-2):
            return weigh
    raise ValueError(
        f"The choices of a {type(router).__name__} cannot be replayed, because how it weighs them is not known here; "
        "set router_replay to 'off'."
    )


def sparse_mixer_weights(logits: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """
    Weights of given experts in Phi-MoE's routers in evaluation (SparseMixer-v2, Liu et al. 2024, arXiv 2409.12136).

    Each of the two is the softmax, over experts whose logit is within `2 * jitter` of the best (relative to it) and
    that were not chosen before, at the chosen one, which counts as within.

    Args:
        logits (`torch.Tensor` of shape `(tokens, experts)`): The router's logits.
        chosen (`torch.Tensor` of shape `(tokens, top_k)`): The experts, best first.
        jitter (`float`): The router's `router_jitter_noise`.
    """
    weights, remaining = [], logits
    for expert in chosen.split(1, dim=-1):
        best = remaining.max(dim=-1, keepdim=True).values
        far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * jitter
        within = remaining.masked_fill(far.scatter(-1, expert, False), float("-inf"))
        weights.append(within.softmax(dim=-1).gather(-1, expert))
        remaining = remaining.scatter(-1, expert, float("-inf"))
    return torch.cat(weights, dim=-1)
