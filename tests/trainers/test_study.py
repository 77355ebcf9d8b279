"""Studies: what is missing is trained and nothing else, and seeds are shown side by side."""

import json

import pytest

from mixturekit.trainers.study import configured, draw_measures, print_measures, run_folder, summary, train_runs

# Says how it was called, and has finished unless told to fail.
RECIPE = """
import json, os, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = pathlib.Path(options["--output_dir"])
run.mkdir(exist_ok=True)
if options["--mode"] == "fails":
    sys.exit("no such mode")
calls = json.loads((run / "calls.json").read_text()) if (run / "calls.json").exists() else []
(run / "calls.json").write_text(json.dumps([*calls, [sys.argv[1:], os.environ["OMP_NUM_THREADS"]]]))
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(RECIPE)
    return path


def finished(run):
    return (run / "calls.json").exists()


def calls(run):
    return json.loads((run / "calls.json").read_text())


def test_runs_are_trained_once_each_on_one_core(tmp_path, recipe, capfd):
    runs = {run_folder(tmp_path / "study", "fast", seed): ["--mode", "fast"] for seed in (1, 2)}
    train_runs(recipe, "study.yaml", runs, finished, jobs=2)
    runs |= {run_folder(tmp_path / "study", "slow", 1): ["--mode", "slow"]}
    train_runs(recipe, "study.yaml", runs, finished, jobs=2)
    for run, options in runs.items():
        [(arguments, threads)] = calls(run)
        assert arguments[:4] == ["--config", "study.yaml", "--output_dir", str(run)] and arguments[4:6] == options
        assert arguments[6:] == ["--overwrite_output_dir"] and threads == "1"
    printed, bar = capfd.readouterr()
    assert "2 of 3 runs have finished before" in printed
    assert "runs:  67%" in bar and " 3/3 [" in bar


def test_a_run_that_was_stopped_goes_on(tmp_path, recipe):
    run = run_folder(tmp_path, "fast", 1)
    (run / "checkpoint-10").mkdir(parents=True)
    train_runs(recipe, "study.yaml", {run: ["--mode", "fast"]}, finished)
    [(arguments, _)] = calls(run)
    assert arguments[-2:] == ["--resume_from_checkpoint", "last"] and "--overwrite_output_dir" not in arguments


def test_a_failure_ends_the_study_and_names_the_log(tmp_path, recipe):
    first, second = (run_folder(tmp_path, name, 1) for name in ("first", "second"))
    with pytest.raises(SystemExit, match="first_1.log"):
        train_runs(recipe, "study.yaml", {first: ["--mode", "fails"], second: ["--mode", "fast"]}, finished)
    assert (tmp_path / "first_1.log").read_text() == "no such mode\n"


def test_folders_have_names_that_shells_take(tmp_path):
    names = ["experts, in memory", "experts", "single builtin:catch", "cost, scaled, dropout"]
    folders = [run_folder(tmp_path, name, 3).name for name in names]
    assert folders == ["experts-in-memory_3", "experts_3", "single-builtin-catch_3", "cost-scaled-dropout_3"]


def test_a_configuration_says_what_is_studied(tmp_path):
    (tmp_path / "study.yaml").write_text("games: [builtin:catch, Pong]\n")
    assert configured(tmp_path / "study.yaml", "games") == ["builtin:catch", "Pong"]


def test_seeds_are_summed_up_by_mean_and_range():
    assert summary([0.1, 0.2, 0.6]) == "0.30 (0.10 to 0.60)"
    assert summary([0.1]) == "0.10"
    assert summary([]) == "-"


def test_agents_are_printed_and_drawn_side_by_side(tmp_path, capsys):
    measures = {
        "experts": {"hit_rate": [0.5, 0.7], "forgetting": [0.2]},
        "dense": {"hit_rate": [], "forgetting": [0.1]},
    }
    names = {"hit_rate": "share of accesses", "forgetting": "score lost"}
    print_measures(measures, names)
    printed = capsys.readouterr().out
    assert "0.60 (0.50 to 0.70)" in printed and "hit rate: share of accesses" in printed
    draw_measures(measures, list(names), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
