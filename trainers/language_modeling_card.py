"""The model card of a language model that a run has trained."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import TrainerState, TrainingArguments

from ..modeling import MoreConfig, MoreForCausalLM
from .shared_card import card_of_run, on_hub, parameter_rows, training_rows
from .task_data import GENERATED
from .training_record import training_record

EXPERT_KINDS = {
    "base": "gated feed-forward",
    "more_a": "recurrent-block",
    "more_b": "GRU",
    "more_c": "feed-forward and GRU",
    "more_d": "feed-forward with GRU refinement",
}
CURVES = {"perplexity": "perplexity of the training data", "eval_perplexity": "held-out perplexity"}
_HUGINN = "Geiping et al. (2025): depth by recurrence, [arXiv 2502.05171](https://arxiv.org/abs/2502.05171)"
_MIXTURES = "Shazeer et al. (2017): mixtures of experts, [arXiv 1701.06538](https://arxiv.org/abs/1701.06538)"


def language_model_record(
    model: MoreForCausalLM,
    arguments: TrainingArguments,
    state: TrainerState,
    dataset_name: str,
    prompt: str = "The",
    routing: dict | None = None,
) -> dict:
    """
    What [`card_of_language_model`] needs to know of a run, for JSON.

    Args:
        model ([`MoreForCausalLM`]): The trained model.
        arguments (`TrainingArguments`): Those of the run.
        state (`TrainerState`): Its log.
        dataset_name (`str`): Hub id, or name of a local data set.
        prompt (`str`, *optional*, defaults to `"The"`): What the example on the card continues.
        routing (`dict`, *optional*): What [`routing_facts`] gives.
    """
    sequences = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    data = {"dataset": dataset_name, "prompt": prompt, "sequences_per_update": sequences}
    data["is_on_hub"] = on_hub(dataset_name)
    return training_record("more", model, arguments, state, data, routing)


def card_of_language_model(
    record: dict, config: MoreConfig, folder: str | Path, repository: str, revision: str | None = None
) -> ModelCard:
    """
    The card of a run that has been recorded.

    Args:
        record (`dict`): By [`language_model_record`].
        config ([`MoreConfig`]): Of the model.
        folder (`str` or `Path`): Where the card will lie, whose pictures it shows.
        repository (`str`): Where the model will be loaded from.
        revision (`str`, *optional*): The revision to pin.
    """
    data, evaluation = record["data"], record.get("evaluation", {})
    name = "generated stories and sums" if data["dataset"] == GENERATED else Path(data["dataset"]).name
    measured = "eval_perplexity" in evaluation
    metadata = {"pipeline_tag": "text-generation", "tags": ["moe", "recurrent", "custom_code", "more"]}
    if measured:
        metadata |= {"metrics": ["perplexity"], "model_name": Path(repository).resolve().name}
        metadata["eval_results"] = [_index_entry(data, name, evaluation)]
    if data["is_on_hub"]:
        metadata["datasets"] = [data["dataset"]]
    return card_of_run(
        "language_model",
        metadata,
        record,
        folder,
        repository,
        revision,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_kind=EXPERT_KINDS[config.expert_type],
        is_recurrent=config.is_recurrent,
        generate_options=f", num_recurrences={config.num_recurrences}" if config.is_recurrent else "",
        prompt=data["prompt"],
        dataset_name=name,
        vocab_size=f"{config.vocab_size:,}",
        steps=f"{evaluation['step']:,}" if measured else "",
        loss=f"{evaluation['eval_loss']:.4f}" if measured else "",
        perplexity=f"{evaluation['eval_perplexity']:.2f}" if measured else "",
        architecture=_architecture(record, config),
        training={"data": name} | training_rows(record, f"{data['sequences_per_update']} sequences"),
        citations=[_MIXTURES, *([_HUGINN] if config.is_recurrent else [])],
    )


def _architecture(record: dict, config: MoreConfig) -> dict[str, str]:
    steps = f"{config.num_recurrences}; any number with `num_recurrences=`"
    heads = f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}"
    return {
        **parameter_rows(record),
        "experts": f"{config.expert_type}, {config.num_experts} per layer, top-{config.num_experts_per_tok}",
        **({"recurrences": steps} if config.is_recurrent else {}),
        "layers, width, heads": heads,
        "context, vocabulary": f"{config.max_position_embeddings:,} tokens, {config.vocab_size:,}",
        "router": f"{config.router_score_function}, balanced by {config.router_balancing}",
        "operations per token, forward, 256 tokens": f"{config.flops_per_token(256) / 1e6:.1f} MFLOP",
    }


def _index_entry(data: dict, name: str, evaluation: dict) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=data["dataset"] if data["is_on_hub"] else "local",
        dataset_name=name,
        dataset_config="default",
        dataset_split="validation",
        metric_type="perplexity",
        metric_name="perplexity per token, held out",
        metric_value=round(evaluation["eval_perplexity"], 4),
    )
