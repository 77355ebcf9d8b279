"""Causal language modelling with any mixture of transformers whose experts are kept in a store."""

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import AutoConfig

from ..modeling import load_offloaded
from .checkpoints import remove_checkpoints
from .language_modeling import check_output_dir, check_sequence_length, load_data
from .language_modeling_config import DataArguments, LanguageModelingConfig
from .offload_arguments import OffloadArguments
from .offloaded_trainer import OffloadedTrainer, check_store_arguments
from .process_checks import check_processes
from .token_datasets import pad_blocks

PRECISIONS = ("float32", "bfloat16")


@dataclass
class CheckpointArguments:
    """The mixture to be trained further."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder: Mixtral, Qwen3-MoE, OLMoE, Phi-MoE, or another with fused experts."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {' or '.join(PRECISIONS)}."})
    output_router_logits: bool = field(
        default=True, metadata={"help": "Whether the loss has the balancing loss of the model in it."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the checkpoint may run."})


def train_offloaded(
    arguments: CheckpointArguments, data_arguments: DataArguments, config: LanguageModelingConfig,
    offload: OffloadArguments,
) -> dict[str, float]:  # fmt: skip
    """
    Trains a checkpoint further and leaves an ordinary one, and metrics, in `config.output_dir`.

    Returns:
        The metrics of the last evaluation, and what the store did.

    Raises:
        ValueError: If there is no folder for the experts, or an argument does not fit.
        FileExistsError, FileNotFoundError: If one of the folders has another run, or none to be resumed.
    """
    if offload.nvme_path is None:
        raise ValueError("--nvme_path names the folder for the experts; without one, use transformers' Trainer.")
    check_processes(config.use_cpu)
    # Before all experts are copied to the disk.
    check_store_arguments(config)
    if arguments.dtype not in PRECISIONS:
        raise ValueError(f"--dtype is {' or '.join(PRECISIONS)}, not {arguments.dtype!r}.")
    checkpoint = check_output_dir(config)
    source = arguments.model_name_or_path
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
    check_sequence_length(data_arguments.sequence_length, model_config)
    if not checkpoint:
        offload.clear_folder(config.overwrite_output_dir)
    tokenizer, train, validation = load_data(data_arguments, source, config.data_seed or 0)
    model, store = load_offloaded(
        source,
        offload.store_config(),
        device=config.device,
        dtype=getattr(torch, arguments.dtype),
        output_router_logits=arguments.output_router_logits,
        trust_remote_code=arguments.trust_remote_code,
    )
    with store:
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        trainer = OffloadedTrainer(
            model=model.train(),
            args=config,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=partial(pad_blocks, pad_token_id=padding),
            processing_class=tokenizer,
            store=store,
            task_arguments=data_arguments.for_evaluation(),
        )
        if not checkpoint:
            remove_checkpoints(config.output_dir)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        metrics = trainer.evaluate() | {"parameters": model.num_parameters(), "steps": trainer.state.global_step}
        metrics |= offload.store_metrics(store)
        trainer.save_metrics("eval", metrics)
    return metrics
