"""Cross-entropy of a language-model head that never holds the logits of all tokens at once."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from torch.nn import LinearCrossEntropyOptions
except ImportError:  # torch before 2.13
    LinearCrossEntropyOptions = None


def linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Sum of the cross-entropies of `hidden_states @ weight.T` in float32; labels of -100 count nothing.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden)`): Final hidden states.
        weight (`torch.Tensor` of shape `(vocab, hidden)`): Weight of the head.
        labels (`torch.Tensor` of shape `(tokens,)`): Next token of each position.
        chunk_size (`int`): Tokens whose logits exist at once.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        chunks = zip(hidden_states.split(chunk_size), labels.split(chunk_size), strict=True)
        return sum(_cross_entropy_sum(chunk, weight, target) for chunk, target in chunks)
    # The fused operator computes the gradients in its forward pass; compiled or with bfloat16 on a CPU, where it
    # would emulate each product, recomputing the logits in the backward pass is the better way.
    low_precision_cpu = device == "cpu" and hidden_states.dtype != torch.float32
    if LinearCrossEntropyOptions is None or torch.compiler.is_compiling() or low_precision_cpu:
        chunks = zip(hidden_states.split(chunk_size), labels.split(chunk_size), strict=True)
        return sum(
            checkpoint(_cross_entropy_sum, chunk, weight, target, use_reentrant=False) for chunk, target in chunks
        )
    options = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=min(chunk_size, len(labels)))
    loss = F.linear_cross_entropy(hidden_states, weight, labels, reduction="sum", ignore_index=-100, options=options)
    return loss.float()


def _cross_entropy_sum(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden_states, weight).float(), labels, reduction="sum", ignore_index=-100)
