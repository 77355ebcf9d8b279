"""Advantages and returns of completions, and of what was played in games.

Shapes: batch; time, the tokens of a completion; a mask is true for tokens that count.
"""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """
    Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438, equation 16) of completions that end.

    With `delta_t = r_t + gamma V_{t+1} - V_t`, it is `A_t = delta_t + gamma lam A_{t+1}`; nothing comes after the last
    token. What is masked, such as the answer of a tool, is skipped: `t + 1` is the next token that counts.

    Args:
        rewards, values (`torch.Tensor` of shape `(batch, time)`): Of each token, and of the state before it.
        mask (`torch.Tensor` of shape `(batch, time)`): True for the tokens that the policy chose.
        gamma (`float`): Discount of a token.
        lam (`float`): 0 trusts the next state's value, 1 trusts nothing but rewards.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages, and returns `A_t + V_t`, both `(batch, time)`, 0 where masked.
    """
    counts = mask.bool()
    advantages = torch.zeros_like(values)
    following = later_value = values.new_zeros(len(values))
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * later_value - values[:, step]
        advantages[:, step] = following = torch.where(counts[:, step], delta + gamma * lam * following, following)
        later_value = torch.where(counts[:, step], values[:, step], later_value)
    return advantages * counts, (advantages + values) * counts


def rollout_advantages(
    rewards: Tensor, values: Tensor, last_values: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """
    Generalized advantage estimation of steps in environments that begin anew when an episode ends.

    Args:
        rewards (`torch.Tensor` of shape `(time, envs)`): Of each step; where an episode was truncated, with the
            discounted value of what it saw last.
        values (`torch.Tensor` of shape `(time, envs)`): Of the state before each step.
        last_values (`torch.Tensor` of shape `(envs,)`): Of the state after the last one.
        ended (`torch.Tensor` of shape `(time, envs)`): Whether the step has ended its episode.
        gamma (`float`), lam (`float`): As in [`generalized_advantages`].

    Returns:
        `torch.Tensor`: Advantages `(time, envs)`; returns are their sum with `values`.
    """
    advantages, goes_on = torch.zeros_like(values), (~ended).to(values.dtype)
    following = torch.zeros_like(last_values)
    for step in reversed(range(len(values))):
        later_value = last_values if step == len(values) - 1 else values[step + 1]
        delta = rewards[step] + gamma * later_value * goes_on[step] - values[step]
        following = advantages[step] = delta + gamma * lam * goes_on[step] * following
    return advantages
