"""AdamW for the experts of a store: those that have a gradient, and no others, each with its own step count."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from .expert_store import ExpertStore


class LazyAdamW(torch.optim.AdamW):
    """
    AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) for the experts of a store, and the rest of a model.

    An expert without a gradient stays as it is, to the bit: neither momentum nor weight decay moves it, and its bias
    correction counts its own updates. That is what `torch.optim.AdamW` does with a parameter per expert whose `grad`
    is `None`, and the results are the same to the bit.

    Schedulers and [`~transformers.Trainer`] work with it as with any optimizer. The experts' moments are in the store:
    `state_dict` holds all else, to be saved beside a checkpoint of the store.

    Args:
        store ([`ExpertStore`]): Opened for training.
        params (`Iterable`, *optional*): What is not in the store, such as `model.parameters()` of an offloaded model,
            as parameters or as groups of them. If unset, another optimizer has to update it.
        lr (`float`, *optional*, defaults to 1e-3): Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Decay of the moments.
        eps (`float`, *optional*, defaults to 1e-8): Added to the denominator.
        weight_decay (`float`, *optional*, defaults to 0.01): Decoupled from the gradient, at updates of the expert.
        no_decay (`Collection[str]`, *optional*): Parameters of the experts without weight decay, by name.
        decay_moments (`bool`, *optional*, defaults to `False`): Whether at its next update an expert's moments decay
            for the updates that it has missed, as if its gradient had been zero in them.
        max_grad_norm (`float`, *optional*): Clips by the norm of all gradients, those in the store and those of
            `params`, before each update; for a trainer that could clip only what it knows.
        fused (`bool`, *optional*, defaults to `True`): As in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        store: ExpertStore,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        no_decay: Collection[str] = (),
        decay_moments: bool = False,
        max_grad_norm: float | None = None,
        fused: bool = True,
    ):
        if not store.config.training:
            raise ValueError("The store was opened with training=False, which keeps no optimizer state.")
        self.store, self.max_grad_norm = store, max_grad_norm
        # The experts change their place all the time; an empty parameter stands for them all.
        anchor = nn.Parameter(torch.empty(0, device=store.device))
        groups = [{"params": [anchor], "no_decay": list(no_decay), "decay_moments": decay_moments, "updates": 0}]
        if params := list(params):
            groups.extend(params if isinstance(params[0], dict) else [{"params": params}])
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Updates every expert that has a gradient, those in the fast tier first, while others arrive."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, store = self.param_groups[0], self.store
        if self.max_grad_norm is not None:
            params = [param for rest in self.param_groups[1:] for param in rest["params"]]
            clip_grad_norm_(params, store, self.max_grad_norm)
        super().step()
        group["updates"] += 1
        touched: dict[int, list[int]] = {}
        for layer, expert in sorted(store.gradients):
            touched.setdefault(layer, []).append(expert)
        for layer, experts in touched.items():
            resident = store.resident(layer)
            experts.sort(key=lambda expert: expert not in resident)
            while experts:
                size = max(1, store.room(layer, experts) // 2)
                now, experts = experts[:size], experts[size:]
                hold = store.hold(layer, now, counted=False)
                store.prefetch(layer, experts[:size])
                for expert, slot in zip(now, hold.wait(), strict=True):
                    self._update(layer, expert, store.memory(layer, slot), group)
                hold.release()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, also those of all experts."""
        super().zero_grad(set_to_none)
        self.store.clear_gradients()

    def _update(self, layer: int, expert: int, memory: torch.Tensor, group: dict) -> None:
        layout, info = self.store.layout, self.store.info(layer, expert)
        gradient = self.store.gradients[layer, expert]
        masters, averages, squares = (
            layout.master(memory), layout.state(memory, "exp_avg"), layout.state(memory, "exp_avg_sq")
        )  # fmt: skip
        beta1, beta2 = group["betas"]
        missed = group["updates"] - info.last_step - 1
        if group["decay_moments"] and info.step > 0 and missed > 0:
            torch._foreach_mul_(list(averages.values()), beta1**missed)
            torch._foreach_mul_(list(squares.values()), beta2**missed)
        bare = [name for name in gradient if name in group["no_decay"]]
        decayed = [name for name in gradient if name not in group["no_decay"]]
        for names, weight_decay in ((decayed, group["weight_decay"]), (bare, 0.0)):
            adamw(
                *([views[name] for name in names] for views in (masters, gradient, averages, squares)),
                [],
                [torch.tensor(float(info.step), device=memory.device) for _ in names],
                fused=group["fused"],
                foreach=False,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=weight_decay,
                eps=group["eps"],
                maximize=False,
            )
        if "master" in layout.sections:
            weights = layout.weights(memory)
            for name in gradient:
                weights[name].copy_(masters[name])
        self.store.mark_updated(layer, expert, group["updates"])


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], store: ExpertStore, max_norm: float) -> torch.Tensor:
    """
    Clips the gradients of a model's parameters and of the experts in a store by the norm of them all.

    Args:
        parameters (`Iterable[nn.Parameter]`): What is not in the store.
        store ([`ExpertStore`]): The experts.
        max_norm (`float`): The norm that stays.

    Returns:
        `torch.Tensor`: The norm before, as `torch.nn.utils.clip_grad_norm_` computes it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for key in sorted(store.gradients):
        gradients.extend(store.gradients[key].values())
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))
    return norm
