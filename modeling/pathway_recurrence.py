"""The arithmetic of several GRUs that read the same input side by side.

Shapes: time, batch; width, the sum of the GRUs' sizes; gates are reset, update and candidate, in the order of
`torch.nn.GRU`. The states of the GRUs lie one after another in one `(batch, width)` tensor, their gates in one
`(batch, 3, width)` tensor.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

RESET, UPDATE, CANDIDATE = range(3)


class PackedGru(nn.Module):
    """
    GRUs of different sizes with a common input, run as one.

    The input projections are one product over all steps. The recurrent products are small and one per GRU; the gates
    are computed on the packed state. Backward runs over time once more and forms each weight's gradient by one product
    over all steps.

    Args:
        input_size (`int`): Width of the input.
        sizes (`list[int]`): Widths of the GRUs' states.
    """

    def __init__(self, input_size: int, sizes: list[int]):
        super().__init__()
        self.sizes = sizes
        self.width = sum(sizes)
        self.input_weight = nn.Parameter(torch.empty(3, self.width, input_size))
        self.input_bias = nn.Parameter(torch.empty(3, self.width))
        self.hidden_weights = nn.ParameterList([torch.empty(3 * size, size) for size in sizes])
        self.hidden_bias = nn.Parameter(torch.empty(3, self.width))

    def slices(self) -> list[slice]:
        """Where each GRU's state lies in the packed one."""
        stops = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(stop - size, stop) for stop, size in zip(stops, self.sizes, strict=True)]

    def gru_weights(self, index: int) -> list[torch.Tensor]:
        """Weights of one GRU as `torch.nn.GRU` lays them out: input and hidden weights, input and hidden biases."""
        part = self.slices()[index]
        return [
            self.input_weight[:, part].flatten(0, 1),
            self.hidden_weights[index],
            self.input_bias[:, part].flatten(),
            self.hidden_bias[:, part].flatten(),
        ]

    @torch.no_grad()
    def load_gru_weights(self, index: int, weights: list[torch.Tensor]):
        """Takes over the weights of a `torch.nn.GRU`, in the order of [`~PackedGru.gru_weights`]."""
        part = self.slices()[index]
        size = self.sizes[index]
        input_weight, hidden_weight, input_bias, hidden_bias = weights
        self.input_weight[:, part] = input_weight.view(3, size, -1)
        self.hidden_weights[index].copy_(hidden_weight)
        self.input_bias[:, part] = input_bias.view(3, size)
        self.hidden_bias[:, part] = hidden_bias.view(3, size)

    def forward(
        self, inputs: torch.Tensor, state: torch.Tensor, keep: torch.Tensor | None = None, eager: bool = False
    ) -> torch.Tensor:
        """Runs all GRUs over `inputs` of shape `(time, batch, input_size)`.

        Args:
            state (`torch.Tensor` of shape `(batch, width)`): The states before the first step.
            keep (`torch.Tensor` of shape `(time, batch, 1)`, *optional*):
                1 where a step continues from the state before it, 0 where it starts afresh.
            eager (`bool`, *optional*, defaults to `False`): Whether to call `torch.gru` for each GRU and step.

        Returns:
            The states after each step, `(time, batch, width)`.
        """
        if eager:
            return self._eager(inputs, state, keep)
        weight, bias = self.input_weight.flatten(0, 1), self.input_bias.flatten()
        projected = nn.functional.linear(inputs, weight, bias).to(state.dtype).unflatten(-1, (3, self.width))
        with torch.autocast(inputs.device.type, enabled=False):
            if torch.is_grad_enabled():
                return _Recurrence.apply(projected, state, keep, self.hidden_bias, *self.hidden_weights)
            return _run_steps(projected, state, keep, self.hidden_bias, self.hidden_weights)[0]

    def _eager(self, inputs: torch.Tensor, state: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        weights = [self.gru_weights(index) for index in range(len(self.sizes))]
        states = []
        for step, current in enumerate(inputs.unbind()):
            state = state if keep is None else state * keep[step]
            parts = [
                torch.gru(current[None], state[None, :, part], own, True, 1, 0.0, False, False, False)[0][0]
                for part, own in zip(self.slices(), weights, strict=True)
            ]
            state = torch.cat(parts, dim=-1)
            states.append(state)
        return torch.stack(states)


def _run_steps(projected, state, keep, hidden_bias, hidden_weights, with_gradient: bool = False):
    """The steps of packed GRUs from projected inputs `(time, batch, 3, width)`.

    Returns:
        The states `(time, batch, width)` and, if `with_gradient`, what backward needs: the reset and update gates, the
        candidates, the candidates' recurrent parts, and the states that each step started from.
    """
    time, batch, _, width = projected.shape
    sizes = [weight.shape[1] for weight in hidden_weights]
    weights = [weight.t() for weight in hidden_weights]
    biases = [bias.flatten() for bias in hidden_bias.split(sizes, dim=1)]
    states = projected.new_empty(time, batch, width)
    saved = []
    for step, current in enumerate(projected.unbind()):
        if keep is not None:
            state = state * keep[step]
        products = [
            torch.addmm(bias, part, weight).view(batch, 3, -1)
            for bias, part, weight in zip(biases, state.split(sizes, dim=1), weights, strict=True)
        ]
        hidden = torch.cat(products, dim=2)
        gates = (current[:, :CANDIDATE] + hidden[:, :CANDIDATE]).sigmoid_()
        candidate = torch.addcmul(current[:, CANDIDATE], gates[:, RESET], hidden[:, CANDIDATE]).tanh_()
        if with_gradient:
            saved.append((gates, candidate, hidden[:, CANDIDATE], state))
        state = torch.lerp(candidate, state, gates[:, UPDATE], out=states[step])
    return states, [torch.stack(values) for values in zip(*saved, strict=True)]


class _Recurrence(torch.autograd.Function):
    """The same steps, with a backward that forms each weight's gradient by one product."""

    @staticmethod
    def forward(ctx, projected, state, keep, hidden_bias, *hidden_weights):
        states, saved = _run_steps(projected, state, keep, hidden_bias, hidden_weights, with_gradient=True)
        ctx.save_for_backward(keep, *saved, *hidden_weights)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states):
        keep, gates, candidates, hidden_candidates, previous, *hidden_weights = ctx.saved_tensors
        time, batch, width = candidates.shape
        sizes = [weight.shape[1] for weight in hidden_weights]
        reset, update = gates.unbind(2)
        # All gradients of a step are multiples of its state's gradient; the factors need no recursion.
        candidate_factor = (1 - update) * (1 - candidates.square())
        hidden_candidate_factor = candidate_factor * reset
        factors = torch.stack(
            [
                hidden_candidate_factor * hidden_candidates * (1 - reset),
                (previous - candidates) * update * (1 - update),
                hidden_candidate_factor,
            ],
            dim=2,
        )
        factors = [part.contiguous() for part in factors.split(sizes, dim=3)]
        grad_hidden = [torch.empty_like(part) for part in factors]
        grad_steps = torch.empty_like(candidates)
        carried = torch.zeros_like(candidates[0])
        for step in reversed(range(time)):
            grad_state = torch.add(grad_states[step], carried, out=grad_steps[step])
            carried = grad_state * update[step]
            parts = (grad_state.split(sizes, 1), carried.split(sizes, 1), factors, grad_hidden, hidden_weights)
            for grad_part, carried_part, factor, product, weight in zip(*parts, strict=True):
                torch.mul(grad_part.unsqueeze(1), factor[step], out=product[step])
                carried_part.addmm_(product[step].flatten(1), weight)
            if keep is not None:
                carried.mul_(keep[step])
        grad_weights = [
            product.flatten(2).flatten(0, 1).t() @ part.flatten(0, 1)
            for product, part in zip(grad_hidden, previous.split(sizes, dim=2), strict=True)
        ]
        grad_projected = torch.cat(grad_hidden, dim=3)
        grad_bias = grad_projected.sum(dim=(0, 1))
        torch.mul(grad_steps, candidate_factor, out=grad_projected[:, :, CANDIDATE])
        return grad_projected, carried, None, grad_bias, *grad_weights


__all__ = ["PackedGru"]
