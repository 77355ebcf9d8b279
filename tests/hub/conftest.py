"""A Hub on this machine, a run of each system to push, and two people: an owner, and one without this package."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TOKEN, OTHER_TOKEN = "hf_owner", "hf_other"

QUIET = ("--disable_tqdm", "true")
RUNS = {
    "more": (
        "train_more.py", "--config", "recipes/more/quickstart.yaml", "--max_steps", 6, "--eval_steps", 3,
        "--save_steps", 3, "--logging_steps", 1, "--num_examples", 300, "--num_validation_examples", 20,
        "--hidden_size", 32, *QUIET,
    ),
    "mop": (
        "train_babyai.py", "--config", "recipes/babyai/quickstart.yaml", "--algorithm", "dagger", "--mop_layers",
        "0,8;4,8", "--mop_intermediate_dim", 16, "--mop_router_dim", 4, "--mission_dim", 8, "--num_envs", 4,
        "--unroll_len", 8, "--num_updates", 6, "--logging_steps", 2, "--eval_episodes", 4, "--eval_steps", 3,
        "--save_steps", 3, *QUIET,
    ),
    "ppo": (
        "train_gsm8k_ppo.py", "--config", "recipes/gsm8k/quickstart.yaml", "--num_train_problems", 40,
        "--num_eval_problems", 6, "--warm_start_steps", 3, "--per_device_train_batch_size", 4, "--max_steps", 4,
        "--logging_steps", 1, "--save_steps", 2, "--max_completion_length", 6, *QUIET,
    ),
    "tiered_moe": (
        "train_atari.py", "--config", "recipes/atari/quickstart.yaml", "--games", "builtin:catch", "builtin:signal",
        "--expert_dim", 16, "--num_experts", 8, "--hbm_capacity", 4, "--dram_capacity", 4, "--encoder_channels", 4, 8,
        "--steps_per_game", 256, "--num_envs", 4, "--eval_episodes", 2, "--eval_max_steps", 10,
    ),
}  # fmt: skip

WORKER = """
    import contextlib, io, json, os, sys, traceback

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    stranger = sys.argv[1] == "stranger"
    if stranger:
        sys.modules["mixturekit"] = None
    import torch
    torch.set_num_threads(1)
    for line in sys.stdin:
        told, answer = io.StringIO(), {"error": None, "trace": None}
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            try:
                exec(json.loads(line), {"__name__": "__main__"})
            except SystemExit as ended:
                answer["error"] = None if ended.code in (None, 0) else str(ended.code)
            except BaseException as error:
                answer |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(json.dumps(answer | {"told": told.getvalue()}), file=answers, flush=True)
"""


def load_local_hub():
    """The server's module; tests are no package that it could be imported from."""
    spec = importlib.util.spec_from_file_location("local_hub", Path(__file__).parent / "local_hub.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["local_hub"] = module
    spec.loader.exec_module(module)
    return module


def environment_of(url, home, **changes):
    """The environment of somebody whose Hub is `url`: `HF_ENDPOINT` is read at import, so that it takes a process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **own, **changes}


def recipe_code(script, *options):
    """What a process does that runs a recipe."""
    arguments = [str(RECIPES / script), *map(str, options)]
    return f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path(sys.argv[0], run_name='__main__')"


class Person:
    """A process that does one thing after another, so that it imports everything but once."""

    def __init__(self, kind, folder, environment):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", textwrap.dedent(WORKER), kind]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, cwd=folder, env=environment, **pipes)

    def begin(self, code):
        """Begins to run the code, and does not wait for its end."""
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()

    def do(self, code, may_fail=False):
        """Runs the code; returns what it printed, or with `may_fail` what it ended with."""
        self.begin(code)
        answer = json.loads(self.process.stdout.readline())
        if may_fail:
            return answer["error"]
        assert answer["error"] is None, answer["trace"] or (answer["error"] + answer["told"][-2000:])
        return answer["told"]

    def run_recipe(self, script, *options, may_fail=False):
        """Runs a recipe as `python recipes/SCRIPT OPTIONS` does."""
        return self.do(recipe_code(script, *options), may_fail)

    def push(self, *options, may_fail=False):
        """Runs `push_to_hub.py`."""
        return self.run_recipe("push_to_hub.py", *options, may_fail=may_fail)

    def begin_push(self, *options):
        """Begins to run `push_to_hub.py`."""
        self.begin(recipe_code("push_to_hub.py", *options))

    def leave(self):
        """Ends the process."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def hub():
    with load_local_hub().LocalHub({TOKEN: "owner", OTHER_TOKEN: "other"}) as server:
        yield server


@pytest.fixture(scope="session")
def arrive(hub, tmp_path_factory):
    """Makes people: `arrive("owner")`, `arrive("stranger", HF_HUB_OFFLINE="1")`."""
    people = []

    def arrive(kind, home=None, **environment):
        folder = tmp_path_factory.mktemp(kind)
        own = {"HF_TOKEN": TOKEN} if kind == "owner" else {}
        person = Person(kind, folder, environment_of(hub.url, home or folder / "home", **own, **environment))
        people.append(person)
        return person

    yield arrive
    for person in people:
        person.leave()


@pytest.fixture(scope="session")
def owner(arrive):
    return arrive("owner")


@pytest.fixture(scope="session")
def stranger(arrive):
    return arrive("stranger")


@pytest.fixture(scope="session")
def runs(tmp_path_factory, run_options):
    """The folders of short runs of the recipes."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for name in RUNS:
            train(patch, folder / name, *run_options(name))
    assert Path.cwd() == before
    return {name: folder / name for name in RUNS}


def train(patch, folder, script, *options):
    """Runs a recipe in this process, which has imported everything already."""
    arguments = [str(RECIPES / script), *options, "--output_dir", str(folder)]
    patch.setattr(sys, "argv", arguments)
    runpy.run_path(arguments[0], run_name="__main__")


@pytest.fixture(scope="session")
def run_options():
    """The script and the options of the short run of a system, for any folder to be in."""

    def run_options(system):
        options = [str(option) for option in RUNS[system]]
        return [str(ROOT / option) if option.startswith("recipes/") else option for option in options]

    return run_options
