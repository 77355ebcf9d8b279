"""How tests run a recipe: in a process of its own, as a shell does, or in this one, which has imported everything."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def run_process():
    """Runs a recipe in a `folder`, in two processes by one of the configurations of accelerate or in one by `cpu`;
    returns the finished process."""

    def run(script, *options, folder=ROOT, configuration=None, timeout=600, **environment):
        command = [ROOT / "recipes" / script, *options]
        if configuration is not None:
            config = ROOT / "recipes" / "accelerate_configs" / f"{configuration}.yaml"
            number = 1 if configuration == "cpu" else 2
            launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", number]
            command = [*launch, "--main_process_port", 0, "--mixed_precision", "no", *command]
        return subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=timeout, cwd=folder,
            env=ENVIRONMENT | environment,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def run_here():
    """Runs a recipe in a `folder`; returns what it exits with, which is the sentence that says what is wrong."""

    def run(script, *options, folder=ROOT):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("COLUMNS", "160")
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            patch.setattr(sys, "argv", [str(ROOT / "recipes" / script), *map(str, options)])
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as ended:
                return ended.code

    return run
