"""What an agent remembers between two calls: keys and values of the last steps of its episode.

Shapes: batch; kept, one token less than attention reaches; heads, width of a head; time, steps of a call.
"""

import torch
from torch import Tensor


class TieredMoeState:
    """
    A rolling cache of keys and values, each row of which begins anew with its own episode.

    It has as many places from the start, marked as of no episode, so that states of different age fit into one batch.
    A call of the model takes one and gives the next, without a change of the first.

    Args:
        keys (`list[torch.Tensor]`), values (`list[torch.Tensor]`): By layer, `(batch, heads, kept, width)`.
        kept_episodes (`torch.Tensor` of shape `(batch, kept)`): Number of the episode of each place, -1 for none.
        episode (`torch.Tensor` of shape `(batch,)`): Number of the episode of each row.
        position (`torch.Tensor` of shape `(batch,)`): Step of the episode that comes next.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], kept_episodes: Tensor, episode: Tensor, position: Tensor
    ):
        self.keys, self.values = keys, values
        self.kept_episodes, self.episode, self.position = kept_episodes, episode, position

    @classmethod
    def initial(cls, config, batch_size: int, device: torch.device | str = "cpu") -> "TieredMoeState":
        """The state before the first step, of a [`TieredMoeConfig`]."""
        kept = config.context_len * config.tokens_per_step - 1
        shape = (batch_size, config.num_attention_heads, kept, config.head_dim)
        numbers = {"dtype": torch.long, "device": device}
        return cls(
            [torch.zeros(shape, device=device) for _ in range(config.num_layers)],
            [torch.zeros(shape, device=device) for _ in range(config.num_layers)],
            torch.full((batch_size, kept), -1, **numbers),
            torch.zeros(batch_size, **numbers),
            torch.zeros(batch_size, **numbers),
        )

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.episode)

    def begin_call(self, starts: Tensor, tokens: int) -> tuple["TieredMoeState", Tensor, Tensor]:
        """
        Prepares the next state for a call.

        Args:
            starts (`torch.Tensor` of shape `(batch, time)`): Whether a step is the first of an episode.
            tokens (`int`): Of a step.

        Returns:
            The next state, which [`~TieredMoeState.update`] fills; positions `(batch, time * tokens)` in the episode;
            and which of the kept and new tokens `(batch, time * tokens, kept + time * tokens)` each new one may see.
        """
        time, kept = starts.shape[1], self.kept_episodes.shape[1]
        steps = torch.arange(time, device=starts.device)
        episodes = self.episode[:, None] + starts.long().cumsum(dim=1)
        begun = torch.where(starts, steps, -1).cummax(dim=1).values
        positions = torch.where(begun >= 0, steps - begun, self.position[:, None] + steps)
        within = torch.arange(tokens, device=starts.device)
        token_positions = (positions[:, :, None] * tokens + within).flatten(1)
        token_episodes = episodes.repeat_interleave(tokens, dim=1)
        all_episodes = torch.cat([self.kept_episodes, token_episodes], dim=1)
        place = torch.arange(kept + time * tokens, device=starts.device)
        query = place[kept:, None]
        near = (place <= query) & (place >= query - kept)
        visible = near & (token_episodes[:, :, None] == all_episodes[:, None])
        following = TieredMoeState(
            list(self.keys),
            list(self.values),
            all_episodes[:, all_episodes.shape[1] - kept :],
            episodes[:, -1],
            positions[:, -1] + 1,
        )
        return following, token_positions, visible

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As `Cache.update` of transformers: all keys and values of a layer, `(batch, heads, kept + new, width)`."""
        kept = self.kept_episodes.shape[1]
        keys = torch.cat([self.keys[layer_idx].to(keys.dtype), keys], dim=2)
        values = torch.cat([self.values[layer_idx].to(values.dtype), values], dim=2)
        self.keys[layer_idx] = keys[:, :, keys.shape[2] - kept :].detach()
        self.values[layer_idx] = values[:, :, values.shape[2] - kept :].detach()
        return keys, values

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by names, for safetensors."""
        parts = {f"keys.{n}": part for n, part in enumerate(self.keys)}
        parts |= {f"values.{n}": part for n, part in enumerate(self.values)}
        return parts | {"kept_episodes": self.kept_episodes, "episode": self.episode, "position": self.position}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "TieredMoeState":
        """The state of [`~TieredMoeState.to_tensors`]."""
        layers = range(sum(name.startswith("keys.") for name in tensors))
        return cls(
            [tensors[f"keys.{n}"] for n in layers],
            [tensors[f"values.{n}"] for n in layers],
            *(tensors[name] for name in ("kept_episodes", "episode", "position")),
        )

    def select(self, rows: Tensor) -> "TieredMoeState":
        """The state of some rows."""
        return TieredMoeState.from_tensors({name: part[rows] for name, part in self.to_tensors().items()})

    @classmethod
    def stack(cls, states: list["TieredMoeState"]) -> "TieredMoeState":
        """One state with the rows of several."""
        parts = [state.to_tensors() for state in states]
        return cls.from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


__all__ = ["TieredMoeState"]
