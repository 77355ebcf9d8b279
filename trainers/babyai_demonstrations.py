"""Demonstrations of BabyAI by minigrid's bot: a data set with one row per episode, and unrolls of it to learn from.

Legend of shapes: `batch` is the number of streams, `time` the steps of an unroll. In a row, `images` are the bytes of
uint8 `(length, 7, 7, 3)`, and `directions` and `actions` the bytes of uint8 `(length,)`.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from datasets.exceptions import DatasetGenerationError

from .babyai import Unroll, check_levels, training_seed
from .babyai_player import IGNORED_LABEL, LevelPlayer
from .minigrid_fast_path import MINIGRID_VERSION, VIEW_SIZE
from .text_data import local_path

FEATURES = datasets.Features(
    {
        "level": datasets.Value("string"),
        "seed": datasets.Value("int64"),
        "mission": datasets.Value("string"),
        "images": datasets.Value("binary"),
        "directions": datasets.Value("binary"),
        "actions": datasets.Value("binary"),
        "episode_return": datasets.Value("float32"),
        "bot_failures": datasets.Value("int32"),
    }
)

_CHUNK = 128
_ATTEMPTS = 1_000
# The last word of the seeds' keys, so that they are none of those that environments derive from the same seed.
_DEMONSTRATIONS = 1

logger = logging.getLogger(__name__)


def generate_demonstrations(
    levels: Sequence[str], num_episodes: int, seed: int = 0, cache_dir: str | None = None, num_proc: int | None = None
) -> datasets.Dataset:
    """
    Let the bot play, or load from the cache what it has played with the same arguments and the same minigrid.

    Args:
        levels (`Sequence[str]`): The ids of the levels, which take turns.
        num_episodes (`int`): The episodes of all levels together. Those in which the bot gives up or is not rewarded
            are left out and played anew with another seed; the column `bot_failures` counts them.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same episodes, and more of them begin with
            the same ones.
        cache_dir (`str`, *optional*): Where `datasets` keeps its files, its own default if not given.
        num_proc (`int`, *optional*): Processes that play at once; it does not change the episodes.

    Returns:
        `datasets.Dataset`: A row per episode with the columns of `FEATURES`, memory-mapped.
    """
    check_levels(levels)
    if num_episodes < 1:
        raise ValueError(f"num_episodes is {num_episodes}: choose a number of at least 1.")
    if seed < 0:
        raise ValueError(f"seed is {seed}: choose a number of at least 0.")
    content = json.dumps(["demonstrations 1", MINIGRID_VERSION, list(levels), num_episodes, seed])
    chunks = [range(start, min(start + _CHUNK, num_episodes)) for start in range(0, num_episodes, _CHUNK)]
    demonstrations = datasets.Dataset.from_generator(
        _play,
        FEATURES,
        cache_dir,
        # The chunks alone are a list, so that they are what is divided among processes.
        gen_kwargs={"chunks": chunks, "levels": tuple(levels), "seed": seed},
        num_proc=num_proc,
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
    )
    failures = sum(demonstrations["bot_failures"])
    if failures:
        logger.warning("Left out %d episodes in which the bot failed; %d remain.", failures, len(demonstrations))
    return demonstrations


def _play(chunks: list[range], levels: tuple[str, ...], seed: int) -> Iterator[dict]:
    players = [LevelPlayer(level) for level in levels]
    for index in (index for chunk in chunks for index in chunk):
        player = players[index % len(levels)]
        for attempt in range(_ATTEMPTS):
            player.begin(training_seed(seed, index, attempt, _DEMONSTRATIONS))
            demonstration = _demonstrate(player)
            if demonstration:
                yield {**demonstration, "bot_failures": attempt}
                break
        else:
            raise RuntimeError(f"{player.level}: the bot failed in {_ATTEMPTS} episodes in a row, so leave it out.")


def _demonstrate(player: LevelPlayer) -> dict | None:
    """Let the bot play an episode that has just begun. Returns its row, or `None` if the bot failed."""
    mission = player.observation["mission"]
    images, directions = [], bytearray()
    done = False
    while not done:
        images.append(player.observation["image"].tobytes())
        directions.append(player.observation["direction"])
        action = player.label()
        if action == IGNORED_LABEL:
            return None
        _, done = player.act(action)
    episode = player.episode()
    if not episode.success:
        return None
    return {
        "level": player.level,
        "seed": player.seed,
        "mission": mission,
        "images": b"".join(images),
        "directions": bytes(directions),
        "actions": bytes(player.actions),
        "episode_return": episode.episode_return,
    }


def load_demonstrations(name_or_path: str, split: str = "train", cache_dir: str | None = None) -> datasets.Dataset:
    """
    Load demonstrations that were generated before.

    Args:
        name_or_path (`str`): A Hub id, a folder of `save_to_disk`, or a Parquet file or a folder of such files.
        split (`str`, *optional*, defaults to `"train"`): The split, unless a folder of `save_to_disk` has none.
        cache_dir (`str`, *optional*): Where `datasets` keeps its files, its own default if not given.

    Returns:
        `datasets.Dataset`: A row per episode. Raises a `ValueError` where columns are missing.
    """
    path = local_path(name_or_path)
    if path is None:
        demonstrations = datasets.load_dataset(name_or_path, split=split, cache_dir=cache_dir)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        demonstrations = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    else:
        files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
        if not files:
            raise ValueError(f"{path} holds no demonstrations: expected a folder of save_to_disk or Parquet files.")
        try:
            demonstrations = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache_dir)
        except DatasetGenerationError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"{path} holds no demonstrations that can be read: {reason}") from error
    missing = [name for name in FEATURES if name not in demonstrations.column_names]
    if missing:
        raise ValueError(f"{name_or_path} holds no demonstrations: it lacks the columns {', '.join(missing)}.")
    return demonstrations


class DemonstrationStreams:
    """
    Endless streams of demonstrations, one after another, so that a recurrent state can be kept across unrolls.

    An epoch shuffles all demonstrations; a stream takes the next when it has come to the end of one. Streams begin
    together, so that their first unrolls see more beginnings of episodes than the later ones.

    Args:
        dataset (`datasets.Dataset`): Demonstrations.
        levels (`Sequence[str]`): The levels to take, in the order of their task ids.
        batch_size (`int`): The number of streams.
        unroll_len (`int`): The steps of an unroll.
        seed (`int`): Of the shuffling.
    """

    def __init__(
        self, dataset: datasets.Dataset, levels: Sequence[str], batch_size: int, unroll_len: int, seed: int = 0
    ):
        for name, value in (("batch_size", batch_size), ("unroll_len", unroll_len)):
            if value < 1:
                raise ValueError(f"{name} is {value}: choose a number of at least 1.")
        overview = dataset.select_columns(["level", "actions"]).with_format("arrow")[:]
        tasks = pyarrow.compute.index_in(overview["level"], pyarrow.array(list(levels)))
        self._tasks = tasks.fill_null(-1).to_numpy()
        self._lengths = pyarrow.compute.binary_length(overview["actions"]).to_numpy()
        for task, level in enumerate(levels):
            if not (self._tasks == task).any():
                has = ", ".join(sorted(overview["level"].unique().to_pylist()))
                raise ValueError(f"There is no demonstration of {level}, only of {has}: generate or load others.")
        self.levels = list(levels)
        self._rows = np.flatnonzero(self._tasks >= 0)
        self._table = dataset.with_format("arrow")
        self.batch_size, self.unroll_len, self.seed = batch_size, unroll_len, seed
        self._start_epoch(0)
        # (row, step) of each stream
        self._positions = [(self._next_row(), 0) for _ in range(batch_size)]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._taken = epoch, 0
        self._order = np.random.default_rng([self.seed, epoch]).permutation(self._rows)

    def _next_row(self) -> int:
        if self._taken == len(self._order):
            self._start_epoch(self._epoch + 1)
        self._taken += 1
        return int(self._order[self._taken - 1])

    @property
    def num_demonstrations(self) -> int:
        """The demonstrations of an epoch."""
        return len(self._rows)

    @property
    def epoch(self) -> float:
        """How often the demonstrations have been taken."""
        return self._epoch + self._taken / len(self._order)

    def next_unroll(self) -> Unroll:
        """The next steps of every stream."""
        shape = (self.batch_size, self.unroll_len)
        pieces = [piece for stream in range(self.batch_size) for piece in self._advance(stream)]
        rows = sorted({row for _, _, row, _, _ in pieces})
        columns = {
            name: self._table[rows][name].to_pylist() for name in ("mission", "images", "directions", "actions")
        }
        missions = list(dict.fromkeys(columns["mission"]))
        index_of_mission = {mission: index for index, mission in enumerate(missions)}
        unroll = Unroll(
            images=np.empty((*shape, VIEW_SIZE, VIEW_SIZE, 3), dtype=np.uint8),
            directions=np.empty(shape, dtype=np.int64),
            missions=missions,
            mission_index=np.empty(shape, dtype=np.int64),
            reset_mask=np.zeros(shape, dtype=bool),
            labels=np.empty(shape, dtype=np.int64),
            task_ids=np.empty(shape, dtype=np.int64),
        )
        place = {row: index for index, row in enumerate(rows)}
        for stream, time, row, start, count in pieces:
            here, there, index = (stream, slice(time, time + count)), slice(start, start + count), place[row]
            images = np.frombuffer(columns["images"][index], dtype=np.uint8)
            unroll.images[here] = images.reshape(-1, VIEW_SIZE, VIEW_SIZE, 3)[there]
            unroll.directions[here] = np.frombuffer(columns["directions"][index], dtype=np.uint8)[there]
            unroll.labels[here] = np.frombuffer(columns["actions"][index], dtype=np.uint8)[there]
            unroll.mission_index[here] = index_of_mission[columns["mission"][index]]
            unroll.task_ids[here] = self._tasks[row]
            unroll.reset_mask[stream, time] |= start == 0
        return unroll

    def _advance(self, stream: int) -> Iterator[tuple[int, int, int, int, int]]:
        """The pieces of a stream's next unroll: stream, time, row, first step of the row, and number of steps."""
        time = 0
        while time < self.unroll_len:
            row, start = self._positions[stream]
            count = min(self._lengths[row] - start, self.unroll_len - time)
            yield stream, time, row, start, count
            time += count
            ended = start + count == self._lengths[row]
            self._positions[stream] = (self._next_row(), 0) if ended else (row, int(start + count))

    def state_dict(self) -> dict:
        """Where the streams stand, for JSON."""
        return {
            "num_demonstrations": self.num_demonstrations,
            "seed": self.seed,
            "epoch": self._epoch,
            "taken": self._taken,
            "positions": self._positions,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go back to where `state_dict` was taken. Raises a `ValueError` if it was of other demonstrations."""
        own = {"num_demonstrations": self.num_demonstrations, "batch_size": self.batch_size}
        theirs = {"num_demonstrations": state["num_demonstrations"], "batch_size": len(state["positions"])}
        for name, value in own.items():
            if theirs[name] != value:
                raise ValueError(f"{name} is {value}, but the state is of {theirs[name]}.")
        self.seed = state["seed"]
        self._start_epoch(state["epoch"])
        self._taken = state["taken"]
        self._positions = [tuple(position) for position in state["positions"]]
