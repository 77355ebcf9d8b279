"""The top-k router and its losses, shared by every model here.

Shapes: tokens = batch * seq, experts, slots = experts per token.
"""

import torch
import torch.nn.functional as F
from torch import nn


class TopKRouter(nn.Module):
    """Scores all experts in float32 and picks the best few of each token.

    Args:
        hidden_size (`int`): Width of the tokens.
        num_experts (`int`): Number of experts.
        top_k (`int`): Experts per token.
        score_function (`str`, *optional*, defaults to `"softmax"`): `softmax` over the experts, or `sigmoid` of each.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether the weights of a token sum to one. Ignored for `top_k` 1, where the weight would be exactly one and
            the language-modelling loss would give the router no gradient.
        bias_balancing (`bool`, *optional*, defaults to `False`):
            Whether a bias per expert, outside of the gradient, steers which experts are picked but not how much they
            count (DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        score_function: str = "softmax",
        normalize: bool = True,
        bias_balancing: bool = False,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.normalize = normalize and top_k > 1
        self.bias_balancing = bias_balancing
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        if bias_balancing:
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))
            # Whole numbers, because a model in bfloat16 could not count beyond 256.
            self.register_buffer("tokens_per_expert", torch.zeros(num_experts, dtype=torch.long), persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes `hidden_states` of shape `(tokens, hidden)`.

        Args:
            hidden_states (`torch.Tensor`): The tokens.
            token_mask (`torch.Tensor` of shape `(tokens,)`, *optional*): True for real tokens, false for padding.

        Returns:
            Logits `(tokens, experts)` in float32, weights `(tokens, slots)` and experts `(tokens, slots)`.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        scores = router_scores(logits, self.score_function)
        preference = scores.detach() + self.e_score_correction_bias if self.bias_balancing else scores
        indices = preference.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.bias_balancing and self.training:
            self._count(indices, token_mask)
        return logits, weights.to(hidden_states.dtype), indices

    @torch.no_grad()
    def _count(self, indices: torch.Tensor, token_mask: torch.Tensor | None):
        ones = torch.ones_like(indices)
        if token_mask is not None:
            ones = ones * token_mask.unsqueeze(-1)
        self.tokens_per_expert.scatter_add_(0, indices.flatten(), ones.flatten())

    @torch.no_grad()
    def update_bias(self, rate: float):
        """Moves the bias of each expert by `rate` towards an even load, over the tokens of all processes since the
        last update; call it once per optimizer step."""
        counts = self.tokens_per_expert.float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.e_score_correction_bias += rate * torch.sign(counts.mean() - counts)
        self.tokens_per_expert.zero_()


def router_scores(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Scores `(tokens, experts)` of the router's logits: `softmax` over the experts, or `sigmoid` of each."""
    return logits.softmax(dim=-1) if score_function == "softmax" else logits.sigmoid()


def balancing_loss(
    logits: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor, score_function: str = "softmax"
) -> torch.Tensor:
    """Load-balancing loss of each sequence (Fedus et al. 2021, arXiv 2101.03961, equation 4), `(batch,)`.

    Switch's loss of a batch depends on which sequences happen to share it. Taken per sequence, as in DeepSeek-V3
    (arXiv 2412.19437, equation 17), it is the same however the sequences are split over batches and processes.
    It is the number of slots if load and scores are even, and grows up to the number of experts.

    Args:
        logits (`torch.Tensor` of shape `(batch * seq, experts)`): Router logits.
        indices (`torch.Tensor` of shape `(batch * seq, slots)`): Experts that were picked.
        mask (`torch.Tensor` of shape `(batch, seq)`): True for real tokens; padding counts nowhere.
        score_function (`str`, *optional*, defaults to `"softmax"`): As in [`TopKRouter`].
    """
    num_experts = logits.shape[-1]
    scores = router_scores(logits.float(), score_function)
    if score_function == "sigmoid":
        scores = scores / scores.sum(dim=-1, keepdim=True)
    weight = mask.to(scores.dtype).unsqueeze(-1)
    tokens = weight.sum(dim=1).clamp(min=1)  # (batch, 1)
    picked = F.one_hot(indices, num_experts).sum(dim=1).to(scores.dtype)
    load = (picked.view(*mask.shape, num_experts) * weight).sum(dim=1) / tokens
    importance = (scores.view(*mask.shape, num_experts) * weight).sum(dim=1) / tokens
    return num_experts * (load * importance).sum(dim=-1)


def z_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared log-partition of the router per sequence (Zoph et al. 2022, arXiv 2202.08906), `(batch,)`.

    Args:
        logits (`torch.Tensor` of shape `(batch * seq, experts)`): Router logits.
        mask (`torch.Tensor` of shape `(batch, seq)`): True for real tokens.
    """
    squares = logits.float().logsumexp(dim=-1).square().view(mask.shape) * mask
    return squares.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
