"""Frames a second of whole DAgger updates: environments, bot, policy and learning, beside a plain loop.

python recipes/benchmarks/babyai_update.py --threads 1

The plain loop has minigrid's own environments and bot, and a policy of one `torch.nn.GRU` per router and expert whose
steps keep their gradient; the other is the code of `recipes/train_babyai.py`. Both begin with the same weights. Either
the new policy acts, whose episodes are long, or the bot does, whose episodes end as often as those of a good policy.
Time is processor time, the median of interleaved repeats.
"""

import argparse
import contextlib
import io
import json
import statistics
import time

import gymnasium
import numpy as np
import torch
from minigrid.utils.baby_ai_bot import BabyAIBot
from mop_policy import PlainPolicy
from rich.console import Console
from rich.table import Table
from torch import nn

from mixturekit.modeling import MopConfig, MopForActionPrediction
from mixturekit.trainers.babyai import IGNORED_LABEL, BabyAIEnvironments, Observations
from mixturekit.trainers.imitation_trainer import unroll_inputs
from mixturekit.trainers.unroll_sources import DaggerSource


class PlainLoop:
    """Updates as a short script makes them."""

    def __init__(self, policy: MopForActionPrediction, arguments):
        self.policy, self.arguments = PlainPolicy(policy), arguments
        self.source = policy
        self.environments = [gymnasium.make(arguments.env_id).unwrapped for _ in range(arguments.num_envs)]
        self.seeds = iter(range(10**9))
        self.bots, self.observations, self.taken = [], [], []
        for index in range(arguments.num_envs):
            self.begin(index)
        self.state = self.policy.initial_state(arguments.num_envs)
        self.fresh = np.ones(arguments.num_envs, dtype=bool)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-4)

    def begin(self, index: int) -> None:
        """Starts an episode in one environment."""
        environment = self.environments[index]
        observation, _ = environment.reset(seed=next(self.seeds))
        for values, value in (
            (self.bots, BabyAIBot(environment)),
            (self.observations, observation),
            (self.taken, None),
        ):
            values[index : index + 1] = [value]

    def update(self) -> None:
        """Plays an unroll and learns from it."""
        losses = []
        self.state = [[part.detach() for part in states] for states in self.state]
        for _ in range(self.arguments.unroll_len):
            labels = [self.label(index) for index in range(len(self.bots))]
            seen = Observations.from_dictionaries(self.observations)
            inputs = {
                "images": torch.from_numpy(seen.images)[:, None],
                "directions": torch.from_numpy(seen.directions)[:, None],
                "mission_index": torch.arange(len(seen.missions))[:, None],
                **self.source.prepare_missions(seen.missions),
            }
            keep = torch.from_numpy(~self.fresh).float()[None, :, None]
            logits, self.state = self.policy.step(inputs, self.state, keep)
            losses.append(nn.functional.cross_entropy(logits, torch.tensor(labels), ignore_index=IGNORED_LABEL))
            actions = labels if self.arguments.bot_acts else logits.argmax(-1).tolist()
            self.act([0 if action == IGNORED_LABEL else action for action in actions])
        torch.stack(losses).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def label(self, index: int) -> int:
        """What the bot would do."""
        try:
            return int(self.bots[index].replan(self.taken[index]))
        except Exception:  # The bot has no errors of its own for what it cannot do.
            return IGNORED_LABEL

    def act(self, actions: list[int]) -> None:
        """One step of every environment."""
        for index, action in enumerate(actions):
            self.observations[index], _, terminated, truncated, _ = self.environments[index].step(action)
            self.taken[index] = action
            self.fresh[index] = terminated or truncated
            if self.fresh[index]:
                self.begin(index)


class Recipe:
    """Updates as the recipe makes them."""

    def __init__(self, policy: MopForActionPrediction, arguments):
        self.policy = policy.train()
        environments = BabyAIEnvironments([arguments.env_id], arguments.num_envs, seed=0)
        beta = 1.0 if arguments.bot_acts else 0.0
        self.source = DaggerSource(environments, arguments.unroll_len, beta_start=beta, beta_unrolls=1e12)
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)

    def update(self) -> None:
        """Plays an unroll and learns from it."""
        unroll, state = self.source.next_unroll(self.policy)
        self.policy(**unroll_inputs(unroll, self.policy), state=state).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(arguments) -> dict[str, float]:
    """Median frames a second of both."""
    torch.manual_seed(0)
    config = MopConfig(layers=arguments.layers, encoder=arguments.encoder)
    policies = [MopForActionPrediction(config) for _ in range(2)]
    policies[1].load_state_dict(policies[0].state_dict())
    # Minigrid prints about the missions that it draws anew.
    with contextlib.redirect_stdout(io.StringIO()):
        loops = {"plain": PlainLoop(policies[0], arguments), "recipe": Recipe(policies[1], arguments)}
        seconds = {name: [] for name in loops}
        for repeat in range(arguments.repeats + 2):
            for name, loop in loops.items():
                started = time.process_time()
                loop.update()
                if repeat > 1:
                    seconds[name].append(time.process_time() - started)
    frames = arguments.num_envs * arguments.unroll_len
    return {name: frames / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Measures with either acting, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env_id", default="BabyAI-GoToRedBall-v0")
    parser.add_argument("--layers", default="32,64,128;64,128,256", help="sizes of the experts of each layer")
    parser.add_argument("--encoder", default="flat", choices=("flat", "bow_conv_film"))
    parser.add_argument("--num_envs", type=int, default=16)
    parser.add_argument("--unroll_len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file to write the figures to as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(title="Frames a second of processor time")
    for column in ("who acts", "plain loop", "recipe", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for arguments.bot_acts in (False, True):
        rates = measure(arguments)
        actor = "the bot" if arguments.bot_acts else "the new policy"
        rows.append({"who acts": actor, **rates})
        ratio = rates["recipe"] / rates["plain"]
        table.add_row(actor, f"{rates['plain']:,.0f}", f"{rates['recipe']:,.0f}", f"{ratio:.2f}")
    Console(width=110).print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
