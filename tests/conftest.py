"""What tests in several folders share: small mixtures, and a checkpoint that knows stories and sums by heart."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerState

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.arithmetic import generate_problems
from mixturekit.trainers.language_modeling_card import card_of_language_model, language_model_record
from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig
from mixturekit.trainers.task_data import (
    GENERATED,
    TaskArguments,
    TaskExample,
    arithmetic_example,
    load_examples,
    save_task_arguments,
)
from mixturekit.trainers.token_datasets import AnswerDataset, pad_blocks
from mixturekit.trainers.tokenization import train_tokenizer

# More threads than free cores make models this small hundreds of times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build_mixture():
    """Builds a mixture of transformers by its `model_type`, with two experts for each token."""

    def build(model_type, num_experts=8, **changes):
        sizes = {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 48,
            "num_local_experts": num_experts, "num_experts": num_experts, "num_experts_per_tok": 2,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | changes))

    return build


@dataclass
class SolvedTasks:
    """A checkpoint as training leaves it, and what it answers: stories of `babi2` and sums of one digit."""

    folder: Path
    model: MoreForCausalLM
    tokenizer: PreTrainedTokenizerBase
    task_arguments: TaskArguments
    stories: list[TaskExample]
    sums: list[TaskExample]


@pytest.fixture(scope="session")
def solved(tmp_path_factory):
    # Of the test split, so that the recipe's own questions are the ones that the model knows.
    arguments = TaskArguments(max_facts=4, max_digits=1)
    stories = load_examples("babi2", arguments, "test", 16)
    problems = generate_problems("addition", 20, "test", max_digits=1, at_most=True)
    sums = [arithmetic_example(problem, arguments) for problem in problems]
    tokenizer = train_tokenizer([text for row in stories + sums for text in (row.prompt, row.answer)], 320)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = MoreConfig.from_preset(
        "debug", "more_c", vocab_size=len(tokenizer), hidden_size=32, num_recurrences=2, **marks
    )
    model = MoreForCausalLM(config)
    learn(model, pad_blocks([*AnswerDataset(stories + sums, tokenizer)], tokenizer.pad_token_id))
    folder = tmp_path_factory.mktemp("solved")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trained_on = DataArguments(max_facts=4, max_digits=1, sequence_length=64, validation_fraction=0.25)
    save_task_arguments(trained_on.for_evaluation(), folder)
    state = TrainerState(log_history=[{"step": 1, "eval_loss": 0.03, "eval_perplexity": 1.03}])
    run = LanguageModelingConfig(output_dir=str(folder), use_cpu=True)
    record = language_model_record(model, run, state, GENERATED)
    card_of_language_model(record, model.config, folder, str(folder)).save(folder / "README.md")
    return SolvedTasks(folder, model, tokenizer, arguments, stories, sums)


def learn(model, batch, loss=0.03):
    """Trains until the batch is known by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        reached = model(**batch).loss
        if reached < loss:
            break
        reached.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert reached < loss, reached
    return model.eval()


@pytest.fixture(scope="session")
def learn_by_heart():
    return learn
