"""What an agent keeps of earlier games: frames to tell them apart, steps to replay, and which weights mattered.

Shapes: games; segments and their steps as in game_rollout.py; frames `(frames, 1, side, side)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling import TieredMoeForActorCritic, TieredMoeState
from .game_rollout import Segments


class DetectorMemory:
    """
    Frames of each game that was met, which the detector goes over so as not to take every game for the last one.

    A sample of all that was seen of a game (Vitter 1985, algorithm R).

    Args:
        num_games (`int`): Games.
        capacity (`int`): Frames of each.
        generator (`torch.Generator`): Draws them.
    """

    def __init__(self, num_games: int, capacity: int, generator: torch.Generator):
        self.capacity, self.generator = capacity, generator
        self.frames: list[Tensor | None] = [None] * num_games
        self.seen = [0] * num_games

    def add(self, frames: Tensor, games: Tensor) -> None:
        """Takes frames uint8 `(frames, stack, side, side)` of the games `(frames,)`."""
        for frame, game in zip(frames[:, -1:].cpu(), games.tolist(), strict=True):
            if self.frames[game] is None:
                self.frames[game] = frame[None].clone()
            elif len(self.frames[game]) < self.capacity:
                self.frames[game] = torch.cat([self.frames[game], frame[None]])
            else:
                place = int(torch.randint(self.seen[game] + 1, (1,), generator=self.generator))
                if place < self.capacity:
                    self.frames[game][place] = frame
            self.seen[game] += 1

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Frames and games, as many of each game that was met, about `size` in all."""
        met = [game for game, frames in enumerate(self.frames) if frames is not None]
        each = max(1, size // len(met))
        parts, games = [], []
        for game in met:
            rows = torch.randint(len(self.frames[game]), (each,), generator=self.generator)
            parts.append(self.frames[game][rows])
            games += [game] * each
        return torch.cat(parts), torch.tensor(games)

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by names, for safetensors."""
        kept = {f"{game}": frames for game, frames in enumerate(self.frames) if frames is not None}
        return kept | {"seen": torch.tensor(self.seen)}

    def load_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Takes what [`~DetectorMemory.to_tensors`] gave; it stays on the host, whatever the `device`."""
        self.seen = tensors["seen"].tolist()
        self.frames = [tensors.get(f"{game}") for game in range(len(self.seen))]


class ReplayMemory:
    """
    Segments of earlier games with what the agent did and thought there, as in CLEAR (Rolnick et al. 2019,
    arXiv:1811.11682): the agent is held to that policy and those values.

    Args:
        capacity (`int`): Segments of each game.
        generator (`torch.Generator`): Draws them.
    """

    def __init__(self, capacity: int, generator: torch.Generator):
        self.capacity, self.generator = capacity, generator
        # Of each game: inputs, state, `log_probs` of all actions and `values`, by names.
        self.kept: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def keep(self, agent: TieredMoeForActorCritic, segments: Segments) -> None:
        """Takes segments of games that end, with what the agent thinks of them now."""
        games = segments.inputs["environment_ids"]
        for game in games.unique().tolist():
            rows = (games == game).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=self.generator)[: self.capacity].to(rows.device)]
            chosen = segments.select(rows)
            outputs = agent(**chosen.inputs, state=chosen.state)
            kept = {"log_probs": outputs.logits.log_softmax(dim=-1), "values": outputs.values}
            kept |= {f"inputs.{name}": part for name, part in chosen.inputs.items()}
            self.kept[game] = kept | {f"state.{name}": part for name, part in chosen.state.to_tensors().items()}

    def loss(self, agent: TieredMoeForActorCritic, size: int, current: set[int]) -> Tensor | None:
        """How far the agent is from what it was in `size` segments of games other than `current`; `None` without."""
        games = [game for game in self.kept if game not in current]
        if not games:
            return None
        game = games[int(torch.randint(len(games), (1,), generator=self.generator))]
        kept = self.kept[game]
        rows = torch.randint(len(kept["values"]), (size,), generator=self.generator).to(kept["values"].device)
        inputs = _prefixed(kept, "inputs.", rows)
        outputs = agent(**inputs, state=TieredMoeState.from_tensors(_prefixed(kept, "state.", rows)))
        log_probs = outputs.logits.log_softmax(dim=-1)
        possible = agent.action_masks[outputs.environment_ids]
        # Of actions that a game lacks, both are as low as numbers go, and their difference says nothing.
        difference = torch.where(possible, kept["log_probs"][rows] - log_probs, 0.0)
        divergence = (kept["log_probs"][rows].exp() * difference).sum(dim=-1).mean()
        return divergence + 0.5 * F.mse_loss(outputs.values, kept["values"][rows])

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by names, for safetensors."""
        return {f"{game}/{name}": part for game, kept in self.kept.items() for name, part in kept.items()}

    def load_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Takes what [`~ReplayMemory.to_tensors`] gave to the `device`."""
        self.kept = {}
        for key, part in tensors.items():
            game, _, name = key.partition("/")
            self.kept.setdefault(int(game), {})[name] = part.to(device)


class ElasticWeights:
    """
    Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796), with one running sum of importances for
    all games (Schwarz et al. 2018, arXiv:1805.06370), of all that is not an expert.

    Args:
        parameters (`dict[str, nn.Parameter]`): By name.
        decay (`float`, *optional*, defaults to 0.9): Of the importances, with each game.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float = 0.9):
        self.parameters, self.decay = parameters, decay
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def consolidate(self, agent: TieredMoeForActorCritic, segments: Segments, size: int = 16) -> None:
        """Weighs the parameters by the squared gradients of the log-probabilities of actions, one segment each."""
        sums = {name: torch.zeros_like(part) for name, part in self.parameters.items()}
        rows = range(min(size, len(segments)))
        for row in rows:
            one = segments.select(torch.tensor([row], device=segments.actions.device))
            outputs = agent(**one.inputs, state=one.state)
            log_probs = outputs.logits.log_softmax(dim=-1).gather(-1, one.actions.unsqueeze(-1))
            log_probs.mean().backward()
            for name, part in self.parameters.items():
                if part.grad is not None:
                    sums[name] += part.grad.square() / len(rows)
                    part.grad = None
        # Relative to the largest, so that games count alike whatever the scale of their gradients.
        largest = max(part.max() for part in sums.values()).clamp(min=1e-30)
        for name, part in self.parameters.items():
            before = self.importance.get(name, torch.zeros_like(part))
            self.importance[name] = self.decay * before + sums[name] / largest
            self.anchor[name] = part.detach().clone()

    def penalty(self) -> Tensor | None:
        """Half the weighted squared distance from the weights after the last game; `None` before the first ends."""
        if not self.anchor:
            return None
        return 0.5 * sum(
            (self.importance[name] * (part - self.anchor[name]).square()).sum()
            for name, part in self.parameters.items()
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by names, for safetensors."""
        named = {f"importance/{name}": part for name, part in self.importance.items()}
        return named | {f"anchor/{name}": part for name, part in self.anchor.items()}

    def load_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Takes what [`~ElasticWeights.to_tensors`] gave to the `device`."""
        for key, part in tensors.items():
            kind, _, name = key.partition("/")
            (self.importance if kind == "importance" else self.anchor)[name] = part.to(device)


def _prefixed(tensors: dict[str, Tensor], prefix: str, rows: Tensor) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part[rows] for name, part in tensors.items() if name.startswith(prefix)}
