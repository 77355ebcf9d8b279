"""Experts that learn by what each of their maps sees for itself, an experiment; all else learns by backpropagation.

A rule takes the place of the loss's gradient of an expert's weights. That gradient still flows through the experts, to
the layers and routers below them, and optimizer, store, freezing and checkpoints are as with backpropagation.

Shapes: tokens of an expert; in, out of a map.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .agent_experts import AgentExperts
from .game_rollout import Segments

# Of an expert, in their order.
_MAPS = ("up_proj", "down_proj")


def oja_update(weight: Tensor, inputs: Tensor, outputs: Tensor, factors: Tensor | None = None) -> Tensor:
    """
    Oja's subspace rule: what is active together is joined, and what the outputs already tell is taken off the inputs.

    One output converges to the first principal component of the inputs, with unit norm (Oja 1982, J. Math. Biology
    15); several linear ones to an orthonormal basis of as many components (Oja 1989, Int. J. Neural Systems 1).

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): Of the map.
        inputs, outputs (`torch.Tensor` of shape `(tokens, in)` and `(tokens, out)`): Its activity.
        factors (`torch.Tensor` of shape `(tokens,)`, *optional*): A third factor, such as reward beyond what was
            expected, whose sign says whether a token's activity is joined or parted (Fremaux and Gerstner 2016,
            Frontiers in Neural Circuits 9). What is taken off keeps its sign, or weights would grow without bound.

    Returns:
        `torch.Tensor`: The change of the weight, a sum over tokens.
    """
    joined = outputs if factors is None else outputs * factors[:, None]
    told = outputs if factors is None else outputs * factors.abs()[:, None]
    return joined.T @ inputs - told.T @ outputs @ weight


def forward_forward_loss(real: Tensor, fake: Tensor) -> Tensor:
    """
    How far a map is from telling real data from fake by its goodness, the sum of its squared outputs (Hinton 2022,
    arXiv:2212.13345): that of real tokens should be above the number of outputs, that of fake ones below.

    Args:
        real, fake (`torch.Tensor` of shape `(tokens, out)`): Outputs.

    Returns:
        `torch.Tensor`: A sum over tokens.
    """
    above, below = (outputs.square().sum(dim=-1) - outputs.shape[-1] for outputs in (real, fake))
    return (F.softplus(-above) + F.softplus(below)).sum()


@contextmanager
def expert_inputs(modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Notes what each layer's experts are called with in a block: `(tokens, hidden)` and indices `(tokens, top_k)`."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given: seen.append((given[0].detach(), given[1])))
        for module in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def replace_gradients(
    experts: AgentExperts,
    rule: str,
    seen: Sequence[tuple[Tensor, Tensor]],
    batch: Segments,
    advantages: Tensor,
    generator: torch.Generator,
) -> None:
    """
    Puts a rule's gradients in the place of those that backpropagation has given the experts that tokens went to.

    - `hebbian`: [`oja_update`] of both maps, of the tokens as they are.
    - `three_factor`: the same with the advantage of a token's step, so that experts join what preceded good actions.
    - `forward_forward`: [`forward_forward_loss`] of both maps, whose inputs are scaled to one length, so that no map
      sees the goodness of the one before it. Real are the steps that were played. Fake are the same frames with
      previous actions and rewards of other steps of the batch: all parts are as common as in real ones, and only who
      knows what an action does in this game can tell. Hinton joins a wrong label to an image likewise.
    - `none`: no gradients, a control: experts stay as they were drawn.

    Gradients are sums over an expert's tokens, divided by the tokens of the batch, as those of a mean loss.

    Args:
        experts ([`AgentExperts`]): After the backward pass.
        rule (`str`): Another one than backpropagation.
        seen (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): By [`expert_inputs`], of the pass that is learned from.
        batch ([`Segments`]): What that pass was of.
        advantages (`torch.Tensor` of shape `(segments, segment)`): Of its steps, normalised.
        generator (`torch.Generator`): Draws the fake steps.
    """
    fake = _fake_inputs(experts, batch, generator) if rule == "forward_forward" else None
    factors = None
    if rule == "three_factor":
        factors = advantages.repeat_interleave(experts.agent.config.tokens_per_step, dim=1).flatten()
    for (layer, expert), gradients in experts.gradients().items():
        tokens, indices = seen[layer]
        own = (indices == expert).any(dim=-1)
        activate = experts.modules[layer].act_fn
        weights = experts.weights(layer, expert)
        up, down = (weights[name].to(tokens.device) for name in _MAPS)
        if rule == "none":
            changes = torch.zeros_like(up), torch.zeros_like(down)
        elif rule == "forward_forward":
            changes = _forward_forward_changes(up, down, activate, tokens[own], fake[layer][own])
        else:
            changes = _oja_changes(up, down, activate, tokens[own], None if factors is None else factors[own])
        for name, change in zip(_MAPS, changes, strict=True):
            gradients[name].copy_(change / -len(tokens))


@torch.no_grad()
def _oja_changes(up: Tensor, down: Tensor, activate, tokens: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    inner = activate(F.linear(tokens, up))
    return oja_update(up, tokens, inner, factors), oja_update(down, inner, F.linear(inner, down), factors)


def _forward_forward_changes(up: Tensor, down: Tensor, activate, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
    up, down = up.detach().requires_grad_(), down.detach().requires_grad_()
    inner = [activate(F.linear(_unit(tokens), up)) for tokens in (real, fake)]
    # Each map learns alone: no gradient leads from the second to the first.
    outer = [F.linear(_unit(part.detach()), down) for part in inner]
    loss = forward_forward_loss(*inner) + forward_forward_loss(*outer)
    return tuple(-part for part in torch.autograd.grad(loss, (up, down)))


def _unit(tokens: Tensor) -> Tensor:
    """Tokens whose mean square is 1, so that only their direction is left."""
    return F.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)


@torch.no_grad()
def _fake_inputs(experts: AgentExperts, batch: Segments, generator: torch.Generator) -> list[Tensor]:
    """What each layer's experts, `(tokens, hidden)`, would see if actions and rewards were those of other steps."""
    inputs = dict(batch.inputs)
    actions = inputs["previous_actions"]
    order = torch.randperm(actions.numel(), generator=generator).to(actions.device)
    for name in ("previous_actions", "rewards"):
        inputs[name] = inputs[name].flatten()[order].view_as(inputs[name])
    with expert_inputs(experts.modules) as seen:
        experts.agent(**inputs, state=batch.state)
    return [tokens for tokens, _ in seen]
