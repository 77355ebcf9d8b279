"""The model card of a policy that an imitation run has trained."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import TrainerState

from ..modeling import MopConfig, MopForActionPrediction
from .imitation_config import EnvironmentArguments, ImitationConfig
from .metrics.answer_accuracy import wilson_interval
from .shared_card import card_of_run, episode_result, parameter_rows, percent, policy_metadata, training_rows
from .training_record import training_record

ALGORITHM_NAMES = {"bc": "behaviour cloning", "dagger": "DAgger"}
CURVES = {"eval_success": "success, held out", "agreement": "agreement with the bot", "routing_cost": "routing cost"}


def imitation_record(
    model: MopForActionPrediction,
    config: ImitationConfig,
    environments: EnvironmentArguments,
    state: TrainerState,
    routing: dict | None = None,
) -> dict:
    """
    What [`card_of_policy`] needs to know of a run, for JSON.

    Args:
        model ([`MopForActionPrediction`]): The trained policy.
        config ([`ImitationConfig`]): Of the run.
        environments ([`EnvironmentArguments`]): Of the run.
        state (`TrainerState`): Its log.
        routing (`dict`, *optional*): What [`routing_facts`] gives.
    """
    names = ("env_id", "algorithm", "num_envs", "unroll_len", "eval_episodes", "eval_first_seed")
    data = {name: getattr(environments, name) for name in names}
    if environments.algorithm == "bc":
        made = f"{environments.num_demonstrations:,} episodes of the bot"
        data["demonstrations"] = environments.demonstrations or made
    data["frames"] = next((entry["frames"] for entry in reversed(state.log_history) if "frames" in entry), None)
    return training_record("mop", model, config, state, data, routing)


def card_of_policy(
    record: dict,
    config: MopConfig,
    folder: str | Path,
    repository: str,
    revision: str | None = None,
    reports: Sequence[dict] = (),
) -> ModelCard:
    """
    The card of a run that has been recorded.

    Args:
        record (`dict`): By [`imitation_record`].
        config ([`MopConfig`]): Of the policy.
        folder (`str` or `Path`): Where the card will lie, whose pictures it shows.
        repository (`str`): Where the policy will be loaded from.
        revision (`str`, *optional*): The revision to pin.
        reports (`Sequence[dict]`, *optional*): What `evaluate_babyai.py` has written, which takes the place of the
            run's own evaluation.
    """
    data = record["data"]
    results = [row for report in reports for row in report["results"]] or _own_results(record)
    seeds = dict.fromkeys(report["settings"]["first_seed"] for report in reports) or [data["eval_first_seed"]]
    levels = [row for row in results if row["level"] in data["env_id"] and _plays_as_it_is(row)]
    tags = ["recurrent", "babyai", "imitation-learning", "mop"]
    return card_of_run(
        "pathway_policy",
        policy_metadata(tags, repository, [_index_entry(row) for row in levels]),
        record,
        folder,
        repository,
        revision,
        policy_kind="pathways of GRU experts" if config.is_routed else "GRU baseline",
        headline=_headline(levels) if levels else "",
        frames=f"{data['frames']:,}" if data["frames"] else "",
        level=data["env_id"][0],
        first_seed=" and ".join(f"{seed:,}" for seed in seeds),
        architecture=_architecture(record, config),
        training=_training(record),
        results=[_row(row) for row in results],
    )


def _architecture(record: dict, config: MopConfig) -> dict[str, str]:
    sizes = "; ".join(", ".join(map(str, layer)) for layer in config.layers)
    return {
        **parameter_rows(record),
        "experts by layer (size of the GRU)": sizes,
        "width, routers": f"{config.intermediate_dim}, {config.router_dim if config.is_routed else 'no routers'}",
        "observation": f"{config.encoder}; missions: {config.mission_encoder}",
        "routing cost": f"alpha {config.routing_cost_coef:g}, size to the power {config.expert_cost_exponent:g}",
        "expert dropout": f"at most {config.expert_dropout_max_prob:g}",
    }


def _training(record: dict) -> dict[str, str]:
    data = record["data"]
    unroll = f"{data['num_envs']} environments, {data['unroll_len']} steps"
    rows = {"algorithm": ALGORITHM_NAMES[data["algorithm"]], "levels": ", ".join(data["env_id"])}
    if data.get("demonstrations"):
        rows["demonstrations"] = data["demonstrations"]
    if data["frames"]:
        rows["frames"] = f"{data['frames']:,}"
    return rows | training_rows(record, unroll if record["world_size"] == 1 else f"{record['world_size']} x {unroll}")


def _own_results(record: dict) -> list[dict]:
    """The last evaluation of the run as records of `evaluate_babyai.py`."""
    data, evaluation = record["data"], record.get("evaluation", {})
    if "eval_success" not in evaluation:
        return []
    results, count = [], data["eval_episodes"]
    for level in data["env_id"]:
        suffix = "" if len(data["env_id"]) == 1 else f"/{level}"
        success = evaluation[f"eval_success{suffix}"]
        low, high = wilson_interval(round(success * count), count)
        row = {"level": level, "decoding": "greedy", "episodes": count, "success": success}
        row |= {"success_low": low, "success_high": high, "return": evaluation[f"eval_return{suffix}"]}
        results.append(row | {"length_ratio": evaluation.get(f"eval_length_ratio{suffix}")})
    return results


def _plays_as_it_is(record: dict) -> bool:
    changed = record.get("weight_threshold") is not None or record.get("lesion_largest")
    return record["decoding"] == "greedy" and not changed


def _headline(levels: list[dict]) -> str:
    """Success in the levels of the training, each of which counts alike, with its interval."""
    count = sum(row["episodes"] for row in levels)
    success = sum(row["success"] for row in levels) / len(levels)
    low, high = (100 * bound for bound in wilson_interval(round(success * count), count))
    return f"{percent(success)} ({low:.1f} to {high:.1f}) of {count:,} held-out episodes"


def _row(record: dict) -> dict[str, str]:
    parts = [record["decoding"]]
    if record.get("weight_threshold") is not None:
        parts.append(f"weights from {record['weight_threshold']:g}")
    if record.get("lesion_largest"):
        parts.append("without the largest experts")
    ratio = record["length_ratio"]
    return {
        "level": record["level"],
        "decoding": ", ".join(parts),
        "episodes": f"{record['episodes']:,}",
        "success": percent(record["success"]),
        "low": f"{100 * record['success_low']:.1f}",
        "high": f"{100 * record['success_high']:.1f}",
        "episode_return": f"{record['return']:.3f}",
        # Where the bot solved nothing, there is no length to compare with.
        "length_ratio": "-" if ratio is None else f"{ratio:.2f}",
    }


def _index_entry(record: dict) -> EvalResult:
    name = f"success on {record['episodes']} held-out episodes"
    return episode_result(record["level"], "success", name, round(record["success"], 5))
