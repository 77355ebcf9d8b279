"""The recipes of sequential games: train, stop, resume, evaluate, film, report, push, and refuse."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mixturekit.trainers.agent_evaluation_config import AgentEvaluationArguments
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
def run(run_here, tmp_path, capsys):
    """Runs a recipe in an empty folder; returns what it printed."""

    def run(recipe, *options):
        assert run_here(recipe, *options, folder=tmp_path) is None
        return "".join(capsys.readouterr())

    return run


def bar_of(told):
    """What the bar of updates showed, without those of other things."""
    return "".join(part for part in told.split("\r") if "update/s" in part or "s/update" in part)


def test_from_training_to_report(run, tmp_path):
    told = run("train_atari.py", *SMALL, "--max_updates", "1")
    assert "Stopped after 1 updates; go on with --resume_from_checkpoint last" in told
    assert " 1/1 [" in bar_of(told)
    resumed = run("train_atari.py", *SMALL, "--resume_from_checkpoint", "last", "--store_trace", "trace.jsonl")
    bar = bar_of(resumed)
    assert " 0/4 [" not in bar and " 1/4 [" in bar and " 4/4 [" in bar and "builtin:signal" in bar
    results = json.loads((tmp_path / "out/continual_results.json").read_text())
    assert results["finished"] and len(results["evaluations"]) == 3 and len(results["switches"]) == 2
    assert {"stall_ms", "lead_ms", "detector_recall", "recency_recall"} <= results["switches"][1].keys()
    assert "average_forgetting" in results["metrics"]
    trace = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert {access["task"] for access in trace} == set(results["games"])

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert_hidden_dim", "999999999"], "are free: choose another --nvme_path"),
        (["--games", "builtin:colect"], "did you mean builtin:collect"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(run_here, tmp_path, options, message):
    told = run_here("train_atari.py", *SMALL, *options, folder=tmp_path)
    assert message in told and "\n" not in told


def test_an_evaluation_replaces_what_is_there_only_where_it_may(tmp_path):
    files = {"output_dir": str(tmp_path), "video": str(tmp_path / "episode.gif")}
    for name in ("episode.gif", "eval_results.json"):
        (tmp_path / name).touch()
        with pytest.raises(FileExistsError, match=f"{name} is there: .* replace it with --overwrite"):
            AgentEvaluationArguments("agent", **files)
    AgentEvaluationArguments("agent", **files, overwrite=True)
    with pytest.raises(NotADirectoryError, match="cannot be a folder, because .*episode.gif is a file"):
        AgentEvaluationArguments("agent", output_dir=files["video"], overwrite=True)


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
