"""A small network that names the game from what is seen, and from that the experts that will be needed.

Shapes: batch; games; layers; experts of a layer; frames are `(batch, stack, side, side)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pixels that are averaged to one along each side: a game is told by its looks, not by where things are.
POOLING = 4


class EnvironmentDetector(nn.Module):
    """
    Names the game of frames, and remembers which experts each game uses.

    It learns beside the agent, to which none of its gradient goes, from the games' numbers; acting, it needs none.

    Args:
        num_games (`int`), num_layers (`int`), num_experts (`int`): What there is.
        channels (`int`): Width of its convolution.
        frame_size (`int`): Pixels along one side.
        decay (`float`, *optional*, defaults to 0.9): Of the averages of use, at each call of `remember`.
    """

    def __init__(
        self, num_games: int, num_layers: int, num_experts: int, channels: int, frame_size: int, decay: float = 0.9
    ):
        super().__init__()
        side = (frame_size // POOLING - 5) // 2 + 1
        self.convolution = nn.Conv2d(1, channels, 5, 2)
        self.classifier = nn.Linear(channels * side * side, num_games)
        self.decay = decay
        # Share of a layer's tokens that each expert gets: in each game, and lately in whatever game.
        self.register_buffer("usage", torch.zeros(num_games, num_layers, num_experts))
        self.register_buffer("recent", torch.zeros(num_layers, num_experts))
        self.register_buffer("last_belief", torch.zeros(num_games))

    def forward(self, frames: Tensor) -> Tensor:
        """Logits `(batch, games)` of uint8 frames, of which the last of each stack is looked at."""
        last = frames[:, -1:].to(self.classifier.weight.dtype) / 255
        features = F.gelu(self.convolution(F.avg_pool2d(last, POOLING)))
        return self.classifier(features.flatten(1))

    def loss(self, frames: Tensor, games: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, and the share that is named rightly, for the games' numbers `(batch,)`."""
        logits = self(frames)
        return F.cross_entropy(logits, games), (logits.argmax(dim=-1) == games).float().mean()

    @torch.no_grad()
    def remember(self, layer: int, experts: Tensor, games: Tensor) -> None:
        """Counts the experts `(tokens, top_k)` of one layer and call, of tokens of the games `(tokens,)`."""
        num_experts = self.usage.shape[-1]
        for game in games.unique().tolist():
            share = torch.bincount(experts[games == game].flatten(), minlength=num_experts) / max(experts.numel(), 1)
            self.usage[game, layer].lerp_(share.to(self.usage.dtype), 1 - self.decay)
        share = torch.bincount(experts.flatten(), minlength=num_experts) / max(experts.numel(), 1)
        self.recent[layer].mul_(0.5).add_(share.to(self.recent.dtype), alpha=0.5)

    @torch.no_grad()
    def predict_experts(self, frames: Tensor, count: int) -> Tensor:
        """
        The experts that each layer will need.

        What a game used counts by how sure its name is; what was used lately by how much the game is still the same.

        Args:
            frames (`torch.Tensor`): What is seen now.
            count (`int`): Experts of a layer at most.

        Returns:
            `torch.Tensor`: `(layers, count)`, the likeliest first; -1 where no expert has been used yet.
        """
        belief = self(frames).softmax(dim=-1).mean(dim=0)
        same = torch.dot(belief, self.last_belief)
        self.last_belief.copy_(belief)
        return _likeliest(torch.einsum("g,gle->le", belief, self.usage) + same * self.recent, count)

    @torch.no_grad()
    def recent_experts(self, count: int) -> Tensor:
        """The experts that were used last, `(layers, count)` as above: what recency alone would bring."""
        return _likeliest(self.recent, count)


def _likeliest(scores: Tensor, count: int) -> Tensor:
    values, experts = scores.topk(min(count, scores.shape[-1]), dim=-1)
    return torch.where(values > 0, experts, -1)


__all__ = ["EnvironmentDetector"]
