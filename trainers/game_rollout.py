"""Playing some steps in all environments, and cutting them into segments to learn from.

Shapes: envs; time, steps of a rollout; segment, steps of one; segments = envs * time / segment.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..modeling import TieredMoeForActorCritic, TieredMoeState
from ..modeling.modeling_tiered_moe import TieredMoeActorCriticOutput
from .advantages import rollout_advantages
from .atari import GameEnvironments, Step


@dataclass
class Segments:
    """
    Segments to learn from; each field has a row for each, `(segments, segment, ...)`.

    Args:
        inputs (`dict[str, torch.Tensor]`): What the agent's forward takes of them.
        state ([`TieredMoeState`]): Before each.
        actions, log_probs, values (`torch.Tensor`): What was done, and how likely and good that was.
        advantages, returns (`torch.Tensor`): What came of it.
    """

    inputs: dict[str, Tensor]
    state: TieredMoeState
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.actions)

    def select(self, rows: Tensor) -> "Segments":
        """Some of them."""
        inputs = {name: part[rows] for name, part in self.inputs.items()}
        rest = (self.actions, self.log_probs, self.values, self.advantages, self.returns)
        return Segments(inputs, self.state.select(rows), *(part[rows] for part in rest))


@dataclass
class Memory:
    """
    What an agent that plays has to remember from step to step; the same fields are in a checkpoint.

    Args:
        frames (`torch.ByteTensor` of shape `(envs, 4, 84, 84)`): What is seen now.
        actions, rewards, starts (`torch.Tensor` of shape `(envs,)`): What was done, the clipped reward of that, and
            whether a new episode has begun.
        state ([`TieredMoeState`]): Of the agent.
        returns (`torch.Tensor` of shape `(envs,)`): Raw return so far of each episode.
    """

    frames: Tensor
    actions: Tensor
    rewards: Tensor
    starts: Tensor
    state: TieredMoeState
    returns: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by names, for safetensors."""
        names = ("frames", "actions", "rewards", "starts", "returns")
        own = {name: getattr(self, name).contiguous() for name in names}
        return own | {f"state.{name}": part for name, part in self.state.to_tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Memory":
        """What [`~Memory.to_tensors`] gave."""
        own = {name: part for name, part in tensors.items() if not name.startswith("state.")}
        state = {name.removeprefix("state."): part for name, part in tensors.items() if name.startswith("state.")}
        return cls(state=TieredMoeState.from_tensors(state), **own)


class GamePlayer:
    """
    Plays with an agent, without gradients.

    Args:
        agent ([`TieredMoeForActorCritic`]): Who plays.
        environments ([`GameEnvironments`]): Where.
        game_ids (`torch.Tensor` of shape `(envs,)`): Number of each environment's game in the agent's configuration.
        generator (`torch.Generator`): Draws the actions.
        device (`torch.device`): Of the agent.
    """

    def __init__(
        self,
        agent: TieredMoeForActorCritic,
        environments: GameEnvironments,
        game_ids: Tensor,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ):
        self.agent, self.environments, self.game_ids = agent, environments, game_ids.to(device)
        self.generator, self.device = generator, device
        self.finished: list[tuple[int, float]] = []
        # Of each step of the last rollout, the experts of its tokens by layer.
        self.routes: list[tuple[Tensor, ...]] = []
        self.memory: Memory | None = None

    def begin(self) -> None:
        """Begins new episodes everywhere."""
        num_envs = self.environments.num_envs
        self.memory = Memory(
            torch.from_numpy(self.environments.reset()),
            torch.zeros(num_envs, dtype=torch.long, device=self.device),
            torch.zeros(num_envs, device=self.device),
            torch.ones(num_envs, dtype=torch.bool, device=self.device),
            TieredMoeState.initial(self.agent.config, num_envs, self.device),
            torch.zeros(num_envs),
        )

    def inputs(self) -> dict[str, Tensor]:
        """What the agent's forward takes of the step that comes next, `(envs, 1, ...)`."""
        memory = self.memory
        parts = {"frames": memory.frames.to(self.device), "previous_actions": memory.actions}
        parts |= {"rewards": memory.rewards, "starts": memory.starts}
        return {name: part[:, None] for name, part in parts.items()} | {"environment_ids": self.game_ids}

    @torch.no_grad()
    def play(self, num_steps: int, segment_len: int, gamma: float, gae_lambda: float) -> Segments:
        """Plays `num_steps` in each environment; the returns of episodes that end are added to `finished`."""
        kept: dict[str, list[Tensor]] = {}
        states = []
        self.routes = []
        for step in range(num_steps):
            if step % segment_len == 0:
                states.append(self.memory.state)
            for name, part in self._step(gamma).items():
                kept.setdefault(name, []).append(part)
        last_values = self.agent(**self.inputs(), state=self.memory.state).values[:, 0]
        # (time, envs, ...) each
        parts = {name: torch.stack(steps) for name, steps in kept.items()}
        advantages = rollout_advantages(
            parts["gained"], parts["values"], last_values, parts.pop("ended"), gamma, gae_lambda
        )
        parts |= {"advantages": advantages, "returns": advantages + parts["values"]}
        del parts["gained"]
        cut = {name: self._cut(part, segment_len) for name, part in parts.items()}
        names = ("frames", "previous_actions", "rewards", "starts")
        inputs = {name: cut.pop(name) for name in names}
        # In the order of memory in which the encoder reads them, once and not in each epoch.
        inputs["frames"] = inputs["frames"].movedim(2, -1).contiguous().movedim(-1, 2)
        inputs["environment_ids"] = self.game_ids.repeat(num_steps // segment_len)
        return Segments(inputs, TieredMoeState.stack(states), **cut)

    def remember_routes(self) -> None:
        """Tells the detector which experts the last rollout has used."""
        tokens = self.agent.config.tokens_per_step
        games = self.game_ids.repeat_interleave(tokens).repeat(len(self.routes))
        for layer, experts in enumerate(zip(*self.routes, strict=True)):
            self.agent.model.detector.remember(layer, torch.cat(experts), games)

    def used_experts(self) -> list[set[int]]:
        """The experts that the last rollout has used, by layer."""
        return [set(torch.cat(experts).unique().tolist()) for experts in zip(*self.routes, strict=True)]

    def act(self, tell_game: bool = True, deterministic: bool = False) -> tuple[Step, tuple[Tensor, ...]]:
        """
        Takes one step everywhere.

        Args:
            tell_game (`bool`, *optional*, defaults to `True`): Whether the agent is told the game.
            deterministic (`bool`, *optional*, defaults to `False`): The likeliest actions, or drawn ones.

        Returns:
            The step, and the experts `(envs * tokens, top_k)` of each layer.
        """
        outputs = self._outputs(tell_game)
        if deterministic:
            actions = outputs.logits[:, 0].argmax(dim=-1)
        else:
            actions = self._draw(outputs.logits[:, 0].log_softmax(dim=-1))
        return self._advance(actions, outputs.state), outputs.router_indices

    def _outputs(self, tell_game: bool = True) -> TieredMoeActorCriticOutput:
        inputs = self.inputs()
        if not tell_game:
            inputs["environment_ids"] = None
        return self.agent(**inputs, state=self.memory.state, output_router_indices=True)

    def _draw(self, log_probs: Tensor) -> Tensor:
        return torch.multinomial(log_probs.exp().cpu(), 1, generator=self.generator)[:, 0].to(self.device)

    def _advance(self, actions: Tensor, state: TieredMoeState) -> Step:
        result = self.environments.step(actions.cpu().numpy())
        clipped = torch.from_numpy(np.sign(result.rewards)).to(self.device)
        ended = torch.from_numpy(result.terminated | result.truncated).to(self.device)
        returns = self.memory.returns + torch.from_numpy(result.rewards)
        over = torch.from_numpy(result.over)
        if over.any():
            self.finished += zip(self.game_ids.cpu()[over].tolist(), returns[over].tolist(), strict=True)
        frames = torch.from_numpy(result.frames)
        self.memory = Memory(frames, actions, clipped, ended, state, returns.masked_fill(over, 0.0))
        return result

    def _step(self, gamma: float) -> dict[str, Tensor]:
        inputs, outputs = self.inputs(), self._outputs()
        self.routes.append(outputs.router_indices)
        log_probs = outputs.logits[:, 0].log_softmax(dim=-1)
        actions = self._draw(log_probs)
        result = self._advance(actions, outputs.state)
        gained = self.memory.rewards
        if result.truncated.any():
            gained = gained + gamma * self._values_at_the_end(result)
        parts = {name: inputs[name][:, 0] for name in ("frames", "previous_actions", "rewards", "starts")}
        return parts | {
            "actions": actions,
            "log_probs": log_probs.gather(1, actions[:, None])[:, 0],
            "values": outputs.values[:, 0],
            "gained": gained,
            "ended": self.memory.starts,
        }

    def _values_at_the_end(self, result: Step) -> Tensor:
        """Values of what truncated episodes saw last, 0 for the others, `(envs,)`."""
        rows = torch.from_numpy(np.flatnonzero(result.truncated)).to(self.device)
        values = self.agent(
            torch.from_numpy(result.final_frames).to(self.device)[rows, None],
            self.memory.actions[rows, None],
            self.memory.rewards[rows, None],
            torch.zeros(len(rows), 1, dtype=torch.bool, device=self.device),
            self.memory.state.select(rows),
            self.game_ids[rows],
        ).values[:, 0]
        return torch.zeros_like(self.memory.rewards).index_copy(0, rows, values)

    @staticmethod
    def _cut(part: Tensor, segment_len: int) -> Tensor:
        """(time, envs, ...) -> (segments, segment, ...), the first segment of all environments first."""
        segments = part.unflatten(0, (-1, segment_len)).transpose(1, 2)
        return segments.flatten(0, 1)
