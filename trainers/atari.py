"""Environments of one or several games: those of the Arcade Learning Environment, and the ones that ship here.

Shapes: envs; frames are uint8 `(envs, 4, 84, 84)`; an action is a number in ALE's full set of 18.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .builtin_games import BUILTIN_GAMES

BUILTIN = "builtin:"
NUM_ACTIONS = 18
PREPROCESSING = ("current", "classic")
# Emulated frames of an episode at most, as ALE's own environments have it: half an hour of play.
MAX_FRAMES = 108_000
# Two-player games, which end the whole process when they are loaded for one.
UNSUPPORTED = {"combat", "joust", "maze_craze", "warlords"}
# Games of a long sequence, from easy to hard for PPO.
DEFAULT_GAMES = (
    "pong", "breakout", "space_invaders", "seaquest", "beam_rider", "qbert", "asteroids", "centipede", "ms_pacman",
    "frostbite",
)  # fmt: skip


@cache
def _atari_games() -> tuple[str, ...]:
    try:
        from ale_py import roms
    except ImportError as error:
        raise ImportError("Atari games need ale-py: pip install 'mixturekit[atari]'") from error
    return tuple(sorted(set(roms.get_all_rom_ids()) - UNSUPPORTED))


def check_games(names: Sequence[str]) -> list[str]:
    """
    The names of games as the rest of the library writes them: `pong`, `ms_pacman`, `builtin:catch`.

    Args:
        names (`Sequence[str]`): `Pong`, `MsPacman`, `ALE/Pong-v5` and the like are understood too.

    Raises:
        ValueError: If there is no such game; the message has names that are close.
        ImportError: If Atari games are asked for and ale-py is not installed.
    """
    return [_check_game(name) for name in names]


def _check_game(given: str) -> str:
    if given.startswith(BUILTIN):
        name, known = given.removeprefix(BUILTIN).lower(), list(BUILTIN_GAMES)
        prefix = BUILTIN
    else:
        bare = re.sub(r"(NoFrameskip)?-v\d+$", "", given.rpartition("/")[2])
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[a-zA-Z])(?=\d)", "_", bare).lower().replace(" ", "_")
        known, prefix = list(_atari_games()), ""
        compact = {other.replace("_", ""): other for other in known}
        name = compact.get(name.replace("_", ""), name)
    if name in known:
        return prefix + name
    if not prefix and name in UNSUPPORTED:
        raise ValueError(f"{given!r} is a game for two players, which the emulator cannot run for one.")
    close = difflib.get_close_matches(name, known, 3, cutoff=0.5)
    if not prefix:
        close += [BUILTIN + other for other in difflib.get_close_matches(name, BUILTIN_GAMES, 1, cutoff=0.8)]
    close = [other if other.startswith(BUILTIN) else prefix + other for other in close]
    hint = (
        f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(prefix + n for n in known[:6])}, ..."
    )
    raise ValueError(f"There is no game {given!r}; {hint}")


@cache
def own_actions(game: str) -> tuple[int, ...]:
    """The actions that do something in a game of [`check_games`], by their numbers in the full set of 18."""
    if game.startswith(BUILTIN):
        return BUILTIN_GAMES[game.removeprefix(BUILTIN)].actions
    emulator = _emulator(game)
    return tuple(sorted(int(action.value) for action in emulator.getMinimalActionSet()))


def _emulator(game: str):
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.loadROM(ale_py.roms.get_rom_path(game))
    return emulator


@dataclass
class Step:
    """
    What a step of all environments gives; each field has a row for each.

    Args:
        frames (`np.ndarray`): What is seen next; of a new episode where one has ended.
        rewards (`np.ndarray`): Raw, float32.
        terminated (`np.ndarray`), truncated (`np.ndarray`): What ends for learning. A lost life terminates with the
            classic preprocessing.
        over (`np.ndarray`): Whether an episode has ended, whose return counts.
        final_frames (`np.ndarray`, *optional*): What the episodes that ended saw last, in their rows.
    """

    frames: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    over: np.ndarray
    final_frames: np.ndarray | None


class GameEnvironments:
    """
    Environments of one game, or as many of each of several.

    Args:
        games (`Sequence[str]`): Of [`check_games`].
        num_envs (`int`): Environments of all games.
        seed (`int`): Of all that is random.
        preprocessing (`str`, *optional*, defaults to `"current"`): `current` for ALE's defaults (an action is repeated
            with probability 0.25; Machado et al. 2018, arXiv:1709.06009), `classic` for those of the DQN of 2015: no
            repetition, and a lost life is an end.
        num_threads (`int`, *optional*): Of the emulator; as many as there are cores, at most `num_envs`, if unset.

    Raises:
        ValueError: If the games cannot share the environments evenly.
    """

    def __init__(
        self,
        games: Sequence[str],
        num_envs: int,
        seed: int,
        preprocessing: str = "current",
        num_threads: int | None = None,
    ):
        if num_envs % len(games):
            raise ValueError(f"{num_envs} environments cannot be shared evenly by {len(games)} games.")
        self.games, self.num_envs, self.each = list(games), num_envs, num_envs // len(games)
        self.classic = preprocessing == "classic"
        self._seed = seed
        self._parts = [_make(game, self.each, self.classic, num_threads) for game in self.games]
        self._tables = [_action_table(game) for game in self.games]
        self._lives = np.zeros(num_envs, dtype=np.int64)

    @property
    def game_of_row(self) -> np.ndarray:
        """The place in `games` of the game of each environment, `(envs,)`."""
        return np.repeat(np.arange(len(self.games)), self.each)

    def reset(self) -> np.ndarray:
        """Frames of new episodes."""
        frames, infos = zip(
            *(part.reset(seed=self._seed + 7919 * n) for n, part in enumerate(self._parts)), strict=True
        )
        self._lives = np.concatenate([info["lives"] for info in infos]).astype(np.int64)
        return np.concatenate(frames)

    def step(self, actions: np.ndarray) -> Step:
        """
        Takes a step in all environments.

        Args:
            actions (`np.ndarray` of shape `(envs,)`): Whole numbers from 0 to 17.

        Raises:
            ValueError: If they are not; the emulator would wait for ever.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(f"Actions are whole numbers ({self.num_envs},), not {actions.dtype} {actions.shape}.")
        if actions.min() < 0 or actions.max() >= NUM_ACTIONS:
            raise ValueError(f"Actions are from 0 to {NUM_ACTIONS - 1}, not {actions.min()} to {actions.max()}.")
        rows = np.split(actions.astype(np.int64), len(self._parts))
        results = [part.step(table[own]) for part, table, own in zip(self._parts, self._tables, rows, strict=True)]
        frames, rewards, terminated, truncated = (np.concatenate([r[n] for r in results]) for n in range(4))
        over, lives = terminated | truncated, np.concatenate([r[4]["lives"] for r in results])
        final = None
        if over.any():
            final = np.concatenate([r[4].get("final_obs", r[0]) for r in results])
        if self.classic:
            terminated = terminated | ((lives < self._lives) & ~over)
            self._lives = lives.astype(np.int64)
        return Step(frames, rewards.astype(np.float32), terminated, truncated, over, final)

    @property
    def can_be_saved(self) -> bool:
        """Whether all games can be put back to where they were; the emulator's vector environment cannot."""
        return all(game.startswith(BUILTIN) for game in self.games)

    def state_dict(self) -> list[dict[str, Any]]:
        """Where each game is; of games that ship here only."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Puts each game back there."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)

    def close(self) -> None:
        """Frees them."""
        for part in self._parts:
            part.close()


def _make(game: str, num_envs: int, classic: bool, num_threads: int | None):
    sticky = 0.0 if classic else 0.25
    if game.startswith(BUILTIN):
        # They are small: a quarter of all actions repeated would change most of what happens in them.
        return BUILTIN_GAMES[game.removeprefix(BUILTIN)](num_envs)
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv(
        game,
        num_envs,
        num_threads=num_threads or min(num_envs, os.cpu_count() or 1),
        max_num_frames_per_episode=MAX_FRAMES,
        repeat_action_probability=sticky,
        full_action_space=True,
        autoreset_mode="SameStep",
        # Clipped where they are learned from, raw where they are counted.
        reward_clipping=False,
    )


@cache
def _action_table(game: str) -> np.ndarray:
    """The number that a game's environment has for each of the 18 actions; two games lack half of them."""
    if game.startswith(BUILTIN):
        return np.arange(NUM_ACTIONS)
    legal = [int(action.value) for action in _emulator(game).getLegalActionSet()]
    return np.array([legal.index(action) if action in legal else 0 for action in range(NUM_ACTIONS)])
