"""The fast arithmetic of recurrent experts against torch's own cells and the plainest loops."""

import pytest
import torch
from torch import nn

from mixturekit.modeling.recurrence import (
    GroupedLinear,
    LoopedLinear,
    RecurrenceOptions,
    gru_cell,
    gru_update,
    iterate,
    sample_num_recurrences,
)

WIDTH, ROWS = 8, 6
UPDATES = pytest.mark.parametrize("update", [gru_cell, gru_update])


def merged_gates(cell: nn.GRUCell, state):
    """The gates of a cell with the state on both sides: reset and update matrices act as their sum."""
    reset_update, candidate = (cell.weight_ih + cell.weight_hh)[: 2 * WIDTH], cell.weight_hh[2 * WIDTH :]
    return state @ torch.cat((reset_update, candidate)).T, state @ cell.weight_ih[2 * WIDTH :].T


@UPDATES
def test_merged_gru_equals_torch(update):
    cell = nn.GRUCell(WIDTH, WIDTH, bias=False).double()
    state = expected = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    for _ in range(3):
        state, expected = update(*merged_gates(cell, state), state), cell(expected, expected)
    torch.testing.assert_close(state, expected)
    assert (state - cell(state, state)).abs().max() > 1e-3


@UPDATES
def test_gru_of_a_constant_input_equals_torch(update):
    """The projection of the input is computed once, for as many steps as the recurrence takes."""
    gru = nn.GRU(WIDTH, WIDTH, bias=False, batch_first=True).double()
    rows = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    expected, _ = gru(rows.unsqueeze(1).expand(-1, 4, -1))
    projected, state = rows @ gru.weight_ih_l0.T, torch.zeros_like(rows)
    for index in range(4):
        state = update(state @ gru.weight_hh_l0.T, projected, state)
        torch.testing.assert_close(state, expected[:, index])


@pytest.mark.parametrize("input_width", [WIDTH, 3 * WIDTH], ids=["merged", "separate"])
def test_gradients_of_the_fused_update(input_width):
    shapes = (3 * WIDTH, input_width, WIDTH)
    inputs = [torch.randn(ROWS, width, dtype=torch.float64, requires_grad=True) for width in shapes]
    assert torch.autograd.gradcheck(gru_update, inputs)
    torch.testing.assert_close(gru_update(*inputs), gru_cell(*inputs))
    weight = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    fused, plain = (torch.autograd.grad((update(*inputs) * weight).sum(), inputs) for update in (gru_update, gru_cell))
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("width", [16, 12, 5], ids=["aligned", "16 bytes in float32 only", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 2), (0, 5, 0), (9, 0, 0), (0, 0, 0)], ids=str)
def test_grouped_equals_looped(sizes, dtype, width):
    """Whatever the widths and however many experts are empty, forward and backward."""
    experts = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    rows = torch.randn(len(experts), width).to(dtype).requires_grad_()
    weight = torch.randn(3, 2 * width, width).to(dtype).requires_grad_()
    mask = torch.randn(len(experts), 2 * width).to(dtype)
    results = []
    for linear_class in (GroupedLinear, LoopedLinear):
        output = linear_class(experts, 3)(rows, weight)
        results.append((output, *torch.autograd.grad((output * mask).sum(), (rows, weight))))
    torch.testing.assert_close(*results)
    plain = torch.stack([weight[expert] @ row for row, expert in zip(rows, experts, strict=True)] or [mask[0:0]])
    torch.testing.assert_close(results[0][0], plain.view_as(mask))


@pytest.mark.parametrize("linear_class", [GroupedLinear, LoopedLinear])
def test_selected_rows_keep_their_experts(linear_class):
    experts = torch.tensor([0, 0, 1, 2, 2])
    rows, weight = torch.randn(5, 8), torch.randn(4, 8, 8)
    kept = torch.tensor([1, 3, 4])
    linear = linear_class(experts, 4)
    torch.testing.assert_close(linear.select(kept)(rows[kept], weight), linear(rows, weight)[kept])


class Contraction:
    """A step that moves every row towards a target, each at its own rate, and counts the rows it computes."""

    def __init__(self, rows=ROWS):
        generator = torch.Generator().manual_seed(3)
        self.rates = torch.linspace(0.05, 0.95, rows, dtype=torch.float64).unsqueeze(1).requires_grad_()
        self.target = torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator)
        self.weight = (torch.eye(WIDTH, dtype=torch.float64) * 0.9).unsqueeze(0).requires_grad_()
        self.start = torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        self.linear = LoopedLinear(torch.zeros(rows, dtype=torch.long), 1)
        self.computed = []

    def __call__(self, state, linear, active, index):
        rows = torch.arange(len(self.target)) if active is None else active
        assert len(rows) == len(state) == len(linear.experts)
        self.computed.append(rows.tolist())
        return state + self.rates[rows] * (linear(self.target[rows] - state, self.weight))

    def run(self, **options):
        self.computed = []
        return iterate(self, self.start, self.linear, RecurrenceOptions(**options))

    def plain(self, num_recurrences):
        states = [self.start]
        for index in range(num_recurrences):
            states.append(self(states[-1], self.linear, None, index))
        return states

    def gradients(self, state):
        weight = torch.linspace(-1, 1, state.numel(), dtype=torch.float64).view_as(state)
        return torch.autograd.grad((state * weight).sum(), (self.start, self.rates, self.weight))


def test_threshold_zero_never_exits():
    step = Contraction()
    state, steps = step.run(num_recurrences=5, exit_threshold=0.0)
    assert step.computed == [list(range(ROWS))] * 5
    assert steps.tolist() == [5] * ROWS
    torch.testing.assert_close(state, step.plain(5)[-1])


@pytest.mark.parametrize("minimum", [1, 3])
def test_rows_that_left_are_computed_no_more(minimum):
    step = Contraction()
    state, steps = step.run(num_recurrences=9, exit_threshold=0.1, min_recurrences=minimum)
    assert minimum <= steps.min() < steps.max() <= 9
    for index, rows in enumerate(step.computed):
        assert rows == (steps > index).nonzero().squeeze(1).tolist()
    assert sum(map(len, step.computed)) == steps.sum()


def test_rows_leave_with_their_state_once_it_has_converged():
    step = Contraction()
    state, steps = step.run(num_recurrences=9, exit_threshold=0.1)
    states = step.plain(9)
    changes = [((new - old).norm(dim=1) / new.norm(dim=1)) for old, new in zip(states, states[1:], strict=False)]
    for row in range(ROWS):
        expected = next((taken for taken in range(1, 9) if changes[taken - 1][row] < 0.1), 9)
        assert steps[row] == expected
        torch.testing.assert_close(state[row], states[expected][row])


def test_recurrence_ends_when_all_rows_have_left():
    step = Contraction()
    state, steps = step.run(num_recurrences=9, exit_threshold=1e6)
    assert steps.tolist() == [1] * ROWS
    assert len(step.computed) == 1
    torch.testing.assert_close(state, step.plain(1)[-1])


def test_gradients_of_rows_that_left():
    step = Contraction()
    state, steps = step.run(num_recurrences=9, exit_threshold=0.1)
    states = torch.stack(step.plain(9))
    expected = states[steps, torch.arange(ROWS)]
    torch.testing.assert_close(step.gradients(state), step.gradients(expected))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_truncated_gradient_equals_that_of_a_detached_state(window):
    """Beyond the window the state counts as a constant, except that its first state gets the gradient unchanged."""
    step = Contraction()
    state, _ = step.run(num_recurrences=5, backprop_recurrences=window)
    with torch.no_grad():
        constant = step.plain(5 - window)[-1]
    expected = constant + (step.start - step.start.detach())
    for index in range(window):
        expected = step(expected, step.linear, None, index)
    torch.testing.assert_close(state, expected)
    truncated = step.gradients(state)
    torch.testing.assert_close(truncated, step.gradients(expected))
    full = step.gradients(step.plain(5)[-1])
    assert all((part - whole).abs().max() > 1e-3 for part, whole in zip(truncated, full, strict=True))


@pytest.mark.parametrize("window", [5, 9, None])
def test_window_of_all_steps_gives_the_full_gradient(window):
    step = Contraction()
    state, _ = step.run(num_recurrences=5, backprop_recurrences=window)
    torch.testing.assert_close(step.gradients(state), step.gradients(step.plain(5)[-1]))


def test_rows_do_not_leave_before_the_first_step_with_gradient():
    step = Contraction()
    _, steps = step.run(num_recurrences=6, backprop_recurrences=2, exit_threshold=1e6)
    assert steps.tolist() == [5] * ROWS
    with torch.no_grad():
        _, steps = step.run(num_recurrences=6, backprop_recurrences=2, exit_threshold=1e6)
    assert steps.tolist() == [1] * ROWS


def draws(sampling, mean=4, minimum=1, maximum=None, count=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [sample_num_recurrences(sampling, mean, minimum, maximum, generator) for _ in range(count)]


def test_fixed_steps():
    assert set(draws("fixed", mean=7, count=20)) == {7}


@pytest.mark.parametrize("sampling", ["uniform", "log_normal_poisson"])
def test_sampling_is_seeded(sampling):
    assert draws(sampling, count=50) == draws(sampling, count=50)
    assert draws(sampling, count=50) != draws(sampling, count=50, seed=1)
    torch.manual_seed(5)
    first = [sample_num_recurrences(sampling, 8, 1, None) for _ in range(20)]
    torch.manual_seed(5)
    assert [sample_num_recurrences(sampling, 8, 1, None) for _ in range(20)] == first


def test_uniform_steps_fill_their_range():
    assert set(draws("uniform", minimum=2, maximum=5)) == {2, 3, 4, 5}
    assert set(draws("uniform", mean=3, minimum=1)) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("mean", [1, 4, 32])
def test_log_normal_poisson_has_its_mean(mean):
    values = torch.tensor(draws("log_normal_poisson", mean=mean), dtype=torch.float)
    assert values.min() >= 1
    assert values.mean() == pytest.approx(mean, rel=0.05)
    if mean > 1:
        # Of a log-normal rate with standard deviation 0.5: wider than a Poisson distribution of that mean.
        assert values.var() == pytest.approx(
            (mean - 1) + (mean - 1) ** 2 * (torch.tensor(0.25).exp().item() - 1), rel=0.2
        )


def test_log_normal_poisson_keeps_its_bounds():
    values = draws("log_normal_poisson", mean=4, minimum=3, maximum=6)
    assert set(values) == {3, 4, 5, 6}


def test_gru_update_of_gates_in_lower_precision():
    gates, candidate, state = torch.randn(ROWS, 3 * WIDTH), torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    mixed = gru_update(gates.bfloat16(), candidate.bfloat16(), state)
    torch.testing.assert_close(mixed, gru_cell(gates, candidate, state), atol=0.02, rtol=0.02)
