"""From arguments to a policy that has learned word problems by reinforcement: data, model, warm start, rewards."""

from dataclasses import fields
from functools import partial, update_wrapper
from pathlib import Path

import datasets
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from transformers import PhimoeConfig, PhimoeForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from .durable_grpo_trainer import DurableGRPOTrainer
from .expert_adapters import expert_lora_config, load_causal_lm
from .gsm8k import (
    correctness_reward,
    length_penalty,
    load_gsm8k,
    make_prompt,
    marker_reward,
    prompt_text,
    uses_chat,
    with_prompts,
)
from .gsm8k_evaluation import GSM8KEvaluation
from .gsm8k_evaluation_config import GSM8KEvaluationArguments
from .gsm8k_training_config import GENERATED, GSM8KDataArguments, GSM8KModelArguments
from .policy_value_model import value_head_file
from .ppo_config import PPOConfig
from .ppo_trainer import PPOTrainer
from .router_replay import check_replayable
from .text_data import local_path
from .tokenization import load_tokenizer, train_tokenizer
from .word_problems import generate_word_problems
from .zero_offload import check_zero_offload, prepare_for_zero3


def check_arguments(model_arguments: GSM8KModelArguments, arguments: GSM8KDataArguments, config: PPOConfig) -> None:
    """
    Refuses what the trainer would refuse only after the policy has been loaded and warmed up.

    Raises:
        ValueError: If GRPO has nothing to compare a completion with.
        FileNotFoundError: If there is no value head to begin with.
    """
    if arguments.algorithm == "grpo" and config.num_generations < 2:
        raise ValueError(f"num_generations is {config.num_generations}: algorithm grpo needs at least 2 generations.")
    if model_arguments.value_head is not None:
        value_head_file(model_arguments.value_head)


def load_splits(arguments: GSM8KDataArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Problems to learn from, and others to judge by.

    Raises:
        ValueError: If the data set is a single file, which has no split of its own to judge by.
    """
    source, judge = arguments.train_file, arguments.eval_file
    if judge is None and source != GENERATED and (path := local_path(source)) is not None and path.is_file():
        raise ValueError(f"{source} is one file: name other problems to judge by with --eval_file.")
    train = _load_problems(source, "train", arguments.num_train_problems, arguments)
    return train, _load_problems(judge or source, "test", arguments.num_eval_problems, arguments)


def _load_problems(name: str, split: str, count: int | None, arguments: GSM8KDataArguments) -> datasets.Dataset:
    if name == GENERATED:
        return generate_word_problems(count, split, arguments.max_number)
    return load_gsm8k(name, split, arguments.dataset_config, count)


def build_small_policy(problems: datasets.Dataset) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Phi-MoE of about 0.9 million parameters, and a tokenizer trained on the problems that splits all numbers."""
    texts = [f"{row['question']} {row['answer']}" for row in problems]
    tokenizer = train_tokenizer(["Question: Answer: " * 20, *texts], 400)
    tokenizer.padding_side = "left"
    config = PhimoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return PhimoeForCausalLM(config), tokenizer


def load_policy(
    arguments: GSM8KModelArguments, problems: datasets.Dataset, config: PPOConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The policy and its tokenizer, which pads on the left.

    Raises:
        ValueError: If what is asked for does not fit the policy; nothing has been written then.
    """
    if arguments.model_name_or_path is None:
        torch.manual_seed(config.seed)
        model, tokenizer = build_small_policy(problems)
        _check_policy(model, arguments, config)
        with config.main_process_first(desc="saving the first policy"):
            # A resumed run finds there what its reference is.
            if config.process_index == 0 and not config.resume_from_checkpoint:
                model.save_pretrained(warm_start_folder(config))
        # From where TRL loads the reference, if there is one.
        model.config._name_or_path = str(warm_start_folder(config))
        return model, tokenizer
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    tokenizer.padding_side = "left"
    options = {"load_in_4bit": True, "device_map": {"": config.device}} if arguments.load_in_4bit else {}
    model = load_causal_lm(arguments.model_name_or_path, arguments.dtype, **options)
    _check_policy(model, arguments, config)
    return model, tokenizer


def _check_policy(model: PreTrainedModel, arguments: GSM8KModelArguments, config: PPOConfig) -> None:
    _adapter_config(model, arguments)
    if config.router_replay != "off":
        check_replayable(model)


def _adapter_config(model: PreTrainedModel, arguments: GSM8KModelArguments) -> LoraConfig | None:
    if not arguments.use_peft:
        return None
    return expert_lora_config(
        model,
        arguments.lora_r,
        arguments.lora_alpha,
        target_parameters=None if arguments.lora_experts else [],
        lora_dropout=arguments.lora_dropout,
    )


def warm_start_folder(config: PPOConfig) -> Path:
    """Where the policy of a run lies that has not seen a reward yet: built from code, or after its warm start."""
    return Path(config.output_dir, "warm_start")


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: datasets.Dataset,
    arguments: GSM8KDataArguments,
    config: PPOConfig,
    nvme_path: str | None = None,
) -> None:
    """
    Trains on the solutions of `problems`, with TRL's `SFTTrainer` and a loss on the solution alone.

    Model and tokenizer go to [`warm_start_folder`]; what DeepSpeed offloads to a disk, to `nvme_path`.
    """
    conversational = uses_chat(arguments.prompt_format, tokenizer)
    rows = with_prompts(problems, conversational)
    answers = [f" {answer}" for answer in rows["answer"]]
    if conversational:
        answers = [[{"role": "assistant", "content": answer}] for answer in rows["answer"]]
    rows = datasets.Dataset.from_dict({"prompt": rows["prompt"], "completion": answers})
    supervised = SFTConfig(
        output_dir=str(warm_start_folder(config)),
        max_steps=arguments.warm_start_steps,
        per_device_train_batch_size=arguments.warm_start_batch_size,
        learning_rate=arguments.warm_start_learning_rate,
        warmup_steps=min(50, arguments.warm_start_steps // 10),
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=config.seed,
        use_cpu=config.use_cpu,
        ddp_backend=config.ddp_backend,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        disable_tqdm=config.disable_tqdm,
        router_aux_loss_coef=0.0,
    )
    # It has a configuration of DeepSpeed of its own.
    check_zero_offload(supervised, nvme_path)
    trainer = SFTTrainer(model, supervised, train_dataset=rows, processing_class=tokenizer)
    if trainer.is_deepspeed_enabled:
        prepare_for_zero3(trainer.model, trainer.accelerator.state.deepspeed_plugin)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled:
        # accelerate refuses DeepSpeed to a second trainer; transformers resets it in the same way.
        AcceleratorState._reset_state()


def reward_functions(arguments: GSM8KDataArguments) -> list:
    """The rewards that the arguments ask for, whose sum a completion gets."""
    functions = [correctness_reward]
    if arguments.marker_bonus:
        functions.append(marker_reward)
    if arguments.length_penalty_tokens is not None:
        penalty = partial(length_penalty, max_tokens=arguments.length_penalty_tokens)
        # TRL names its metrics by the function.
        functions.append(update_wrapper(penalty, length_penalty))
    return functions


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_arguments: GSM8KModelArguments,
    arguments: GSM8KDataArguments,
    config: PPOConfig,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
) -> GRPOTrainer:
    """The trainer of the algorithm that is asked for."""
    conversational = uses_chat(arguments.prompt_format, tokenizer)
    common = {
        "reward_funcs": reward_functions(arguments),
        "train_dataset": with_prompts(train, conversational),
        "eval_dataset": with_prompts(held_out, conversational),
        "processing_class": tokenizer,
        "peft_config": _adapter_config(model, model_arguments),
    }
    if arguments.algorithm == "ppo":
        trainer = PPOTrainer(model, args=config, value_head=model_arguments.value_head, **common)
        trainer.card_facts = {
            "train_file": arguments.train_file,
            "base_model": model_arguments.model_name_or_path,
            "warm_start_steps": arguments.warm_start_steps,
            "prompt": prompt_text(make_prompt(held_out[0]["question"], conversational), tokenizer),
        }
        return trainer
    shared = {field.name: getattr(config, field.name) for field in fields(GRPOConfig) if field.init}
    # Derived from the others.
    shared |= {"generation_batch_size": None}
    trainer = DurableGRPOTrainer(model, args=GRPOConfig(**shared), **common)
    if trainer.is_deepspeed_enabled:
        prepare_for_zero3(trainer.model, trainer.accelerator.state.deepspeed_plugin)
    return trainer


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: datasets.Dataset,
    arguments: GSM8KDataArguments,
    config: PPOConfig,
    name: str,
) -> dict:
    """Solves the held-out problems greedily; completions and `eval_results.json` go to a folder of that name.

    Returns:
        `dict`: The record of pass@1 by exact match, `value` with its interval `low` and `high`.
    """
    settings = GSM8KEvaluationArguments(
        model_name_or_path=str(config.output_dir),
        dataset_name=arguments.eval_file or arguments.train_file,
        num_problems=arguments.num_eval_problems,
        max_new_tokens=config.max_completion_length,
        batch_size=arguments.eval_batch_size,
        prompt_format=arguments.prompt_format,
        output_dir=str(Path(config.output_dir, name)),
        overwrite=True,
    )
    was_training = model.training
    model.eval()
    try:
        report = GSM8KEvaluation(model, tokenizer, settings, held_out).run()
    finally:
        model.train(was_training)
    return next(record for record in report["results"] if record["grader"] == "exact")
