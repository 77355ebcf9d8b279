"""How well a policy plays held-out episodes of BabyAI, each to its end, beside the bot on the same seeds.

What is measured are records, one dictionary for each level and way to play: `level`, `decoding`, `weight_threshold`,
`lesion_largest`, `episodes`, `success` with `success_low` and `success_high` (95 % interval), `return`,
`normalised_score` (random actions 0, the bot 1), `length`, `bot_length`, `length_ratio` and `routing_cost`.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..modeling import MopForActionPrediction
from .babyai import Episode, Turn, bot_episode, check_levels, normalized_score, run_episodes
from .metrics.answer_accuracy import wilson_interval
from .policy_actor import PolicyActor
from .policy_evaluation_config import RESULTS, PolicyEvaluationArguments
from .whole_files import write_whole_text

ALL_LEVELS = "all levels"
# The figures that are means over the levels.
_MEANS = ("return", "normalised_score", "length", "bot_length", "length_ratio", "routing_cost")


@dataclass(frozen=True)
class PlayOptions:
    """
    A way to play.

    Args:
        decoding (`str`, *optional*, defaults to `"greedy"`): `greedy` or `sampled`.
        weight_threshold (`float`, *optional*): Weight below which experts are dropped.
        lesion_largest (`bool`, *optional*, defaults to `False`): Whether the largest expert of each layer is dropped.
        seed (`int`, *optional*, defaults to 0): Of `sampled`.
    """

    decoding: str = "greedy"
    weight_threshold: float | None = None
    lesion_largest: bool = False
    seed: int = 0


class PolicyPlayer:
    """
    What [`run_episodes`] asks for actions: a policy, its state, and what its routing costs.

    Args:
        policy ([`MopForActionPrediction`]): In evaluation mode.
        options ([`PlayOptions`]): How it plays.
    """

    def __init__(self, policy: MopForActionPrediction, options: PlayOptions):
        self.policy = policy
        self.actor = PolicyActor(
            policy,
            sample=options.decoding == "sampled",
            seed=options.seed,
            weight_threshold=options.weight_threshold,
            lesion_largest=options.lesion_largest,
            with_routing=policy.config.is_routed,
        )
        self.costs: dict[str, list[float]] = {}  # of each level: sum and steps
        self._state = None

    def __call__(self, turn: Turn) -> np.ndarray:
        """The actions of a turn."""
        if self._state is None:
            self._state = self.policy.initial_state(len(turn.episodes))
        elif len(turn.kept) < self._state.batch_size:
            self._state = self._state.batch_select_indices(torch.from_numpy(turn.kept))
        actions, self._state = self.actor(turn.observations, turn.started, self._state)
        self._count_costs(turn)
        return actions

    def _count_costs(self, turn: Turn) -> None:
        if not self.actor.router_weights:
            return
        costs = self.policy.usage_cost(self.actor.router_weights).tolist()
        for (level, _), cost in zip(turn.episodes, costs, strict=True):
            sums = self.costs.setdefault(level, [0.0, 0])
            sums[0] += cost
            sums[1] += 1


class HeldOutEpisodes:
    """
    The same episodes for every policy: some seeds of some levels, shared out between the processes.

    Args:
        levels (`Sequence[str]`): The levels.
        num_episodes (`int`): Of each level.
        first_seed (`int`): Of each level; the next follow.
        num_envs (`int`, *optional*, defaults to 64): Episodes played at once, in each process.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.
    """

    def __init__(
        self, levels: Sequence[str], num_episodes: int, first_seed: int, num_envs: int = 64, progress: bool = False
    ):
        self.levels = list(levels)
        self.num_envs = num_envs
        self.progress = progress
        self.episodes = [(level, first_seed + index) for index in range(num_episodes) for level in self.levels]
        self._bot: dict[tuple[str, int], Episode] | None = None

    def play(self, policy: MopForActionPrediction, options: PlayOptions | None = None) -> list[dict]:
        """
        Plays all episodes.

        Args:
            policy ([`MopForActionPrediction`]): Whose mode, for training or evaluation, is as before afterwards.
            options ([`PlayOptions`], *optional*): How it plays; greedily if unset.

        Returns:
            `list[dict]`: A record for each level, and one for all where there are several, the mean of the others.
        """
        options = options or PlayOptions()
        bot = self._bot_episodes()
        was_training = policy.training
        policy.eval()
        try:
            player = PolicyPlayer(policy, options)
            played = list(
                self._bar(run_episodes(self._share(), player, self.num_envs), describe(_options_record(options)))
            )
        finally:
            policy.train(was_training)
        played = gather_object(played)
        costs = gather_object([player.costs])
        records = []
        for level in self.levels:
            own = [episode for episode in played if episode.level == level]
            cost, steps = np.sum([part.get(level, (0.0, 0)) for part in costs], axis=0).tolist()
            record = _record(level, own, [bot[level, episode.seed] for episode in own], options)
            records.append({**record, "routing_cost": cost / steps if steps else None})
        return records if len(records) == 1 else [*records, _mean_record(records, options)]

    def metrics(self, policy: MopForActionPrediction, prefix: str = "eval") -> dict[str, float]:
        """The figures of greedy play as `Trainer.evaluate` returns them."""
        started = time.perf_counter()
        records = self.play(policy)
        metrics = {}
        names = ("success", "return", "normalised_score", "length", "length_ratio", "routing_cost")
        for record in records:
            # One level stands for itself.
            suffix = "" if len(self.levels) == 1 or record["level"] == ALL_LEVELS else f"/{record['level']}"
            metrics |= {f"{prefix}_{name}{suffix}": record[name] for name in names if record[name] is not None}
        return {**metrics, f"{prefix}_runtime": round(time.perf_counter() - started, 3)}

    def _share(self) -> list[tuple[str, int]]:
        state = PartialState()
        return self.episodes[state.process_index :: state.num_processes]

    def _bot_episodes(self) -> dict[tuple[str, int], Episode]:
        if self._bot is None:
            share = self._share()
            episodes = list(self._bar((bot_episode(level, seed) for level, seed in share), "the bot"))
            self._bot = {(episode.level, episode.seed): episode for episode in gather_object(episodes)}
        return self._bot

    def _bar(self, episodes, title: str):
        hidden = not self.progress or not PartialState().is_main_process
        return tqdm(episodes, desc=title, total=len(self._share()), unit="episode", disable=hidden)


def describe(record: dict) -> str:
    """How the policy of a record played: `greedy`, `greedy, weights from 0.2`, `greedy, without the largest`."""
    parts = [record["decoding"]]
    if record["weight_threshold"] is not None:
        parts.append(f"weights from {record['weight_threshold']:g}")
    if record["lesion_largest"]:
        parts.append("without the largest")
    return ", ".join(parts)


def _record(level: str, played: list[Episode], bot: list[Episode], options: PlayOptions) -> dict:
    count, solved = len(played), sum(episode.success for episode in played)
    low, high = wilson_interval(solved, count)
    mean_return = float(np.mean([episode.episode_return for episode in played]))
    # Where the bot gave up, its length says nothing.
    pairs = [(mine.length, its.length) for mine, its in zip(played, bot, strict=True) if its.success]
    lengths = np.mean(pairs, axis=0).tolist() if pairs else [None, None]
    return {
        "level": level,
        **_options_record(options),
        "episodes": count,
        "success": solved / count,
        "success_low": low,
        "success_high": high,
        "return": mean_return,
        "normalised_score": normalized_score(level, mean_return),
        "length": float(np.mean([episode.length for episode in played])),
        "bot_length": lengths[1],
        "bot_success": sum(episode.success for episode in bot) / count,
        "length_ratio": lengths[0] / lengths[1] if pairs else None,
    }


def _mean_record(records: list[dict], options: PlayOptions) -> dict:
    """Levels count alike, however many of their episodes there are."""
    count = sum(record["episodes"] for record in records)
    solved = round(sum(record["success"] * record["episodes"] for record in records))
    low, high = wilson_interval(solved, count)
    means = {}
    for name in _MEANS:
        values = [record[name] for record in records if record[name] is not None]
        means[name] = float(np.mean(values)) if values else None
    shared = {"level": ALL_LEVELS, **_options_record(options), "episodes": count, "success": solved / count}
    return {**shared, "success_low": low, "success_high": high, **means}


def _options_record(options: PlayOptions) -> dict:
    values = asdict(options)
    del values["seed"]
    return values


def load_evaluated_policy(arguments: PolicyEvaluationArguments) -> tuple[MopForActionPrediction, list[str]]:
    """The policy in evaluation mode, and the levels to play.

    Raises:
        ValueError: If there is no such policy, or a level is unknown.
    """
    if arguments.env_id is not None:
        check_levels(arguments.env_id)
    source = arguments.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error
    if config.model_type != "mop":
        raise ValueError(f"{source} is a {config.model_type!r} checkpoint; this recipe evaluates 'mop' policies.")
    levels = arguments.env_id or config.task_names
    if not levels:
        raise ValueError(f"{source} does not name the levels of its training; name some with --env_id.")
    check_levels(levels)
    policy = MopForActionPrediction.from_pretrained(source)
    return policy.to(PartialState(cpu=arguments.use_cpu).device).eval(), list(levels)


class PolicyEvaluation:
    """
    Plays in every way that is asked for, and keeps what it has: `eval_results.json` is written after each.

    Args:
        policy ([`MopForActionPrediction`]): In evaluation mode.
        levels (`Sequence[str]`): The levels.
        arguments ([`PolicyEvaluationArguments`]): What to do.
    """

    def __init__(self, policy: MopForActionPrediction, levels: Sequence[str], arguments: PolicyEvaluationArguments):
        self.policy, self.arguments = policy, arguments
        self.held_out = HeldOutEpisodes(
            levels, arguments.num_episodes, arguments.first_seed, arguments.num_envs, progress=True
        )
        self.records: list[dict] = []

    def ways(self) -> list[PlayOptions]:
        """The ways to play that the arguments ask for."""
        arguments = self.arguments
        ways = [PlayOptions(decoding, seed=arguments.seed) for decoding in arguments.decoding]
        if self.policy.config.is_routed:
            if arguments.self_sufficiency:
                ways += [PlayOptions(weight_threshold=value) for value in sorted(set(arguments.weight_thresholds))]
            if arguments.lesion:
                ways.append(PlayOptions(lesion_largest=True))
        return ways

    def run(self, after_each: Callable[[list[dict]], None] | None = None) -> dict:
        """Plays, and returns what `eval_results.json` has."""
        started = time.perf_counter()
        for options in self.ways():
            records = self.held_out.play(self.policy, options)
            self.records += records
            self._save(time.perf_counter() - started)
            if after_each is not None:
                after_each(records)
        return self._results(time.perf_counter() - started)

    def _results(self, seconds: float) -> dict:
        device, state = self.policy.device, PartialState()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
        settings = asdict(self.arguments)
        del settings["model_name_or_path"]
        return {
            "model": self.arguments.model_name_or_path,
            "parameters": self.policy.num_parameters(),
            "settings": settings,
            "hardware": f"{state.num_processes} x {name}, {torch.get_num_threads()} threads",
            "seconds": round(seconds, 1),
            "results": self.records,
        }

    def _save(self, seconds: float) -> None:
        if PartialState().is_main_process:
            text = json.dumps(self._results(seconds), indent=2) + "\n"
            write_whole_text(Path(self.arguments.output_dir, RESULTS), text)
