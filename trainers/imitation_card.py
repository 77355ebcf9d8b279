"""The model card of a policy that an imitation run has trained."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import TrainerState

from ..hub_cards import render_model_card
from ..modeling import MopForActionPrediction
from .imitation_config import EnvironmentArguments, ImitationConfig
from .metrics.answer_accuracy import wilson_interval

ALGORITHM_NAMES = {"bc": "behaviour cloning", "dagger": "DAgger"}


def imitation_card(
    model: MopForActionPrediction,
    config: ImitationConfig,
    environments: EnvironmentArguments,
    state: TrainerState,
) -> ModelCard:
    """A card from what the policy is and what the run logged.

    Args:
        model ([`MopForActionPrediction`]): The trained policy.
        config ([`ImitationConfig`]): Of the run.
        environments ([`EnvironmentArguments`]): Of the run.
        state (`TrainerState`): Its log, with at least one evaluation.
    """
    repository = config.hub_model_id or str(config.output_dir)
    name = Path(repository).resolve().name
    evaluation = next(entry for entry in reversed(state.log_history) if "eval_success" in entry)
    results = [_row(level, evaluation, environments) for level in environments.env_id]
    metadata = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "reinforcement-learning",
        "tags": ["mixturekit", "moe", "recurrent", "babyai", "imitation-learning", "custom_code"],
        "metrics": ["success"],
        "model_name": name,
        "eval_results": [_index_entry(level, evaluation, environments) for level in environments.env_id],
    }
    frames = next((entry["frames"] for entry in reversed(state.log_history) if "frames" in entry), 0)
    return render_model_card(
        "pathway_policy",
        metadata,
        model_name=name,
        repository=repository,
        parameters=f"{model.num_parameters():,}",
        policy_kind="pathways of GRU experts" if model.config.is_routed else "GRU baseline",
        success=f"{100 * evaluation['eval_success']:.1f} %",
        frames=f"{frames:,}",
        level=environments.env_id[0],
        episodes=environments.eval_episodes,
        first_seed=f"{environments.eval_first_seed:,}",
        architecture=_architecture(model),
        training=_training(config, environments, state, frames),
        results=results,
    )


def _architecture(model: MopForActionPrediction) -> dict[str, str]:
    config = model.config
    sizes = "; ".join(", ".join(map(str, layer)) for layer in config.layers)
    return {
        "experts by layer (size of the GRU)": sizes,
        "width, routers": f"{config.intermediate_dim}, {config.router_dim if config.is_routed else 'no routers'}",
        "observation": f"{config.encoder}; missions: {config.mission_encoder}",
        "routing cost": f"alpha {config.routing_cost_coef:g}, size to the power {config.expert_cost_exponent:g}",
        "expert dropout": f"at most {config.expert_dropout_max_prob:g}",
    }


def _training(
    config: ImitationConfig, environments: EnvironmentArguments, state: TrainerState, frames: int
) -> dict[str, str]:
    unroll = f"{environments.num_envs} environments, {environments.unroll_len} steps"
    return {
        "algorithm": ALGORITHM_NAMES[environments.algorithm],
        "levels": ", ".join(environments.env_id),
        "updates, frames": f"{state.global_step:,}, {frames:,}",
        "unroll": unroll if config.world_size == 1 else f"{config.world_size} x {unroll}",
        "optimizer": f"{config.optim}, learning rate {config.learning_rate}, {config.lr_scheduler_type}",
        "seed": str(config.seed),
        "devices": f"{config.world_size} x {config.device.type}",
    }


def _figure(name: str, level: str, evaluation: dict, environments: EnvironmentArguments) -> float:
    return evaluation[f"eval_{name}" if len(environments.env_id) == 1 else f"eval_{name}/{level}"]


def _row(level: str, evaluation: dict, environments: EnvironmentArguments) -> dict[str, str]:
    success, episode_return, ratio = (
        _figure(name, level, evaluation, environments) for name in ("success", "return", "length_ratio")
    )
    count = environments.eval_episodes
    low, high = wilson_interval(round(success * count), count)
    return {
        "level": level,
        "success": f"{100 * success:.1f} %",
        "low": f"{100 * low:.1f}",
        "high": f"{100 * high:.1f}",
        "episode_return": f"{episode_return:.3f}",
        "length_ratio": f"{ratio:.2f}",
    }


def _index_entry(level: str, evaluation: dict, environments: EnvironmentArguments) -> EvalResult:
    return EvalResult(
        task_type="reinforcement-learning",
        dataset_type=level,
        dataset_name=level,
        metric_type="success",
        metric_name=f"success on {environments.eval_episodes} held-out episodes",
        metric_value=round(_figure("success", level, evaluation, environments), 5),
    )
