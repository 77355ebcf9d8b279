"""The study of the three biases: what it trains, what it claims, and one small study from beginning to end."""

import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from mixturekit.trainers.study import configured

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def study():
    return runpy.run_path(str(RECIPES / "study_pathways.py"))


def options_of(study, way):
    arguments = Namespace(
        num_seeds=2, config=RECIPES / "babyai" / "study.yaml", routing_cost_coef=0.5, difficulty_steps=7
    )
    options = study["planned_runs"](Path("study"), arguments)[study["run_folder"](Path("study"), way, 1)]
    return dict(zip(options[::2], options[1::2], strict=True))


def test_two_ways_that_are_compared_differ_in_the_bias_alone(study):
    expected = {
        "routing cost": {"--routing_cost_coef": ("0", "0.5")},
        "scaling by performance": {"--scale_cost_by_performance": ("false", "true")},
        "expert dropout": {
            "--expert_dropout_max_prob": ("0", "0.8"),
            "--expert_dropout_threshold": (None, "0.1"),
        },
    }
    for bias, ways in study["CONTRASTS"].items():
        first, second = (options_of(study, way) for way in ways)
        changed = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
        changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
        kind = bias.partition(", with")[0]
        assert changed == expected.get(kind, {name: pair for part in expected.values() for name, pair in part.items()})


def test_every_level_is_learned_alone_by_one_expert_without_biases(study):
    for level in configured(RECIPES / "babyai" / "study.yaml", "env_id"):
        options = options_of(study, level)
        assert options["--env_id"] == level and options["--mop_layers"] == "64"
        assert options["--routing_cost_coef"] == options["--expert_dropout_max_prob"] == "0"


@pytest.mark.parametrize(
    "option",
    [
        "--env_id=BabyAI-GoToObj-v0", "--env-id=BabyAI-GoToObj-v0", "--mop_layers=0,4;0,8", "--max_steps=20",
        "--num_updates=20", "--expert_dropout_max_prob=0.5", "--scale_cost_by_performance=true", "--seed=1",
    ],
)  # fmt: skip
def test_what_the_runs_differ_in_is_refused_before_any_is_trained(option, run_here, tmp_path, capsys):
    for given in ([option], option.split("=")):
        assert run_here("study_pathways.py", "--output_dir", tmp_path / "study", "--unroll_len", 8, *given) == 2
        assert f"error: {given[0].partition('=')[0]}: what the runs differ in" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def rows(**values):
    """A row for each seed, the same for all measures but those given by way."""
    names = ["success", "complexity", "distinctness", "consistency", "self_sufficiency", "lesion", "difficulty"]
    ways = ["none", "cost", "cost, scaled", "cost, dropout", "cost, scaled, dropout"]
    return [
        {
            "way": way,
            "seed": seed,
            **dict.fromkeys(names, 0.5 + 0.1 * seed),
            "complexity": values.get(way, (0.5, 0.6))[seed],
        }
        for way in ways
        for seed in range(2)
    ]


def test_a_change_is_claimed_only_beyond_what_seeds_differ_by(study, capsys):
    study["print_contrasts"](rows(cost=(0.3, 0.4)))
    claims = capsys.readouterr().out.splitlines()
    assert [line for line in claims if "routing cost" in line] == [
        "  routing cost (none -> cost): complexity 0.55 -> 0.35"
    ]
    study["print_contrasts"](rows(cost=(0.3, 0.55)))
    claims = capsys.readouterr().out.splitlines()
    assert [line for line in claims if "routing cost" in line] == [
        "  routing cost (none -> cost): nothing beyond the seeds"
    ]


@pytest.mark.slow
def test_a_study_trains_what_is_missing_and_says_what_came_out(tmp_path):
    config = yaml.safe_load((RECIPES / "babyai" / "study.yaml").read_text())
    config |= {"env_id": ["BabyAI-GoToRedBallGrey-v0", "BabyAI-GoToObj-v0"], "mop_layers": "0,4;0,8"}
    config |= {"num_demonstrations": 20, "num_envs": 2, "eval_episodes": 1, "max_steps": 20, "warmup_steps": 1}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, RECIPES / "study_pathways.py", "--config", tmp_path / "study.yaml", "--num_seeds", 2]
    command += ["--difficulty_steps", 20, "--num_episodes", 2, "--output_dir", tmp_path / "study"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = lambda: subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=900)  # noqa: E731
    first = run()
    assert first.returncode == 0, first.stderr[-2000:]
    saved = json.loads((tmp_path / "study" / "study.json").read_text())
    assert len(saved["rows"]) == 10 and (tmp_path / "study" / "study.png").stat().st_size > 10_000
    again = run()
    assert "training" in first.stdout and "training" not in again.stdout
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == saved
