"""The accelerate configurations, with two processes on CPUs: the same losses, checkpoints and resumption as with one.

accelerate knows FSDP2 on accelerators only. Started as a program, this file therefore tells it that the CPU is one. It
runs a recipe several times in the same processes, because starting them takes most of the time.
"""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import DistributedType, PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, training_args

from mixturekit.trainers.language_modeling import train_language_model
from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
from mixturekit.trainers.recipe_parser import parse_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "train_more.py"
CONFIGURATIONS = RECIPE.parent / "accelerate_configs"
NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'mixturekit[offload]'"
)
OPTIONS = {
    # ZeRO-3 does not split what is smaller than 100,000 values: here the embeddings and the experts are larger.
    "preset": "debug", "hidden_size": 128, "intermediate_size": 128, "vocab_size": 1000, "num_recurrences": 3,
    "train_tokenizer": True, "num_examples": 200, "num_validation_examples": 96, "max_facts": 4, "max_digits": 2,
    "max_steps": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 2, "warmup_steps": 1, "learning_rate": 1e-3,
    "seed": 7, "disable_tqdm": True, "report_to": "none",
}  # fmt: skip
# The processes route different numbers of tokens, and in the last case they also draw different numbers of steps.
CASES = {
    "plain": {"expert_type": "more_c"},
    "resumed": {"expert_type": "more_c", "resume_from_checkpoint": "{folder}/plain/checkpoint-2"},
    "demanding": {
        "expert_type": "more_a", "num_recurrences": 4, "backprop_recurrences": 2, "exit_threshold": 0.5,
        "router_balancing": "bias", "num_experts_per_tok": 2, "tie_word_embeddings": False,
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    },
    "sampled": {
        "expert_type": "more_a", "state_initialization": "noise", "recurrence_sampling": "log_normal_poisson",
        "max_recurrences": 6, "backprop_recurrences": 2,
    },
    "infinite": {"expert_type": "base", "learning_rate": math.inf, "warmup_steps": 0, "save_steps": 1},
}  # fmt: skip
LOSSES = ("lm_loss", "aux_loss", "grad_norm", "eval_loss")


def command_line(folder, case, processes, **options):
    """The options of the recipe for a case, with the same global batch for any number of processes."""
    options = {**OPTIONS, **CASES[case], **options}
    steps = options.get("gradient_accumulation_steps", 1)
    options["per_device_train_batch_size"] = 8 // steps // processes
    options["per_device_eval_batch_size"] = 32 // processes
    return [f"--{name}={str(value).format(folder=folder)}" for name, value in options.items()] + [
        f"--output_dir={folder / case}"
    ]


def launch(configuration, lines, folder, processes=2):
    """Runs the recipe with each of `lines`, under `accelerate launch` with a configuration of this repository."""
    (folder / "lines.json").write_text(json.dumps(lines))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", CONFIGURATIONS / f"{configuration}.yaml", "--num_processes", processes]
    command += ["--mixed_precision", "no", "--main_process_port", 0, __file__, configuration, folder / "lines.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
    try:
        output, errors = launcher.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        # A launcher that is killed leaves its processes behind.
        launcher.terminate()
        output, errors = launcher.communicate()
    assert launcher.returncode == 0, errors[-5000:]
    return output


def run_recipe(configuration, file):
    """What each process of [`launch`] does."""
    if configuration == "fsdp2":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
        training_args.is_torch_bf16_gpu_available = lambda: True
    for line in json.loads(Path(file).read_text()):
        sys.argv = [str(RECIPE), *line]
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as stop:
            if "--learning_rate=inf" not in line:
                raise
            print(f"process {os.environ['RANK']}: {stop.code}", flush=True)


def history(folder, key):
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log if key in entry]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of the cases that one process has trained."""
    folder = tmp_path_factory.mktemp("single")
    for case in ("plain", "demanding"):
        line = command_line(folder, case, processes=1, use_cpu=True)
        train_language_model(*parse_recipe((ModelArguments, DataArguments, LanguageModelingConfig), line))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        "ddp",
        "fsdp2",
        pytest.param("zero2", marks=NO_DEEPSPEED),
        pytest.param("zero3", marks=NO_DEEPSPEED),
    ],
)
def pair(request, tmp_path_factory):
    """The folder of the cases that two processes have trained, and what they printed."""
    folder = tmp_path_factory.mktemp(request.param)
    # Elsewhere `use_cpu` would take precedence over FSDP2 and DeepSpeed.
    options = {"use_cpu": True} if request.param == "ddp" else {"ddp_backend": "gloo"}
    lines = [command_line(folder, case, processes=2, **options) for case in CASES]
    return folder, launch(request.param, lines, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "demanding"])
def test_two_processes_train_and_evaluate_like_one(single, pair, case):
    folder, _ = pair
    for key in LOSSES:
        expected, actual = history(single / case, key), history(folder / case, key)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "demanding"])
def test_the_checkpoint_is_the_same_as_of_one_process(single, pair, case):
    folder, _ = pair
    expected, actual = (load_file(path / case / "model.safetensors") for path in (single, folder))
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4)
    biases = [name for name in expected if name.endswith("e_score_correction_bias")]
    assert len(biases) == (2 if case == "demanding" else 0)
    for name in biases:
        assert torch.equal(actual[name], expected[name])
        assert actual[name].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "demanding"])
def test_the_checkpoint_loads_and_carries_its_own_code(single, pair, case):
    folder, _ = pair
    expected, actual = ({file.name for file in (path / case).glob("*.*")} for path in (single, folder))
    assert actual == expected
    configs = [json.loads((path / case / "config.json").read_text()) for path in (single, folder)]
    assert configs[0] == configs[1]
    model = AutoModelForCausalLM.from_pretrained(folder / case)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (case == "plain")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(pair):
    folder, _ = pair
    whole, again = (load_file(folder / case / "model.safetensors") for case in ("plain", "resumed"))
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    for key in LOSSES:
        assert history(folder / "plain", key) == history(folder / "resumed", key)


@pytest.mark.slow
def test_processes_may_take_different_numbers_of_recurrences(pair):
    folder, _ = pair
    losses = history(folder / "sampled", "lm_loss")
    assert len(losses) == OPTIONS["max_steps"]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_weights_that_are_not_finite_stop_all_processes_and_never_become_a_checkpoint(pair):
    folder, output = pair
    for process in range(2):
        assert f"process {process}: FloatingPointError: Training stopped: " in output
    assert not list((folder / "infinite").glob("checkpoint-*"))


@pytest.mark.slow
def test_losses_are_not_rounded_to_bfloat16(single, tmp_path):
    launch("fsdp2", [command_line(tmp_path, "plain", processes=2, bf16=True)], tmp_path)
    for key in ("lm_loss", "aux_loss", "eval_loss"):
        expected, actual = (history(folder / "plain", key) for folder in (single, tmp_path))
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)
        rounded = torch.tensor(actual).bfloat16().tolist()
        assert all(value != loss for value, loss in zip(rounded, actual, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["cpu", "single_gpu"])
def test_one_process_trains(single, tmp_path, configuration):
    launch(configuration, [command_line(tmp_path, "plain", processes=1, use_cpu=True)], tmp_path, processes=1)
    assert history(tmp_path / "plain", "lm_loss") == pytest.approx(history(single / "plain", "lm_loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("configuration", "distributed_type"),
    [
        ("cpu", DistributedType.NO),
        ("single_gpu", DistributedType.NO),
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("zero2", DistributedType.DEEPSPEED),
        ("zero3", DistributedType.DEEPSPEED),
        ("zero3_nvme", DistributedType.DEEPSPEED),
    ],
)
def test_every_configuration_is_read(configuration, distributed_type):
    config = load_config_from_file(str(CONFIGURATIONS / f"{configuration}.yaml"))
    assert config.distributed_type == distributed_type
    assert config.use_cpu == (configuration == "cpu")
    assert config.mixed_precision == ("no" if configuration == "cpu" else "bf16")


if __name__ == "__main__":
    run_recipe(*sys.argv[1:])
    PartialState().destroy_process_group()
    sys.stdout.flush()
    # Gloo's threads now and then abort an interpreter that takes itself apart after five runs; nothing is left to do.
    os._exit(0)
