"""AdamW for fused experts in memory that leaves those that no token was sent to as they are."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


class InMemoryLazyAdamW(torch.optim.AdamW):
    """
    What [`LazyAdamW`] does with a store, for experts that are parameters `(experts, ...)` of the model.

    An expert is updated if a forward pass with gradients has sent it a token, with a step count of its own; neither
    momentum nor weight decay moves another one.

    Args:
        modules (`Sequence[nn.Module]`): The experts of each layer, called with hidden states and the indices
            `(tokens, top_k)` of their experts.
        params (`Iterable[nn.Parameter]`): The rest of the model.
        lr, betas, eps, weight_decay, fused: As in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = True,
    ):
        self.modules = list(modules)
        # Layer and expert of each that has got a token since the gradients were last forgotten.
        self.touched: set[tuple[int, int]] = set()
        for layer, module in enumerate(self.modules):
            module.register_forward_pre_hook(lambda _, args, layer=layer: self._note(layer, args[1]))
        experts = [part for module in self.modules for part in module.parameters()]
        groups = [{"params": experts}, {"params": list(params)}]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    def _note(self, layer: int, indices: Tensor) -> None:
        if torch.is_grad_enabled():
            self.touched.update((layer, expert) for expert in indices.unique().tolist())

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates the experts that have got a token, and all else."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        experts = self.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in experts]
        # Without a gradient, torch leaves a parameter alone.
        for parameter in experts:
            parameter.grad = None
        super().step()
        for parameter, gradient in zip(experts, gradients, strict=True):
            parameter.grad = gradient
        for layer, module in enumerate(self.modules):
            rows = sorted(expert for other, expert in self.touched if other == layer)
            for parameter in module.parameters():
                if rows and parameter.grad is not None:
                    self._update(parameter, rows)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and which experts have them."""
        super().zero_grad(set_to_none)
        self.touched.clear()

    def _update(self, parameter: nn.Parameter, rows: list[int]) -> None:
        group, state = self.param_groups[0], self.state[parameter]
        if not state:
            # By the name that torch looks for, with a number for each expert.
            state["step"] = torch.zeros(len(parameter), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        adamw(
            # Views of single rows, each with its own count, which the update advances in place.
            *([part[row] for row in rows] for part in whole),
            [],
            [state["step"][row] for row in rows],
            fused=group["fused"],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
