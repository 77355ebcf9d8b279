"""Generalized advantage estimation against its definition."""

import pytest
import torch

from mixturekit.trainers.advantages import generalized_advantages

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *MASK.shape, generator=generator).unbind()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.9, 0.0)])
def test_it_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    rewards, values = draw()
    advantages, returns = generalized_advantages(rewards, values, MASK, gamma, lam)
    for row, mask in enumerate(MASK):
        length = int(mask.sum())
        later = [*values[row, 1:length].tolist(), 0.0]
        deltas = [float(rewards[row, t] + gamma * later[t] - values[row, t]) for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-5)


def test_what_is_masked_is_zero_and_has_no_influence():
    rewards, values = draw()
    first = generalized_advantages(rewards, values, MASK, 0.9, 0.9)
    second = generalized_advantages(torch.where(MASK, rewards, 7.0), torch.where(MASK, values, -3.0), MASK, 0.9, 0.9)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) and not one[~MASK].any()


def test_tokens_of_tools_between_those_of_the_policy_change_nothing():
    rewards, values = draw()
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    results = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    for row, chosen in enumerate(mask):
        alone = rewards[row : row + 1, chosen], values[row : row + 1, chosen]
        expected = generalized_advantages(*alone, torch.ones_like(alone[0]).bool(), 0.9, 0.8)
        for result, one in zip(results, expected, strict=True):
            torch.testing.assert_close(result[row, chosen], one[0])
            assert not result[row, ~chosen].any()


def test_with_lambda_1_the_return_does_not_depend_on_the_critic():
    rewards, values = draw()
    _, returns = generalized_advantages(rewards, values, MASK, 1.0, 1.0)
    _, of_another = generalized_advantages(rewards, values + 5, MASK, 1.0, 1.0)
    torch.testing.assert_close(returns, of_another)


def test_a_perfect_critic_leaves_no_advantage():
    rewards, _ = draw()
    rewards = rewards * MASK
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, _ = generalized_advantages(rewards, values, MASK, 1.0, 0.3)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-6, rtol=0)
