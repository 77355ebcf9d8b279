"""The recipes of BabyAI, run as a user runs them."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from mixturekit.trainers.imitation import load_policy_config
from mixturekit.trainers.imitation_config import EnvironmentArguments, ImitationConfig, PolicyArguments
from mixturekit.trainers.recipe_parser import parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
LEVEL = "BabyAI-GoToRedBall-v0"
SMALL = (
    "--config", RECIPES / "babyai" / "quickstart.yaml", "--mop_layers", "0,8;4,8", "--mop_intermediate_dim", 16,
    "--mop_router_dim", 4, "--mission_dim", 8, "--num_envs", 4, "--unroll_len", 8, "--num_updates", 6,
    "--logging_steps", 2, "--eval_episodes", 4, "--disable_tqdm", "true", "--algorithm", "dagger",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_process):
    """The folder of a run of DAgger."""
    folder = tmp_path_factory.mktemp("babyai")
    options = (*SMALL, "--env_id", LEVEL, "--eval_steps", 3, "--save_steps", 3)
    whole = run_process("train_babyai.py", *options, folder=folder, configuration="cpu")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "after 6 updates" in whole.stdout
    return folder


def test_training_leaves_a_policy_a_card_metrics_and_curves(trained):
    out = trained / "out"
    assert {"model.safetensors", "config.json", "README.md", "eval_results.json"} <= {
        path.name for path in out.iterdir()
    }
    metrics = json.loads((out / "eval_results.json").read_text())
    assert metrics["updates"] == 6 and 0 <= metrics["eval_success"] <= 1
    assert list(out.rglob("events.out.tfevents*"))
    assert json.loads((out / "config.json").read_text())["task_names"] == [LEVEL]


def test_a_finished_run_is_continued_or_replaced_only_when_asked(trained, run_here):
    refused = run_here("train_babyai.py", *SMALL, folder=trained)
    assert refused.startswith("FileExistsError: out already holds a run")
    before = load_file(trained / "out" / "checkpoint-6" / "model.safetensors")
    steps = ("--eval_steps", 3, "--save_steps", 3, "--resume_from_checkpoint", "out/checkpoint-3")
    assert run_here("train_babyai.py", *SMALL, *steps, folder=trained) is None
    after = load_file(trained / "out" / "checkpoint-6" / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)


def test_an_evaluation_prints_saves_draws_and_films(trained, run_here, capsys):
    options = ("--model_name_or_path", "out", "--num_episodes", 4, "--self_sufficiency", "--lesion")
    options += ("--weight_thresholds", 0, 0.4, "--video", "eval/episode.gif")
    assert run_here("evaluate_babyai.py", *options, folder=trained) is None
    printed = capsys.readouterr().out
    assert LEVEL in printed and "without the largest" in printed
    results = json.loads((trained / "eval" / "eval_results.json").read_text())["results"]
    assert [row["decoding"] for row in results] == ["greedy", "sampled", "greedy", "greedy", "greedy"]
    assert all(row["success_low"] <= row["success"] <= row["success_high"] for row in results)
    for name in ("self_sufficiency.png", "episode.gif"):
        assert Image.open(trained / "eval" / name).width > 100
    assert "eval_results.json is there" in run_here("evaluate_babyai.py", *options, folder=trained)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        pytest.param(
            "train_babyai.py",
            ("--env_id", "BabyAI-GoToRedBal-v0"),
            "'BabyAI-GoToRedBal-v0' is no BabyAI level",
            id="level",
        ),
        pytest.param("train_babyai.py", ("--env_id", "BabyAI-KeyInBox-v0"), "bot cannot solve", id="unsolvable"),
        pytest.param("train_babyai.py", ("--mop_layers", "8;x"), "'x' is not the size of an expert", id="layers"),
        pytest.param("train_babyai.py", ("--num_envs", "0"), "num_envs is 0: it must be at least 1.", id="num_envs"),
        pytest.param("train_babyai.py", ("--algorithm", "ppo"), "algorithm is 'ppo'", id="algorithm"),
        pytest.param(
            "train_babyai.py", ("--resume_from_checkpoint", "last"), "No checkpoint to resume in new", id="resume"
        ),
        pytest.param(
            "evaluate_babyai.py", ("--model_name_or_path", "nowhere"), "nowhere cannot be loaded", id="no_policy"
        ),
    ],
)
def test_a_recipe_says_in_one_sentence_what_is_wrong(tmp_path, run_here, script, options, message):
    refused = run_here(script, "--use_cpu", "--output_dir", "new", *options, folder=tmp_path)
    assert message in refused and "\n" not in refused
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", sorted((RECIPES / "babyai").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_has_four_headings_and_known_values(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    headings = [line.split(":")[0] for line in lines if line.startswith(("# Model", "# Data", "# Trainer", "# Hub"))]
    assert headings == ["# Model", "# Data", "# Trainer", "# Hub"]
    policy, environments, config = parse_recipe(
        (PolicyArguments, EnvironmentArguments, ImitationConfig), ["--config", str(path)]
    )
    load_policy_config(policy, environments.env_id)
    assert config.report_to == ["tensorboard"]
    # Steps without an evaluation would have no best checkpoint.
    assert not config.load_best_model_at_end or config.save_steps % config.eval_steps == 0
    assert set(yaml.safe_load(path.read_text())) >= {"env_id", "algorithm", "seed", "max_steps"}


@pytest.mark.slow
def test_two_processes_play_environments_of_their_own_and_learn_one_policy(tmp_path, run_process):
    options = (*SMALL, "--save_steps", 3, "--eval_steps", 3)
    done = run_process("train_babyai.py", *options, folder=tmp_path, configuration="ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = tmp_path / "out" / "checkpoint-6"
    places = [json.loads((checkpoint / f"environments_{index}.json").read_text()) for index in range(2)]
    assert places[0]["environments"]["seed"] != places[1]["environments"]["seed"]
    logged = [entry for entry in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]]
    assert [entry["frames"] for entry in logged if "frames" in entry][-1] == 6 * 4 * 8 * 2
    options += ("--resume_from_checkpoint", "out/checkpoint-3")
    resumed = run_process("train_babyai.py", *options, folder=tmp_path, configuration="ddp")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
