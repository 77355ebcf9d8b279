"""Where an imitation run takes its unrolls from: the bot's demonstrations, or environments that bot and student play.

Shapes: batch = environments, or streams of demonstrations; time = steps of an unroll.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import numpy as np

from ..modeling import MopForActionPrediction, MopState
from .babyai import IGNORED_LABEL, BabyAIEnvironments, Episode, Observations, Unroll, bot_episode
from .babyai_demonstrations import DemonstrationStreams
from .policy_actor import PolicyActor

RECENT = 100
_BOT_EPISODES = 20


class UnrollSource(ABC):
    """
    Unrolls, and the recurrent state before their first steps, which goes on from one unroll to the next.

    Everything that a resumed run needs is in `state_dict` and `state`.
    """

    def __init__(self):
        self.state: MopState | None = None
        self.num_unrolls = 0

    @abstractmethod
    def next_unroll(self, policy: MopForActionPrediction) -> tuple[Unroll, MopState]:
        """The next unroll, and the state that it starts from."""

    @abstractmethod
    def finish(self, state: MopState) -> None:
        """Takes the state that the update's own forward pass ended with, without its gradient."""

    def metrics(self) -> dict[str, float]:
        """What this process can tell of its unrolls so far."""
        return {}

    def state_dict(self) -> dict:
        """All but the recurrent state, for JSON."""
        return {"num_unrolls": self.num_unrolls}

    def load_state_dict(self, values: dict) -> None:
        """Goes on where `state_dict` was taken."""
        self.num_unrolls = values["num_unrolls"]


class DemonstrationSource(UnrollSource):
    """
    Unrolls of demonstrations; the student's state runs through them as it was trained.

    Args:
        streams ([`DemonstrationStreams`]): The demonstrations.
    """

    def __init__(self, streams: DemonstrationStreams):
        super().__init__()
        self.streams = streams

    def next_unroll(self, policy: MopForActionPrediction) -> tuple[Unroll, MopState]:
        """The next steps of every stream."""
        unroll = self.streams.next_unroll()
        if self.state is None:
            self.state = policy.initial_state(len(unroll.images))
        self.num_unrolls += 1
        return unroll, self.state

    def finish(self, state: MopState) -> None:
        """The next unroll goes on from here."""
        self.state = state

    def metrics(self) -> dict[str, float]:
        """`demonstration_epoch`: times that the demonstrations have been seen."""
        return {"demonstration_epoch": self.streams.epoch}

    def state_dict(self) -> dict:
        """With the place in the streams."""
        return {**super().state_dict(), "streams": self.streams.state_dict()}

    def load_state_dict(self, values: dict) -> None:
        """With the place in the streams."""
        super().load_state_dict(values)
        self.streams.load_state_dict(values["streams"])


class DaggerSource(UnrollSource):
    """
    Unrolls that bot and student play together and that the bot labels (DAgger, Ross et al. 2011).

    At every step each environment takes the bot's action with probability beta, which falls linearly to 0, and the
    student's otherwise. Whoever acts, the label is what the bot would do.

    Args:
        environments ([`BabyAIEnvironments`]): With the bot.
        unroll_len (`int`): Steps of an unroll.
        beta_start (`float`): Probability of the bot's action at first.
        beta_unrolls (`float`): Unrolls until beta is 0.
        sample (`bool`): Whether the student's actions are sampled, and not the most probable ones.
        seed (`int`): Of who acts, and of what is sampled. Unroll `k` has a generator of its own, so that a resumed
            run needs no more than `k`.
    """

    def __init__(
        self,
        environments: BabyAIEnvironments,
        unroll_len: int,
        beta_start: float = 1.0,
        beta_unrolls: float = 2000,
        sample: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.environments = environments
        self.unroll_len, self.sample, self.seed = unroll_len, sample, seed
        self.beta_start, self.beta_unrolls = beta_start, beta_unrolls
        self.recent = RecentEpisodes(environments.levels)
        self._observations = environments.reset()
        self._is_fresh = np.ones(environments.num_envs, dtype=bool)  # (batch,)

    @property
    def beta(self) -> float:
        """Probability that the bot acts in the next unroll."""
        if self.beta_unrolls <= 0:
            return 0.0
        return self.beta_start * max(0.0, 1 - self.num_unrolls / self.beta_unrolls)

    def next_unroll(self, policy: MopForActionPrediction) -> tuple[Unroll, MopState]:
        """Plays `unroll_len` steps with the policy in evaluation mode."""
        was_training = policy.training
        # Dropout is for learning; what acts is what will be evaluated.
        policy.eval()
        try:
            return self._play(policy)
        finally:
            policy.train(was_training)

    def _play(self, policy: MopForActionPrediction) -> tuple[Unroll, MopState]:
        environments, batch = self.environments, len(self._is_fresh)
        start = state = policy.initial_state(batch) if self.state is None else self.state
        bot_acts = np.random.default_rng((self.seed, self.num_unrolls)).random((self.unroll_len, batch)) < self.beta
        actor = PolicyActor(policy, sample=self.sample, seed=(self.seed, self.num_unrolls, 1))
        record = _UnrollRecord(environments.level_index, self.unroll_len, self._observations.images.shape[1:])
        for step in range(self.unroll_len):
            observations, labels = self._observations, environments.expert_actions()
            record.add(step, observations, self._is_fresh, labels)
            student, state = actor(observations, self._is_fresh, state)
            actions = np.where(bot_acts[step] & (labels != IGNORED_LABEL), labels, student)
            self._observations, _, self._is_fresh, episodes = environments.step(actions)
            for episode in episodes:
                self.recent.add(episode)
        self.state = state
        self.num_unrolls += 1
        return record.unroll, start

    def finish(self, state: MopState) -> None:
        """Nothing: the next unroll goes on from the state that was played with."""

    def metrics(self) -> dict[str, float]:
        """`dagger_beta`, `bot_failures`, and what [`RecentEpisodes`] has."""
        failures = float(self.environments.num_bot_failures)
        return {"dagger_beta": self.beta, "bot_failures": failures, **self.recent.metrics()}

    def state_dict(self) -> dict:
        """With the environments in the middle of their episodes."""
        return {
            **super().state_dict(),
            "environments": self.environments.state_dict(),
            "is_fresh": self._is_fresh.tolist(),
            "recent": self.recent.state_dict(),
        }

    def load_state_dict(self, values: dict) -> None:
        """With the environments in the middle of their episodes."""
        super().load_state_dict(values)
        self.environments.load_state_dict(values["environments"])
        self._observations = self.environments.observations
        self._is_fresh = np.array(values["is_fresh"], dtype=bool)
        self.recent.load_state_dict(values["recent"])


class _UnrollRecord:
    """An [`Unroll`] that is filled step by step."""

    def __init__(self, level_index: np.ndarray, unroll_len: int, image_shape: tuple[int, ...]):
        shape = (len(level_index), unroll_len)
        self._places: dict[str, int] = {}
        self._current: list[str] = []
        self._index = np.zeros(shape[0], dtype=np.int64)
        self.unroll = Unroll(
            images=np.empty((*shape, *image_shape), dtype=np.uint8),
            directions=np.empty(shape, dtype=np.int64),
            missions=[],
            mission_index=np.empty(shape, dtype=np.int64),
            reset_mask=np.empty(shape, dtype=bool),
            labels=np.empty(shape, dtype=np.int64),
            task_ids=np.repeat(np.asarray(level_index, dtype=np.int64)[:, None], unroll_len, axis=1),
        )

    def add(self, step: int, observations: Observations, is_fresh: np.ndarray, labels: np.ndarray) -> None:
        unroll = self.unroll
        unroll.images[:, step] = observations.images
        unroll.directions[:, step] = observations.directions
        unroll.reset_mask[:, step] = is_fresh
        unroll.labels[:, step] = labels
        if observations.missions != self._current:
            self._current = list(observations.missions)
            for environment, mission in enumerate(self._current):
                if mission not in self._places:
                    self._places[mission] = len(unroll.missions)
                    unroll.missions.append(mission)
                self._index[environment] = self._places[mission]
        unroll.mission_index[:, step] = self._index


class RecentEpisodes:
    """
    Success and length of the last 100 episodes, and of the last 100 of each level.

    Episodes that ended because the bot failed are left out: nobody knows how they would have gone on.

    Args:
        levels (`Sequence[str]`): The levels.
    """

    def __init__(self, levels: Sequence[str]):
        self.levels = list(levels)
        self._all: deque[list] = deque(maxlen=RECENT)  # of [level, success, length]
        self._by_level: dict[str, deque[list]] = {level: deque(maxlen=RECENT) for level in self.levels}
        self._bot_lengths: dict[str, float] = {}

    def add(self, episode: Episode) -> None:
        """Takes one finished episode."""
        if not episode.aborted:
            entry = [episode.level, bool(episode.success), int(episode.length)]
            self._all.append(entry)
            self._by_level[episode.level].append(entry)

    def metrics(self) -> dict[str, float]:
        """
        `success` and `length_ratio` (length over the mean length of the bot's own episodes), and where there are
        several levels `success/{level}` and `length_ratio/{level}`; nothing before the first episode has ended.
        """
        if not self._all:
            return {}
        figures = {
            "success": float(np.mean([success for _, success, _ in self._all])),
            "length_ratio": float(np.mean([length / self._bot_length(level) for level, _, length in self._all])),
        }
        if len(self.levels) > 1:
            for level, entries in self._by_level.items():
                if entries:
                    figures[f"success/{level}"] = float(np.mean([entry[1] for entry in entries]))
                    lengths = [entry[2] for entry in entries]
                    figures[f"length_ratio/{level}"] = float(np.mean(lengths)) / self._bot_length(level)
        return figures

    def _bot_length(self, level: str) -> float:
        if level not in self._bot_lengths:
            self._bot_lengths[level] = mean_bot_length(level)
        return self._bot_lengths[level]

    def state_dict(self) -> dict:
        """For JSON."""
        return {"all": list(self._all), "by_level": {level: list(rows) for level, rows in self._by_level.items()}}

    def load_state_dict(self, values: dict) -> None:
        """Goes on where `state_dict` was taken."""
        self._all = deque(values["all"], maxlen=RECENT)
        self._by_level = {level: deque(rows, maxlen=RECENT) for level, rows in values["by_level"].items()}


def mean_bot_length(level: str, num_episodes: int = _BOT_EPISODES) -> float:
    """Mean length of the bot's episodes with seeds 0, 1, ... that it solves."""
    episodes = (bot_episode(level, seed) for seed in range(num_episodes))
    lengths = [episode.length for episode in episodes if episode.success]
    if not lengths:
        raise ValueError(f"The bot solves no episode of {level}; choose a level that it can solve.")
    return float(np.mean(lengths))
