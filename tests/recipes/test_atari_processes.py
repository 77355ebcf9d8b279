"""Sequential games in two processes: each plays games of its own, one writes, and a stopped run goes on as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SMALL = (
    "--config", Path(__file__).parents[2] / "recipes/atari/quickstart.yaml", "--expert_dim", 32,
    "--expert_hidden_dim", 16, "--num_experts", 8, "--hbm_capacity", 4, "--dram_capacity", 4, "--encoder_channels", 4,
    8, "--games", "builtin:collect", "builtin:signal", "--steps_per_game", 256, "--num_steps", 16, "--num_envs", 4,
    "--eval_episodes", 2, "--eval_max_steps", 10, "--save_steps", 1, "--save_total_limit", 9,
)  # fmt: skip


def weights(folder):
    return {name: part for path in folder.glob("model*.safetensors") for name, part in load_file(path).items()}


@pytest.fixture(scope="module")
def finished(run_process, tmp_path_factory):
    """The folder that two processes worked in, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    done = run_process("train_atari.py", *SMALL, folder=folder, configuration="ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.slow
def test_processes_play_games_of_their_own_and_one_writes(finished):
    folder, printed = finished
    out = folder / "out"
    assert printed.count("Agent, checkpoints and continual_results.json are in out") == 1
    # events.out.tfevents.{time}.{host}.{process}.{number}
    assert len({path.name.split(".")[-2] for path in out.rglob("events.out.tfevents.*")}) == 1
    assert {path.name for path in (out / "experts").iterdir()} == {"rank_0", "rank_1"}
    played = [load_file(out / "checkpoint-1" / f"process_{process}.safetensors") for process in range(2)]
    frames = [part for part in played[0] if part.startswith("player/") and part.endswith("frames")]
    assert frames and all(not torch.equal(played[0][name], played[1][name]) for name in frames)
    results = json.loads((out / "continual_results.json").read_text())
    # Two games of 256 steps by 2 processes with 4 environments each, 16 steps at a time.
    assert results["finished"] and results["steps"] == 512 and results["updates"] == 4


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_stopped(finished, run_process, tmp_path):
    shutil.copytree(finished[0] / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-1")
    done = run_process(
        "train_atari.py", *SMALL, "--resume_from_checkpoint", "last", folder=tmp_path, configuration="ddp"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, actual = (weights(folder / "out") for folder in (finished[0], tmp_path))
    assert expected.keys() == actual.keys()
    assert [name for name, part in expected.items() if not torch.equal(part, actual[name])] == []
