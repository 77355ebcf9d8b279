"""The recipes that keep experts on disk, run as a user runs them."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixturekit.modeling import MoreForCausalLM
from mixturekit.trainers.language_modeling import train_language_model
from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
from mixturekit.trainers.offload_arguments import OffloadArguments
from mixturekit.trainers.recipe_parser import parse_recipe
from mixturekit.trainers.task_data import saved_task_arguments
from mixturekit.trainers.training_record import parameter_counts

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def run(run_here):
    """Runs a recipe; returns what it exits with, and what it printed."""

    def run(script, *options):
        with redirect_stdout(StringIO()) as printed:
            code = run_here(script, *options)
        return code, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def train(tmp_path_factory, run):
    """Trains a MoRE model of 12 experts per layer, of which 6 are in memory."""
    folder = tmp_path_factory.mktemp("training")
    fixed = ["--config", RECIPES / "more" / "quickstart.yaml", "--num_experts", 12, "--num_examples", 400]
    fixed += ["--num_validation_examples", 16, "--per_device_train_batch_size", 4, "--logging_steps", 2]
    fixed += ["--max_steps", 6, "--eval_steps", 3, "--save_steps", 3, "--fast_capacity", 4, "--ram_capacity", 2]

    def train(name, *options):
        places = ["--output_dir", folder / name, "--nvme_path", folder / f"{name}_experts"]
        places += ["--store_trace", folder / f"{name}_trace.jsonl"]
        return folder / name, *run("train_more.py", *fixed, *places, *options)

    return train


@pytest.fixture(scope="module")
def trained(train):
    folder, code, printed = train("out")
    assert code is None
    return folder, printed


def test_more_trains_with_its_experts_on_disk(trained):
    folder, printed = trained
    assert "of the experts were there when asked for" in printed
    results = json.loads((folder / "eval_results.json").read_text())
    assert results["store_bytes_read"] > 0 and results["store_bytes_written"] > 0
    assert 0 < results["store_hit_rate"] < 1
    assert results["parameters"] > 1_500_000, "Experts on disk count, too."
    counts = json.loads((folder / "training_record.json").read_text())["parameters"]
    assert counts["total"] == results["parameters"] == MoreForCausalLM.from_pretrained(folder).num_parameters()
    assert counts == parameter_counts(MoreForCausalLM.from_pretrained(folder))


def test_text_is_that_of_the_model_in_memory(trained, run, tmp_path):
    folder, _ = trained
    options = ["--model_name_or_path", folder, "--prompt", "Mary went to the", "--max_new_tokens", 8]
    options += ["--fast_capacity", 3, "--ram_capacity", 2, "--prefetch_next_layer"]
    for _ in range(2):
        code, printed = run("generate_offloaded.py", *options, "--nvme_path", tmp_path / "experts")
        assert code is None
        tokenizer, model = AutoTokenizer.from_pretrained(folder), MoreForCausalLM.from_pretrained(folder)
        prompt = tokenizer("Mary went to the", return_tensors="pt")
        expected = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
        assert printed.startswith(expected)
        assert "tokens/s" in printed
    refused, _ = run("generate_offloaded.py", *options, "--nvme_path", f"{folder}_experts")
    assert "was not filled from" in refused
    refused, _ = run("generate_offloaded.py", *options)
    assert "--nvme_path" in refused


def test_stopped_training_goes_on_as_if_it_had_not_been(train, trained):
    folder, code, _ = train("stopped")
    assert code is None
    # As if it had been killed after its first checkpoint.
    shutil.rmtree(folder / "checkpoint-6")
    _, code, _ = train("stopped", "--resume_from_checkpoint", "last")
    assert code is None
    results = [json.loads((path / "eval_results.json").read_text()) for path in (folder, trained[0])]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


def test_experts_of_an_earlier_run_are_not_taken_for_new_ones(train, trained):
    _, refused, _ = train("other", "--nvme_path", f"{trained[0]}_experts")
    assert "already holds the experts of a run" in refused


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_other_mixtures_train_further(trained, run, tmp_path, family):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    names = {"num_local_experts": 8} if family == "mixtral" else {"num_experts": 8, "moe_intermediate_size": 24}
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, **names,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "source")
    options = ["--model_name_or_path", tmp_path / "source", "--nvme_path", tmp_path / "experts", "--use_cpu", True]
    options += [
        "--num_examples",
        64,
        "--num_validation_examples",
        8,
        "--max_facts",
        5,
        "--per_device_train_batch_size",
        8,
    ]
    options += ["--max_steps", 4, "--eval_strategy", "no", "--warmup_steps", 0, "--output_dir", tmp_path / "out"]
    options += ["--report_to", "none", "--fast_capacity", 3, "--ram_capacity", 2, "--bf16", False]
    limit = config.max_position_embeddings
    refused, _ = run("train_offloaded.py", *options, "--sequence_length", limit + 1)
    assert refused == f"ValueError: sequence_length is {limit + 1}: the model takes {limit} tokens at most."
    code, printed = run("train_offloaded.py", *options)
    assert code is None
    assert "MB were read" in printed
    assert saved_task_arguments(tmp_path / "out")["max_facts"] == 5
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = {name: (after[name] != weight).any().item() for name, weight in model.state_dict().items()}
    assert all(moved.values()), moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--optim", "adafactor"), "trained by AdamW, not by optim="),
        (("--save_only_model", True, "--load_best_model_at_end", True), "set save_only_model=False"),
    ],
)
def test_what_a_store_cannot_do_is_refused_before_it_is_filled(train, trained, run, tmp_path, options, message):
    places = ["--model_name_or_path", trained[0], "--nvme_path", tmp_path / "experts", "--output_dir", tmp_path]
    refused, _ = run("train_offloaded.py", *places, "--use_cpu", True, "--bf16", False, *options)
    assert message in refused and not (tmp_path / "experts").exists()
    folder, refused, _ = train("refused", *options)
    assert message in refused and not folder.with_name("refused_experts").exists()


def test_more_goes_on_from_a_checkpoint_with_its_experts_on_disk(train, trained, run):
    options = ["--model_name_or_path", trained[0], "--train_tokenizer", False, "--num_recurrences", 2]
    folder, code, _ = train("further", *options)
    assert code is None
    losses = [json.loads((path / "eval_results.json").read_text())["eval_loss"] for path in (trained[0], folder)]
    assert losses[1] < losses[0]
    assert MoreForCausalLM.from_pretrained(folder).config.num_recurrences == 2
    options = ["--model_name_or_path", trained[0], "--prompt", "Mary", "--nvme_path", f"{folder}_experts"]
    refused, _ = run("generate_offloaded.py", *options, "--fast_capacity", 3)
    assert "holds the experts of a training run" in refused


def test_failed_training_gives_the_folder_back(tmp_path):
    line = ["--config", str(RECIPES / "more" / "quickstart.yaml"), "--num_examples", "100", "--learning_rate", "inf"]
    line += ["--num_validation_examples", "4", "--warmup_steps", "0", "--output_dir", str(tmp_path / "out")]
    line += ["--report_to", "none", "--nvme_path", str(tmp_path / "experts")]
    types = (ModelArguments, DataArguments, LanguageModelingConfig, OffloadArguments)
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            # A store that is still open would refuse the second of them.
            train_language_model(*parse_recipe(types, [*line, "--overwrite_output_dir"]))


def test_impossible_tiers_are_refused_in_one_sentence(train):
    _, refused, _ = train("impossible", "--fast_capacity", 0)
    assert refused.startswith("ValueError: fast_capacity (0)") and "\n" not in refused


def test_doctor_says_what_is_missing(run, tmp_path):
    code, printed = run("doctor.py", "--nvme_path", tmp_path / "experts")
    assert code is None and f"Experts can be kept in {tmp_path}/experts" in printed
    code, printed = run("doctor.py", "--nvme_path", tmp_path, "--gigabytes", 1e9)
    assert code == 1 and "Needed: " in printed and "1000000000.0 are asked for" in printed
    code, printed = run("doctor.py", "--nvme_path", "/dev/shm")
    assert code == 1 and "is in memory, so that nothing is gained" in printed


def test_replay_of_a_recorded_trace(trained, run, tmp_path):
    folder, _ = trained
    figures = tmp_path / "figures.json"
    options = ["--trace", f"{folder}_trace.jsonl", "--fast_capacity", 4, 12, "--json", figures]
    code, _ = run("benchmarks/expert_cache.py", *options)
    assert code is None
    for rates in json.loads(figures.read_text())["hit_rates"].values():
        assert all(0 < rate <= rates["optimum"] < 1 for rate in rates.values())
