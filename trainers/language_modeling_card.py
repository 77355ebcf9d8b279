"""The model card of a language model that a run has trained."""

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import TrainerState, TrainingArguments

from ..hub_cards import render_model_card
from ..modeling import MoreForCausalLM
from .task_data import GENERATED

EXPERT_KINDS = {
    "base": "gated feed-forward",
    "more_a": "recurrent-block",
    "more_b": "GRU",
    "more_c": "feed-forward and GRU",
    "more_d": "feed-forward with GRU refinement",
}


def language_model_card(
    model: MoreForCausalLM, arguments: TrainingArguments, state: TrainerState, dataset_name: str, prompt: str = "The"
) -> ModelCard:
    """A card from what the model is and what the run logged.

    Args:
        model ([`MoreForCausalLM`]): The trained model.
        arguments (`TrainingArguments`): Those of the run.
        state (`TrainerState`): Its log, with at least one evaluation.
        dataset_name (`str`): Hub id, or name of a local data set.
        prompt (`str`, *optional*, defaults to `"The"`): What the example on the card continues.
    """
    config = model.config
    repository = arguments.hub_model_id or str(arguments.output_dir)
    evaluation = next(entry for entry in reversed(state.log_history) if "eval_loss" in entry)
    on_hub = dataset_name.count("/") == 1 and not Path(dataset_name).exists()
    metadata = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixturekit", "moe", "recurrent", "custom_code"],
        "metrics": ["perplexity"],
        **({"datasets": [dataset_name]} if on_hub else {}),
    }
    architecture = {
        "experts": f"{config.expert_type}, {config.num_experts} per layer, top-{config.num_experts_per_tok}",
        "recurrences": f"{config.num_recurrences}; any number with `num_recurrences=`" if config.is_recurrent else "-",
        "layers, width, heads": f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}",
        "router": f"{config.router_score_function}, balanced by {config.router_balancing}",
        "operations per token, forward, 256 tokens": f"{config.flops_per_token(256) / 1e6:.1f} MFLOP",
    }
    training = {
        "steps": state.global_step,
        "sequences per step": arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size,
        "optimizer": f"{arguments.optim}, learning rate {arguments.learning_rate}, decay {arguments.weight_decay}",
        "schedule": f"{arguments.lr_scheduler_type}, warm-up {arguments.warmup_steps}",
        "seed": arguments.seed,
        "devices": f"{arguments.world_size} x {arguments.device.type}",
    }
    return render_model_card(
        "language_model",
        metadata,
        model_name=Path(repository).name,
        repository=repository,
        parameters=f"{model.num_parameters():,}",
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_kind=EXPERT_KINDS[config.expert_type],
        generate_options=f", num_recurrences={config.num_recurrences}" if config.is_recurrent else "",
        prompt=prompt,
        dataset_name="generated stories and sums" if dataset_name == GENERATED else Path(dataset_name).name,
        vocab_size=config.vocab_size,
        steps=evaluation["step"],
        loss=f"{evaluation['eval_loss']:.4f}",
        perplexity=f"{evaluation['eval_perplexity']:.2f}",
        architecture=architecture,
        training=training,
    )
