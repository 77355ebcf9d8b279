"""Packed GRUs are GRUs: values and gradients of `torch.nn.GRU`, with resets inside the sequence, in one run."""

import pytest
import torch
from torch import nn

from mixturekit.modeling.pathway_recurrence import PackedGru

SIZES, INPUT, TIME, BATCH = [5, 3, 8], 6, 11, 4


@pytest.fixture
def packed():
    module = PackedGru(INPUT, SIZES)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def inputs():
    return torch.randn(TIME, BATCH, INPUT, requires_grad=True), torch.randn(BATCH, sum(SIZES), requires_grad=True)


@pytest.fixture(params=["no resets", "resets"])
def keep(request):
    return None if request.param == "no resets" else (torch.rand(TIME, BATCH, 1) > 0.3).float()


def as_modules(packed) -> list[nn.GRU]:
    modules = []
    for index, size in enumerate(packed.sizes):
        gru = nn.GRU(INPUT, size)
        for parameter, weight in zip(gru.parameters(), packed.gru_weights(index), strict=True):
            parameter.data = weight.detach().clone()
        modules.append(gru)
    return modules


def plain(modules, x, state, keep):
    """One module at a time, one step at a time, zeroing states by hand."""
    columns = []
    for gru, part in zip(modules, state.split(SIZES, dim=1), strict=True):
        states = []
        for step in range(len(x)):
            part = part if keep is None else part * keep[step]
            part = gru(x[step : step + 1], part.unsqueeze(0).contiguous())[1][0]
            states.append(part)
        columns.append(torch.stack(states))
    return torch.cat(columns, dim=-1)


@pytest.mark.parametrize("eager", [False, True], ids=["fused", "eager"])
def test_equals_one_torch_gru_per_expert_in_values_and_gradients(packed, inputs, keep, eager):
    modules = as_modules(packed)
    states = packed(*inputs, keep, eager=eager)
    expected = plain(modules, *inputs, keep)
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-6)

    target = torch.randn_like(states)
    gradients = torch.autograd.grad((states * target).sum(), [*inputs, *packed.parameters()])
    own = torch.autograd.grad((expected * target).sum(), [*inputs, *(p for m in modules for p in m.parameters())])
    torch.testing.assert_close(gradients[:2], own[:2], atol=2e-6, rtol=1e-5)
    packed_gradients = PackedGru(INPUT, SIZES)
    for parameter, gradient in zip(packed_gradients.parameters(), gradients[2:], strict=True):
        parameter.data = gradient
    for index in range(len(SIZES)):
        expected_gradients = list(own[2 + 4 * index : 6 + 4 * index])
        for gradient, other in zip(packed_gradients.gru_weights(index), expected_gradients, strict=True):
            torch.testing.assert_close(gradient.detach(), other, atol=5e-6, rtol=1e-5)


def test_gradients_are_numerically_right(packed):
    packed = packed.double()
    x = torch.randn(4, 2, INPUT, dtype=torch.double, requires_grad=True)
    state = torch.randn(2, sum(SIZES), dtype=torch.double, requires_grad=True)
    keep = torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.double).unsqueeze(-1)
    names, parameters = zip(*packed.named_parameters(), strict=True)

    def run(x, state, *values):
        return torch.func.functional_call(packed, dict(zip(names, values, strict=True)), (x, state, keep))

    assert torch.autograd.gradcheck(run, (x, state, *parameters))


def test_no_gradient_crosses_a_reset(packed, inputs):
    keep = torch.ones(TIME, BATCH, 1)
    keep[6, 1] = 0
    x, state = inputs
    states = packed(x, state, keep)
    gradient, state_gradient = torch.autograd.grad(states[6:, 1].sum(), [x, state])
    assert gradient[:6].count_nonzero() == 0 and state_gradient.count_nonzero() == 0
    assert gradient[6:, 1].count_nonzero() > 0
    gradient, state_gradient = torch.autograd.grad(packed(x, state, keep)[6:, 2].sum(), [x, state])
    assert gradient[:6, 2].count_nonzero() > 0 and state_gradient[2].count_nonzero() > 0


def test_without_gradient_it_computes_the_same(packed, inputs, keep):
    states = packed(*inputs, keep)
    with torch.no_grad():
        assert torch.equal(packed(*inputs, keep), states)


def test_weights_go_in_and_out(packed):
    other = PackedGru(INPUT, SIZES)
    for index, gru in enumerate(as_modules(packed)):
        other.load_gru_weights(index, list(gru.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), other.parameters(), strict=True))


def test_half_precision_follows_single_precision(packed, inputs, keep):
    x, state = (tensor.detach() for tensor in inputs)
    expected = packed(x, state, keep)
    half = packed.bfloat16()(x.bfloat16(), state.bfloat16(), None if keep is None else keep.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1
