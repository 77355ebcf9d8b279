"""Speed of sequential Atari: environments, whole PPO loops beside CleanRL's, and experts on disk or in memory.

python recipes/benchmarks/atari.py --parts environments loops experts --output atari.json

The peer of the loops is the network and loop of CleanRL's `ppo_atari` (Huang et al. 2022, JMLR 23), written anew from
its published description: Nature CNN, 8 environments of 128 steps, 4 epochs of 4 minibatches, Adam. It runs on
gymnasium's vector environments, as CleanRL does, and also on ale-py's, which leaves the network and loop alone.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

PARTS = ("environments", "loops", "experts")
SMALL = {
    "expert_dim": 128, "expert_hidden_dim": 256, "num_layers": 1, "num_attention_heads": 4, "num_experts": 1,
    "top_k": 1, "hbm_capacity": 1, "dram_capacity": 1, "context_len": 4, "step_tokens": "merged",
    "encoder_channels": [16, 32], "router_balancing": "none",
}  # fmt: skip


def main() -> None:
    """Measures what is asked for, prints it and saves it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--game", default="pong", help="game of environments and loops")
    parser.add_argument("--num_envs", type=int, default=8, help="environments")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each environment's measurement")
    parser.add_argument("--updates", type=int, default=3, help="updates of each loop, after one to warm up")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each, in turn; the best counts")
    parser.add_argument("--num_threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--nvme_path", help="folder for experts on disk; a temporary one if unset")
    parser.add_argument("--output", default="atari.json", help="file of the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    measures = {"environments": measure_environments, "loops": measure_loops, "experts": measure_experts}
    figures: dict = {"settings": vars(arguments)}
    for part in arguments.parts:
        figures[part] = measures[part](arguments)
        for name, value in figures[part].items():
            print(f"{part:>13}  {name:<58} {value:>12,.2f}", flush=True)
        Path(arguments.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"Figures: {arguments.output}")


def native(game: str, num_envs: int):
    """Ale-py's vector environment, as the trainer uses it."""
    from mixturekit.trainers.atari import GameEnvironments

    environments = GameEnvironments([game], num_envs, seed=0)
    return environments.reset, lambda actions: environments.step(actions).frames, environments.close


def gymnasium_vector(game: str, num_envs: int, mode: str):
    """Gymnasium's vector environments, each copy with the wrappers of CleanRL."""
    import ale_py
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    gymnasium.register_envs(ale_py)
    identifier = f"ALE/{''.join(part.capitalize() for part in game.split('_'))}-v5"

    def make():
        environment = gymnasium.make(identifier, frameskip=1, full_action_space=True)
        return FrameStackObservation(AtariPreprocessing(environment, frame_skip=4), 4)

    kind = gymnasium.vector.AsyncVectorEnv if mode == "async" else gymnasium.vector.SyncVectorEnv
    environments = kind([make] * num_envs)
    return lambda: environments.reset(seed=0)[0], lambda actions: environments.step(actions)[0], environments.close


def build_environments(arguments, kind: str):
    """Reset, step and close of a kind of environments; `None` with a sentence where OpenCV is missing."""
    if kind == "native":
        return native(arguments.game, arguments.num_envs)
    try:
        import cv2  # noqa: F401, gymnasium's preprocessing needs it
    except ImportError:
        print(f"{kind} is left out: gymnasium's AtariPreprocessing needs opencv-python-headless", file=sys.stderr)
        return None
    return gymnasium_vector(arguments.game, arguments.num_envs, kind)


def measure_environments(arguments) -> dict[str, float]:
    """Emulated frames a second, four in each step, with random actions."""
    best: dict[str, float] = {}
    for _ in range(arguments.repeats):
        for kind in ("native", "async", "sync"):
            built = build_environments(arguments, kind)
            if built is None:
                continue
            reset, step, close = built
            reset()
            random, steps, started = np.random.default_rng(0), 0, time.perf_counter()
            while time.perf_counter() - started < arguments.seconds / arguments.repeats:
                step(random.integers(0, 18, arguments.num_envs))
                steps += arguments.num_envs
            best[kind] = max(best.get(kind, 0.0), 4 * steps / (time.perf_counter() - started))
            close()
    named = {f"{kind}, frames a second": value for kind, value in best.items()}
    if "async" in best:
        named["native over async"] = best["native"] / best["async"]
    return named


class NatureAgent(nn.Module):
    """CleanRL's network: three convolutions, 512 features, an actor and a critic; orthogonal weights."""

    def __init__(self, actions: int = 18):
        super().__init__()
        layers = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1)]
        self.network = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU())
        self.actor, self.critic = nn.Linear(512, actions), nn.Linear(512, 1)
        gains = {self.actor: 0.01, self.critic: 1.0}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(module.weight, gains.get(module, 2**0.5))
                nn.init.zeros_(module.bias)

    def forward(self, frames: torch.Tensor) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        """Distribution of actions and values of float frames `(batch, 4, 84, 84)` from 0 to 255."""
        hidden = self.network(frames / 255.0)
        return torch.distributions.Categorical(logits=self.actor(hidden)), self.critic(hidden).squeeze(-1)


def peer_update(agent, optimizer, step, frames, num_steps: int = 128):
    """A rollout and an update of CleanRL's loop; returns the frames that come next."""
    num_envs = len(frames)
    kept = {name: [] for name in ("frames", "actions", "log_probs", "values")}
    with torch.no_grad():
        for _ in range(num_steps):
            seen = torch.Tensor(np.asarray(frames))
            distribution, values = agent(seen)
            actions = distribution.sample()
            parts = (seen, actions, distribution.log_prob(actions), values)
            for name, part in zip(kept, parts, strict=True):
                kept[name].append(part)
            frames = step(actions.numpy())
    flat = {name: torch.cat(parts) for name, parts in kept.items()}
    # What is rewarded takes no time; noise stands in for the advantages.
    advantages, returns = torch.randn(num_steps * num_envs), torch.randn(num_steps * num_envs)
    for _ in range(4):
        for rows in torch.randperm(num_steps * num_envs).split(num_steps * num_envs // 4):
            distribution, values = agent(flat["frames"][rows])
            ratio = (distribution.log_prob(flat["actions"][rows]) - flat["log_probs"][rows]).exp()
            own = (advantages[rows] - advantages[rows].mean()) / (advantages[rows].std() + 1e-8)
            policy_loss = torch.max(-own * ratio, -own * ratio.clamp(0.9, 1.1)).mean()
            near = flat["values"][rows] + (values - flat["values"][rows]).clamp(-0.1, 0.1)
            errors = torch.max((values - returns[rows]) ** 2, (near - returns[rows]) ** 2)
            loss = policy_loss - 0.01 * distribution.entropy().mean() + 0.5 * 0.5 * errors.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
    return frames


def build_trainer(arguments, agent: dict, games: list[str], folder: str, **options):
    """A trainer in the middle of its first game."""
    from mixturekit.trainers.agent_experts import build_agent
    from mixturekit.trainers.continual import load_agent_config
    from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
    from mixturekit.trainers.continual_ppo_trainer import ContinualPpoTrainer

    own, play = AgentArguments(**agent), GameArguments(games=games, num_envs=arguments.num_envs)
    given = {"num_steps": 128, "segment_len": 16, "use_cpu": not torch.cuda.is_available(), **options}
    config = ContinualPpoConfig(output_dir=folder, **given)
    trainer = ContinualPpoTrainer(build_agent(own, load_agent_config(own, play.games), config), config, play, own)
    trainer.open_games()
    trainer.player.begin()
    return trainer


def timed_update(trainer) -> tuple[float, float]:
    """Seconds of a rollout and of the update after it."""
    config, started = trainer.config, time.perf_counter()
    trainer.agent.eval()
    segments = trainer.player.play(config.num_steps, config.segment_len, config.gamma, config.gae_lambda)
    acted = time.perf_counter()
    trainer.agent.train()
    trainer.player.remember_routes()
    trainer.learn(segments)
    return acted - started, time.perf_counter() - acted


def measure_loops(arguments) -> dict[str, float]:
    """Emulated frames a second of whole updates, the loops in turn."""
    frames_of_update = 4 * 128 * arguments.num_envs
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(arguments, SMALL, [arguments.game], folder)
        timed_update(trainer)
        agent = NatureAgent()
        optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
        peers = {}
        for kind in ("native", "sync"):
            built = build_environments(arguments, kind)
            if built is not None:
                reset, step, close = built
                peers[kind] = [step, peer_update(agent, optimizer, step, reset()), close]
        for _ in range(arguments.repeats):
            seconds = np.mean([timed_update(trainer) for _ in range(arguments.updates)], axis=0)
            for name, part in (("acting", seconds[0]), ("updating", seconds[1]), ("small dense agent", seconds.sum())):
                key = f"{name}, frames a second"
                best[key] = max(best.get(key, 0.0), frames_of_update / part)
            for kind, peer in peers.items():
                started = time.perf_counter()
                for _ in range(arguments.updates):
                    peer[1] = peer_update(agent, optimizer, peer[0], peer[1])
                key = f"CleanRL's network and loop on {kind} environments, frames a second"
                speed = frames_of_update * arguments.updates / (time.perf_counter() - started)
                best[key] = max(best.get(key, 0.0), speed)
        for peer in peers.values():
            peer[2]()
    own = best["small dense agent, frames a second"]
    for kind in peers:
        name = f"CleanRL's network and loop on {kind} environments, frames a second"
        best[f"small dense agent over CleanRL's on {kind}"] = own / best[name]
    return best


def measure_experts(arguments) -> dict[str, float]:
    """Seconds of an update with experts on disk and in memory, and what the change to another game costs."""
    # Experts of 1.5 MiB with their optimizer's state, of which a game is given a part.
    agent = {
        "expert_dim": 256, "expert_hidden_dim": 256, "num_layers": 2, "num_attention_heads": 4, "num_experts": 64,
        "top_k": 2, "hbm_capacity": 32, "dram_capacity": 32, "context_len": 8, "step_tokens": "merged",
        "encoder_channels": [16, 32], "routing_condition": "environment", "router_balancing": "none",
    }  # fmt: skip
    games = ["builtin:catch", "builtin:collect"]
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.nvme_path) as folder:
        trainers = {
            "in memory": build_trainer(arguments, agent, games, folder),
            "on disk": build_trainer(arguments, agent | {"nvme_path": f"{folder}/store"}, games, folder),
        }
        for trainer in trainers.values():
            timed_update(trainer)
        stalls = []
        for _ in range(arguments.repeats):
            for name, trainer in trainers.items():
                trainer.experts.take_stats()
                seconds = np.sum([timed_update(trainer) for _ in range(arguments.updates)]) / arguments.updates
                best[f"{name}, seconds of an update"] = min(best.get(f"{name}, seconds of an update", 1e9), seconds)
        stats = trainers["on disk"].experts.take_stats()
        best["on disk, hit rate of the fast tier"] = stats["hit_rate"]
        for _ in range(arguments.repeats):
            stalls.append(stall_at_change(trainers["on disk"]))
        best["on disk, stall of the first update of a game, milliseconds"] = float(np.median(stalls))
        trainers["on disk"].experts.close()
    best["on disk over in memory"] = best["on disk, seconds of an update"] / best["in memory, seconds of an update"]
    return best


def stall_at_change(trainer) -> float:
    """Milliseconds that the program waits for experts in the first rollout and update of the other game."""
    trainer.progress.phase = 1 - trainer.progress.phase
    trainer.environments.close()
    trainer.open_games()
    trainer.player.begin()
    trainer.experts.take_stats()
    timed_update(trainer)
    return 1000 * trainer.experts.take_stats()["stall_seconds"]


if __name__ == "__main__":
    main()
