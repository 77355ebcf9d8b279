"""Whole episodes of games, played by an agent or by chance, with raw rewards.

Shapes: episodes, all of which are played at once; layers; experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ..modeling import ExpertStore, TieredMoeForActorCritic
from .agent_experts import prefetch_experts
from .atari import GameEnvironments, Step, own_actions
from .game_rollout import GamePlayer


@dataclass
class PlayedEpisodes:
    """
    The first episode of each environment.

    Args:
        game (`str`): Its name.
        returns (`np.ndarray`), lengths (`np.ndarray`): `(episodes,)`; lengths in steps of four frames.
        counts (`np.ndarray`, *optional*): Tokens that each expert was given, `(episodes, layers, experts)`.
        named (`float`, *optional*): Share of the steps in which the detector named the game rightly.
    """

    game: str
    returns: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray | None = None
    named: float | None = None

    def record(self) -> dict:
        """Its figures, for JSON."""
        spread = float(self.returns.std(ddof=1) / np.sqrt(len(self.returns))) if len(self.returns) > 1 else 0.0
        record = {"game": self.game, "episodes": len(self.returns), "return": float(self.returns.mean())}
        record |= {"return_error": spread, "median": float(np.median(self.returns))}
        record |= {"length": float(self.lengths.mean())}
        return record | ({} if self.named is None else {"detector_accuracy": self.named})


@torch.no_grad()
def play_episodes(
    agent: TieredMoeForActorCritic,
    game: str,
    episodes: int,
    seed: int,
    max_steps: int,
    tell_game: bool = True,
    deterministic: bool = False,
    num_threads: int | None = None,
    preprocessing: str = "current",
    store: ExpertStore | None = None,
    progress: bool = False,
) -> PlayedEpisodes:
    """
    Lets an agent play, with the preprocessing of its training but without ends at lost lives.

    Args:
        agent ([`TieredMoeForActorCritic`]): Whose mode is as before afterwards.
        game (`str`): One of its configuration.
        episodes (`int`): How many, all at once.
        seed (`int`): Of games and actions.
        max_steps (`int`): After which an episode counts as it is.
        tell_game (`bool`, *optional*, defaults to `True`): Whether the agent is told which game it is.
        deterministic (`bool`, *optional*, defaults to `False`): The likeliest actions, or drawn ones.
        num_threads (`int`, *optional*), preprocessing (`str`, *optional*): As of [`GameEnvironments`].
        store ([`ExpertStore`], *optional*): Of the agent's experts. If given, it is asked ahead for those that the
            detector foretells as the game begins.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.
    """
    config, number = agent.config, agent.config.games.index(game)
    device = agent.action_head.weight.device
    environments = GameEnvironments([game], episodes, seed, preprocessing, num_threads)
    generator = torch.Generator().manual_seed(seed)
    player = GamePlayer(agent, environments, torch.full((episodes,), number), generator, device)
    player.begin()
    if store:
        foretold = agent.model.detector.predict_experts(player.memory.frames.to(device), config.hbm_capacity)
        prefetch_experts(store, foretold)
    counts = np.zeros((episodes, config.num_layers, config.num_experts), dtype=np.int64)
    named, was_training = [], agent.training

    def act(running: np.ndarray) -> Step:
        named.append((agent.model.detector(player.memory.frames.to(device)).argmax(dim=-1) == number).float().mean())
        result, experts = player.act(tell_game, deterministic)
        for layer, chosen in enumerate(experts):
            # (episodes * tokens, top_k) -> (episodes, tokens * top_k)
            own = chosen.view(episodes, -1).cpu().numpy()[running]
            np.add.at(counts[:, layer], (np.flatnonzero(running)[:, None], own), 1)
        return result

    agent.eval()
    returns, lengths = _play(act, game, episodes, max_steps, progress)
    environments.close()
    agent.train(was_training)
    return PlayedEpisodes(game, returns, lengths, counts, float(torch.stack(named).mean()))


def play_at_random(
    game: str, episodes: int, seed: int, max_steps: int, preprocessing: str = "current", progress: bool = False
) -> PlayedEpisodes:
    """Draws evenly from the actions that do something; arguments as of [`play_episodes`]."""
    environments = GameEnvironments([game], episodes, seed, preprocessing, num_threads=1)
    environments.reset()
    random, actions = np.random.default_rng(seed), own_actions(game)
    returns, lengths = _play(
        lambda running: environments.step(random.choice(actions, episodes)),
        f"{game}, at random", episodes, max_steps, progress,
    )  # fmt: skip
    environments.close()
    return PlayedEpisodes(game, returns, lengths)


def _play(
    step: Callable[[np.ndarray], Step], title: str, episodes: int, max_steps: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return and length of the first episode in each environment; `step` is told which are still running."""
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    running = np.ones(episodes, dtype=bool)
    with tqdm(desc=title, unit="step", leave=False, disable=not progress) as bar:
        for _ in range(max_steps):
            result = step(running)
            returns += np.where(running, result.rewards, 0)
            lengths += running
            running &= ~result.over
            bar.set_postfix_str(f"{episodes - running.sum()} of {episodes} episodes over", refresh=False)
            bar.update()
            if not running.any():
                break
    return returns, lengths
