"""The arithmetic of recurrent experts: products of sorted rows with their experts' weights, and the loop over steps.

Shapes: rows = token-expert pairs sorted by expert, experts, in and out = widths of a linear map, width = of a state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class RecurrenceOptions:
    """How many steps a recurrence takes in one forward pass, and when a token may leave it.

    Args:
        num_recurrences (`int`): Steps to take.
        backprop_recurrences (`int`, *optional*): Gradient flows through this many last steps; all if unset.
        exit_threshold (`float`, *optional*, defaults to 0.0): Relative change below which a row exits; 0 never exits.
        min_recurrences (`int`, *optional*, defaults to 1): Steps that every row takes before it may exit.
    """

    num_recurrences: int
    backprop_recurrences: int | None = None
    exit_threshold: float = 0.0
    min_recurrences: int = 1

    @property
    def first_step_with_gradient(self) -> int:
        """Index of the first step that gradient flows through."""
        return max(0, self.num_recurrences - (self.backprop_recurrences or self.num_recurrences))


class LoopedLinear:
    """Multiplies each row with its own expert's weight, one expert after the other: the plain reference.

    Args:
        experts (`torch.Tensor` of shape `(rows,)`): The expert of each row, ascending.
        num_experts (`int`): Number of experts.
    """

    fast = False

    def __init__(self, experts: torch.Tensor, num_experts: int):
        self.experts = experts
        self.num_experts = num_experts
        self.sizes = torch.bincount(experts, minlength=num_experts).tolist()

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Maps `rows` of shape `(rows, in)` by `weight` of shape `(experts, out, in)` to `(rows, out)`."""
        pieces = [F.linear(piece, expert) for piece, expert in zip(rows.split(self.sizes), weight, strict=True)]
        return torch.cat(pieces)

    def share(self, weight: torch.Tensor) -> "torch.Tensor | SharedWeight":
        """`weight` for a loop that multiplies by it in every step."""
        return weight

    def select(self, index: torch.Tensor) -> "LoopedLinear":
        """The same map for a subset of the rows, by ascending index."""
        return type(self)(self.experts[index], self.num_experts)


class GroupedLinear(LoopedLinear):
    """The same map as one grouped matrix product, for rows whose layout is computed once and kept for all steps."""

    fast = True

    def __init__(self, experts: torch.Tensor, num_experts: int):
        self.experts = experts
        self.num_experts = num_experts
        self.offsets = _group_ends(experts, num_experts)

    def __call__(self, rows: torch.Tensor, weight: "torch.Tensor | SharedWeight") -> torch.Tensor:
        if isinstance(weight, SharedWeight):
            if torch.is_grad_enabled():
                weight.add_use()
                return _SharedProduct.apply(_autocast(rows), weight.weight, self, weight)
            weight = weight.weight
        return _grouped_product(_autocast(rows), _autocast(weight), self.offsets)

    def share(self, weight: torch.Tensor) -> "torch.Tensor | SharedWeight":
        """`weight`, cast once for all steps, whose gradient is computed once for all steps, too."""
        weight = _autocast(weight)
        trained = torch.is_grad_enabled() and weight.requires_grad
        if not trained or torch.compiler.is_compiling() or not _has_grouped_kernel(weight):
            return weight
        return SharedWeight(weight, self.num_experts)


class SharedWeight:
    """A weight of several products, the gradients of which wait for each other.

    Step by step, each product would write a gradient of the weight's full size, and each but the first would be added
    to the last: for wide experts that is more memory traffic than the products themselves. Here the rows of all steps
    go into one product.
    """

    def __init__(self, weight: torch.Tensor, num_experts: int):
        self.weight = weight
        self.num_experts = num_experts
        self.uses = self.waiting = 0
        self.pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add_use(self):
        """Counts a product whose backward pass has to come before the gradient is complete."""
        self.uses += 1
        self.waiting += 1

    def add_gradient(self, experts: torch.Tensor, rows: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
        """Takes what one product contributes; returns the weight's gradient once it is the last, else `None`."""
        self.pending.append((experts, rows, grad))
        self.waiting -= 1
        if self.waiting > 0:
            return None
        experts, rows, grad = (torch.cat(pieces) for pieces in zip(*self.pending, strict=True))
        # Ready for a second backward pass through a graph that was retained.
        self.pending, self.waiting = [], self.uses
        order = experts.argsort(stable=True)
        ends = _group_ends(experts[order], self.num_experts)
        return F.grouped_mm(grad.index_select(0, order).t(), rows.index_select(0, order), offs=ends)


class _SharedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, linear, shared):
        ctx.save_for_backward(rows, weight)
        ctx.linear, ctx.shared = linear, shared
        return _grouped_product(rows, weight, linear.offsets)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad_rows = _grouped_product(grad, weight.transpose(1, 2), ctx.linear.offsets)
        return grad_rows, ctx.shared.add_gradient(ctx.linear.experts, rows, grad), None, None


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    # The grouped kernels are not known to autocast, which would leave experts in float32 under bf16 training.
    if torch.is_autocast_enabled(tensor.device.type):
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor


def _group_ends(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    boundaries = torch.arange(num_experts, device=experts.device)
    return torch.searchsorted(experts, boundaries, right=True).to(torch.int32)


def _grouped_product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows `(rows, in)` times their experts' weights `(experts, out, in)`, `(rows, out)`."""
    if not _has_grouped_kernel(weight):
        return torch.ops.transformers.grouped_mm_fallback(rows, weight.transpose(1, 2), ends)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _has_grouped_kernel(weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        # Inductor lowers grouped products of bfloat16 only; transformers registers an operator for the rest.
        return weight.dtype == torch.bfloat16
    # The kernels need rows of whole 16 bytes, which odd widths in bfloat16 are not.
    if weight.dtype == torch.float64 or any(width * weight.element_size() % 16 for width in weight.shape[1:]):
        return False
    return weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) >= (8, 0)


def gru_cell(hidden_gates: torch.Tensor, input_gates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """One update of a gated recurrent unit (Cho et al. 2014, in the form of `torch.nn.GRUCell`, without biases).

    Args:
        hidden_gates (`torch.Tensor` of shape `(rows, 3 * width)`): Reset, update and candidate terms of the state.
        input_gates (`torch.Tensor` of shape `(rows, 3 * width)` or `(rows, width)`):
            The same terms of the input. Where state and input are the same vector, their reset and update matrices
            act as their sum, which `hidden_gates` then holds: what is left for the input is the candidate term.
        state (`torch.Tensor` of shape `(rows, width)`): The state to update.
    """
    width = state.shape[-1]
    gates, candidate = hidden_gates.split((2 * width, width), dim=-1)
    if input_gates.shape[-1] > width:
        input_rates, input_gates = input_gates.split((2 * width, width), dim=-1)
        gates = gates + input_rates
    reset, update = torch.sigmoid(gates).chunk(2, dim=-1)
    proposal = torch.tanh(input_gates + reset * candidate)
    return proposal + update * (state - proposal)


class _GatedRecurrentUpdate(torch.autograd.Function):
    """[`gru_cell`] with a hand-written backward: a third of the memory traffic of the operations one by one."""

    @staticmethod
    def forward(ctx, hidden_gates, input_gates, state):
        width = state.shape[-1]
        ctx.full_input = input_gates.shape[-1] > width
        gates = hidden_gates[:, : 2 * width]
        rates = torch.add(gates, input_gates[:, : 2 * width]).sigmoid_() if ctx.full_input else gates.sigmoid()
        candidate = hidden_gates[:, 2 * width :].contiguous()
        proposal = torch.addcmul(input_gates[:, -width:], rates[:, :width], candidate).tanh_()
        ctx.save_for_backward(rates, candidate, proposal, state)
        return torch.lerp(proposal, state, rates[:, width:])

    @staticmethod
    def backward(ctx, grad):
        rates, candidate, proposal, state = ctx.saved_tensors
        width = state.shape[-1]
        reset, update = rates[:, :width], rates[:, width:]
        grad_hidden = torch.empty(grad.shape[0], 3 * width, dtype=grad.dtype, device=grad.device)
        grad_state = grad * update
        grad_proposal = (grad - grad_state) * (1 - proposal.square())
        torch.mul(grad_proposal, reset, out=grad_hidden[:, 2 * width :])
        torch.mul(grad_proposal * candidate, reset * (1 - reset), out=grad_hidden[:, :width])
        torch.mul(grad * (state - proposal), update * (1 - update), out=grad_hidden[:, width : 2 * width])
        if not ctx.full_input:
            return grad_hidden, grad_proposal, grad_state
        return grad_hidden, torch.cat((grad_hidden[:, : 2 * width], grad_proposal), dim=-1), grad_state


def gru_update(hidden_gates: torch.Tensor, input_gates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """[`gru_cell`], fused where autograd runs it: same arguments, same result."""
    if torch.compiler.is_compiling() or hidden_gates.dtype != state.dtype:
        return gru_cell(hidden_gates, input_gates, state)
    return _GatedRecurrentUpdate.apply(hidden_gates, input_gates, state)


def iterate(
    step: Callable[[torch.Tensor, LoopedLinear, torch.Tensor | None, int], torch.Tensor],
    state: torch.Tensor,
    linear: LoopedLinear,
    options: RecurrenceOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies `step` until every row has taken its steps; rows that converged leave, and cost nothing from then on.

    Args:
        step (`Callable`):
            `step(state, linear, active, index) -> state` for the rows `active` (all of them if `None`), which
            `linear` is laid out for.
        state (`torch.Tensor` of shape `(rows, width)`): First state.
        linear ([`LoopedLinear`]): The experts' products for all rows.
        options ([`RecurrenceOptions`]): Steps, truncation and exit.

    Returns:
        The last state of each row, `(rows, width)`, and the number of steps that it took, `(rows,)`. If steps without
        gradient came first, the gradient of the state after them passes to the first state unchanged.
    """
    steps = torch.full((state.shape[0],), options.num_recurrences, device=state.device)
    first_with_gradient = options.first_step_with_gradient if torch.is_grad_enabled() else 0
    # A row that left before the first step with gradient would not train its expert.
    min_steps = max(options.min_recurrences, first_with_gradient + 1)
    active, exited_rows, exited_states, initial = None, [], [], state
    for index in range(options.num_recurrences):
        if index == first_with_gradient and index > 0:
            state = state + (initial - initial.detach())
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= first_with_gradient):
            previous, state = state, step(state, linear, active, index)
        taken = index + 1
        if options.exit_threshold > 0 and min_steps <= taken < options.num_recurrences:
            moving = _is_moving(previous, state, options.exit_threshold)
            if not moving.all():
                keep, leave = moving.nonzero().squeeze(1), (~moving).nonzero().squeeze(1)
                active = torch.arange(len(moving), device=state.device) if active is None else active
                exited_rows.append(active[leave])
                exited_states.append(state[leave])
                steps[active[leave]] = taken
                active, state, linear = active[keep], state[keep], linear.select(keep)
                if len(keep) == 0:
                    break
    if exited_rows:
        order = torch.cat([*exited_rows, active]).argsort()
        state = torch.cat([*exited_states, state])[order]
    return state, steps


@torch.no_grad()
def _is_moving(previous: torch.Tensor, state: torch.Tensor, threshold: float) -> torch.Tensor:
    change = (state - previous).float().norm(dim=-1)
    return change >= threshold * state.float().norm(dim=-1)


def sample_num_recurrences(
    sampling: str, mean: int, minimum: int, maximum: int | None, generator: torch.Generator | None = None
) -> int:
    """Draws the number of steps of one training pass, from torch's seeded generator.

    Args:
        sampling (`str`):
            `fixed` gives `mean`; `uniform` a whole number between `minimum` and `maximum`; `log_normal_poisson` one
            plus a Poisson draw whose rate is log-normal with standard deviation 0.5, so that the mean is about
            `mean` (Geiping et al. 2025, arXiv 2502.05171, section 3.3), cut off at `minimum` and `maximum`.
        mean (`int`): Number of steps on average.
        minimum (`int`): Fewest steps.
        maximum (`int`, *optional*): Most steps; if unset, twice `mean` for `uniform` and no bound for the other.
        generator (`torch.Generator`, *optional*): Source of randomness; torch's default generator if unset.
    """
    if sampling == "fixed":
        return mean
    if sampling == "uniform":
        maximum = max(minimum, 2 * mean) if maximum is None else maximum
        return int(torch.randint(minimum, maximum + 1, (), generator=generator))
    sigma = 0.5
    # Where the mean is one step, its Poisson part is zero and every draw is one step.
    log_rate = torch.log(torch.tensor(mean - 1.0)) - sigma**2 / 2 + sigma * torch.randn((), generator=generator)
    draw = 1 + int(torch.poisson(log_rate.exp(), generator=generator))
    draw = max(draw, minimum)
    return draw if maximum is None else min(draw, maximum)
