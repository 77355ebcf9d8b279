"""An agent of many experts acts step by step as it does at once, and from a store as from memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel

from mixturekit.modeling import TieredMoeConfig, TieredMoeForActorCritic, TieredMoeModel, TieredMoeState
from mixturekit.modeling.expert_store import ExpertStoreConfig
from mixturekit.modeling.offloaded_experts import initialize_offloaded, load_offloaded, offload_experts

SMALL = {
    "games": ["builtin:catch", "builtin:rally"],
    "own_actions": [[0, 3, 4], [0, 2, 5]],
    "frame_size": 36,
    "encoder_channels": [4, 8],
    "expert_dim": 32,
    "expert_hidden_dim": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "hbm_capacity": 3,
    "dram_capacity": 4,
    "context_len": 3,
    "detector_channels": 2,
}
EVERY_OPTION = {"routing_condition": "environment", "per_game_heads": True, "per_game_norm": True}
KINDS = [
    pytest.param({}, id="separate tokens"),
    pytest.param({"step_tokens": "merged"}, id="merged tokens"),
    pytest.param(EVERY_OPTION, id="every option by game"),
    pytest.param({"context_len": 1, "step_tokens": "merged"}, id="no context"),
]


def lively_agent(**options):
    """An agent in which every part shows in the logits."""
    torch.manual_seed(0)
    agent = TieredMoeForActorCritic(TieredMoeConfig(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return agent


def play(batch=3, time=11):
    """Steps in which episodes begin in the middle, at other times in each row."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.zeros(batch, time, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, 5] = starts[1, 2] = starts[1, 3] = True
    return {
        "frames": torch.randint(0, 256, (batch, time, 4, 36, 36), dtype=torch.uint8, generator=generator),
        "previous_actions": torch.randint(0, 18, (batch, time), generator=generator),
        "rewards": torch.randn(batch, time, generator=generator),
        "starts": starts,
        "environment_ids": torch.arange(batch) % 2,
    }


def pieces(steps, start, end):
    return {name: part if part.ndim == 1 else part[:, start:end] for name, part in steps.items()}


def in_pieces(agent, steps, bounds):
    state, outputs = None, []
    for start, end in zip(bounds, bounds[1:], strict=False):
        outputs.append(agent(**pieces(steps, start, end), state=state))
        state = outputs[-1].state
    logits, values = (torch.cat([getattr(part, name) for part in outputs], dim=1) for name in ("logits", "values"))
    return logits, values, state


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("bounds", [range(12), (0, 4, 5, 11)], ids=["step by step", "in pieces"])
@torch.no_grad()
def test_acting_with_a_rolling_cache_equals_the_whole_sequence(options, bounds):
    agent, steps = lively_agent(**options), play()
    whole = agent(**steps)
    logits, values, state = in_pieces(agent, steps, list(bounds))
    torch.testing.assert_close(logits, whole.logits)
    torch.testing.assert_close(values, whole.values)
    for name, part in state.to_tensors().items():
        torch.testing.assert_close(part, whole.state.to_tensors()[name])


@torch.no_grad()
def test_an_episode_knows_nothing_of_the_one_before():
    agent, steps = lively_agent(), play()
    began_alone = agent(**pieces(steps, 5, 11)).logits[0]
    torch.testing.assert_close(agent(**steps).logits[0, 5:], began_alone)


@torch.no_grad()
def test_attention_reaches_back_as_far_as_the_context_in_each_layer():
    agent, steps = lively_agent(num_layers=1), play()
    steps["starts"][:, 1:] = False
    changed = {**steps, "frames": steps["frames"].clone()}
    changed["frames"][:, 4] = 255 - changed["frames"][:, 4]
    differs = (agent(**steps).values - agent(**changed).values).abs().amax(dim=0) > 0
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 4


@torch.no_grad()
def test_rows_of_a_batch_do_not_matter_to_each_other():
    agent, steps = lively_agent(), play()
    state = agent(**pieces(steps, 0, 4)).state
    whole = agent(**pieces(steps, 4, 11), state=state).values
    rows = torch.tensor([2, 0])
    some = {name: part[rows] for name, part in pieces(steps, 4, 11).items()}
    torch.testing.assert_close(agent(**some, state=state.select(rows)).values, whole[rows])
    stacked = TieredMoeState.stack([state.select(torch.tensor([2])), state.select(torch.tensor([0]))])
    torch.testing.assert_close(agent(**some, state=stacked).values, whole[rows])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_every_implementation_computes_the_same(implementation):
    agent, steps = lively_agent(), play()
    expected = agent(**steps).logits
    agent.set_experts_implementation(implementation)
    agent.set_attn_implementation("eager")
    torch.testing.assert_close(agent(**steps).logits, expected)


@pytest.mark.parametrize("options", KINDS[:3])
@pytest.mark.parametrize("capacity", [2, 8])
def test_a_store_gives_the_same_outputs_and_gradients(options, capacity, tmp_path):
    steps = play()
    memory, stored = lively_agent(**options), lively_agent(**options)
    store = offload_experts(stored, ExpertStoreConfig(str(tmp_path), fast_capacity=capacity, ram_capacity=2))
    outputs = [agent(**steps, output_router_logits=True, output_router_indices=True) for agent in (memory, stored)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    torch.testing.assert_close(outputs[1].values, outputs[0].values)
    for agent, output in zip((memory, stored), outputs, strict=True):
        output.logits = output.logits.clamp(min=-10)
        (output.logits.square().sum() + output.values.sum() + agent.balancing_loss(output)).backward()
    for name, parameter in stored.named_parameters():
        torch.testing.assert_close(parameter.grad, memory.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    assert store.gradients
    for (layer, expert), parts in store.gradients.items():
        for name, gradient in parts.items():
            expected = memory.get_parameter(f"model.layers.{layer}.mlp.experts.{name}").grad[expert]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    store.close()


def test_every_parameter_of_the_agent_learns():
    agent, steps = lively_agent(**EVERY_OPTION).train(), play()
    outputs = agent(**steps, output_router_logits=True, output_router_indices=True)
    named, _ = agent.model.detector.loss(steps["frames"][:, 0], steps["environment_ids"])
    loss = outputs.logits.clamp(min=-10).square().sum() + outputs.values.sum() + agent.balancing_loss(outputs) + named
    loss.backward()
    still = [
        name for name, parameter in agent.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert still == []


def test_only_actions_of_the_game_are_drawn():
    agent, steps = lively_agent(), play()
    steps["environment_ids"] = torch.tensor([0, 1, 1])
    drawn = agent(**steps).logits.softmax(dim=-1) > 0
    assert drawn[0].any(dim=0).nonzero().flatten().tolist() == [0, 3, 4]
    assert drawn[1].any(dim=0).nonzero().flatten().tolist() == [0, 2, 5]


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a store"])
def test_a_new_agent_knows_the_actions_of_its_games(stored, tmp_path):
    config = TieredMoeConfig(**SMALL)
    if stored:
        agent, store = initialize_offloaded(config, ExpertStoreConfig(str(tmp_path), 4, 4), AutoModel)
        store.close()
    else:
        agent = AutoModel.from_config(config)
    assert type(agent) is TieredMoeForActorCritic
    assert [mask.nonzero().flatten().tolist() for mask in agent.action_masks] == config.own_actions


@pytest.mark.parametrize("balancing", ["game", "all_games"])
def test_the_mean_balancing_loss_of_parts_has_the_gradients_of_the_whole(balancing):
    """As of two processes with a row each, and each with a game of its own."""
    agent, steps = lively_agent(router_balancing=balancing), play(batch=2)
    agent.model.detector.usage.uniform_()

    def outputs(rows):
        return agent(
            **{name: part[rows] for name, part in steps.items()}, output_router_logits=True, output_router_indices=True
        )

    agent.balancing_loss(outputs([0, 1])).backward()
    wanted = {name: part.grad.clone() for name, part in agent.named_parameters() if part.grad is not None}
    agent.zero_grad()
    # What each process sends, before what it gets is the mean of them.
    sent = ([], [])
    for row, own in enumerate(sent):
        agent.balancing_loss(outputs([row]), lambda part, own=own: own.append(part) or part)
    for row in range(2):
        means = iter([(one + two) / 2 for one, two in zip(*sent, strict=True)])
        (agent.balancing_loss(outputs([row]), lambda _, means=means: next(means)) / 2).backward()
    assert {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"} <= wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(agent.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-6)


def test_balancing_is_even_within_a_game_whatever_other_games_use():
    agent, steps = lively_agent(), play(batch=2)
    outputs = agent(**steps, output_router_logits=True, output_router_indices=True)
    together = agent.balancing_loss(outputs)
    apart = []
    for row in range(2):
        one = agent(**{name: part[[row]] for name, part in steps.items()}, output_router_logits=True,
                    output_router_indices=True)  # fmt: skip
        apart.append(agent.balancing_loss(one))
    torch.testing.assert_close(together, torch.stack(apart).mean())


@pytest.mark.parametrize("stored", [False, True], ids=["from memory", "from a store"])
def test_a_checkpoint_is_whole_and_loads_with_and_without_a_store(stored, tmp_path):
    agent, steps = lively_agent(), play()
    agent.model.detector.remember(0, torch.tensor([[1, 2]]), torch.tensor([0]))
    expected = agent(**steps)
    if stored:
        store = offload_experts(agent, ExpertStoreConfig(str(tmp_path / "store"), fast_capacity=2))
    agent.save_pretrained(tmp_path / "saved")
    if stored:
        store.close()
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is TieredMoeForActorCritic
    torch.testing.assert_close(loaded(**steps).logits, expected.logits)
    torch.testing.assert_close(loaded.model.detector.usage, agent.model.detector.usage)
    config = ExpertStoreConfig(str(tmp_path / "other"), fast_capacity=2)
    from_store, opened = load_offloaded(tmp_path / "saved", config, AutoModel)
    torch.testing.assert_close(from_store(**steps).logits, expected.logits)
    opened.close()
    base = TieredMoeModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(base(**steps).last_hidden_state, expected.last_hidden_state)


def test_a_checkpoint_carries_its_code(tmp_path):
    lively_agent().save_pretrained(tmp_path)
    script = (
        "import torch, sys; from transformers import AutoModel;"
        f"agent = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True);"
        "print(agent.act(torch.zeros(2, 4, 36, 36, dtype=torch.uint8))[0].shape, 'mixturekit' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", timeout=120)
    assert "torch.Size([2]) False" in run.stdout, run.stderr[-2000:]
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"].endswith("ForActorCritic")
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert "model.layers.1.mlp.experts.up_proj" in weights.keys()  # noqa: SIM118, it is no dictionary


def test_dense_agents_have_the_active_or_the_total_parameters():
    config = TieredMoeConfig(**SMALL)
    layers = config.num_layers * 2 * config.expert_dim * config.expert_hidden_dim
    for kind, experts in (("active", 2), ("total", 8)):
        agent = TieredMoeForActorCritic(config.dense(kind))
        parameters = sum(part.numel() for name, part in agent.named_parameters() if ".experts." in name)
        assert parameters == layers * experts
        assert torch.isfinite(agent(**play()).values).all()


def test_the_detector_learns_games_and_foretells_their_experts():
    torch.manual_seed(0)
    detector = lively_agent().model.detector
    frames = torch.zeros(16, 4, 36, 36, dtype=torch.uint8)
    frames[8:, :, ::2] = 255
    frames[8:] //= 2
    games = torch.arange(16) // 8
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-2)
    for _ in range(50):
        loss, accuracy = detector.loss(frames, games)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy == 1
    for _ in range(20):
        detector.remember(0, torch.tensor([[5, 6]]), torch.tensor([0]))
    for _ in range(20):
        detector.remember(0, torch.tensor([[1, 2]]), torch.tensor([1]))
    assert set(detector.recent_experts(2)[0].tolist()) == {1, 2}
    assert set(detector.predict_experts(frames[:8], 2)[0].tolist()) == {5, 6}
    assert detector.predict_experts(frames[:8], 2)[1].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hbm_capacity": 5}, "above `dram_capacity` .4.: the tiers are in the wrong order"),
        ({"top_k": 4}, "`top_k` is 4, but the fast tier holds 3"),
        ({"num_experts": 1}, "`top_k` is 2, but a layer has 1 experts"),
        ({"routing_condition": "game"}, "choose one of content, environment"),
        ({"frame_size": 20, "encoder_channels": [4, 4, 4]}, "leaves nothing after the convolutions"),
        ({"context_len": 0}, "`context_len` is 0; it must be at least 1"),
        ({"own_actions": [[0]]}, "`own_actions` has 1 lists for 2 games"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TieredMoeConfig(**{**SMALL, **options})


def test_configurations_have_the_names_of_transformers():
    config = AutoConfig.for_model("tiered_moe", **SMALL)
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts_per_tok) == (32, 2, 2)
