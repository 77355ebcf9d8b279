"""From arguments to what an imitation run needs: policy, unrolls, and checks before it starts."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from transformers import AutoConfig

from ..modeling import MopConfig, MopForActionPrediction
from .babyai import BabyAIEnvironments, check_levels
from .babyai_demonstrations import DemonstrationStreams, generate_demonstrations, load_demonstrations
from .checkpoints import remove_checkpoints
from .imitation_config import EnvironmentArguments, ImitationConfig, PolicyArguments
from .imitation_trainer import ImitationTrainer
from .language_modeling import check_output_dir
from .process_checks import check_processes
from .unroll_sources import DaggerSource, DemonstrationSource, UnrollSource

# A checkpoint and a resumed or continued run must agree on these.
_SHAPE_FIELDS = (
    "layers", "intermediate_dim", "router_dim", "policy_type", "expert_norm", "encoder", "vision_dim",
    "mission_encoder", "mission_model_name_or_path", "mission_dim",
)  # fmt: skip
# Between the seeds of two processes.
_SEED_STRIDE = 1_000_003


def load_policy_config(arguments: PolicyArguments, levels: list[str]) -> MopConfig:
    """The configuration of a new policy for `levels`, or of a checkpoint with the overrides of `arguments`.

    Raises:
        ValueError: If a value is not understood, or a checkpoint is of another architecture.
    """
    overrides = _overrides(arguments)
    tasks = {"num_tasks": len(levels), "task_names": list(levels)}
    if arguments.model_name_or_path is None:
        wants_baseline = overrides.get("policy_type") == "gru"
        if wants_baseline:
            # The sizes that are given are those of the pathways whose number of parameters it has.
            del overrides["policy_type"]
        config = MopConfig(**overrides, **tasks)
        return config.matched_gru() if wants_baseline else config
    path = arguments.model_name_or_path
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "mop":
        raise ValueError(f"{path} is a {config.model_type!r} checkpoint; this recipe trains 'mop' policies.")
    wanted_type = overrides.pop("policy_type", config.policy_type)
    # As for a new baseline, sizes that are given are those of the pathways whose number of parameters it has.
    is_baseline = wanted_type == "gru" and "layers" in overrides
    wanted_type = "pathways" if is_baseline else wanted_type
    # Built anew, because only the constructor checks the fields against each other.
    changed = MopConfig(**{**config.to_dict(), **overrides, **tasks, "policy_type": wanted_type})
    changed = changed.matched_gru() if is_baseline else changed
    for name in _SHAPE_FIELDS:
        if getattr(changed, name) != getattr(config, name):
            raise ValueError(
                f"{path} has {name}={getattr(config, name)}, which {getattr(changed, name)} cannot replace."
            )
    if config.task_embedding_dim and config.num_tasks != len(levels):
        raise ValueError(f"{path} has embeddings of {config.num_tasks} tasks, but there are {len(levels)} levels.")
    return changed


def _overrides(arguments: PolicyArguments) -> dict:
    names = [field.name for field in fields(arguments) if field.name != "model_name_or_path"]
    given = {name.removeprefix("mop_"): getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def check_resumed_policy(checkpoint: str, config: MopConfig) -> None:
    """Raises `ValueError` if `checkpoint` was written by a policy of another shape than `config`."""
    saved = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    if saved.get("model_type") != "mop":
        raise ValueError(f"{checkpoint} is a {saved.get('model_type')!r} checkpoint; this run trains a 'mop' policy.")
    names = [*_SHAPE_FIELDS, "task_names"]
    differing = [name for name in names if saved.get(name) != getattr(config, name)]
    if differing:
        pairs = ", ".join(f"{name}={saved.get(name)} there, {getattr(config, name)} here" for name in differing)
        raise ValueError(f"{checkpoint} cannot be resumed by this policy: {pairs}.")


def load_policy(arguments: PolicyArguments, config: MopConfig) -> MopForActionPrediction:
    """A new policy, or a checkpoint."""
    if arguments.model_name_or_path:
        return MopForActionPrediction.from_pretrained(arguments.model_name_or_path, config=config, dtype=torch.float32)
    return MopForActionPrediction(config)


def load_source(arguments: EnvironmentArguments, config: ImitationConfig) -> UnrollSource:
    """Where the unrolls of this process come from."""
    seed = config.seed + _SEED_STRIDE * config.process_index
    if arguments.algorithm == "dagger":
        unrolls = config.max_steps * config.gradient_accumulation_steps
        steps = arguments.dagger_beta_steps
        return DaggerSource(
            BabyAIEnvironments(arguments.env_id, arguments.num_envs, seed, level_weights=arguments.level_weights),
            arguments.unroll_len,
            beta_start=arguments.dagger_beta_start,
            beta_unrolls=steps * unrolls if steps < 1 else steps * config.gradient_accumulation_steps,
            sample=arguments.student_acting == "sampled",
            seed=seed,
        )
    # The other processes then find the demonstrations in the cache.
    with config.main_process_first(desc="loading the demonstrations"):
        if arguments.demonstrations:
            demonstrations = load_demonstrations(arguments.demonstrations)
        else:
            # Not of the run's own seed, so that runs with several seeds share them.
            where = {"cache_dir": arguments.cache_dir, "num_proc": arguments.demonstration_num_proc}
            demonstrations = generate_demonstrations(arguments.env_id, arguments.num_demonstrations, seed=0, **where)
    return DemonstrationSource(
        DemonstrationStreams(demonstrations, arguments.env_id, arguments.num_envs, arguments.unroll_len, seed)
    )


def train_policy(
    policy_arguments: PolicyArguments, environment_arguments: EnvironmentArguments, config: ImitationConfig
) -> dict[str, float]:
    """Trains a MoP policy and leaves the best checkpoint, metrics and logs in `config.output_dir`.

    Returns:
        The metrics of the last evaluation, `eval_success` and others.
    """
    check_processes(config.use_cpu)
    checkpoint = check_output_dir(config)
    check_levels(environment_arguments.env_id)
    policy_config = load_policy_config(policy_arguments, environment_arguments.env_id)
    if checkpoint:
        check_resumed_policy(checkpoint, policy_config)
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    policy = load_policy(policy_arguments, policy_config)
    source = load_source(environment_arguments, config)
    trainer = ImitationTrainer(policy, config, source, environment_arguments)
    if not checkpoint and trainer.is_world_process_zero():
        remove_checkpoints(config.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    # First of all, so that nothing after it can cost what was learned.
    trainer.save_model(_internal_call=True)
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    metrics |= {"parameters": policy.num_parameters(), "updates": trainer.state.global_step}
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()
    return metrics
