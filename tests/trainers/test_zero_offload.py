"""Mixtures of experts under ZeRO-3: what DeepSpeed does to experts without tokens, and what is refused beforehand.

Started as a program, this file trains a mixture under DeepSpeed and prints the gradients that its optimizer was given.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mixturekit.modeling.deep_nvme import is_built
from mixturekit.trainers.language_modeling_config import LanguageModelingConfig
from mixturekit.trainers.zero_offload import check_leaf_blocks, check_zero_offload, expert_blocks

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'mixturekit[offload]'"
)
needs_extension = pytest.mark.skipif(
    not is_built(), reason="needs DeepSpeed's I/O extension: recipes/doctor.py --build"
)
# At each step, the expert that all tokens are sent to.
ROUTE = (0, 0, 1, 1)


class Block(nn.Module):
    """Four experts, of which one computes."""

    def __init__(self, hidden_size: int = 1024):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4))
        self.chosen = 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(tokens, hidden)` to the same shape."""
        return self.experts[self.chosen](hidden_states)


class Model(nn.Module):
    """A block between two matrices, so that it is not the first in the backward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.block, self.after = nn.Linear(1024, 1024), Block(), nn.Linear(1024, 1024)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """A loss of `(tokens, hidden)`."""
        return self.after(self.block(self.before(hidden_states))).pow(2).mean()


def norms_under_zero3(leaf: bool, folder: str) -> list[list[float]]:
    """At each step, the norm of what each expert's weights moved by under SGD, which is that of its gradient."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if folder:
        nvme = {"device": "nvme", "nvme_path": folder, "pin_memory": False}
        zero |= {"offload_param": {**nvme, "buffer_count": 12, "buffer_size": 2**20}, "offload_optimizer": nvme}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True,
              "zero_force_ds_cpu_optimizer": False}  # fmt: skip
    deepspeed.init_distributed("gloo")
    model = Model()
    if leaf:
        set_z3_leaf_modules(model, [Block])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator, rows = torch.Generator().manual_seed(1), []
    for chosen in ROUTE:
        engine.module.block.chosen = chosen
        before = [weights_of(expert) for expert in engine.module.block.experts]
        engine.backward(engine(torch.randn(4, 1024, generator=generator)))
        engine.step()
        after = [weights_of(expert) for expert in engine.module.block.experts]
        rows.append([(new - old).norm().item() for new, old in zip(after, before, strict=True)])
    return rows


def weights_of(expert: nn.Linear) -> torch.Tensor:
    """A copy of a parameter that ZeRO-3 has in parts."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([expert.weight]):
        return expert.weight.detach().clone()


def launch(leaf, folder=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, __file__, str(int(leaf)), str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return torch.tensor(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=needs_extension)], ids=["in memory", "on disk"])
def test_leaf_blocks_keep_experts_without_tokens_where_they_are(tmp_path, on_disk):
    stale, right = (launch(leaf, tmp_path if on_disk else "") for leaf in (False, True))
    chosen = torch.zeros(len(ROUTE), 4, dtype=torch.bool)
    chosen[range(len(ROUTE)), ROUTE] = True
    assert (right[chosen] > 0).all()
    assert (right[~chosen] == 0).all(), right
    assert stale[2:, 0].min() > 0, "The first expert has no tokens any more, but its last gradient is used again."


def test_blocks_of_experts_are_found_whatever_their_class():
    model = Model()
    assert expert_blocks(model) == [model.block]


@needs_deepspeed
def test_training_without_leaf_blocks_is_refused():
    from deepspeed.utils import set_z3_leaf_modules

    model = Model()
    with pytest.raises(ValueError, match="experts of Block would be given stale gradients"):
        check_leaf_blocks(model)
    set_z3_leaf_modules(model, [Block])
    check_leaf_blocks(model)


def deepspeed_config(monkeypatch, folder, **options):
    """What a recipe sees under `accelerate launch` with zero3_nvme.yaml."""
    for name, value in {
        "USE_DEEPSPEED": "true",
        "DEEPSPEED_ZERO_STAGE": "3",
        "DEEPSPEED_ZERO3_INIT": "false",
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    return LanguageModelingConfig(output_dir=str(folder), report_to="none", **options)


@needs_deepspeed
def test_preflight_says_what_is_missing(monkeypatch, tmp_path):
    assert not check_zero_offload(LanguageModelingConfig(output_dir=str(tmp_path), report_to="none"), None)
    config = deepspeed_config(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="needs a folder on a disk: name it with --nvme_path"):
        check_zero_offload(config, None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"cannot offload here: .*ninja is not in PATH: activate the environment"):
        check_zero_offload(config, str(tmp_path))
    config.resume_from_checkpoint = "last"
    with pytest.raises(ValueError, match="does not restore an optimizer that it keeps on a disk: start anew"):
        check_zero_offload(config, str(tmp_path))


if __name__ == "__main__":
    print(json.dumps(norms_under_zero3(sys.argv[1] == "1", sys.argv[2])))
