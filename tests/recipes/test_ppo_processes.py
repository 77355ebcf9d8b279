"""PPO on word problems in two processes, launched as a user does: by DDP, ZeRO-2 and ZeRO-3."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixturekit.modeling.deep_nvme import is_built

RECIPES = Path(__file__).parents[2] / "recipes"
# After so few steps of imitation some completions earn a reward, and routing does not amplify rounding yet. Four
# updates learn from the first rollout, and two from the next.
SMALL = (
    "--config", RECIPES / "gsm8k" / "quickstart.yaml", "--num_train_problems", 40, "--num_eval_problems", 5,
    "--eval_batch_size", 2, "--warm_start_steps", 12, "--per_device_train_batch_size", 4, "--max_steps", 6,
    "--logging_steps", 1, "--save_steps", 2, "--save_total_limit", 3, "--max_completion_length", 24,
    "--disable_tqdm", "true", "--lr_scheduler_type", "constant",
)  # fmt: skip
ON_CPU = {"ddp": ("--use_cpu", "true")} | dict.fromkeys(
    ("zero2", "zero3", "zero3_nvme"), ("--use_cpu", "false", "--ddp_backend", "gloo")
)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'mixturekit[offload]'"
)
METRICS = ("loss", "grad_norm", "reward", "kl", "entropy", "value/loss", "learning_rate")


@pytest.fixture(scope="module")
def launch(run_process):
    """Runs the recipe in two processes, and returns what they print."""

    def launch(configuration, folder, *options):
        options = (*SMALL, *ON_CPU[configuration], "--output_dir", folder, *options)
        where = {"folder": folder.parent, "configuration": configuration}
        done = run_process("train_gsm8k_ppo.py", *options, **where, DS_ACCELERATOR="cpu")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return launch


def history(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in METRICS if name in entry} for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def by_ddp(launch, tmp_path_factory):
    """The folder of a run by DDP, and what it printed."""
    folder = tmp_path_factory.mktemp("ddp") / "out"
    return folder, launch("ddp", folder)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3")])
def by_zero(request, launch, tmp_path_factory):
    """The name of a configuration of DeepSpeed, and the folder of a run by it."""
    folder = tmp_path_factory.mktemp(request.param) / "out"
    launch(request.param, folder)
    return request.param, folder


@pytest.mark.slow
def test_processes_play_on_their_own_and_one_writes_what_all_have_done(by_ddp):
    folder, printed = by_ddp
    assert printed.count("Held-out exact match after:") == 1
    first = history(folder)[0]
    assert first["reward"] > 0 and first["grad_norm"] > 0
    # Five problems, four at a time: in the second batch one process has none.
    for name in ("eval_before", "eval_after"):
        rows = [json.loads(line) for line in (folder / name / "completions.jsonl").read_text().splitlines()]
        assert sorted(row["problem"] for row in rows) == list(range(5))
    rollouts = [load_file(folder / "checkpoint-2" / f"rollout_{process}.safetensors") for process in range(2)]
    assert rollouts[0]["0 prompt_ids"].tolist() != rollouts[1]["0 prompt_ids"].tolist()
    assert rollouts[0]["0 completion_ids"].tolist() != rollouts[1]["0 completion_ids"].tolist()


@pytest.mark.slow
def test_split_weights_learn_as_whole_ones_do(by_ddp, by_zero):
    (whole, _), (_, split) = by_ddp, by_zero
    for expected, actual in zip(history(whole), history(split), strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name in ("warm_start/model.safetensors", "model.safetensors", "value_head.safetensors"):
        expected, actual = load_file(whole / name), load_file(split / name)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-2, atol=1e-3, msg=f"{name}: {key}")
    sizes = [
        json.loads((run / "eval_after" / "eval_results.json").read_text())["parameters"] for run in (whole, split)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_split_weights_resume_to_the_bit(by_zero, launch, tmp_path):
    configuration, split = by_zero
    for name in ("checkpoint-2", "warm_start"):
        shutil.copytree(split / name, tmp_path / name)
    launch(configuration, tmp_path, "--resume_from_checkpoint", "last")
    assert history(tmp_path) == history(split)
    for name in ("model.safetensors", "value_head.safetensors"):
        expected, actual = load_file(split / name), load_file(tmp_path / name)
        assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.slow
@needs_deepspeed
def test_adapters_of_split_weights_learn_as_those_of_whole_ones_do(launch, tmp_path):
    for configuration in ("ddp", "zero3"):
        launch(configuration, tmp_path / configuration, "--use_peft", "true", "--save_strategy", "no")
    for expected, actual in zip(history(tmp_path / "ddp"), history(tmp_path / "zero3"), strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not is_built(), reason="needs DeepSpeed's I/O extension: recipes/doctor.py --build")
def test_weights_and_optimizer_on_a_disk_learn_as_in_memory(by_ddp, launch, tmp_path):
    launch("zero3_nvme", tmp_path / "out", "--nvme_path", tmp_path / "swap")
    for expected, actual in zip(history(by_ddp[0]), history(tmp_path / "out"), strict=True):
        assert actual == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert any(path.is_file() for path in (tmp_path / "swap").rglob("*.swp"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "swap"}


PRETENDS_TO_HAVE_ACCELERATORS = f"""
import os, runpy, sys
from accelerate.state import DistributedType, PartialState

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)
sys.argv[0] = {str(RECIPES / "train_gsm8k_ppo.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def launch_fsdp2(run_process, tmp_path_factory):
    """As `launch`, by FSDP2, which accelerate has for accelerators only."""
    program = tmp_path_factory.mktemp("fsdp2") / "program.py"
    program.write_text(PRETENDS_TO_HAVE_ACCELERATORS)

    def launch(folder, *options):
        options = (*SMALL, "--use_cpu", "false", "--output_dir", folder, *options)
        done = run_process(program, *options, configuration="fsdp2")
        assert done.returncode == 0, done.stderr[-3000:]

    return launch


@pytest.fixture(scope="module")
def by_fsdp2(launch_fsdp2, tmp_path_factory):
    """The folder of a run by FSDP2."""
    folder = tmp_path_factory.mktemp("fsdp2") / "out"
    launch_fsdp2(folder)
    return folder


@pytest.mark.slow
def test_fsdp2_learns_as_whole_weights_do(by_ddp, by_fsdp2):
    # Each process draws its part of the critic, so that this is another one, which is zero at first.
    first_cycles = [
        [[entry[name] for name in ("loss", "kl", "entropy")] for entry in history(folder)[:2]]
        for folder in (by_ddp[0], by_fsdp2)
    ]
    torch.testing.assert_close(first_cycles[1], first_cycles[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_fsdp2_resumes_to_the_bit(launch_fsdp2, by_fsdp2, tmp_path):
    for name in ("checkpoint-2", "warm_start"):
        shutil.copytree(by_fsdp2 / name, tmp_path / name)
    launch_fsdp2(tmp_path, "--resume_from_checkpoint", "last")
    assert history(tmp_path) == history(by_fsdp2)
    for name in ("model.safetensors", "value_head.safetensors"):
        expected, actual = load_file(by_fsdp2 / name), load_file(tmp_path / name)
        assert all(torch.equal(actual[key], value) for key, value in expected.items())
