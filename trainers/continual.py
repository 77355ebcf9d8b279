"""From arguments to what a run over several games needs: the agent, checks before it starts, and its results."""

from dataclasses import asdict, fields
from pathlib import Path

import torch
from transformers import AutoConfig

from ..modeling import TieredMoeConfig
from .agent_card import write_agent_card
from .agent_experts import build_agent, check_room
from .atari import own_actions
from .checkpoints import remove_checkpoints
from .continual_log import METRICS
from .continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
from .continual_ppo_trainer import ContinualPpoTrainer
from .continual_results import RESULTS, continual_results, write_results
from .language_modeling import check_output_dir
from .process_checks import check_processes

# What is no field of the agent's configuration.
_NOT_OF_MODEL = {
    "model_name_or_path", "dense", "nvme_path", "store_trace", "eviction_policy", "prefetch", "prefetch_next_layer"
}  # fmt: skip


def load_agent_config(arguments: AgentArguments, games: list[str]) -> TieredMoeConfig:
    """
    The configuration of a new agent for `games`, or of a checkpoint.

    Raises:
        ValueError: If a value makes no sense, or a checkpoint is of another model or knows other games.
    """
    names = [part.name for part in fields(arguments) if part.name not in _NOT_OF_MODEL]
    overrides = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.model_name_or_path is None:
        config = TieredMoeConfig(games=games, own_actions=[list(own_actions(game)) for game in games], **overrides)
        return config.dense(arguments.dense) if arguments.dense else config
    path = arguments.model_name_or_path
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "tiered_moe":
        raise ValueError(f"{path} is a {config.model_type!r} checkpoint; this recipe trains 'tiered_moe' agents.")
    unknown = [game for game in games if game not in config.games]
    if unknown:
        raise ValueError(f"{path} knows the games {', '.join(config.games)}, and not {', '.join(unknown)}.")
    differing = [name for name, value in overrides.items() if getattr(config, name) != value]
    if differing:
        raise ValueError(f"{path} has other values of {', '.join(differing)}: leave these options out.")
    return config


def train_agent(arguments: AgentArguments, games: GameArguments, config: ContinualPpoConfig) -> dict:
    """
    Trains an agent game after game, and leaves it, checkpoints, logs and results in `config.output_dir`.

    Returns:
        `dict`: What `continual_results.json` has; `finished` says whether all games were learned.
    """
    check_processes(config.use_cpu)
    if arguments.nvme_path and config.optimizer == "dense":
        raise ValueError(
            "Dense Adam updates all experts at every step, and a store only those that have a gradient: leave out "
            "--nvme_path or --optimizer dense."
        )
    checkpoint = check_output_dir(config)
    model_config = load_agent_config(arguments, games.games)
    config.check_segments(games.num_envs)
    if config.learns_locally and model_config.num_experts == 1:
        raise ValueError(
            f"A dense agent has no experts to learn by --expert_learning_rule {config.expert_learning_rule}: "
            "leave it out."
        )
    if arguments.nvme_path:
        check_room(arguments, model_config, config)
    folder = Path(config.output_dir)
    if not checkpoint and config.process_index == 0 and config.overwrite_output_dir:
        remove_checkpoints(folder)
        (folder / METRICS).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    config.accelerator.wait_for_everyone()
    torch.set_num_threads(config.num_threads)
    experts = build_agent(arguments, model_config, config)
    try:
        trainer = ContinualPpoTrainer(experts, config, games, arguments)
        progress = trainer.train(checkpoint)
        finished = progress.phase == len(trainer.phases)
        results = continual_results(trainer, asdict(arguments)) | {"finished": finished}
        results["seconds"] = progress.seconds
        if config.process_index == 0:
            if arguments.store_trace:
                experts.store.save_trace(arguments.store_trace)
            if finished:
                # First of all, so that nothing after it can cost what was learned.
                trainer.agent.save_pretrained(folder)
            write_results(results, folder / RESULTS)
            trainer.log.write_retention(results)
            if finished:
                write_agent_card(trainer.agent, config, results)
        return results
    finally:
        experts.close()
