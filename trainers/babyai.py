"""BabyAI levels to learn and to be judged on: many at once, labelled by minigrid's bot, repeatable and resumable.

Legend of shapes: `envs` is the number of environments, `time` the steps of an unroll, and an image is what minigrid
shows of the world, `(7, 7, 3)`: column, row, and the codes of object, colour and state.
"""

import difflib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .babyai_player import IGNORED_LABEL, Episode, LevelPlayer
from .minigrid_fast_path import MINIGRID_VERSION, VIEW_SIZE, babyai_levels

NUM_ACTIONS = 7

# BabyAI's own convention for validation. Training seeds stay below.
FIRST_HELD_OUT_SEED = 1_000_000_000

# (mean return of random actions, mean return of the bot), from the JAT data set (huggingface.co/datasets/jat-project/
# jat-dataset, Gallouédec et al. 2024, arXiv:2402.09844).
REFERENCE_RETURNS = {
    "BabyAI-BossLevel-v0": (0.062, 0.942),
    "BabyAI-GoTo-v0": (0.131, 0.917),
    "BabyAI-GoToImpUnlock-v0": (0.071, 0.829),
    "BabyAI-GoToLocal-v0": (0.162, 0.925),
    "BabyAI-GoToRedBall-v0": (0.167, 0.925),
    "BabyAI-GoToRedBallGrey-v0": (0.124, 0.917),
    "BabyAI-GoToSeq-v0": (0.080, 0.939),
    "BabyAI-KeyCorridor-v0": (0.0, 0.907),
    "BabyAI-PickupLoc-v0": (0.085, 0.915),
    "BabyAI-PutNextLocal-v0": (0.004, 0.915),
    "BabyAI-SynthSeq-v0": (0.066, 0.947),
    "BabyAI-Unlock-v0": (0.032, 0.866),
    "BabyAI-UnlockPickup-v0": (0.0, 0.754),
}

_UNSOLVABLE = {
    "BabyAI-KeyInBox-v0",
    "BabyAI-PutNextS5N2Carrying-v0",
    "BabyAI-PutNextS6N3Carrying-v0",
    "BabyAI-PutNextS7N4Carrying-v0",
}


def known_levels() -> list[str]:
    """The ids of all BabyAI levels that minigrid has and its bot can solve."""
    return [name for name in babyai_levels() if name not in _UNSOLVABLE]


def check_level(env_id: str) -> None:
    """Raise a `ValueError` unless minigrid has this BabyAI level and its bot can solve it."""
    if env_id in _UNSOLVABLE:
        raise ValueError(f"{env_id} is a level that minigrid's bot cannot solve, so there is nobody to learn from.")
    if env_id not in known_levels():
        # The beginning and the end, which all have in common, would make any two names close.
        names = {_short_name(name): name for name in known_levels()}
        close = [names[name] for name in difflib.get_close_matches(_short_name(env_id), names, n=3)]
        hint = f"did you mean {' or '.join(close)}?" if close else "an id looks like 'BabyAI-GoToRedBall-v0'."
        raise ValueError(f"{env_id!r} is no BabyAI level of minigrid {MINIGRID_VERSION}: {hint}")


def _short_name(env_id: str) -> str:
    return re.sub(r"^BabyAI-|-v\d+$", "", env_id, flags=re.IGNORECASE)


def check_levels(env_ids: Sequence[str]) -> None:
    """Raise a `ValueError` unless every one of these is a level that the bot can solve, and there is one."""
    if isinstance(env_ids, str) or not env_ids:
        raise ValueError(f"levels is {env_ids!r}: give a list of at least one BabyAI level.")
    for env_id in env_ids:
        check_level(env_id)


def level_of_environments(num_levels: int, num_envs: int, level_weights: Sequence[int] | None = None) -> np.ndarray:
    """
    The level that each environment plays, int64 `(envs,)`.

    Args:
        num_levels (`int`): Levels.
        num_envs (`int`): Environments.
        level_weights (`Sequence[int]`, *optional*): How many of every `sum(level_weights)` environments play each
            level; by default one.

    Raises:
        ValueError: If the weights are not one positive number for each level, or a level would have no environment.
    """
    weights = [1] * num_levels if level_weights is None else list(level_weights)
    if len(weights) != num_levels or min(weights) < 1:
        raise ValueError(
            f"level_weights is {weights}: give a whole number above 0 for each of the {num_levels} levels."
        )
    if num_envs < sum(weights):
        raise ValueError(f"num_envs is {num_envs}: levels with weights {weights} need at least {sum(weights)}.")
    return np.resize(np.repeat(np.arange(num_levels), weights), num_envs)


def normalized_score(env_id: str, mean_return: float) -> float | None:
    """A mean return on the scale where random actions score 0 and the bot 1; `None` without reference returns."""
    if env_id not in REFERENCE_RETURNS:
        return None
    random, expert = REFERENCE_RETURNS[env_id]
    return (mean_return - random) / (expert - random)


def training_seed(*key: int) -> int:
    """The seed of an episode to train on, derived from non-negative numbers, such as a run, a stream and an index."""
    high, low = np.random.SeedSequence(key).generate_state(2).tolist()
    return (high << 32 | low) % FIRST_HELD_OUT_SEED


@dataclass
class Observations:
    """
    What several agents observe.

    Args:
        images (`np.ndarray`): The views, uint8 `(envs, 7, 7, 3)`.
        directions (`np.ndarray`): Where the agents look, int64 `(envs,)`: 0 right, 1 down, 2 left, 3 up.
        missions (`list[str]`): What the agents are to do.
    """

    images: np.ndarray
    directions: np.ndarray
    missions: list[str]

    @classmethod
    def from_dictionaries(cls, observations: Sequence[dict]) -> "Observations":
        """The observations of several agents from minigrid's own form."""
        images = np.array([observation["image"] for observation in observations], dtype=np.uint8)
        directions = np.array([observation["direction"] for observation in observations], dtype=np.int64)
        missions = [observation["mission"] for observation in observations]
        return cls(images.reshape(-1, VIEW_SIZE, VIEW_SIZE, 3), directions, missions)

    def __len__(self) -> int:
        return len(self.missions)


@dataclass
class Unroll:
    """
    Steps of several streams of episodes, labelled.

    Args:
        images (`np.ndarray`): uint8 `(batch, time, 7, 7, 3)`.
        directions (`np.ndarray`): int64 `(batch, time)`.
        missions (`list[str]`): The distinct missions among these steps.
        mission_index (`np.ndarray`): int64 `(batch, time)`, the mission of each step, an index into `missions`.
        reset_mask (`np.ndarray`): bool `(batch, time)`, whether an episode begins with the step.
        labels (`np.ndarray`): int64 `(batch, time)`, the actions to learn, -100 where there is none.
        task_ids (`np.ndarray`): int64 `(batch, time)`, the level of each step.
    """

    images: np.ndarray
    directions: np.ndarray
    missions: list[str]
    mission_index: np.ndarray
    reset_mask: np.ndarray
    labels: np.ndarray
    task_ids: np.ndarray


class BabyAIEnvironments:
    """
    Environments of BabyAI levels that the bot watches. Each environment plays one level for good, in
    this process, and begins its next episode as soon as one has ended.

    Where the bot gives up, the label is -100, and the next step breaks the episode off without taking the action.

    Args:
        levels (`Sequence[str]`): The ids of the levels.
        num_envs (`int`): How many environments, at least as many as levels.
        seed (`int`): The same seed gives the same episodes, whatever was done in those before.
        with_bot (`bool`, *optional*, defaults to `True`): Whether the bot labels.
        level_weights (`Sequence[int]`, *optional*): How many of every `sum(level_weights)` environments play each
            level; by default environment `i` plays level `i % len(levels)`.

    Attributes:
        level_index (`np.ndarray`): The level of each environment, int64 `(envs,)`.
        bot_failures (`Counter[str]`): How many episodes were broken off, by the error in which the bot gave up.

    Example:

    ```python
    environments = BabyAIEnvironments(["BabyAI-GoToRedBall-v0"], num_envs=16, seed=0)
    for _ in range(100):
        observations, rewards, dones, episodes = environments.step(environments.expert_actions())
    ```
    """

    def __init__(
        self,
        levels: Sequence[str],
        num_envs: int,
        seed: int,
        with_bot: bool = True,
        level_weights: Sequence[int] | None = None,
    ):
        check_levels(levels)
        self.level_index = level_of_environments(len(levels), num_envs, level_weights)
        if seed < 0:
            raise ValueError(f"seed is {seed}: choose a number of at least 0.")
        self.levels = list(levels)
        self.num_envs = num_envs
        self.seed = seed
        self.with_bot = with_bot
        self._players = [LevelPlayer(levels[index], with_bot) for index in self.level_index]
        self.reset()

    def reset(self) -> Observations:
        """Begin again with the first episode of every environment."""
        self._episode_index = [0] * self.num_envs
        self.bot_failures: Counter[str] = Counter()
        for index in range(self.num_envs):
            self._begin(index)
        return self._observe()

    def _begin(self, index: int) -> None:
        self._players[index].begin(training_seed(self.seed, index, self._episode_index[index]))

    def _observe(self) -> Observations:
        self.observations = Observations.from_dictionaries([player.observation for player in self._players])
        return self.observations

    @property
    def num_bot_failures(self) -> int:
        """How many episodes were broken off because the bot gave up."""
        return self.bot_failures.total()

    def expert_actions(self) -> np.ndarray:
        """What the bot would do now, int64 `(envs,)`, -100 where it has given up. May be asked any number of times."""
        if not self.with_bot:
            raise ValueError("with_bot is False: these environments have nobody to ask.")
        return np.array([player.label() for player in self._players], dtype=np.int64)

    def step(self, actions: np.ndarray) -> tuple[Observations, np.ndarray, np.ndarray, list[Episode]]:
        """
        Take one action in every environment.

        Args:
            actions (`np.ndarray`): Integers `(envs,)` from 0 to 6. Where the bot has given up, any number will do.

        Returns:
            `tuple`: The observations, of the next episode where one has ended; the rewards, float32 `(envs,)`;
            whether an episode has ended, bool `(envs,)`; and the episodes that have ended, in the order of `envs`.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(f"actions is {actions.dtype} {actions.shape}: give {self.num_envs} integers.")
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        dones = np.zeros(self.num_envs, dtype=bool)
        episodes = []
        for index, (player, action) in enumerate(zip(self._players, actions.tolist(), strict=True)):
            aborted = self.with_bot and player.label() == IGNORED_LABEL
            if aborted:
                self.bot_failures[player.bot_failure] += 1
                dones[index] = True
            elif not 0 <= action < NUM_ACTIONS:
                raise ValueError(f"actions[{index}] is {action}: choose a number from 0 to {NUM_ACTIONS - 1}.")
            else:
                rewards[index], dones[index] = player.act(action)
            if dones[index]:
                episodes.append(player.episode(aborted))
                self._episode_index[index] += 1
                self._begin(index)
        return self._observe(), rewards, dones, episodes

    def state_dict(self) -> dict:
        """Where the environments stand, for JSON: the episode of each, and the actions taken in it."""
        return {
            "minigrid": MINIGRID_VERSION,
            "levels": self.levels,
            "num_envs": self.num_envs,
            "level_index": self.level_index.tolist(),
            "seed": self.seed,
            "bot_failures": dict(self.bot_failures),
            "episode_index": list(self._episode_index),
            "actions": [list(player.actions) for player in self._players],
            "observations": zlib.crc32(self.observations.images.tobytes()),
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Go back to where `state_dict` was taken, by taking the actions again; the seed becomes that of `state`.

        Raises a `ValueError` if `state` is of other levels, or if this minigrid plays them differently.
        """
        own_levels = self.level_index.tolist()
        for name, own in (("levels", self.levels), ("num_envs", self.num_envs), ("level_index", own_levels)):
            if state[name] != own:
                raise ValueError(f"{name} is {own}, but the state is of {state[name]}.")
        self.seed = state["seed"]
        self._episode_index = list(state["episode_index"])
        self.bot_failures = Counter(state["bot_failures"])
        for index, (player, actions) in enumerate(zip(self._players, state["actions"], strict=True)):
            player.replay(training_seed(self.seed, index, self._episode_index[index]), actions)
        if zlib.crc32(self._observe().images.tobytes()) != state["observations"]:
            raise ValueError(
                f"The state is of minigrid {state['minigrid']}, which minigrid {MINIGRID_VERSION} does not replay: "
                "install that version to resume."
            )


@dataclass
class Turn:
    """
    A moment at which a policy is asked to act, in [`run_episodes`].

    Args:
        observations ([`Observations`]): What it observes in each slot.
        kept (`np.ndarray`): The slots of the turn before that are still in use, int64, in the order of this turn's
            slots: what the policy remembers is selected by it.
        started (`np.ndarray`): Whether an episode begins in the slot, bool: what the policy remembers is reset.
        episodes (`list[tuple[str, int]]`): The level and the seed that each slot plays.
    """

    observations: Observations
    kept: np.ndarray
    started: np.ndarray
    episodes: list[tuple[str, int]]


def run_episodes(
    episodes: Iterable[tuple[str, int]], act: Callable[[Turn], np.ndarray], num_envs: int = 64
) -> Iterator[Episode]:
    """
    Play episodes to their end, each exactly once, so that short ones are not preferred.

    Args:
        episodes (`Iterable[tuple[str, int]]`): The level and the seed of each.
        act (`Callable[[Turn], np.ndarray]`): Gives an integer action from 0 to 6 for each slot of a [`Turn`].
        num_envs (`int`, *optional*, defaults to `64`): Slots, each of which plays one episode after another and is
            dropped when there are no more.

    Returns:
        `Iterator[Episode]`: The episodes, as they end.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}: choose a number of at least 1.")
    waiting = iter(episodes)

    def next_player() -> LevelPlayer | None:
        for level, seed in waiting:
            player = LevelPlayer(level, with_bot=False)
            player.begin(seed)
            return player
        return None

    slots = [player for player in (next_player() for _ in range(num_envs)) if player]
    kept, started = np.arange(len(slots)), np.ones(len(slots), dtype=bool)
    while slots:
        observations = Observations.from_dictionaries([player.observation for player in slots])
        turn = Turn(observations, kept, started, [(player.level, player.seed) for player in slots])
        started = np.zeros(len(slots), dtype=bool)
        for slot, (player, action) in enumerate(zip(slots, np.asarray(act(turn)).tolist(), strict=True)):
            if player.act(action)[1]:
                yield player.episode()
                slots[slot], started[slot] = next_player(), True
        kept = np.flatnonzero([player is not None for player in slots])
        slots, started = [slots[slot] for slot in kept], started[kept]


def bot_episode(env_id: str, seed: int) -> Episode:
    """The episode of this seed played by the bot, `aborted` where it gives up."""
    player = LevelPlayer(env_id)
    player.begin(seed)
    done = False
    while not done:
        action = player.label()
        if action == IGNORED_LABEL:
            return player.episode(aborted=True)
        _, done = player.act(action)
    return player.episode()
