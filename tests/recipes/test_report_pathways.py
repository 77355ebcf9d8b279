"""The recipe of the pathways report, run as a user runs it."""

import json
from functools import partial

import pytest
import torch

from mixturekit.modeling import MopConfig, MopForActionPrediction, MoreConfig

LEVEL, OTHER = "BabyAI-GoToRedBall-v0", "BabyAI-GoToObj-v0"
SMALL = dict(intermediate_dim=16, router_dim=4, mission_dim=8, word_dim=4)


def save(folder, seed=0, layers="0,8;4,8", levels=(LEVEL, OTHER), matched_gru=False):
    torch.manual_seed(seed)
    config = MopConfig(**SMALL, layers=layers, num_tasks=len(levels), task_names=list(levels))
    MopForActionPrediction(config.matched_gru() if matched_gru else config).save_pretrained(folder)


def save_run(folder, losses, level):
    folder.mkdir()
    history = [{"step": 10 * (index + 1), "action_loss": loss} for index, loss in enumerate(losses)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "config.json").write_text(json.dumps({"task_names": [level]}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with policies and runs, as trainings leave them."""
    folder = tmp_path_factory.mktemp("pathways")
    save(folder / "out")
    save(folder / "out_1", seed=1)
    save(folder / "wider", layers="0,16;4,8")
    save(folder / "baseline", matched_gru=True)
    MoreConfig().save_pretrained(folder / "language")
    save_run(folder / "red", [0.9, 0.1], LEVEL)
    save_run(folder / "obj", [0.1, 0.1], OTHER)
    save_run(folder / "local", [0.1], "BabyAI-GoToLocal-v0")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(place, run_here):
    """Runs the recipe there."""
    return partial(run_here, "report_pathways.py", "--use_cpu", folder=place)


def test_a_report_with_everything_is_written_and_said(place, run, capsys):
    options = ("--model_name_or_path", "out", "--other_seeds", "out_1", "--difficulty_runs", "red", "obj")
    options += ("--num_episodes", 2, "--weight_thresholds", 0.3, "--output", "report/page.html")
    assert run(*options) is None
    printed = capsys.readouterr().out
    assert f"{LEVEL}: success" in printed and "Report: report/page.html" in printed
    assert "report/pathways.json" in printed
    numbers = json.loads((place / "report" / "pathways.json").read_text())
    assert numbers["checkpoints"] == ["out", "out_1"] and numbers["consistency"]["pairs"] == 1
    assert {level: row["updates"] for level, row in numbers["difficulty"].items()} == {LEVEL: [20], OTHER: [10]}
    assert numbers["episodes"][LEVEL]["episodes"] == 2
    assert "Missing:" not in (place / "report" / "page.html").read_text()

    written = (place / "report" / "page.html").read_bytes()
    refused = run(*options)
    assert "report has a report (page.html, pathways.json): add --overwrite" in refused
    assert (place / "report" / "page.html").read_bytes() == written
    assert run(*options, "--first_seed", 7, "--overwrite") is None
    assert (place / "report" / "page.html").read_bytes() != written


def test_only_the_levels_that_are_named_are_played(place, run):
    options = ("--model_name_or_path", "out", "--num_episodes", 1, "--weight_thresholds", 0.3)
    assert run(*options, "--env_id", OTHER, "--output", "one.html") is None
    assert list(json.loads((place / "pathways.json").read_text())["episodes"]) == [OTHER]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("nowhere",), "There is no folder nowhere.", id="no_folder"),
        pytest.param(("empty",), "empty cannot be loaded", id="no_checkpoint"),
        pytest.param(("language",), "language is a 'more' checkpoint", id="other_model"),
        pytest.param(("baseline",), "baseline is a GRU baseline, which has no routers", id="baseline"),
        pytest.param(("out", "--env_id", "BabyAI-GoToRedBal-v0"), "did you mean BabyAI-GoToRedBall-v0", id="level"),
        pytest.param(("out", "--other_seeds", "gone"), "There is no folder gone.", id="no_seed"),
        pytest.param(("out", "--other_seeds", "wider"), "consistency is between checkpoints of the same", id="layers"),
        pytest.param(("out", "--other_seeds", "out"), "names a checkpoint twice", id="same_seed"),
        pytest.param(("out", "--difficulty_runs", "away"), "There is no folder away.", id="no_run"),
        pytest.param(("out", "--difficulty_runs", "empty"), "empty is no run of train_babyai.py", id="not_a_run"),
        pytest.param(("out", "--difficulty_runs", "local"), "which this report is not about", id="other_task"),
        pytest.param(("out", "--difficulty_threshold", 0), "--difficulty_threshold must be above 0", id="threshold"),
        pytest.param(("out", "--num_episodes", 0), "--num_episodes must be at least 1", id="no_episodes"),
        pytest.param(("out", "--weight_thresholds", 2), "must lie between 0 and 1", id="weight"),
        pytest.param(("out", "--output", "page.pdf"), "its name must end in .html", id="output"),
        pytest.param(("out", "--output", "out/config.json/a.html"), "config.json is a file: choose", id="no_place"),
    ],
)
def test_bad_input_is_named_in_one_sentence_before_any_work(place, run, options, message):
    refused = run("--output", "refused/page.html", "--model_name_or_path", *options)
    assert message in refused and "\n" not in refused
    assert not (place / "refused").exists()
