"""Playing one BabyAI level, watched by minigrid's bot."""

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .minigrid_fast_path import make_bot, make_level

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Episode:
    """
    An episode that has ended.

    Args:
        level (`str`): The id of its level.
        seed (`int`): The seed that the level was reset with.
        episode_return (`float`): The sum of its rewards.
        length (`int`): Its steps.
        success (`bool`): Whether it was rewarded. That it ended is no success: some levels end on a mistake.
        aborted (`bool`): Whether it was broken off because the bot failed.
    """

    level: str
    seed: int
    episode_return: float
    length: int
    success: bool
    aborted: bool = False


class LevelPlayer:
    """
    Plays one level, an episode after another.

    Args:
        level (`str`): The id of the level.
        with_bot (`bool`, *optional*, defaults to `True`): Whether the bot watches, so that it can be asked.

    Attributes:
        observation (`dict`): The current observation.
        actions (`list[int]`): The actions of the current episode.
        bot_failure (`str | None`): The error in which the bot gave up on the current episode.
    """

    def __init__(self, level: str, with_bot: bool = True):
        self.level = level
        self.with_bot = with_bot
        self._environment = make_level(level)

    def begin(self, seed: int) -> None:
        """Start the episode of this seed."""
        self.seed = seed
        with without_rejections():
            self.observation, _ = self._environment.reset(seed=seed)
        self.actions: list[int] = []
        self.episode_return = 0.0
        self.bot_failure: str | None = None
        self._bot = None
        self._label: int | None = None

    def label(self) -> int:
        """The action of the bot, -100 if it gives up."""
        if self._label is None:
            try:
                if self._bot is None:
                    self._bot = make_bot(self._environment)
                self._label = int(self._bot.replan(self.actions[-1] if self.actions else None))
            except Exception as error:  # The bot has no errors of its own for what it cannot do.
                self.bot_failure = type(error).__name__
                self._label = IGNORED_LABEL
        return self._label

    def act(self, action: int) -> tuple[float, bool]:
        """Take an action. Returns its reward, and whether the episode has ended."""
        if self.with_bot:
            # The bot keeps its plan up to date only if it sees every step.
            self.label()
        self.observation, reward, terminated, truncated, _ = self._environment.step(action)
        self.actions.append(action)
        self.episode_return += float(reward)
        self._label = None
        return float(reward), terminated or truncated

    def episode(self, aborted: bool = False) -> Episode:
        """The current episode as it stands."""
        won = self.episode_return > 0
        return Episode(self.level, self.seed, self.episode_return, len(self.actions), won, aborted)

    def replay(self, seed: int, actions: Iterable[int]) -> None:
        """Start the episode of this seed and take these actions."""
        self.begin(seed)
        for action in actions:
            self.act(action)


@contextlib.contextmanager
def without_rejections() -> Iterator[None]:
    """Keep what minigrid prints about the missions that it draws anew from standard output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    for line in printed.getvalue().splitlines():
        if not line.startswith(("Sampling rejected:", "Timeout during mission generation:")):
            print(line)
