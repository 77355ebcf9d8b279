# SPDX-License-Identifier: Apache-2.0
"""The recipes of sequential games, from a shell: train, stop, resume, evaluate, film, report, and refuse."""

import json
import os
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
    "--steps_per_game", "512", "--num_envs", "4", "--eval_episodes", "2", "--eval_max_steps", "20",
]  # fmt: skip


def run(recipe, *options, folder):
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / recipe), *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_from_training_to_report(tmp_path):
    stopped = run("train_atari.py", *SMALL, "--max_updates", "3", folder=tmp_path)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "Stopped after 3 updates; go on with --resume_from_checkpoint last" in stopped.stdout
    resumed = run("train_atari.py", *SMALL, "--resume_from_checkpoint", "last", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    results = json.loads((tmp_path / "out/continual_results.json").read_text())
    assert results["finished"] and len(results["evaluations"]) == 4 and len(results["switches"]) == 3
    assert {"stall_ms", "lead_ms", "detector_recall", "recency_recall"} <= results["switches"][1].keys()
    assert "average_forgetting" in results["metrics"]

    evaluated = run(
        "evaluate_atari.py", "--model_name_or_path", "out", "--num_episodes", "2", "--max_steps", "15",
        "--video", "eval/episode.gif", "--video_steps", "5", "--use_cpu", "true", "--nvme_path", "eval_store",
        folder=tmp_path,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    report = json.loads((tmp_path / "eval/eval_results.json").read_text())
    assert [row["game"] for row in report["results"]] == results["games"]
    with Image.open(tmp_path / "eval/episode.gif") as video:
        assert video.n_frames == 5

    written = run("report_continual.py", "--run", "out", folder=tmp_path)
    assert written.returncode == 0, written.stderr[-3000:]
    page = (tmp_path / "out/report.html").read_text()
    for title in ("What was kept", "Where the experts were", "Game changes", "Experts and games"):
        assert title in page
    assert 'src="http' not in page
    assert "builtin:collect" in (tmp_path / "out/README.md").read_text()

    pushed = run(
        "push_to_hub.py", "--model_name_or_path", "out", "--repo_id", "me/agent", "--dry_run", folder=tmp_path
    )
    assert "Files and card are in order." in pushed.stdout, pushed.stdout + pushed.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--games", "builtin:colect"], "did you mean builtin:collect"),
        (["--expert_hidden_dim", "999999999"], "are free: choose another --nvme_path"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(options, message, tmp_path):
    refused = run("train_atari.py", *SMALL, *options, folder=tmp_path)
    assert refused.returncode == 1 and message in refused.stderr.replace("\n", " ")
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
