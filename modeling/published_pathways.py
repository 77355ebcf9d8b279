"""Loads weights in the layout of the published code, https://github.com/jackcook/mixture-of-pathways."""

import torch

from .modeling_mop import MopForActionPrediction

GRU_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@torch.no_grad()
def load_published_state_dict(policy: MopForActionPrediction, state_dict: dict[str, torch.Tensor]):
    """Copies published weights into a policy whose configuration fits them.

    That is `encoder="features"`, `expert_norm="batchnorm"`, `recurrence="published"`, and for the multi-task models
    `num_tasks=82, task_embedding_dim=16, input_dim=33`.

    Args:
        policy ([`MopForActionPrediction`]): The policy, changed in place.
        state_dict (`dict[str, torch.Tensor]`): The weights of the published `Model`, of any version.

    Raises:
        ValueError: If a weight is missing or left over, or has another shape.
    """
    remaining = {name.replace("sparse_moe", "hmoe"): value for name, value in state_dict.items()}

    def take(name: str) -> torch.Tensor:
        if name not in remaining:
            raise ValueError(f"The published weights lack {name!r}, which a policy of this configuration needs.")
        return remaining.pop(name)

    def fill(parameter: torch.Tensor, name: str):
        value = take(name)
        if parameter.shape != value.shape:
            raise ValueError(
                f"{name!r} has the shape {tuple(value.shape)}, but this policy's is {tuple(parameter.shape)}."
            )
        parameter.copy_(value)

    def fill_linear(module: torch.nn.Module, name: str):
        fill(module.weight, f"{name}.weight")
        fill(module.bias, f"{name}.bias")

    if policy.config.task_embedding_dim:
        fill(policy.model.task_embedding.weight, "embedding.weight")
    fill_linear(policy.model.input_projection, "input_layer")
    for layer, block in enumerate(policy.model.blocks):
        prefix = f"blocks.{layer}.hmoe"
        experts = [f"{prefix}.experts.{index}" for index, size in enumerate(block.sizes) if size]
        for index, name in enumerate([f"{prefix}.router", *experts]):
            weights = block.gru.gru_weights(index)
            for weight, part in zip(weights, GRU_NAMES, strict=True):
                fill(weight, f"{name}.rnn.{part}")
            block.gru.load_gru_weights(index, weights)
        fill_linear(block.router, f"{prefix}.router.output_layer")
        for index, (name, output) in enumerate(
            zip(experts, block.output_weight.split(block.unit_sizes, dim=1), strict=True)
        ):
            fill(output, f"{name}.output_layer.weight")
            fill(block.output_bias[index], f"{name}.output_layer.bias")
            _fill_batch_norm(block, index, name, fill, take)
        fill_linear(block.norm, f"blocks.{layer}.ln")
    fill_linear(policy.action_head, "output_layer")
    if remaining:
        raise ValueError(f"The published weights have parts that this policy lacks: {', '.join(sorted(remaining))}.")


def _fill_batch_norm(block, index: int, name: str, fill, take):
    for part in ("weight", "bias", "running_mean", "running_var"):
        fill(getattr(block.batch_norm, part).split(block.unit_sizes)[index], f"{name}.batchnorm.{part}")
    block.batch_norm.num_batches_tracked.copy_(take(f"{name}.batchnorm.num_batches_tracked"))


__all__ = ["load_published_state_dict"]
