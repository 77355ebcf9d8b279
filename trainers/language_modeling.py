"""From arguments to what a language-modelling run needs: tokenizer, data sets, model, and checks before it starts."""

import json
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from ..modeling import ExpertStore, MoreConfig, MoreForCausalLM, initialize_offloaded, load_offloaded
from .checkpoints import check_checkpoint, checkpoints_of, newest_checkpoint, remove_checkpoints
from .language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
from .language_modeling_trainer import LanguageModelingTrainer
from .offload_arguments import OffloadArguments
from .offloaded_trainer import check_store_arguments
from .process_checks import check_processes
from .task_data import GENERATED, mix_examples, parse_task_weights
from .text_data import load_train_and_validation
from .token_datasets import AnswerDataset, PackedTokens
from .tokenization import load_tokenizer, tokenize_documents, train_tokenizer
from .training_record import parameter_counts
from .zero_offload import check_zero_offload

# A checkpoint and a resumed run must agree on these.
_SHAPE_FIELDS = (
    "expert_type", "hidden_size", "intermediate_size", "recurrent_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts", "vocab_size", "tie_word_embeddings", "state_initialization",
)  # fmt: skip


def check_output_dir(config: TrainingArguments) -> str | None:
    """Finds the checkpoint to resume, and refuses to overwrite a run without `overwrite_output_dir`.

    Returns:
        The path of the checkpoint, or `None` for a new run.

    Raises:
        FileExistsError: If `output_dir` has a run that the arguments neither resume nor overwrite.
        FileNotFoundError: If there is no checkpoint to resume.
    """
    folder = Path(config.output_dir)
    if config.resume_from_checkpoint:
        wanted = config.resume_from_checkpoint
        if wanted in ("last", "true", "True"):
            checkpoint = newest_checkpoint(folder)
            if checkpoint is None:
                raise FileNotFoundError(f"No checkpoint to resume in {folder}; leave out --resume_from_checkpoint.")
            return str(checkpoint)
        if problem := check_checkpoint(wanted):
            raise FileNotFoundError(f"{wanted} {problem}; --resume_from_checkpoint last takes the newest whole one.")
        return wanted
    has_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    has_run = has_model or bool(checkpoints_of(folder))
    if has_run and not config.overwrite_output_dir:
        raise FileExistsError(
            f"{folder} already holds a run; choose another --output_dir, continue it with "
            "--resume_from_checkpoint last, or replace it with --overwrite_output_dir."
        )
    return None


def check_sequence_length(sequence_length: int, config: PreTrainedConfig) -> None:
    """Raises `ValueError` for sequences that the model of `config` has no positions for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise ValueError(f"sequence_length is {sequence_length}: the model takes {limit} tokens at most.")


def load_data(
    arguments: DataArguments, model_name_or_path: str | None = None, seed: int = 0
) -> tuple[PreTrainedTokenizerBase, torch.utils.data.Dataset, torch.utils.data.Dataset]:
    """Loads the documents, the tokenizer or trains one, and cuts the tokens into sequences.

    Args:
        arguments ([`DataArguments`]): The data set and how to read it.
        model_name_or_path (`str`, *optional*): Checkpoint whose tokenizer is taken if no other is named.
        seed (`int`, *optional*, defaults to 0): Seed of the generated data.

    Returns:
        Tokenizer, training data and validation data.
    """
    named = arguments.tokenizer_name_or_path or model_name_or_path
    if arguments.train_tokenizer and named:
        raise ValueError(f"--train_tokenizer would replace the tokenizer of {named}; leave out one of them.")
    if not arguments.train_tokenizer and not named:
        raise ValueError("No tokenizer: name one with --tokenizer_name_or_path, or train one with --train_tokenizer.")
    if arguments.dataset_name == GENERATED:
        return _load_tasks(arguments, named, seed)
    train, validation = load_train_and_validation(
        arguments.dataset_name, arguments.dataset_config, arguments.text_column, arguments.validation_fraction
    )
    tokenizer = (
        load_tokenizer(named)
        if named
        else train_tokenizer(train, arguments.vocab_size or 8192, arguments.tokenizer_unit)
    )
    tokens = (tokenize_documents(rows, tokenizer, arguments.preprocessing_num_workers) for rows in (train, validation))
    return tokenizer, *(PackedTokens(part, arguments.sequence_length) for part in tokens)


def _load_tasks(arguments: DataArguments, tokenizer_name: str | None, seed: int):
    weights = parse_task_weights(arguments.task)
    facts, renamings = arguments.supporting_facts, arguments.num_renamings
    train = mix_examples(
        weights, arguments, "train", arguments.num_examples, seed, supporting_facts=facts, num_renamings=renamings
    )
    validation = mix_examples(
        weights, arguments, "validation", arguments.num_validation_examples, seed, supporting_facts=facts
    )
    if tokenizer_name:
        tokenizer = load_tokenizer(tokenizer_name)
    else:
        # Apart, as they are encoded: a token must not reach from a prompt into its answer.
        texts = (text for row in train for text in (row.prompt, row.answer, row.explanation))
        tokenizer = train_tokenizer(texts, arguments.vocab_size or 8192, arguments.tokenizer_unit)
    return tokenizer, *(AnswerDataset(part, tokenizer, arguments.sequence_length) for part in (train, validation))


def load_model(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> MoreForCausalLM:
    """A new model of a preset, or a checkpoint with the overrides that do not change its shape.

    Args:
        arguments ([`ModelArguments`]): Preset or checkpoint, and overrides.
        tokenizer (`PreTrainedTokenizerBase`): Its size and special tokens go into the model's configuration.
        vocab_size (`int`, *optional*): Embeddings of a new model; the tokenizer's size if unset.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or the checkpoint is of another architecture.
    """
    config = _config_for(arguments, tokenizer, vocab_size)
    if arguments.model_name_or_path:
        return MoreForCausalLM.from_pretrained(arguments.model_name_or_path, config=config, dtype=torch.float32)
    return MoreForCausalLM(config)


def load_model_offloaded(
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None,
    offload: OffloadArguments,
    device: torch.device,
) -> tuple[MoreForCausalLM, ExpertStore]:
    """As [`load_model`], with its experts in a store, layer by layer, and the rest on `device`."""
    config, store_config = _config_for(arguments, tokenizer, vocab_size), offload.store_config()
    if not arguments.model_name_or_path:
        return initialize_offloaded(config, store_config, device=device)
    model, store = load_offloaded(
        arguments.model_name_or_path, store_config, device=device, config=config, dtype=torch.float32
    )
    return model.train(), store


def _config_for(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> MoreConfig:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not arguments.model_name_or_path:
        special["vocab_size"] = len(tokenizer) if vocab_size is None else vocab_size
    config = load_config(arguments, **special)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {config.vocab_size}; "
            "raise --vocab_size or choose the tokenizer that belongs to the model."
        )
    return config


def load_config(arguments: ModelArguments, **changes) -> MoreConfig:
    """The configuration of a preset or a checkpoint with the overrides of `arguments`, and then `changes`."""
    overrides = _overrides(arguments)
    if not arguments.model_name_or_path:
        return MoreConfig.from_preset(
            arguments.preset, arguments.expert_type, arguments.match, **{**overrides, **changes}
        )
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    _check_architecture(config, overrides, arguments)
    # Built anew, because only the constructor checks the fields against each other.
    return MoreConfig(**{**config.to_dict(), **overrides, **changes})


def _overrides(arguments: ModelArguments) -> dict:
    chosen = {"model_name_or_path", "preset", "match", "expert_type"}
    values = {field.name: getattr(arguments, field.name) for field in fields(arguments) if field.name not in chosen}
    return {name: value for name, value in values.items() if value is not None}


def _check_architecture(config, overrides: dict, arguments: ModelArguments):
    path = arguments.model_name_or_path
    if config.model_type != "more":
        raise ValueError(f"{path} is a {config.model_type!r} checkpoint; this recipe trains 'more' models.")
    wanted = dict(overrides)
    if arguments.expert_type != ModelArguments.expert_type:
        wanted["expert_type"] = arguments.expert_type
    for name in _SHAPE_FIELDS:
        if name in wanted and wanted[name] != getattr(config, name):
            raise ValueError(f"{path} has {name}={getattr(config, name)}, which {wanted[name]} cannot replace.")


def check_resumed_model(checkpoint: str, config: MoreConfig):
    """Raises `ValueError` if `checkpoint` was written by a model of another shape than `config`."""
    with open(Path(checkpoint, "config.json"), encoding="utf-8") as file:
        saved = json.load(file)
    if saved.get("model_type") != "more":
        raise ValueError(f"{checkpoint} is a {saved.get('model_type')!r} checkpoint; this run trains a 'more' model.")
    differing = [name for name in _SHAPE_FIELDS if saved.get(name) != getattr(config, name)]
    if differing:
        pairs = ", ".join(f"{name}={saved.get(name)} there, {getattr(config, name)} here" for name in differing)
        raise ValueError(f"{checkpoint} cannot be resumed by this model: {pairs}.")


def train_language_model(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: LanguageModelingConfig,
    offload: OffloadArguments | None = None,
) -> dict[str, float]:
    """Trains a MoRE model and leaves the best checkpoint, its tokenizer, metrics and logs in `config.output_dir`.

    With `offload`, and a folder in it, the experts are in a store, whose statistics are among the metrics.

    Returns:
        The metrics of the last evaluation: `eval_loss`, `eval_perplexity` and the evaluation's speed.
    """
    check_processes(config.use_cpu)
    offloaded = offload is not None and offload.nvme_path is not None
    # With parameters on a disk by DeepSpeed the folder is for these.
    offloaded = not check_zero_offload(config, offload.nvme_path if offloaded else None) and offloaded
    checkpoint = check_output_dir(config)
    check_sequence_length(data_arguments.sequence_length, load_config(model_arguments))
    if offloaded:
        check_store_arguments(config)
    if offloaded and not checkpoint:
        offload.clear_folder(config.overwrite_output_dir)
    # The other processes then find the tokens in the cache.
    with config.main_process_first(desc="loading the data"):
        data = load_data(data_arguments, model_arguments.model_name_or_path, config.data_seed or 0)
    tokenizer, train, validation = data
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        store = None
        if offloaded:
            model, store = load_model_offloaded(
                model_arguments, tokenizer, data_arguments.vocab_size, offload, config.device
            )
            stack.enter_context(store)
        else:
            model = load_model(model_arguments, tokenizer, data_arguments.vocab_size)
        if checkpoint:
            check_resumed_model(checkpoint, model.config)
        trainer = LanguageModelingTrainer(
            model=model,
            args=config,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            store=store,
            task_arguments=data_arguments.for_evaluation(),
        )
        # Tasks are sums, which are generated, and stories from somewhere.
        on_tasks = data_arguments.dataset_name == GENERATED
        trainer.card_facts["dataset"] = data_arguments.babi_data if on_tasks else data_arguments.dataset_name
        if on_tasks:
            trainer.card_facts["prompt"] = "Mary went to the kitchen."
        return _train_and_save(trainer, checkpoint, offload)


def _train_and_save(
    trainer: LanguageModelingTrainer,
    checkpoint: str | None,
    offload: OffloadArguments | None,
) -> dict[str, float]:
    config, store = trainer.args, trainer.store
    if not checkpoint and trainer.is_world_process_zero():
        remove_checkpoints(config.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    # What it would push lacks the card still.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    metrics["parameters"] = parameter_counts(trainer.model)["total"]
    metrics["steps"] = trainer.state.global_step
    if store is not None:
        metrics |= offload.store_metrics(store)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()
    return metrics
