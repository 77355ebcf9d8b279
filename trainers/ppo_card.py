"""The model card of a language model that has learned word problems by reinforcement."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from .gsm8k_evaluation_config import RESULTS
from .shared_card import card_of_run, on_hub, parameter_rows, percent, training_rows
from .training_record import size_of, training_record

CURVES = {
    "reward": "reward",
    "kl": "divergence, nats per token",
    "entropy": "entropy, nats",
    "value/explained_variance": "explained variance of returns",
    "completions/mean_length": "tokens of a completion",
}
BEFORE, AFTER = "before", "after"
_LAST = {
    "reward": "mean reward",
    "kl": "divergence from the reference, nats per token",
    "value/explained_variance": "explained variance of the returns",
    "completions/mean_length": "tokens of a completion",
    "extraction_rate": "share of completions with a number",
    "router_agreement": "share of experts that a router would choose again",
}
_TITLES = {"exact": "exact number", "strict_match": "lm-eval, strict", "flexible_extract": "lm-eval, flexible"}
_SOURCES = (
    "Schulman et al. (2017): proximal policy optimisation, [arXiv 1707.06347](https://arxiv.org/abs/1707.06347)",
    "Schulman et al. (2016): generalized advantages, [arXiv 1506.02438](https://arxiv.org/abs/1506.02438)",
    "Cobbe et al. (2021): GSM8K, [arXiv 2110.14168](https://arxiv.org/abs/2110.14168)",
)
_REPLAY = "Ma et al. (2025): router replay, [arXiv 2510.11370](https://arxiv.org/abs/2510.11370)"


def ppo_record(model: PreTrainedModel, arguments: TrainingArguments, state: TrainerState, facts: dict) -> dict:
    """
    What [`card_of_ppo_policy`] needs to know of a run, for JSON.

    Args:
        model (`PreTrainedModel`): The policy, with its adapters if it has some.
        arguments (`TrainingArguments`): Those of the run.
        state (`TrainerState`): Its log.
        facts (`dict`): What the recipe knows: `train_file`, `base_model`, `prompt` and others.
    """
    config = model.config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    shape = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    shape["num_experts"] = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    shape["num_experts_per_tok"] = getattr(config, "num_experts_per_tok", None)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    trainable = sum(
        size_of(value) for name, value in model.named_parameters() if value.requires_grad and "value_head." not in name
    )
    data = {**facts, "model_type": config.model_type, "shape": shape, "completions_per_update": batch}
    data["base_model"] = facts.get("base_model") if on_hub(facts.get("base_model")) else None
    # Only the recipe knows of a policy that it has built itself.
    data["has_base"] = facts.get("base_model", "unknown") is not None
    data["trainable"] = trainable
    return training_record("ppo", model, arguments, state, data)


def reports_of_run(folder: str | Path) -> list[tuple[str, dict]]:
    """The evaluations that the recipe leaves in the folder of a run, with when they were made."""
    places = {when: Path(folder, f"eval_{when}", RESULTS) for when in (BEFORE, AFTER)}
    return [(when, json.loads(path.read_text("utf-8"))) for when, path in places.items() if path.is_file()]


def card_of_ppo_policy(
    record: dict,
    folder: str | Path,
    repository: str,
    revision: str | None = None,
    reports: Sequence[tuple[str, dict]] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """
    The card of a run that has been recorded.

    Args:
        record (`dict`): By [`ppo_record`], with the `license` that was asked for, if one was.
        folder (`str` or `Path`): Where the card will lie, beside pictures, adapters and critic.
        repository (`str`): Where the policy will be loaded from.
        revision (`str`, *optional*): The revision to pin.
        reports (`Sequence[tuple[str, dict]]`, *optional*): What `eval_results.json` has, with when it was measured;
            those of the folder if unset.
        base_model (`str`, *optional*): What the adapters belong to, if not what the record says.
    """
    data, arguments, folder = record["data"], record["arguments"], Path(folder)
    reports = reports_of_run(folder) if reports is None else reports
    is_adapter = (folder / "adapter_config.json").is_file()
    base_model = base_model or data.get("base_model")
    results = [
        {"when": when, "data": _data_name(report["settings"]["dataset_name"]), **row}
        for when, report in reports
        for row in record_rows(report)
    ]
    metadata = {"pipeline_tag": "text-generation", "tags": _tags(data, is_adapter)}
    if base_model:
        metadata |= {"base_model": base_model, "base_model_relation": "adapter" if is_adapter else "finetune"}
    if base_model or data["has_base"]:
        metadata["license"] = record.get("license", "unknown")
    if on_hub(data["train_file"]):
        metadata["datasets"] = [data["train_file"]]
    entries = [entry for when, report in reports if when != BEFORE for entry in _index_entries(report)]
    if entries:
        metadata |= {"metrics": ["exact_match"], "model_name": Path(repository).resolve().name}
        metadata["eval_results"] = entries
    return card_of_run(
        "ppo_policy",
        metadata,
        record,
        folder,
        repository,
        revision,
        model_type=data["model_type"],
        num_experts=data["shape"]["num_experts"],
        dataset_name=_data_name(data["train_file"]),
        algorithm="PPO with a critic",
        is_adapter=is_adapter,
        has_code=data["model_type"] == "more",
        has_value_head=(folder / "value_head.safetensors").is_file(),
        base_model=base_model or "",
        headline=_headline(reports),
        prompt=data["prompt"].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"),
        max_new_tokens=arguments.get("max_completion_length", 256),
        architecture=_architecture(record),
        training=_training(record),
        results=results,
        last={title: f"{record['last_log'][name]:.4g}" for name, title in _LAST.items() if _was_logged(record, name)},
        limits=_limits(data),
        citations=[*_SOURCES, *([_REPLAY] if arguments.get("router_replay", "off") != "off" else [])],
    )


def _was_logged(record: dict, name: str) -> bool:
    # The explained variance of returns that are all alike is not a number.
    value = record.get("last_log", {}).get(name)
    return isinstance(value, int | float) and value == value


def _tags(data: dict, is_adapter: bool) -> list[str]:
    tags = ["trl", "ppo", "reinforcement-learning", "gsm8k"]
    tags += ["moe"] if data["shape"]["num_experts"] else []
    tags += ["lora", "peft"] if is_adapter else []
    return tags + (["custom_code"] if data["model_type"] == "more" else [])


def _data_name(name: str) -> str:
    return "generated word problems" if name == "generated" else name if on_hub(name) else Path(name).name


def _architecture(record: dict) -> dict[str, str]:
    shape = record["data"]["shape"]
    names = {"num_hidden_layers": "layers", "hidden_size": "width", "num_attention_heads": "heads"}
    rows = {**parameter_rows(record), "trained": f"{record['data']['trainable']:,}"}
    if shape["num_experts"]:
        rows["experts"] = f"{shape['num_experts']} per layer, top-{shape['num_experts_per_tok']}"
    rows |= {title: f"{shape[name]:,}" for name, title in names.items() if name in shape}
    if "max_position_embeddings" in shape:
        rows["context"] = f"{shape['max_position_embeddings']:,} tokens"
    return rows


def _training(record: dict) -> dict[str, str]:
    data, given = record["data"], record["arguments"]
    rows = {"problems": f"{data['num_problems']:,}, {_data_name(data['train_file'])}"}
    if data.get("warm_start_steps"):
        rows["before it"] = f"{data['warm_start_steps']:,} steps on solutions"
    rows |= training_rows(record, f"{data['completions_per_update']:,} completions")
    rows["epochs of a rollout, clipping"] = f"{given['num_iterations']}, {given['epsilon']:g}"
    rows["critic"] = (
        f"{given['critic_level']}, learning rate {given['value_learning_rate']:g}, lambda {given['lam']:g}"
    )
    rows["divergence from the reference"] = f"weight {given['beta']:g}, in the {given['kl_in']}"
    rows["routers"] = f"{'frozen' if given['freeze_router'] else 'trained'}, replay {given['router_replay']}"
    if not data["shape"]["num_experts"]:
        del rows["routers"]
    return rows


def _headline(reports: Sequence[tuple[str, dict]]) -> dict[str, str] | None:
    greedy = {
        when: record
        for when, report in reports
        for record in report["results"]
        if (record["decoding"], record["metric"], record["grader"]) == ("greedy", "pass@1", "exact")
    }
    after = next((record for when, record in reversed(greedy.items()) if when != BEFORE), None)
    if after is None:
        return None
    headline = {name: percent(after[name]) for name in ("value", "low", "high")} | {"count": f"{after['count']:,}"}
    # Only the run's own two evaluations are of the same problems.
    both = BEFORE in greedy and AFTER in greedy and after is greedy[AFTER]
    return headline | {"before": percent(greedy[BEFORE]["value"]) if both else ""}


def record_rows(report: dict) -> list[dict[str, str]]:
    """The records of `eval_results.json` for a table."""
    return [
        {
            "figure": f"{record['decoding']}, {record['metric'].replace('_', ' ')}",
            "grader": _TITLES.get(record["grader"], "-"),
            "count": f"{record['count']:,}",
            "value": _cell(record),
        }
        for record in report["results"]
    ]


def _cell(record: dict) -> str:
    if record["metric"] == "mean_tokens":
        return f"{record['value']:.1f}"
    shown = f"{100 * record['value']:.1f}"
    return f"{shown} ({100 * record['low']:.1f} to {100 * record['high']:.1f})" if "low" in record else shown


def _index_entries(report: dict) -> list[EvalResult]:
    name = report["settings"]["dataset_name"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name if on_hub(name) else "local",
            dataset_name=_data_name(name),
            dataset_split=report["settings"]["split"],
            metric_type="exact_match" if record["grader"] == "exact" else record["grader"],
            metric_name=f"{record['metric']}, {record['decoding']}, {_TITLES[record['grader']]}",
            metric_value=round(record["value"], 5),
        )
        for record in report["results"]
        if record["grader"]
    ]


def _limits(data: dict) -> str:
    made = data["train_file"] == "generated"
    kind = "one-step problems that a program made" if made else "school problems in words"
    return (
        f"The policy has been rewarded for the final number of {kind}, and for nothing else: its reasoning is not\n"
        "judged, other tasks may have become worse, and it is no source of facts."
    )
