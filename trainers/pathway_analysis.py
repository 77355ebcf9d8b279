"""What pathways through the experts a policy takes, and what follows from them: measured here, drawn elsewhere.

The measures are those of "Brain-Like Processing Pathways Form in Models With Heterogeneous Experts" (Cook, Akarca,
Costa and Achterberg 2025, arXiv 2506.02813), for levels of BabyAI as tasks.

Legend of shapes: `steps`, all steps of all episodes; `groups`, the tasks or whatever else steps are grouped by;
`experts`, those of one layer.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.trainer_utils import get_last_checkpoint

from ..modeling import MopForActionPrediction
from .babyai import FIRST_HELD_OUT_SEED, Turn, check_levels, run_episodes
from .babyai_player import IGNORED_LABEL, Episode, LevelPlayer
from .policy_evaluation import HeldOutEpisodes, PlayOptions

NO_PHASE, NOTHING = "none", "nothing"
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
# What steps can be grouped by, and the columns that tell the groups apart.
GROUPINGS = {"task": ["task"], "phase": ["phase"], "cell": ["x", "y"], "carried": ["carried"], "action": ["action"]}
# fmt: off
STEP = np.dtype([
    ("task", "i2"), ("seed", "i8"), ("step", "i4"), ("x", "i2"), ("y", "i2"), ("carried", "i2"), ("phase", "i2"),
    ("action", "i1"), ("entropy", "f4"), ("usage_cost", "f4"),
])
# fmt: on


@dataclass
class PathwayRecords:
    """
    Every step of some episodes that a policy has played.

    Args:
        levels (`list[str]`): The tasks.
        grids (`list[tuple[int, int]]`): Columns and rows of each task's grid.
        rooms (`list[int]`): The number of each task's rooms.
        phases (`list[str]`): Kinds of the bot's first subgoal; `"none"` where it has given up or has none left.
        carried (`list[str]`): Names of what is carried; `"nothing"` where the hands are free.
        expert_sizes (`list[list[int]]`): Sizes of the experts of each layer.
        cost_exponent (`float`): An expert of size h costs h to this power.
        largest_usage (`float`): The usage cost of always using the largest experts, in the units of `usage_cost`.
        episodes (`list[Episode]`): The episodes, by task and then by seed.
        steps (`np.ndarray`): Their steps in the same order, `(steps,)` of the fields of `STEP`: `task`, `phase`,
            `carried` and `action` are indices of names; `x` and `y` the agent's cell; `entropy` that of the
            distribution over the actions, in nats; `usage_cost` that of the policy.
        weights (`list[np.ndarray]`): For each layer, the router's weights of each step, float32 `(steps, experts)`.
    """

    levels: list[str]
    grids: list[tuple[int, int]]
    rooms: list[int]
    phases: list[str]
    carried: list[str]
    expert_sizes: list[list[int]]
    cost_exponent: float
    largest_usage: float
    episodes: list[Episode]
    steps: np.ndarray
    weights: list[np.ndarray]

    def select(self, mask: np.ndarray) -> "PathwayRecords":
        """The same episodes, but only the steps where `mask` of shape `(steps,)` is true."""
        return PathwayRecords(**{**vars(self), "steps": self.steps[mask], "weights": [w[mask] for w in self.weights]})

    def of_task(self, level: str) -> "PathwayRecords":
        """The same, but only the steps of one task."""
        return self.select(self.steps["task"] == self.levels.index(level))

    @property
    def largest_complexity(self) -> float:
        """The cost of always using the largest experts, in sizes to the power of `cost_exponent`."""
        return float(sum(max(sizes) ** self.cost_exponent for sizes in self.expert_sizes if len(sizes) > 1))


class _WatchedPlayer(LevelPlayer):
    """A player whose bot only watches, and can be asked what it would be about to do."""

    def label(self) -> int:
        # A bot that has given up once has missed what happened since.
        return IGNORED_LABEL if self.bot_failure is not None else super().label()

    def situation(self) -> tuple[int, int, str, str]:
        """Column and row of the agent, what it carries, and the kind of the bot's first subgoal, such as `Pickup`."""
        (x, y), thing = self._environment.agent_pos, self._environment.carrying
        carried = NOTHING if thing is None else f"{thing.color} {thing.type}"
        phase = NO_PHASE
        if self.label() != IGNORED_LABEL and self._bot.stack:
            subgoal = self._bot.stack[-1]
            # To explore, the bot goes next to what it has not seen, so that its own class never comes first.
            phase = "Explore" if subgoal.is_exploratory() else type(subgoal).__name__.removesuffix("Subgoal")
        return int(x), int(y), carried, phase

    def place(self) -> tuple[tuple[int, int], int]:
        """Columns and rows of the grid, and the number of its rooms."""
        level = self._environment
        return (level.width, level.height), level.num_rows * level.num_cols


class _PathwayRecorder:
    """What [`run_episodes`] asks for actions: the policy, which acts greedily, and what is kept of each step."""

    def __init__(self, policy: MopForActionPrediction, levels: Sequence[str]):
        self.policy = policy
        self.levels = list(levels)
        self.names: tuple[dict[str, int], ...] = ({}, {})  # codes of what is carried, and of phases
        self.places: dict[str, tuple[tuple[int, int], int]] = {}
        self.steps: list[np.ndarray] = []  # of each turn (batch,)
        self.weights: list[list[np.ndarray]] = []  # of each turn and layer (batch, experts)
        # The same episodes over again: those of `run_episodes` keep their worlds and have no bot.
        self._players: list[_WatchedPlayer] = []
        self._state = None

    def __call__(self, turn: Turn) -> np.ndarray:
        if self._state is None:
            self._state, self._players = self.policy.initial_state(len(turn.kept)), [None] * len(turn.kept)
        elif len(turn.kept) < len(self._players):
            self._state = self._state.batch_select_indices(torch.from_numpy(turn.kept))
        self._players = [self._players[slot] for slot in turn.kept]
        for slot in np.flatnonzero(turn.started):
            self._players[slot] = self._begin(*turn.episodes[slot])
        seen, fresh = turn.observations, torch.from_numpy(turn.started)[:, None].to(self.policy.device)
        options = {"reset_mask": fresh, "output_router_weights": True}
        outputs = self.policy.step(seen.images, seen.directions, seen.missions, self._state, **options)
        self._state = outputs.state
        log_probabilities = outputs.logits[:, 0].float().log_softmax(-1)  # (batch, actions)
        actions = log_probabilities.argmax(-1)
        entropies = -(log_probabilities.exp() * log_probabilities).sum(-1)
        costs = self.policy.usage_cost(outputs.router_weights)[:, 0]
        self._keep(*(column.tolist() for column in (actions, entropies, costs)))
        self.weights.append([layer[:, 0].cpu().numpy() for layer in outputs.router_weights])
        for player, action in zip(self._players, actions.tolist(), strict=True):
            player.act(action)
        return actions.cpu().numpy()

    def _begin(self, level: str, seed: int) -> _WatchedPlayer:
        player = _WatchedPlayer(level)
        player.begin(seed)
        self.places[level] = player.place()
        return player

    def _keep(self, *measured: list) -> None:
        rows = []
        for player, *numbers in zip(self._players, *measured, strict=True):
            x, y, *names = player.situation()
            known = [codes.setdefault(name, len(codes)) for codes, name in zip(self.names, names, strict=True)]
            rows.append((self.levels.index(player.level), player.seed, len(player.actions), x, y, *known, *numbers))
        self.steps.append(np.array(rows, dtype=STEP))


def record_pathways(
    policy: MopForActionPrediction,
    levels: Sequence[str],
    num_episodes: int,
    first_seed: int = FIRST_HELD_OUT_SEED,
    num_envs: int = 64,
    progress: bool | str = False,
) -> PathwayRecords:
    """
    Lets a policy play episodes greedily and to their end, and keeps every step, in 31 bytes and 4 for each expert.

    Args:
        policy ([`MopForActionPrediction`]): Whose mode, for training or evaluation, is as before afterwards.
        levels (`Sequence[str]`): The tasks.
        num_episodes (`int`): Of each task.
        first_seed (`int`, *optional*): Of each task; the next follow.
        num_envs (`int`, *optional*, defaults to 64): Episodes played at once, which changes nothing but the time.
        progress (`bool` or `str`, *optional*, defaults to `False`): Whether to show a bar, or what stands before it.

    Raises:
        ValueError: If the policy has no routers, a level is unknown, or there is no episode.
    """
    if not policy.config.is_routed:
        raise ValueError("This policy is a GRU baseline, which has no routers and so no pathways.")
    check_levels(levels)
    if num_episodes < 1:
        raise ValueError(f"num_episodes is {num_episodes}: choose a number of at least 1.")
    asked = [(level, first_seed + index) for index in range(num_episodes) for level in levels]
    recorder, was_training = _PathwayRecorder(policy, levels), policy.training
    policy.eval()
    try:
        running = run_episodes(asked, recorder, num_envs)
        title = progress if isinstance(progress, str) else "episodes"
        played = list(tqdm(running, desc=title, total=len(asked), unit="episode", disable=not progress))
    finally:
        policy.train(was_training)
    steps = np.concatenate(recorder.steps)  # by turn
    order = np.lexsort((steps["step"], steps["seed"], steps["task"]))
    return PathwayRecords(
        levels=recorder.levels,
        grids=[recorder.places[level][0] for level in recorder.levels],
        rooms=[recorder.places[level][1] for level in recorder.levels],
        carried=list(recorder.names[0]),
        phases=list(recorder.names[1]),
        expert_sizes=policy.config.layers,
        cost_exponent=policy.config.expert_cost_exponent,
        largest_usage=sum(max(costs) for costs in policy.expert_costs),
        episodes=sorted(played, key=lambda episode: (recorder.levels.index(episode.level), episode.seed)),
        steps=steps[order],
        weights=[np.concatenate(layer)[order] for layer in zip(*recorder.weights, strict=True)],
    )


@dataclass
class ExpertUse:
    """
    The mean weights of experts in groups of steps.

    Args:
        groups (`list`): What each group is called; in a grid, its column and row.
        steps (`np.ndarray`): How many steps each has, `(groups,)`.
        weights (`list[np.ndarray]`): For each layer, the mean weights `(groups, experts)`; each row sums to 1.
    """

    groups: list
    steps: np.ndarray
    weights: list[np.ndarray]

    def as_records(self) -> list[dict]:
        """A dictionary for each group: `group`, `steps`, and `weights` by layer."""
        rows = zip(self.groups, self.steps.tolist(), *(layer.tolist() for layer in self.weights), strict=True)
        return [{"group": group, "steps": steps, "weights": weights} for group, steps, *weights in rows]


def expert_use(records: PathwayRecords, by: str | Sequence[str]) -> ExpertUse:
    """
    How much each expert is used, by group of steps.

    Args:
        records ([`PathwayRecords`]): The steps.
        by (`str` or `Sequence[str]`): One of `GROUPINGS`, or several, whose groups are named by tuples.
    """
    keys = [by] if isinstance(by, str) else list(by)
    unknown = [key for key in keys if key not in GROUPINGS]
    if unknown or not keys:
        raise ValueError(f"by is {by!r}: steps are grouped by {', '.join(GROUPINGS)}.")
    columns = np.stack([records.steps[name].astype(int) for key in keys for name in GROUPINGS[key]], axis=1)
    values, group = np.unique(columns, axis=0, return_inverse=True)
    steps = np.bincount(group)
    names = {"task": records.levels, "phase": records.phases, "carried": records.carried, "action": ACTIONS}
    labels = []
    for row in values.tolist():
        left = iter(row)
        label = tuple((next(left), next(left)) if key == "cell" else names[key][next(left)] for key in keys)
        labels.append(label[0] if isinstance(by, str) else label)
    weights = [
        np.stack([np.bincount(group, column) for column in layer.T], axis=1) / steps[:, None]
        for layer in records.weights
    ]
    return ExpertUse(labels, steps, weights)


def learned_pathway_complexity(records: PathwayRecords) -> dict[str, dict]:
    """
    What the pathways of each task cost, after arXiv 2506.02813: the mean over its steps of the sum over layers and
    experts of weight times size to the power of `cost_exponent`. Layers of one expert, without a choice, cost nothing.

    Returns:
        `dict[str, dict]`: For each task, `complexity`; `share`, of that of always using the largest experts;
        `usage_cost`, the mean in the units of the policy's own loss; and the number of `steps`.
    """
    measured = {}
    for level in records.levels:
        costs = records.of_task(level).steps["usage_cost"]
        usage = float(costs.mean(dtype=float))
        share = usage / records.largest_usage if records.largest_usage > 0 else 0.0
        complexity = share * records.largest_complexity
        measured[level] = {"complexity": complexity, "share": share, "usage_cost": usage, "steps": len(costs)}
    return measured


@dataclass(frozen=True)
class TrainingRun:
    """
    The curve of a training.

    Args:
        folder (`str`): Where it was read.
        tasks (`list[str]`): What it learned.
        updates, losses (`np.ndarray`): The action loss, the mean since the entry before, `(logged,)`.
    """

    folder: str
    tasks: list[str]
    updates: np.ndarray
    losses: np.ndarray

    @classmethod
    def read(cls, folder: str | Path) -> "TrainingRun":
        """The run whose output folder, or one of whose checkpoints, this is. Raises `ValueError` if it is none."""
        for place in map(Path, filter(None, (folder, get_last_checkpoint(folder)))):
            files = [place / "trainer_state.json", place / "config.json"]
            if all(file.is_file() for file in files):
                state, config = (json.loads(file.read_bytes()) for file in files)
                logged = [(row["step"], row["action_loss"]) for row in state["log_history"] if "action_loss" in row]
                if not logged:
                    break
                updates, losses = map(np.array, zip(*logged, strict=True))
                return cls(str(folder), config.get("task_names") or [], updates, losses)
        raise ValueError(f"{folder} is no run of train_babyai.py that has logged its loss, nor a checkpoint of one.")

    def updates_below(self, threshold: float) -> tuple[int, bool]:
        """The first logged update from which on the loss stays below, and whether there is one; otherwise the last."""
        above = np.flatnonzero(~(self.losses < threshold))
        first = int(above[-1]) + 1 if len(above) else 0
        return int(self.updates[min(first, len(self.updates) - 1)]), first < len(self.updates)


def task_difficulty(runs: Iterable[TrainingRun], threshold: float = 0.25) -> dict[str, dict]:
    """
    How hard tasks are to learn by themselves, after arXiv 2506.02813: the natural logarithm of the median over runs
    of the updates until the loss stays below a threshold.

    Args:
        runs (`Iterable[TrainingRun]`): Runs that learned one task each.
        threshold (`float`, *optional*, defaults to 0.25): In nats per step.

    Returns:
        `dict[str, dict]`: For each task, its `difficulty`, the `threshold`, the `updates` of its runs, and how many of
        them are `unreached`: they never stayed below and count as their last update, so that it is at least as hard.
    """
    found: dict[str, dict] = {}
    for run in runs:
        if len(run.tasks) != 1:
            raise ValueError(f"{run.folder} learned {len(run.tasks)} tasks; difficulty is that of runs with one.")
        task = found.setdefault(run.tasks[0], {"threshold": threshold, "updates": [], "unreached": 0})
        updates, reached = run.updates_below(threshold)
        task["updates"].append(updates)
        task["unreached"] += not reached
    for task in found.values():
        task["difficulty"] = float(np.log(np.median(task["updates"])))
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's correlation, with mean ranks for ties; `None` of fewer than three pairs, or where one is constant."""
    ranks = [
        [np.sum(values < value) + np.sum(values == value) / 2 for value in values]
        for values in (np.asarray(first), np.asarray(second))
    ]
    return _correlation(*map(np.array, ranks)) if len(ranks[0]) > 2 else None


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's correlation of all entries; `None` where one array is constant."""
    first, second = first.ravel() - first.mean(), second.ravel() - second.mean()
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    # What is left of a constant after rounding has no direction.
    return float(first @ second / norms) if norms > 1e-12 * first.size else None


def routing_consistency(profiles: Sequence[ExpertUse]) -> dict | None:
    """
    Whether several trainings of one architecture came to the same pathways: the mean over pairs of checkpoints of the
    correlation between their tables of tasks by experts.

    A high correlation alone may only say that all prefer, say, small experts, whatever the task. Two controls tell:
    `task_specific` is the correlation after each expert's mean over the tasks is subtracted, so that only what differs
    from task to task is left; `exchanged_tasks` compares each task of one checkpoint with every other task of the
    second, and is as high as `correlation` where tasks make no difference. Experts of one layer that have the same
    size are told apart by nothing but chance, and are compared as they are numbered.

    Args:
        profiles (`Sequence[ExpertUse]`): For each checkpoint, its use by task; layers of one expert are left out.

    Returns:
        `dict`: `pairs`, their number, and `layers`, a dictionary for each layer and last one for all together, with
        `layer` and the means of the three correlations, `None` where a table is constant. `None` of fewer than two.
    """
    shapes = [(profile.groups, [layer.shape[1] for layer in profile.weights]) for profile in profiles]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("The checkpoints have other tasks or layers, so that their profiles cannot be compared.")
    if len(profiles) < 2:
        return None
    layers = [index for index, experts in enumerate(shapes[0][1]) if experts > 1]
    tables = {index: [profile.weights[index] for profile in profiles] for index in layers}
    if layers:
        tables["all"] = [np.concatenate(parts, axis=1) for parts in zip(*tables.values(), strict=True)]
    pairs = list(itertools.combinations(range(len(profiles)), 2))
    rows = []
    for name, table in tables.items():
        compared = [_compare(table[first], table[second]) for first, second in pairs]
        rows.append({"layer": name} | {key: _mean([pair[key] for pair in compared]) for key in compared[0]})
    return {"pairs": len(pairs), "layers": rows}


def _compare(first: np.ndarray, second: np.ndarray) -> dict:
    turned = [_correlation(first, np.roll(second, shift, axis=0)) for shift in range(1, len(first))]
    return {
        "correlation": _correlation(first, second),
        "task_specific": _correlation(first - first.mean(0), second - second.mean(0)),
        "exchanged_tasks": _mean(turned),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def pathway_distinctness(use: ExpertUse) -> dict:
    """
    How different the pathways of tasks are within one checkpoint: the Jensen-Shannon divergence in bits between their
    mean weights p and q, `H((p + q) / 2) - (H(p) + H(q)) / 2`, 0 if they are the same and 1 if they share no expert.

    Returns:
        `dict`: `layers`, a dictionary for each layer that has a choice, `layer` and `divergence`, the mean over the
        pairs of tasks; `divergence`, the mean over these layers, `None` of fewer than two tasks; and `between`, for
        each task its divergence from each, the mean over the layers.
    """
    between = {
        index: _entropy((layer[:, None] + layer) / 2) - (_entropy(layer)[:, None] + _entropy(layer)) / 2
        for index, layer in enumerate(use.weights)
        if layer.shape[1] > 1
    }
    pairs = np.triu_indices(len(use.groups), 1)
    means = {index: _mean(np.maximum(matrix, 0)[pairs].tolist()) for index, matrix in between.items()}
    return {
        "layers": [{"layer": index, "divergence": value} for index, value in means.items()],
        "divergence": _mean(list(means.values())),
        "between": np.maximum(np.mean(list(between.values()), axis=0), 0).tolist() if between else [],
    }


def _entropy(weights: np.ndarray) -> np.ndarray:
    """In bits, over the last axis."""
    return -(weights * np.log2(np.where(weights > 0, weights, 1))).sum(-1)


def self_sufficiency(
    policy: MopForActionPrediction, episodes: HeldOutEpisodes, thresholds: Sequence[float]
) -> list[dict]:
    """
    How well a policy plays with fewer experts: without those below a weight, for each of `thresholds` and for 0, which
    drops none; and without the largest expert of each layer.

    Returns:
        `list[dict]`: The records of [`HeldOutEpisodes`], for each way to play and level.
    """
    ways = [PlayOptions(weight_threshold=threshold) for threshold in sorted({0.0, *thresholds})]
    return [record for way in [*ways, PlayOptions(lesion_largest=True)] for record in episodes.play(policy, way)]
