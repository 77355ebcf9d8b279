"""The recipe of PPO on word problems, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mixturekit.trainers.checkpoints import checkpoints_of
from mixturekit.trainers.tokenization import train_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "--config", RECIPES / "gsm8k" / "quickstart.yaml", "--num_train_problems", 40, "--num_eval_problems", 6,
    "--warm_start_steps", 3, "--per_device_train_batch_size", 4, "--max_steps", 4, "--logging_steps", 1,
    "--save_steps", 2, "--max_completion_length", 6, "--disable_tqdm", "true", "--lr_scheduler_type", "constant",
)  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run(run_here, tmp_path):
    """Runs the recipe, small."""
    return partial(run_here, "train_gsm8k_ppo.py", *SMALL, folder=tmp_path)


def test_a_run_leaves_policy_critic_curves_and_completions(run, tmp_path, capsys):
    assert run("--output_dir", tmp_path / "out") is None
    printed = capsys.readouterr().out
    assert "Held-out exact match before:" in printed and "Held-out exact match after:" in printed
    out = tmp_path / "out"
    assert {"model.safetensors", "value_head.safetensors", "training.png", "tokenizer.json", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    for name in ("eval_before", "eval_after"):
        rows = [json.loads(line) for line in (out / name / "completions.jsonl").read_text().splitlines()]
        assert len(rows) == 6
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"reward", "value/loss", "value/explained_variance", "tokens_per_second"} <= set().union(*history)


def test_a_resumed_run_is_the_run_that_was_never_stopped(run, tmp_path):
    assert run("--output_dir", tmp_path / "whole") is None
    assert run("--output_dir", tmp_path / "parts", "--max_steps", 2) is None
    reference = (tmp_path / "parts" / "warm_start" / "model.safetensors").read_bytes()
    assert run("--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "last") is None
    assert (tmp_path / "parts" / "warm_start" / "model.safetensors").read_bytes() == reference
    for name in ("model.safetensors", "value_head.safetensors"):
        whole, parts = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_grpo_runs_from_the_same_configuration_for_comparison(run, tmp_path, capsys):
    options = ("--algorithm", "grpo", "--num_generations", 4)
    assert run("--output_dir", tmp_path / "out", *options) is None
    assert "exact match after" in capsys.readouterr().out
    assert not (tmp_path / "out" / "value_head.safetensors").exists()
    assert "at least 2 generations" in run("--output_dir", tmp_path / "other", "--algorithm", "grpo")


def test_adapters_learn_beside_a_policy_that_stays(run, tmp_path):
    assert run("--output_dir", tmp_path / "out", "--use_peft", "true", "--router_replay", "r2", "--beta", 0.05) is None
    assert {"adapter_model.safetensors", "value_head.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train_file", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--algorithm", "dpo"), "algorithm is 'dpo': choose ppo or grpo"),
        (("--load_in_4bit", "true", "--use_peft", "true"), "experts in 4 bits cannot carry adapters"),
        (("--num_generations", 3), "must be divisible by num_generations"),
        (("--max_completion_length", 4000), "max_new_tokens is 4000"),
        (("--resume_from_checkpoint", "last"), "No checkpoint to resume"),
        (("--value_head", "nowhere"), "has no value_head.safetensors"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, options, message):
    told = run("--output_dir", tmp_path / "out", "--warm_start_steps", 0, *options)
    assert message in told and "\n" not in told


def test_what_lacks_an_answer_is_refused_before_anything_is_loaded(run, tmp_path):
    row = {"question": "How many?", "answer": "Seven."}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    options = ("--train_file", tmp_path / "train.jsonl", "--eval_file", tmp_path / "train.jsonl")
    assert "has no `####`" in run("--output_dir", tmp_path / "out", *options)
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "How many?"}) + "\n")
    assert "has no column 'answer'" in run("--output_dir", tmp_path / "out", *options)
    assert "name other problems" in run("--output_dir", tmp_path / "out", "--train_file", tmp_path / "train.jsonl")


def test_a_finished_run_is_replaced_only_if_asked_and_as_a_whole(run, tmp_path):
    assert run("--output_dir", tmp_path / "out", "--max_steps", 2) is None
    assert "already holds a run" in run("--output_dir", tmp_path / "out")
    assert run("--output_dir", tmp_path / "out", "--max_steps", 1, "--overwrite_output_dir") is None
    assert [path.name for path in checkpoints_of(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--algorithm", "grpo"), "needs at least 2 generations"),
        (("--use_peft", "true", "--lora_dropout", 0.1), "lora_dropout is 0.1: adapters of fused expert weights"),
        (("--value_head", "nowhere"), "has no value_head.safetensors"),
        (("--model_name_or_path", "dense", "--router_replay", "r2"), "LlamaForCausalLM is no mixture of experts"),
    ],
)
def test_what_is_refused_leaves_the_run_that_it_would_have_replaced(run, tmp_path, options, message):
    earlier = [tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "warm_start"]
    for folder in earlier:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"of an earlier run")
    save_dense_policy(tmp_path / "dense")
    assert message in run("--output_dir", tmp_path / "out", "--overwrite_output_dir", *options)
    assert all((folder / "model.safetensors").read_bytes() == b"of an earlier run" for folder in earlier)


def save_dense_policy(folder):
    """A model without experts, and a tokenizer beside it."""
    tokenizer = train_tokenizer(["Question: 1 + 1 Answer: 2"], 300)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_a_process_that_is_killed_in_a_rollout_goes_on_as_if_it_had_not_been(tmp_path):
    command = [sys.executable, RECIPES / "train_gsm8k_ppo.py", *SMALL, "--max_steps", 40, "--save_total_limit", 40]
    start = lambda folder, *options: subprocess.Popen(  # noqa: E731
        [*map(str, command), "--output_dir", str(tmp_path / folder), *options],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    whole = start("whole")
    assert whole.wait(timeout=300) == 0
    killed, deadline = start("killed"), time.monotonic() + 200
    while not (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start("killed", "--resume_from_checkpoint", "last").wait(timeout=300) == 0
    for name in ("model.safetensors", "value_head.safetensors"):
        one, other = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())
