"""A disk that fills up, for real, ends a run with one sentence, and costs nothing that had been saved before."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mixturekit.trainers.checkpoints import UNFINISHED, check_checkpoint, checkpoints_of

RECIPES = Path(__file__).parents[2] / "recipes"
RUNS = {
    "train_more.py": (
        "--config", RECIPES / "more" / "quickstart.yaml", "--num_examples", 200, "--num_validation_examples", 8,
        "--per_device_train_batch_size", 2,
    ),
    "train_babyai.py": (
        "--config", RECIPES / "babyai" / "quickstart.yaml", "--mop_layers", "0,8;4,8", "--mop_intermediate_dim", 16,
        "--mop_router_dim", 4, "--mission_dim", 8, "--num_envs", 4, "--unroll_len", 8, "--algorithm", "dagger",
        "--eval_episodes", 2,
    ),
}  # fmt: skip
# Of a disk with room for some checkpoints of these, in MiB.
SIZES = {"train_more.py": 24, "train_babyai.py": 4}
EACH_STEP = (
    "--max_steps", 40, "--logging_steps", 1, "--save_steps", 1, "--save_total_limit", 50, "--eval_strategy", "no",
    "--load_best_model_at_end", "false", "--use_cpu", "true",
)  # fmt: skip
# Between the first checkpoint and the second, someone else takes all that is left of the disk.
FILLER = "(until [ -e run/checkpoint-1 ]; do sleep 0.01; done; cat /dev/zero > filler) 2>/dev/null & filler=$!"


@pytest.fixture
def on_small_disk(tmp_path):
    """Runs commands in a disk of their own of some MiB, and leaves what is on it at their end in a folder."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mounted = ["unshare", "--mount", "sh", "-c"]
    tried = subprocess.run([*mounted, f"mount -t tmpfs tmpfs {disk}"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"A small disk cannot be mounted here: {tried.stderr.strip()}")

    def on_small_disk(size, *command, meanwhile=""):
        script = (
            f"mount -t tmpfs -o size={size}m tmpfs {disk} && cd {disk} || exit 99\n{meanwhile}\n"
            f"{shlex.join(map(str, command))}; code=$?; kill $filler 2>/dev/null; rm -f filler\n"
            f"cp -a {disk} {kept}; exit $code"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run([*mounted, script], env=environment, capture_output=True, text=True, timeout=300), kept

    return on_small_disk


@pytest.mark.parametrize(
    ("script", "meanwhile"),
    [
        pytest.param("train_more.py", FILLER, id="train_more.py by others"),
        pytest.param("train_babyai.py", "", id="train_babyai.py by the run"),
        pytest.param("train_more.py", "", id="train_more.py by the run", marks=pytest.mark.slow),
        pytest.param("train_babyai.py", FILLER, id="train_babyai.py by others", marks=pytest.mark.slow),
    ],
)
def test_full_disk_ends_a_run_and_leaves_its_checkpoints(on_small_disk, script, meanwhile):
    options = (*RUNS[script], *EACH_STEP, "--output_dir", "run")
    ended, kept = on_small_disk(SIZES[script], sys.executable, RECIPES / script, *options, meanwhile=meanwhile)
    assert ended.returncode == 1, ended.stderr[-3000:]
    checkpoints = checkpoints_of(kept / "run")
    assert checkpoints, ended.stderr[-3000:]
    assert all(check_checkpoint(checkpoint) is None for checkpoint in checkpoints)
    newest = checkpoints[0].name
    failed = f"checkpoint-{int(newest.removeprefix('checkpoint-')) + 1}"
    # Those who fill it may be faster than the run, whose next log then fails.
    told = re.findall(
        rf"OSError: (?:run/{failed} could not be written as the disk|Training stopped as the disk of run) is full "
        rf"\(.+\); the last good checkpoint is run/{newest}\.",
        ended.stderr,
    )
    assert len(told) == 1, ended.stderr[-3000:]
    assert not (kept / "run" / UNFINISHED).exists()
