"""PPO over games: what was played is what is learned from, from a store as from memory, resumed as never stopped."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mixturekit.modeling import TieredMoeForActorCritic
from mixturekit.trainers.advantages import rollout_advantages
from mixturekit.trainers.agent_evaluation import play_at_random, play_episodes
from mixturekit.trainers.agent_experts import build_agent
from mixturekit.trainers.atari import GameEnvironments
from mixturekit.trainers.continual import load_agent_config, train_agent
from mixturekit.trainers.continual_checkpoints import save_checkpoint
from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
from mixturekit.trainers.continual_ppo_trainer import ContinualPpoTrainer, most_used, ppo_loss
from mixturekit.trainers.continual_remedies import ElasticWeights
from mixturekit.trainers.game_rollout import GamePlayer
from mixturekit.trainers.local_learning import expert_inputs, oja_update, replace_gradients

GAMES = ["builtin:catch", "builtin:signal"]
AGENT = {
    "expert_dim": 32,
    "expert_hidden_dim": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "hbm_capacity": 4,
    "dram_capacity": 4,
    "context_len": 3,
    "encoder_channels": [4, 8],
    "routing_condition": "environment",
}
RUN = {"num_steps": 8, "segment_len": 4, "num_minibatches": 2, "update_epochs": 2, "use_cpu": True}
# Two updates a game.
PLAY = {"games": GAMES, "steps_per_game": 64, "num_envs": 4, "eval_episodes": 2, "eval_max_steps": 8}
RULES = ("forward_forward", "hebbian", "three_factor")


def arguments(folder, agent=None, play=None, **run):
    return (
        AgentArguments(**{**AGENT, **(agent or {})}),
        GameArguments(**{**PLAY, **(play or {})}),
        ContinualPpoConfig(output_dir=str(folder), **{**RUN, **run}),
    )


def build_trainer(folder, agent=None, play=None, **run):
    own, games, config = arguments(folder, agent, play, **run)
    Path(config.output_dir).mkdir(exist_ok=True)
    experts = build_agent(own, load_agent_config(own, games.games), config)
    return ContinualPpoTrainer(experts, config, games, own)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of both games, and its results."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train_agent(*arguments(folder))


def begun(trainer):
    trainer.open_games()
    trainer.player.begin()
    return trainer


def weights(folder):
    return {name: part for path in Path(folder).glob("model*.safetensors") for name, part in load_file(path).items()}


def assert_same_weights(folder, other):
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name, part in one.items():
        assert torch.equal(part, two[name]), name


def test_advantages_are_those_of_a_plain_loop_over_episodes():
    torch.manual_seed(0)
    rewards, values, last = torch.randn(6, 2), torch.randn(6, 2), torch.randn(2)
    ended = torch.zeros(6, 2, dtype=torch.bool)
    ended[2, 0] = ended[5, 1] = True
    result = rollout_advantages(rewards, values, last, ended, 0.9, 0.8)
    for env in range(2):
        for start in range(6):
            total, factor = 0.0, 1.0
            for step in range(start, 6):
                following = last[env] if step == 5 else values[step + 1, env]
                following = 0.0 if ended[step, env] else following
                total += factor * (rewards[step, env] + 0.9 * following - values[step, env])
                factor *= 0.9 * 0.8
                if ended[step, env]:
                    break
            torch.testing.assert_close(result[start, env], torch.as_tensor(total))


def test_what_was_played_has_the_same_probability_when_it_is_learned_from(tmp_path):
    trainer = begun(build_trainer(tmp_path, play={"games": ["builtin:signal"]}))
    for _ in range(2):
        # Long enough for episodes of 64 steps to end within.
        segments = trainer.player.play(40, 8, 0.99, 0.95)
        assert segments.inputs["frames"].shape == (20, 8, 4, 84, 84)
        outputs = trainer.agent(**segments.inputs, state=segments.state)
        log_probs = outputs.logits.log_softmax(dim=-1).gather(-1, segments.actions.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(log_probs, segments.log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs.values, segments.values, rtol=1e-4, atol=1e-5)
    assert len(trainer.player.finished) == 4
    _, figures = ppo_loss(outputs, segments, trainer.config)
    assert figures["losses/clipfrac"] == 0


def test_truncated_episodes_are_worth_what_they_saw_last():
    torch.manual_seed(0)
    own, games, config = arguments("out", play={"games": ["builtin:signal"]})
    agent = TieredMoeForActorCritic(load_agent_config(own, games.games)).eval()
    environments = GameEnvironments(["builtin:signal"], 2, seed=0)
    player = GamePlayer(agent, environments, torch.zeros(2, dtype=torch.long), torch.Generator().manual_seed(0))
    player.begin()
    player.play(63, 63, 0.99, 0.95)
    before = copy.deepcopy(player.memory)
    with torch.no_grad():
        agent.value_head.bias.fill_(10.0)
        part = player._step(0.99)
    assert part["ended"].all() and (part["gained"] - player.memory.rewards > 5).all()
    # A new episode knows nothing of it.
    assert player.memory.returns.tolist() == [0, 0] and before.returns.any()


@pytest.mark.parametrize("rule", ["backpropagation", *RULES])
def test_a_store_learns_what_memory_learns(rule, tmp_path):
    stored = build_trainer(tmp_path / "store", {"nvme_path": str(tmp_path / "nvme")}, expert_learning_rule=rule)
    stored.agent.save_pretrained(tmp_path / "agent")
    agent = {"model_name_or_path": str(tmp_path / "agent")}
    trainers = [build_trainer(tmp_path / "memory", agent, expert_learning_rule=rule), stored]
    for trainer in map(begun, trainers):
        trainer._update_once()
        trainer._update_once()
    memory, store = (trainer.agent for trainer in trainers)
    # Eight updates by Adam of 2.5e-4 each; sums in another order round differently.
    tolerance = {"rtol": 1e-3, "atol": 5e-5}
    for name, part in store.named_parameters():
        torch.testing.assert_close(part, memory.get_parameter(name), **tolerance)
    for layer, module in enumerate(trainers[0].experts.modules):
        updates = trainers[0].experts.optimizer.state[module.up_proj]["step"]
        for expert in range(8):
            assert trainers[1].experts.store.info(layer, expert).step == updates[expert]
            for name, part in trainers[1].experts.store.read_weights(layer, expert).items():
                torch.testing.assert_close(part, module.get_parameter(name)[expert], **tolerance)
    assert trainers[1].experts.store.stats.disk_misses + trainers[1].experts.store.stats.ram_hits > 0
    trainers[1].experts.close()


def test_replay_in_a_store_takes_the_room_of_one_batch(tmp_path):
    """A token needs two experts, of which the fast tier has two: what is replayed has to wait for them."""
    agent = {"step_tokens": "merged", "hbm_capacity": 2, "dram_capacity": 2}
    run = {"replay_coef": 1.0, "num_steps": 4, "segment_len": 1, "num_minibatches": 16, "norm_adv": False}
    play = {"steps_per_game": 32, "eval_episodes": 0}
    store = build_trainer(tmp_path / "store", {**agent, "nvme_path": str(tmp_path / "nvme")}, play, **run)
    store.agent.save_pretrained(tmp_path / "agent")
    memory = build_trainer(tmp_path / "memory", {**agent, "model_name_or_path": str(tmp_path / "agent")}, play, **run)
    for trainer in (store, memory):
        trainer.train()
        lines = [json.loads(line) for line in trainer.log.path.open()]
        assert any("losses/replay" in line for line in lines)
    for name, part in store.agent.named_parameters():
        torch.testing.assert_close(part, memory.agent.get_parameter(name), rtol=1e-3, atol=2e-4)
    store.experts.close()


@pytest.mark.parametrize(
    ("place", "stop", "options"),
    [
        ("memory", 1, {"replay_coef": 1.0}),
        ("memory", 3, {"replay_coef": 1.0}),
        ("store", 1, {"expert_learning_rule": "forward_forward"}),
        ("store", 3, {"replay_coef": 1.0}),
    ],
)
def test_resumed_in_the_middle_of_a_game_it_learns_what_it_would_have(place, stop, options, tmp_path):
    def agent(folder):
        return {"nvme_path": str(tmp_path / f"nvme_{folder}")} if place == "store" else {}

    options = {"ewc_coef": 10.0, "freeze_router": "after_first_game", **options}
    whole = train_agent(*arguments(tmp_path / "whole", agent("whole"), **options))
    stopped = train_agent(*arguments(tmp_path / "parts", agent("parts"), max_updates=stop, **options))
    assert whole["finished"] and not stopped["finished"] and stopped["updates"] == stop
    resumed = train_agent(*arguments(tmp_path / "parts", agent("parts"), resume_from_checkpoint="last", **options))
    assert resumed["finished"] and resumed["updates"] == whole["updates"] == 4
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert resumed["evaluations"] == whole["evaluations"] and resumed["curves"] == whole["curves"]
    lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("whole", "parts")]
    assert [line["update"] for line in lines[0]] == [line["update"] for line in lines[1]]


def test_arms_differ_in_what_they_say(finished, tmp_path):
    """Every arm trains, and leaves the results that a study compares."""
    arms = {
        "active": {"dense": "active"},
        "total": {"dense": "total"},
        "heads": {"per_game_heads": True, "per_game_norm": True},
        "content": {"routing_condition": "content", "router_balancing": "all_games"},
    }
    found = {name: train_agent(*arguments(tmp_path / name, agent)) for name, agent in arms.items()}
    for results in found.values():
        assert np.isfinite(results["metrics"]["reference"]).all() and "average_forgetting" in results["metrics"]
        assert len(results["evaluations"]) == 3 and len(results["specialisation"]) == 2
    total, dense = finished[1]["parameters"], found["active"]["parameters"]
    assert dense["experts"] * 4 == total["experts"] == found["total"]["parameters"]["experts"]
    assert dense["experts"] == total["active"] - total["total"] + total["experts"]
    together = train_agent(*arguments(tmp_path / "together", play={"interleaved": True}, optimizer="dense"))
    assert together["finished"] and together["phases"] == [GAMES] and together["steps"] == 128


@pytest.mark.parametrize("place", ["memory", "store"])
def test_frozen_experts_stay_as_they_are(place, tmp_path):
    agent = {"nvme_path": str(tmp_path / "nvme")} if place == "store" else {}
    trainer = begun(build_trainer(tmp_path / "run", agent, freeze_experts=True))
    trainer._update_once()
    frozen = torch.zeros(2, 8, dtype=torch.bool)
    frozen[:, ::2] = True
    trainer.experts.freeze(frozen)
    before = snapshot(trainer)
    trainer._update_once()
    after = snapshot(trainer)
    changed = [
        (layer, expert) for layer, expert in before if not torch.equal(before[layer, expert], after[layer, expert])
    ]
    assert changed and all(expert % 2 for _, expert in changed)
    trainer.experts.close()


def snapshot(trainer):
    keys = [(layer, expert) for layer in range(2) for expert in range(8)]
    return {key: trainer.experts.weights(*key)["up_proj"].clone() for key in keys}


@pytest.mark.parametrize("rule", [*RULES, "none"])
def test_only_experts_with_tokens_change_and_by_nothing_but_the_rule(rule, tmp_path):
    trainer = begun(build_trainer(tmp_path, expert_learning_rule=rule, update_epochs=1, num_minibatches=1))
    experts = trainer.experts
    segments = trainer.player.play(8, 4, 0.99, 0.95)
    # Of one segment, whose tokens leave some experts alone.
    batch = segments.select(torch.tensor([0]))
    before, router = snapshot(trainer), trainer.agent.model.layers[0].mlp.gate.weight.clone()
    with expert_inputs(experts.modules) as seen:
        outputs = trainer.agent(**batch.inputs, state=batch.state)
    (outputs.logits[..., :3].sum() + outputs.values.sum()).backward()
    replace_gradients(experts, rule, seen, batch, torch.ones(1, 4), trainer.generator)
    local = {key: {name: part.clone() for name, part in parts.items()} for key, parts in experts.gradients().items()}
    if rule in ("hebbian", "three_factor"):
        # With an advantage of 1 everywhere, it is Oja's rule.
        for (layer, expert), parts in local.items():
            tokens = seen[layer][0][(seen[layer][1] == expert).any(dim=-1)]
            weight = experts.weights(layer, expert)["up_proj"]
            change = oja_update(weight, tokens, F.relu(F.linear(tokens, weight)))
            torch.testing.assert_close(parts["up_proj"], -change / len(seen[layer][0]))
    experts.step()
    after = snapshot(trainer)
    routed = {(layer, expert) for layer in range(2) for expert in seen[layer][1].unique().tolist()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert 0 < len(routed) < len(before) and changed == (set() if rule == "none" else routed)
    assert not torch.equal(router, trainer.agent.model.layers[0].mlp.gate.weight)


def test_playing_for_the_retention_matrix_leaves_the_tiers_as_they_are(tmp_path):
    trainer = begun(build_trainer(tmp_path / "run", {"nvme_path": str(tmp_path / "nvme")}))
    trainer._update_once()
    store = trainer.experts.store
    present = [store.resident(layer) for layer in range(2)]
    trainer._evaluate()
    assert [store.resident(layer) for layer in range(2)] == present and store.task == GAMES[0]
    assert trainer.experts.take_stats()["accesses"] == 0
    # It did use others.
    used = np.sum(trainer.progress.expert_counts, axis=0)
    assert any(set(np.flatnonzero(used[layer])) - present[layer] for layer in range(2))
    trainer.experts.close()


def test_checkpoints_share_what_has_not_changed(tmp_path):
    trainer = build_trainer(tmp_path / "run", {"nvme_path": str(tmp_path / "nvme")})
    for trainer.progress.updates in (1, 2):
        save_checkpoint(trainer)
    records = list(tmp_path.glob("run/checkpoint-*/experts/*/*.record"))
    # Two layers of eight experts.
    assert len(records) == 32 and len({path.stat().st_ino for path in records}) == 16
    trainer.experts.close()


def test_importances_of_games_count_alike_whatever_the_scale_of_their_gradients(tmp_path):
    trainer = begun(build_trainer(tmp_path))
    segments = trainer.player.play(8, 4, 0.99, 0.95)
    scale = trainer.agent.model.norm.weight
    for loud in (0.01, 100.0):
        elastic = ElasticWeights({"action_head": trainer.agent.action_head.weight}, decay=1.0)
        elastic.consolidate(trainer.agent, segments)
        first = elastic.importance["action_head"]
        # The gradients of the head scale with what it sees.
        before = scale.detach().clone()
        with torch.no_grad():
            scale.mul_(loud)
        elastic.consolidate(trainer.agent, segments)
        second = elastic.importance["action_head"] - first
        with torch.no_grad():
            scale.copy_(before)
        torch.testing.assert_close(torch.stack([first.max(), second.max()]), torch.ones(2))


def test_what_is_kept_of_earlier_games_goes_to_the_device_of_the_agent(tmp_path):
    trainer = begun(build_trainer(tmp_path))
    segments = trainer.player.play(8, 4, 0.99, 0.95)
    trainer.replay.keep(trainer.agent, segments)
    trainer.elastic.consolidate(trainer.agent, segments)
    for memory in (trainer.replay, trainer.elastic):
        memory.load_tensors(memory.to_tensors(), torch.device("meta"))
        assert {part.device.type for part in memory.to_tensors().values()} == {"meta"}


def test_most_used_experts_are_those_of_the_first_share():
    usage = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.0, 0.0, 1.0, 0.0]])
    assert most_used(usage, 0.8).tolist() == [[True, False, True, False], [False, False, True, False]]
    assert most_used(usage, 0.81)[0].tolist() == [True, False, True, True]


def test_the_detector_names_both_games_after_learning_one_after_the_other(tmp_path):
    trainer = build_trainer(tmp_path, play={"steps_per_game": 160})
    trainer.train()
    for game in GAMES:
        assert play_episodes(trainer.agent, game, 2, seed=5, max_steps=10).named > 0.9
    told, detected = (
        play_episodes(trainer.agent, GAMES[0], 2, seed=5, max_steps=30, tell_game=tell).returns
        for tell in (True, False)
    )
    assert told.tolist() == detected.tolist()


def test_episodes_are_counted_once_and_to_their_end():
    played = play_at_random("builtin:signal", 3, seed=0, max_steps=1000)
    assert played.lengths.tolist() == [64, 64, 64]
    assert played.record()["return"] == pytest.approx(played.returns.mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {"num_steps": 10}}, "num_steps .10. is not a multiple of segment_len .4."),
        ({"run": {"num_minibatches": 3}}, "8 segments of 4, which 3 minibatches cannot share evenly"),
        ({"run": {"num_minibatches": 32, "segment_len": 1}}, "32 minibatches of one step each"),
        ({"run": {"optimizer": "dense", "freeze_experts": True}}, "--freeze_experts needs --optimizer lazy"),
        ({"run": {"optimizer": "dense", "expert_learning_rule": "hebbian"}}, "leave out --optimizer dense"),
        ({"run": {"replay_coef": 1.0, "expert_learning_rule": "hebbian"}}, "does without: leave out one of them"),
        ({"run": {"expert_learning_rule": "hebb"}}, "is 'hebb': choose one of backpropagation, forward_forward, "),
        ({"agent": {"dense": "active"}, "run": {"expert_learning_rule": "hebbian"}}, "no experts to learn by"),
        ({"play": {"games": ["builtin:cathc"]}}, "did you mean builtin:catch"),
        ({"play": {"num_games": 3}}, "num_games is 3, and there are 2 games"),
        ({"play": {"interleaved": True, "num_envs": 3}}, "which 2 games cannot share evenly"),
        ({"agent": {"hbm_capacity": 6}}, "tiers are in the wrong order"),
        ({"agent": {"top_k": 5}}, "`top_k` is 5, but the fast tier holds 4"),
        ({"agent": {"dense": "active", "nvme_path": "x"}}, "no experts to put in a store"),
        ({"agent": {"nvme_path": "x"}, "run": {"optimizer": "dense"}}, "--nvme_path or --optimizer dense"),
        ({"agent": {"expert_hidden_dim": 10**9, "nvme_path": "."}}, "are free: choose another --nvme_path"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(change, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        train_agent(*arguments(tmp_path, change.get("agent"), change.get("play"), **change.get("run", {})))
    assert not (tmp_path / "config.json").exists() and not list(tmp_path.glob("*.jsonl"))


def test_a_checkpoint_of_another_run_is_refused(finished):
    with pytest.raises(ValueError, match="cannot be resumed by this run: seed=1 there, 2 here"):
        train_agent(*arguments(finished[0], resume_from_checkpoint="last", seed=2))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train_agent(*arguments(finished[0]))


def test_an_agent_goes_on_with_one_of_its_games(finished, tmp_path):
    on = {"model_name_or_path": str(finished[0])}
    # Until episodes of 64 steps end.
    results = train_agent(*arguments(tmp_path / "one", on, {"games": [GAMES[1]], "steps_per_game": 256}))
    assert results["games"] == [GAMES[1]] and {point["game"] for point in results["curves"]} == {GAMES[1]}
    agent = TieredMoeForActorCritic.from_pretrained(tmp_path / "one")
    assert agent.config.games == GAMES
    assert play_episodes(agent, GAMES[1], 2, seed=5, max_steps=10).named == 1
    with pytest.raises(ValueError, match="knows the games builtin:catch, builtin:signal, and not builtin:rally"):
        train_agent(*arguments(tmp_path / "other", on, {"games": ["builtin:rally"]}))


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_a_whole_checkpoint(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "train_atari.py"
    options = [f"--{name}={value}" for name, value in {**AGENT, **RUN, **PLAY}.items() if not isinstance(value, list)]
    options += ["--games", *GAMES, "--encoder_channels", "4", "8"]
    options += [f"--nvme_path={tmp_path / 'nvme'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder, *more):
        command = [sys.executable, str(script), *options, f"--output_dir={tmp_path / folder}", *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    run = start("run")
    # While the games are played after the first of them, which ends with the second update.
    while not (tmp_path / "run" / "checkpoint-2").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    resumed = start("run", "--resume_from_checkpoint=last")
    output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, output[-3000:]
    options[-1] = f"--nvme_path={tmp_path / 'nvme2'}"
    whole = start("whole")
    assert whole.wait(timeout=300) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    results = [json.loads((tmp_path / folder / "continual_results.json").read_text()) for folder in ("run", "whole")]
    assert results[0]["evaluations"] == results[1]["evaluations"] and len(results[0]["evaluations"]) == 3
