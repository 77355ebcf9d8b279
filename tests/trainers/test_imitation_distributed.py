"""Imitation in two processes: the updates of one that accumulates their unrolls. As a program, this file trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixturekit.modeling import MopConfig, MopForActionPrediction
from mixturekit.trainers.babyai import BabyAIEnvironments
from mixturekit.trainers.imitation_config import EnvironmentArguments, ImitationConfig
from mixturekit.trainers.imitation_trainer import ImitationTrainer
from mixturekit.trainers.unroll_sources import DaggerSource

LEVEL = "BabyAI-GoToRedBall-v0"


class InTurn:
    """One unroll of each source after the other."""

    def __init__(self, sources):
        self.sources, self.turn = sources, 0

    @property
    def num_unrolls(self):
        """Those of all sources."""
        return sum(source.num_unrolls for source in self.sources)

    def next_unroll(self, policy):
        """The unroll of the source whose turn it is."""
        return self.sources[self.turn].next_unroll(policy)

    def finish(self, state):
        """Gives that source its state, and the turn to the next."""
        self.sources[self.turn].finish(state)
        self.turn = (self.turn + 1) % len(self.sources)

    def metrics(self):
        """Those of the first."""
        return self.sources[0].metrics()


def train(folder: Path, processes: int) -> None:
    """Three updates of eight episodes, four in each half."""
    torch.manual_seed(0)
    policy = MopForActionPrediction(
        MopConfig(layers="0,8;4,8", intermediate_dim=16, router_dim=4, mission_dim=8, word_dim=4)
    )
    config = ImitationConfig(
        output_dir=str(folder), max_steps=3, logging_steps=1, eval_strategy="no", save_strategy="no", use_cpu=True,
        report_to=[], disable_tqdm=True, optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", warmup_steps=0,
        gradient_accumulation_steps=2 // processes,
    )  # fmt: skip
    # The bot plays, so that what is seen does not depend on rounding.
    bots = [
        DaggerSource(BabyAIEnvironments([LEVEL], 4, seed), 8, seed=seed, beta_start=1.0, beta_unrolls=1e9)
        for seed in (3, 4)
    ]
    source = InTurn(bots) if processes == 1 else bots[config.process_index]
    trainer = ImitationTrainer(
        policy, config, source, EnvironmentArguments(env_id=[LEVEL], num_envs=4, unroll_len=8, eval_episodes=2)
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one_with_the_unrolls_of_both(tmp_path):
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if processes == 2 else []
        command = [sys.executable, *launcher, __file__, str(tmp_path / str(processes)), str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / processes / "model.safetensors") for processes in "12")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)
    logs = [json.loads((tmp_path / processes / "trainer_state.json").read_text())["log_history"] for processes in "12"]
    for alone, together in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "action_loss", "agreement", "frames"):
            if name in alone:
                assert together[name] == pytest.approx(alone[name], rel=1e-4), name


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
