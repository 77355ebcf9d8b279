"""What rules converge to by which a map learns without a loss."""

import pytest
import torch
import torch.nn.functional as F

from mixturekit.trainers.local_learning import forward_forward_loss, oja_update


@pytest.fixture
def data():
    """Inputs `(tokens, 6)` of known principal components, the rows of `(6, 6)`, the strongest first."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6))[0]
    return torch.randn(512, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1]) @ axes, axes


def follow(weight, inputs, factors=None, rate=0.02, steps=2000):
    """The weight after many updates of a linear map, each by the mean over all tokens."""
    for _ in range(steps):
        weight = weight + rate * oja_update(weight, inputs, F.linear(inputs, weight), factors) / len(inputs)
    return weight


@pytest.mark.parametrize("length", [0.01, 3.0], ids=["from a short weight", "from a long one"])
def test_one_output_becomes_the_first_principal_component_with_unit_norm(data, length):
    inputs, _ = data
    first = torch.linalg.eigh(inputs.T @ inputs).eigenvectors[:, -1]
    weight = follow(length * F.normalize(torch.randn(1, 6)), inputs, steps=600)
    assert abs(weight @ first).item() == pytest.approx(1, abs=1e-3)
    assert weight.norm().item() == pytest.approx(1, abs=1e-3)


def test_several_outputs_span_the_first_components_by_an_orthonormal_basis(data):
    inputs, _ = data
    first = torch.linalg.eigh(inputs.T @ inputs).eigenvectors[:, -3:]
    weight = follow(0.1 * torch.randn(3, 6), inputs)
    torch.testing.assert_close(weight @ weight.T, torch.eye(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(weight.T @ weight, first @ first.T, rtol=0, atol=2e-2)


def test_a_third_factor_of_one_changes_nothing_and_its_sign_joins_or_parts(data):
    inputs, axes = data
    weight = torch.randn(2, 6)
    outputs = F.linear(inputs, weight)
    plain = oja_update(weight, inputs, outputs)
    torch.testing.assert_close(oja_update(weight, inputs, outputs, torch.ones(len(inputs))), plain)
    # Good tokens lie along the second axis only, where less is to be seen than along the first, along which bad ones
    # do: the output learns what is good, and is not carried away by what is bad.
    tokens = torch.cat([inputs @ axes.T[:, [1]] @ axes[[1]], inputs @ axes.T[:, [0]] @ axes[[0]]])
    factors = torch.ones(len(tokens))
    factors[len(inputs) :] = -1
    unmodulated, modulated = follow(0.1 * axes.sum(0)[None], tokens), follow(0.1 * axes.sum(0)[None], tokens, factors)
    assert abs(unmodulated @ axes[0]) > 0.99 and abs(modulated @ axes[0]) < 0.01
    assert abs(modulated @ axes[1]).item() == pytest.approx(1, abs=0.05)


def test_forward_forward_raises_the_goodness_of_real_data_above_that_of_fake(data):
    inputs, _ = data
    # Real pairs agree in their halves; fake ones have halves of two of them, each half as common as before.
    real = torch.cat([inputs, inputs], dim=1)
    fake = torch.cat([inputs, inputs.roll(1, 0)], dim=1)
    weight = (0.1 * torch.randn(16, 12)).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.01)

    def told():
        good, bad = (F.relu(F.linear(part, weight)).square().sum(dim=1) for part in (real, fake))
        return (good > bad).float().mean().item()

    before = told()
    for _ in range(300):
        optimizer.zero_grad()
        forward_forward_loss(F.relu(F.linear(real, weight)), F.relu(F.linear(fake, weight))).backward()
        optimizer.step()
    assert before < 0.6 < 0.8 < told()


def test_goodness_is_judged_against_the_number_of_outputs():
    halves = torch.ones(1, 4), torch.ones(1, 4)
    torch.testing.assert_close(forward_forward_loss(*halves), 2 * torch.log(torch.tensor(2.0)))
    good, bad = 10 * torch.ones(1, 4), torch.zeros(1, 4)
    assert forward_forward_loss(good, bad) < 0.02 < 100 < forward_forward_loss(bad, good)
