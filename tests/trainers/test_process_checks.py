"""What accelerate would do otherwise than it was told to, without a word, is refused before any work."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixturekit.trainers.language_modeling_config import LanguageModelingConfig
from mixturekit.trainers.process_checks import check_processes

ROOT = Path(__file__).parents[2]
without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")


def check(folder, use_cpu=False):
    """What a recipe does first."""
    check_processes(LanguageModelingConfig(output_dir=str(folder), report_to="none", use_cpu=use_cpu).use_cpu)


def test_one_process_trains_alone_and_is_let(tmp_path):
    check(tmp_path, use_cpu=True)


@without_accelerator
def test_processes_that_would_train_apart_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but .* each would train alone: set --use_cpu"):
        check(tmp_path)


@without_accelerator
@pytest.mark.parametrize("use_cpu", [False, True])
def test_fsdp_without_accelerators_is_refused(monkeypatch, tmp_path, use_cpu):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate has FSDP for accelerators only, and found none: on CPUs take"):
        check(tmp_path, use_cpu=use_cpu)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'mixturekit[offload]'")
def test_deepspeed_is_refused_where_use_cpu_would_replace_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="use_cpu makes accelerate train by DDP"):
        check(tmp_path, use_cpu=True)


@without_accelerator
@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("train_more.py", "--preset", "debug", "--train_tokenizer", "true", "--bf16", "false"),
        ("train_babyai.py", "--env_id", "BabyAI-GoToRedBall-v0", "--bf16", "false"),
        ("train_gsm8k_ppo.py", "--train_file", "generated", "--bf16", "false"),
        ("train_atari.py", "--games", "builtin:catch"),
    ],
    ids=lambda command: command[0],
)
def test_every_recipe_refuses_before_it_writes(tmp_path, command):
    script, *options = command
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [ROOT / "recipes" / script, *options, "--use_cpu", "false", "--output_dir", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert "2 processes were started" in ended.stderr and "Traceback" not in ended.stderr.split("2 processes")[0]
    assert not (tmp_path / "out").exists()
