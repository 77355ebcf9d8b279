"""Evaluating an agent on all of its games: loading it, the results as JSON and as a table."""

import json
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from rich.table import Table
from transformers import AutoConfig, AutoModel

from ..modeling import ExpertStore, ExpertStoreConfig, TieredMoeForActorCritic, load_offloaded
from .agent_evaluation import play_at_random, play_episodes
from .agent_evaluation_config import RESULTS, AgentEvaluationArguments
from .atari_scores import human_normalised
from .continual_ppo_trainer import expert_specialisation
from .whole_files import write_whole_text
from .wide_console import wide_console


@contextmanager
def evaluated_agent(arguments: AgentEvaluationArguments):
    """
    The agent in evaluation mode and the store of its experts, if they are wanted in one, for the time of a block.

    Raises:
        ValueError: If there is no such agent, or it does not know a game.
    """
    source = arguments.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error
    if config.model_type != "tiered_moe":
        raise ValueError(f"{source} is a {config.model_type!r} checkpoint; this recipe evaluates 'tiered_moe' agents.")
    unknown = [game for game in arguments.games or [] if game not in config.games]
    if unknown:
        raise ValueError(f"{source} knows the games {', '.join(config.games)}, and not {', '.join(unknown)}.")
    device = PartialState(cpu=arguments.use_cpu).device
    if arguments.nvme_path is None:
        yield AutoModel.from_pretrained(source).to(device).eval(), None
        return
    store_config = ExpertStoreConfig(
        arguments.nvme_path, min(config.hbm_capacity, config.num_experts), config.dram_capacity, training=False
    )
    agent, store = load_offloaded(source, store_config, AutoModel, str(device))
    with store:
        yield agent.eval(), store


def evaluate_agent(
    agent: TieredMoeForActorCritic, store: ExpertStore | None, arguments: AgentEvaluationArguments
) -> dict:
    """Plays all games, with the experts in `store` if there is one; returns and saves what `eval_results.json` has."""
    started = time.perf_counter()
    games = arguments.games or agent.config.games
    played, records = [], []
    for game in games:
        episodes = play_episodes(
            agent, game, arguments.num_episodes, arguments.first_seed, arguments.max_steps, arguments.tell_game,
            arguments.deterministic, preprocessing=arguments.preprocessing, store=store, progress=True,
        )  # fmt: skip
        chance = play_at_random(
            game, arguments.num_episodes, arguments.first_seed, arguments.max_steps, arguments.preprocessing, True
        )
        played.append(episodes)
        record = episodes.record() | {"random_return": float(chance.returns.mean())}
        records.append(record | {"human_normalised": human_normalised(game, record["return"])})
    settings = asdict(arguments)
    del settings["model_name_or_path"]
    results = {
        "model": arguments.model_name_or_path,
        "parameters": agent.num_parameters(),
        "settings": settings,
        "seconds": round(time.perf_counter() - started, 1),
        "results": records,
        "specialisation": expert_specialisation(played),
    }
    write_whole_text(Path(arguments.output_dir, RESULTS), json.dumps(results, indent=2) + "\n")
    return results


def print_results(results: dict) -> None:
    """A row for each game."""
    table = Table(title="Returns of whole episodes, raw, with the standard error of their mean")
    table.add_column("game")
    for column in ("episodes", "return", "median", "random", "human-normalised", "length", "game named"):
        table.add_column(column, justify="right")
    for record in results["results"]:
        human = record["human_normalised"]
        table.add_row(
            record["game"],
            f"{record['episodes']}",
            f"{record['return']:.2f} ± {record['return_error']:.2f}",
            f"{record['median']:.2f}",
            f"{record['random_return']:.2f}",
            "-" if human is None else f"{human:.2f}",
            f"{record['length']:.0f}",
            f"{100 * record['detector_accuracy']:.0f} %",
        )
    wide_console(130).print(table)
