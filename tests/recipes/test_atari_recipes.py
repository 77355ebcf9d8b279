# SPDX-License-Identifier: Apache-2.0
"""The recipes of sequential games: train, stop, resume, evaluate, film, report, push, and refuse."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
from mixturekit.trainers.recipe_parser import parse_recipe

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config", str(ROOT / "recipes/atari/quickstart.yaml"), "--expert_dim", "32", "--expert_hidden_dim", "16",
    "--num_experts", "8", "--hbm_capacity", "4", "--dram_capacity", "4", "--encoder_channels", "4", "8",
    "--games", "builtin:collect", "builtin:signal", "--steps_per_game", "128", "--num_steps", "16", "--num_envs", "4",
    "--eval_episodes", "2", "--eval_max_steps", "10",
]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a recipe as a shell does in an empty folder, but in this process; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(recipe, *options):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / recipe), *options])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
        return capsys.readouterr().out

    return run


def test_from_training_to_report(run, tmp_path):
    told = run("train_atari.py", *SMALL, "--max_updates", "1")
    assert "Stopped after 1 updates; go on with --resume_from_checkpoint last" in told
    run("train_atari.py", *SMALL, "--resume_from_checkpoint", "last")
    results = json.loads((tmp_path / "out/continual_results.json").read_text())
    assert results["finished"] and len(results["evaluations"]) == 3 and len(results["switches"]) == 2
    assert {"stall_ms", "lead_ms", "detector_recall", "recency_recall"} <= results["switches"][1].keys()
    assert "average_forgetting" in results["metrics"]

    run(
        "evaluate_atari.py", "--model_name_or_path", "out", "--num_episodes", "2", "--max_steps", "15",
        "--video", "eval/episode.gif", "--video_steps", "5", "--use_cpu", "true", "--nvme_path", "eval_store",
    )  # fmt: skip
    report = json.loads((tmp_path / "eval/eval_results.json").read_text())
    assert [row["game"] for row in report["results"]] == results["games"]
    with Image.open(tmp_path / "eval/episode.gif") as video:
        assert video.n_frames == 5

    run("report_continual.py", "--run", "out")
    page = (tmp_path / "out/report.html").read_text()
    for title in ("What was kept", "Where the experts were", "Game changes", "Experts and games"):
        assert title in page
    assert 'src="http' not in page
    assert "builtin:collect" in (tmp_path / "out/README.md").read_text()

    told = run("push_to_hub.py", "--model_name_or_path", "out", "--repo_id", "me/agent", "--dry_run")
    assert "Files and card are in order." in told


def test_what_there_is_no_room_for_is_one_sentence(run):
    with pytest.raises(SystemExit, match="are free: choose another --nvme_path"):
        run("train_atari.py", *SMALL, "--expert_hidden_dim", "999999999")


def test_an_unknown_game_is_one_sentence_in_a_shell():
    refused = subprocess.run(
        [sys.executable, str(ROOT / "recipes/train_atari.py"), "--games", "builtin:colect"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert refused.returncode == 1 and "did you mean builtin:collect" in refused.stderr.replace("\n", " ")
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "recipes/atari").glob("*.yaml"))])
def test_configurations_are_understood_and_short(name):
    pytest.importorskip("ale_py")
    path = ROOT / "recipes/atari" / f"{name}.yaml"
    agent, games, config = parse_recipe((AgentArguments, GameArguments, ContinualPpoConfig), ["--config", str(path)])
    config.check_segments(games.num_envs)
    text = path.read_text()
    assert len(text.splitlines()) <= 60 and isinstance(yaml.safe_load(text), dict)
    assert [line[2:] for line in text.splitlines() if line in ("# Model", "# Data", "# Trainer", "# Hub")] == [
        "Model", "Data", "Trainer", "Hub",
    ]  # fmt: skip
    assert agent.top_k <= agent.hbm_capacity
