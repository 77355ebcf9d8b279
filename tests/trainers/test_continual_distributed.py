"""Two gloo processes, each with tiers of its own, make the update of one with the batches of both."""

import json
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    from safetensors.torch import load_file, save_file
    from mixturekit.modeling import TieredMoeState
    from mixturekit.trainers.agent_experts import build_agent
    from mixturekit.trainers.continual import load_agent_config
    from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
    from mixturekit.trainers.continual_ppo_trainer import ContinualPpoTrainer
    from mixturekit.trainers.game_rollout import Segments

    torch.set_num_threads(1)
    place, folder, played = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    store = {"nvme_path": str(folder / "nvme")} if place == "store" else {}
    own = AgentArguments(
        expert_dim=32, expert_hidden_dim=16, num_layers=2, num_attention_heads=2, num_experts=16, hbm_capacity=8,
        dram_capacity=8, context_len=3, encoder_channels=[4, 8], routing_condition="environment",
        **store,
    )
    games = GameArguments(games=["builtin:catch"], num_envs=4)
    # All of it in one minibatch, because two processes draw other minibatches than one.
    config = ContinualPpoConfig(
        output_dir=str(folder), num_steps=8, segment_len=4, num_minibatches=1, update_epochs=3, use_cpu=True,
        optimizer="dense" if place == "dense" else "lazy",
        expert_learning_rule="three_factor" if place == "three factors" else "backpropagation",
    )
    trainer = ContinualPpoTrainer(build_agent(own, load_agent_config(own, games.games), config), config, games, own)
    fields = ("actions", "log_probs", "values", "advantages", "returns")
    if not played.exists():
        trainer.open_games()
        trainer.player.begin()
        segments = trainer.player.play(8, 4, 0.99, 0.95)
        tensors = {f"inputs.{name}": part.contiguous() for name, part in segments.inputs.items()}
        tensors |= {f"state.{name}": part for name, part in segments.state.to_tensors().items()}
        save_file(tensors | {name: getattr(segments, name).contiguous() for name in fields}, played)
    tensors = load_file(played)
    inputs = {name[7:]: part for name, part in tensors.items() if name.startswith("inputs.")}
    state = TieredMoeState.from_tensors({n[6:]: part for n, part in tensors.items() if n.startswith("state.")})
    segments = Segments(inputs, state, *(tensors[name] for name in fields))
    rows = torch.arange(len(segments)).chunk(config.world_size)[config.process_index]
    trainer.agent.train()
    trainer.learn(segments.select(rows))
    if config.process_index == 0:
        trainer.agent.save_pretrained(folder)
    config.accelerator.wait_for_everyone()
    trainer.experts.close()
    """
)


@pytest.fixture
def learn(monkeypatch):
    """Learns in this process, or in several others; returns the weights."""

    def learn(folder, place, played, processes):
        folder.mkdir()
        command = [str(folder / "learn.py"), place, str(folder), str(played)]
        (folder / "learn.py").write_text(SCRIPT)
        if processes == 1:
            monkeypatch.setattr(sys, "argv", command)
            runpy.run_path(command[0])
        else:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            run = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, run.stderr[-3000:]
        return {name: part for path in folder.glob("model*.safetensors") for name, part in load_file(path).items()}

    return learn


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "place", ["store", *(pytest.param(p, marks=SLOW) for p in ("memory", "dense", "three factors"))]
)
def test_two_processes_learn_what_one_learns_from_both_batches(place, learn, tmp_path):
    one = learn(tmp_path / "one", place, tmp_path / "played.safetensors", 1)
    two = learn(tmp_path / "two", place, tmp_path / "played.safetensors", 2)
    assert one.keys() == two.keys()
    for name, part in one.items():
        torch.testing.assert_close(
            two[name], part, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


WHOLE_RUN = textwrap.dedent(
    """
    import json
    import sys
    from pathlib import Path
    import torch
    from mixturekit.trainers.agent_experts import build_agent
    from mixturekit.trainers.continual import load_agent_config
    from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
    from mixturekit.trainers.continual_ppo_trainer import ContinualPpoTrainer

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    own = AgentArguments(
        expert_dim=32, expert_hidden_dim=16, num_layers=2, num_attention_heads=2, num_experts=16, hbm_capacity=8,
        dram_capacity=8, context_len=3, encoder_channels=[4, 8], routing_condition="environment",
    )
    games = GameArguments(games=["builtin:catch", "builtin:signal"], num_envs=4, steps_per_game=256, eval_episodes=0)
    # Bounds that each process would meet at another time by itself.
    config = ContinualPpoConfig(
        output_dir=str(folder), num_steps=16, segment_len=4, num_minibatches=2, update_epochs=8, learning_rate=1e-2,
        target_kl=0.02, freeze_experts=True, freeze_share=0.6, use_cpu=True,
    )
    experts = build_agent(own, load_agent_config(own, games.games), config)
    ContinualPpoTrainer(experts, config, games, own).train()
    weights = torch.cat([part.detach().flatten() for part in experts.agent.parameters()])
    found = {"weights": weights.tolist(), "frozen": experts.frozen.tolist()}
    (folder / f"process_{config.process_index}.json").write_text(json.dumps(found))
    """
)


@SLOW
def test_processes_have_the_same_agent_whatever_each_has_played(tmp_path):
    """Where an update ends early, and experts are frozen after their game."""
    (tmp_path / "train.py").write_text(WHOLE_RUN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launcher, str(tmp_path / "train.py"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"process_{number}.json").read_text()) for number in range(2))
    assert first["frozen"] == second["frozen"] and torch.tensor(first["frozen"]).any()
    assert not torch.tensor(first["frozen"]).all()
    # The detector learns from what each has seen, by gradients of both.
    assert first["weights"] == second["weights"]
