"""Gradients of several processes: dense ones are averaged, and those of the experts that have one are exchanged."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .agent_experts import AgentExperts


def exchange_gradients(experts: AgentExperts) -> None:
    """
    Gives every process the mean over all processes of each gradient, as of one with the batches of all.

    An expert that some process has a gradient of gets one in every process. Experts without stay without, so that
    lazy updates leave them alone everywhere.

    Args:
        experts ([`AgentExperts`]): After the backward pass.
    """
    if not _several():
        return
    if not experts.is_lazy:
        mean_over_processes([*experts.rest, *experts.fused])
        return
    mean_over_processes(experts.rest)
    own = experts.gradients()
    keys: list[list] = [None] * dist.get_world_size()
    dist.all_gather_object(keys, sorted(own))
    for layer, expert in sorted({key for of_process in keys for key in of_process}):
        parts = own.get((layer, expert)) or experts.add_empty_gradient(layer, expert)
        _average(list(parts.values()))


def mean_over_processes(parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients of parameters that every process has."""
    if not _several():
        return
    for parameter in parameters:
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    _average([parameter.grad for parameter in parameters if parameter.grad is not None])


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _average(gradients: list[Tensor]) -> None:
    # One message instead of one for each.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
