"""Training recipes that are killed again and again, also while they save, end as if they had never been killed."""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from mixturekit.trainers.checkpoints import UNFINISHED, check_checkpoint, checkpoints_of

RECIPES = Path(__file__).parents[2] / "recipes"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# What the recipes spend their first seconds on.
IMPORTED = (
    "mixturekit.trainers.language_modeling",
    "mixturekit.trainers.imitation",
    "mixturekit.trainers.gsm8k_training",
    "mixturekit.trainers.continual",
)
EACH_STEP = ("--logging_steps", 1, "--save_steps", 1, "--save_total_limit", 2, "--use_cpu", "true")
RUNS = {
    "train_more.py": (
        "--config", RECIPES / "more" / "quickstart.yaml", "--num_examples", 200, "--num_validation_examples", 8,
        "--per_device_train_batch_size", 2, "--max_steps", 24, "--eval_strategy", "no",
        "--load_best_model_at_end", "false",
    ),
    "train_babyai.py": (
        "--config", RECIPES / "babyai" / "quickstart.yaml", "--mop_layers", "0,8;4,8", "--mop_intermediate_dim", 16,
        "--mop_router_dim", 4, "--mission_dim", 8, "--num_envs", 4, "--unroll_len", 8, "--max_steps", 40,
        "--algorithm", "dagger", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--eval_episodes", 2,
    ),
    "train_gsm8k_ppo.py": (
        "--config", RECIPES / "gsm8k" / "quickstart.yaml", "--num_train_problems", 40, "--num_eval_problems", 2,
        "--warm_start_steps", 2, "--per_device_train_batch_size", 4, "--max_steps", 16, "--max_completion_length", 6,
    ),
    "train_atari.py": (
        "--config", RECIPES / "atari" / "quickstart.yaml", "--expert_dim", 32, "--expert_hidden_dim", 16,
        "--num_experts", 8, "--hbm_capacity", 4, "--dram_capacity", 4, "--encoder_channels", 4, 8, "--num_steps", 16,
        "--steps_per_game", 512, "--num_envs", 4, "--eval_episodes", 1, "--eval_max_steps", 10,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def start():
    """Starts a recipe in a process of its own, forked from one that has imported the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED, __name__])

        def start(script, folder, *options):
            options = (*RUNS[script], *EACH_STEP, "--output_dir", folder, *options)
            if script == "train_atari.py":
                options += ("--nvme_path", f"{folder}_experts")
            process = context.Process(target=run, args=(script, [*map(str, options)], f"{folder}.log"))
            process.start()
            return process

        yield start


def run(script, options, log):
    """What the process does: the recipe, as from the command line."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = [str(RECIPES / script), *options]
    runpy.run_path(sys.argv[0], run_name="__main__")


def finish(process, folder):
    process.join(timeout=300)
    assert process.exitcode == 0, Path(f"{folder}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """What a recipe gives that nobody kills, and how long it takes."""
    known = {}

    def run_once(script):
        if script not in known:
            folder, began = tmp_path_factory.mktemp("uninterrupted") / "run", time.monotonic()
            finish(start(script, folder), folder)
            known[script] = outcome(folder), time.monotonic() - began
        return known[script]

    return run_once


def outcome(folder):
    """Losses of all steps, and the bytes of the weights."""
    if (folder / "metrics.jsonl").exists():
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        logged = {line["update"]: {key: value for key, value in line.items() if "loss" in key} for line in lines}
    else:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        logged = {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry}
    return logged, {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def is_saving(folder):
    return any(folder.glob(f"{UNFINISHED}*"))


def kill_at_random(process, rng, longest):
    process.join(timeout=rng.uniform(0, longest))


def kill_while_saving(process, rng, folder):
    """Waits for one of the next checkpoints to be under way, and a moment more."""
    for _ in range(rng.randint(1, 3)):
        for saving in (True, False):
            while is_saving(folder) is not saving and process.is_alive():
                time.sleep(0.0005)
    while not is_saving(folder) and process.is_alive():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.02))


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_run_that_was_never_killed(start, uninterrupted, tmp_path, script, kills):
    folder, rng, killed, saving = tmp_path / "killed", random.Random(f"{script} {kills}"), 0, 0
    expected, longest = uninterrupted(script)
    while killed < kills:
        resume = ("--resume_from_checkpoint", "last") if checkpoints_of(folder) else ("--overwrite_output_dir", "true")
        process = start(script, folder, *resume)
        if killed % 2:
            kill_at_random(process, rng, longest)
        else:
            kill_while_saving(process, rng, folder)
        if process.is_alive():
            process.kill()
            process.join()
            killed, saving = killed + 1, saving + is_saving(folder)
            for checkpoint in checkpoints_of(folder):
                assert check_checkpoint(checkpoint) is None
        else:
            # It was faster than the kill, which is then for another run.
            finish(process, folder)
            assert outcome(folder) == expected
            shutil.rmtree(folder)
    resume = ("--resume_from_checkpoint", "last") if checkpoints_of(folder) else ("--overwrite_output_dir", "true")
    finish(start(script, folder, *resume), folder)
    assert outcome(folder) == expected
    assert not is_saving(folder)
    print(f"{script}: {killed} kills, {saving} of them while a checkpoint was being written, nothing lost")


@pytest.mark.parametrize("script", RUNS)
def test_sigterm_ends_a_run_with_a_checkpoint(start, uninterrupted, tmp_path, script):
    folder, (expected, _) = tmp_path / "stopped", uninterrupted(script)
    process = start(script, folder)
    while not checkpoints_of(folder):
        assert process.is_alive(), Path(f"{folder}.log").read_text()[-3000:]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == 128 + signal.SIGTERM
    newest = checkpoints_of(folder)[0]
    assert f"SIGTERM: stopped at {newest}" in Path(f"{folder}.log").read_text()
    finish(start(script, folder, "--resume_from_checkpoint", "last"), folder)
    assert outcome(folder) == expected
