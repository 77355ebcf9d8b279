"""A policy of pathways: time is time, environments are separate, and routing is what it says."""

import numpy as np
import pytest
import torch

from mixturekit.modeling import MopConfig, MopForActionPrediction, MopModel
from mixturekit.modeling.pathway_block import MopBlock, PathwayOptions

BATCH, TIME = 5, 9
MISSIONS = ["go to a red ball", "put the grey key next to the green box", "open the door", "", "juggle a red ball"]
VARIANTS = [
    pytest.param({}, id="pathways"),
    pytest.param({"layers": "0,8;0,4,12"}, id="skip experts"),
    pytest.param({"layers": "8;12"}, id="one expert"),
    pytest.param({"layers": "0;8,0"}, id="only a skip expert"),
    pytest.param({"expert_norm": "none"}, id="no norm"),
    pytest.param({"encoder": "bow_conv_film", "vision_dim": 8}, id="film"),
    pytest.param({"policy_type": "gru", "layers": "12;8"}, id="gru"),
    pytest.param({"recurrence_implementation": "eager"}, id="eager"),
]


def build(**fields) -> MopForActionPrediction:
    config = MopConfig(**{"layers": "4,8;6,12", "intermediate_dim": 16, "router_dim": 5, "mission_dim": 8, **fields})
    policy = MopForActionPrediction(config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return policy


@pytest.fixture(params=VARIANTS)
def policy(request):
    return build(**request.param)


def observe(policy, batch=BATCH, time=TIME, seed=0):
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([11, 6, 3])
    return {
        "images": (torch.rand(batch, time, 7, 7, 3, generator=generator) * limits).to(torch.uint8),
        "directions": torch.randint(4, (batch, time), generator=generator),
        "mission_index": torch.randint(len(MISSIONS), (batch, time), generator=generator),
        **policy.prepare_missions(MISSIONS),
    }


PER_STEP = ("images", "directions", "mission_index", "reset_mask", "labels", "task_ids")


def steps(inputs, index):
    """The steps at `index` of every sequence."""
    return {name: value[:, index] if name in PER_STEP else value for name, value in inputs.items()}


def rows(inputs, index):
    return {name: value[index] if name in PER_STEP else value for name, value in inputs.items()}


@pytest.mark.parametrize("with_resets", [False, True], ids=["no resets", "resets"])
def test_step_by_step_equals_the_sequence(policy, with_resets):
    inputs = observe(policy)
    if with_resets:
        inputs["reset_mask"] = torch.rand(BATCH, TIME) < 0.3
    whole = policy(**inputs, output_router_weights=True)
    state, logits = None, []
    for step in range(TIME):
        output = policy(**steps(inputs, slice(step, step + 1)), state=state)
        state = output.state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=1e-5, rtol=1e-5)
    for block, other in zip(state.blocks, whole.state.blocks, strict=True):
        torch.testing.assert_close(block, other, atol=1e-5, rtol=1e-5)


def test_two_halves_equal_the_whole(policy):
    inputs = observe(policy)
    first = policy(**steps(inputs, slice(0, 4)))
    second = policy(**steps(inputs, slice(4, None)), state=first.state)
    whole = policy(**inputs).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-5, rtol=1e-5)


def test_reset_inside_a_sequence_is_a_fresh_start(policy):
    inputs = observe(policy)
    reset_mask = torch.zeros(BATCH, TIME, dtype=torch.bool)
    reset_mask[2, 4] = True
    output = policy(**inputs, reset_mask=reset_mask)
    fresh = policy(**steps(rows(inputs, slice(2, 3)), slice(4, None)))
    continued = policy(**inputs)
    torch.testing.assert_close(output.logits[2:3, 4:], fresh.logits, atol=1e-5, rtol=1e-5)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(output.logits[others], continued.logits[others], atol=1e-6, rtol=1e-5)
    by_state = policy(**steps(inputs, slice(0, 4))).state.reset(torch.arange(BATCH) == 2)
    later = policy(**steps(inputs, slice(4, None)), state=by_state)
    torch.testing.assert_close(later.logits, output.logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_the_past_matters_and_the_future_does_not(policy):
    inputs = observe(policy)
    logits = policy(**inputs).logits
    changed = {**inputs, "directions": inputs["directions"].clone()}
    changed["directions"][:, 4] = (changed["directions"][:, 4] + 1) % 4
    difference = (policy(**changed).logits - logits).abs().amax(dim=(0, 2))
    assert difference[:4].max() == 0
    assert difference[4:].min() > 1e-6


def test_permuting_environments_permutes_outputs(policy):
    inputs = observe(policy)
    order = torch.randperm(BATCH)
    output, permuted = policy(**inputs), policy(**rows(inputs, order))
    torch.testing.assert_close(permuted.logits, output.logits[order], atol=1e-6, rtol=1e-5)
    alone = policy(**rows(inputs, slice(3, 4)))
    torch.testing.assert_close(alone.logits, output.logits[3:4], atol=1e-5, rtol=1e-5)


def test_batch_norm_couples_environments_in_training_and_is_left_alone_in_evaluation():
    policy = build(expert_norm="batchnorm")
    inputs = observe(policy)
    torch.testing.assert_close(
        policy(**rows(inputs, slice(0, 1))).logits, policy(**inputs).logits[:1], atol=1e-5, rtol=1e-5
    )
    policy.train()
    together, alone = policy(**inputs).logits[:1], policy(**rows(inputs, slice(0, 1))).logits
    assert (together - alone).abs().max() > 1e-3


def test_fused_equals_eager_in_loss_and_gradients():
    policy = build(layers="0,8;0,4,12", routing_cost_coef=0.5)
    inputs = observe(policy) | {"reset_mask": torch.rand(BATCH, TIME) < 0.3}
    labels = torch.randint(7, (BATCH, TIME))
    gradients = []
    for implementation in ("fused", "eager"):
        policy.config.recurrence_implementation = implementation
        loss = policy(**inputs, labels=labels).loss
        gradients.append((loss, *torch.autograd.grad(loss, list(policy.parameters()))))
    for fused, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, eager, atol=1e-6, rtol=1e-4)


def test_every_parameter_gets_a_gradient(policy):
    policy.train()
    policy(**observe(policy), labels=torch.randint(7, (BATCH, TIME))).loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in policy.named_parameters()
    }
    without = {name for name, gradient in gradients.items() if not gradient.count_nonzero()}
    # Where there is one expert, its weight is 1 whatever the router says, and a skip expert has no parameters.
    for index, sizes in enumerate(policy.config.layers):
        if len(sizes) == 1 and policy.config.is_routed:
            router = ["router.weight", "router.bias", "gru.hidden_weights.0", "gru.input_weight", "gru.input_bias"]
            idle = router if sizes != [0] else [*router, "gru.hidden_bias", "output_weight", "output_bias"]
            without -= {f"model.blocks.{index}.{name}" for name in idle}
    assert {name for name in without if gradients[name].numel() > 0} == set()


def test_skip_expert_returns_its_input():
    block = MopBlock(MopConfig(layers="0,8", intermediate_dim=16, encoder="features", input_dim=3), [0, 8])
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        block.router.bias.copy_(torch.tensor([100.0, -100.0]))
    x = torch.randn(TIME, BATCH, 16)
    y, _, weights = block(x, torch.zeros(BATCH, block.gru.width), None, PathwayOptions())
    assert torch.equal(weights, torch.tensor([1.0, 0.0]).expand_as(weights))
    torch.testing.assert_close(y, block.norm(2 * x))


def test_dropout_drops_an_expert_of_weight_zero_with_probability_beta():
    config = MopConfig(layers="4,8", intermediate_dim=16, expert_dropout_max_prob=0.6, expert_dropout_threshold=0.2)
    block = MopBlock(config, [4, 8]).train()
    for weight, expected in ((0.0, 0.6), (0.05, 0.45), (0.1, 0.3), (0.2, 0.0)):
        weights = torch.tensor([1 - weight, weight]).expand(20_000, 2)
        dropped = block._dropped(weights, PathwayOptions()).float().mean(dim=0)
        assert dropped[1].item() == pytest.approx(expected, abs=0.02)
        assert dropped[0] == 0
    assert block.eval()._dropped(weights, PathwayOptions()) is None


def test_threshold_keeps_the_best_expert_and_renormalises():
    policy = build(layers="2,4,8;2,4,8")
    inputs = observe(policy)
    full = policy(**inputs)
    torch.testing.assert_close(policy(**inputs, weight_threshold=0.0).logits, full.logits)
    best_only = policy(**inputs, weight_threshold=0.999)
    assert best_only.logits.isfinite().all()
    assert (best_only.logits - full.logits).abs().max() > 1e-3
    torch.testing.assert_close(policy(**inputs, weight_threshold=2.0).logits, best_only.logits)


def test_lesion_leaves_out_the_largest_expert_of_every_layer():
    policy = build(layers="8,2;4,12,6")
    inputs = observe(policy)
    before = policy(**inputs, lesion_largest=True).logits
    assert (before - policy(**inputs).logits).abs().max() > 1e-3
    with torch.no_grad():
        # What the lesioned experts would have said does not matter.
        for block, largest in zip(policy.model.blocks, (0, 1), strict=True):
            for parameter in (block.output_weight.split(block.unit_sizes, dim=1)[largest], block.output_bias[largest]):
                parameter.add_(1.0)
    torch.testing.assert_close(policy(**inputs, lesion_largest=True).logits, before)
    alone = build(layers="8;12")
    inputs = observe(alone)
    assert torch.equal(alone(**inputs, lesion_largest=True).logits, alone(**inputs).logits)


def test_ignored_labels_give_no_gradient():
    policy = build(routing_cost_coef=0.3).train()
    inputs = observe(policy)
    labels = torch.randint(7, (BATCH, TIME))
    labels[3:] = -100
    policy(**inputs, labels=labels).loss.backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    policy(**rows(inputs, slice(0, 3)), labels=labels[:3]).loss.backward()
    for gradient, parameter in zip(gradients, policy.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)
    policy.zero_grad()
    loss = policy(**inputs, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.count_nonzero() == 0 for parameter in policy.parameters())


def test_routing_cost_is_the_usage_scaled_by_each_tasks_own_loss():
    policy = build(routing_cost_coef=0.5, num_tasks=3, cost_epsilon=0.05)
    labels = torch.randint(7, (BATCH, TIME))
    labels[0, :3] = -100
    tasks = torch.tensor([0, 0, 2, 2, 2]).unsqueeze(1).expand(BATCH, TIME)
    output = policy(**observe(policy), labels=labels, task_ids=tasks, output_router_weights=True)
    expected = 0.0
    for task in (0, 2):
        chosen = (tasks == task) & (labels != -100)
        loss = torch.nn.functional.cross_entropy(output.logits[chosen], labels[chosen])
        usage = sum(
            (weights[chosen] @ torch.tensor(costs)).mean()
            for weights, costs in zip(output.router_weights, policy.config.expert_costs(), strict=True)
        )
        expected = expected + usage / (0.05 + loss) / 2
    torch.testing.assert_close(output.loss, output.action_loss + 0.5 * expected)
    assert 0 < output.routing_cost < 1


def test_detached_performance_changes_gradients_but_not_the_loss():
    losses, gradients = [], []
    for detached in (False, True):
        torch.manual_seed(1)
        policy = build(routing_cost_coef=0.5, detach_performance=detached)
        loss = policy(**observe(policy), labels=torch.zeros(BATCH, TIME, dtype=torch.long)).loss
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, policy.action_head.weight)[0])
    assert torch.equal(*losses)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_truncated_backpropagation_stops_at_a_detached_state():
    policy = build()
    inputs = observe(policy)
    first = policy(**steps(inputs, slice(0, 4)))
    second = policy(**steps(inputs, slice(4, None)), state=first.state)
    assert torch.autograd.grad(second.logits.sum(), first.state.blocks[0])[0].count_nonzero() > 0
    cut = policy(**steps(inputs, slice(4, None)), state=first.state.detach())
    assert torch.equal(cut.logits, second.logits)
    assert not first.state.detach().blocks[0].requires_grad


def test_acting_equals_forward_and_routing_info_equals_both():
    policy = build()
    inputs = observe(policy, time=3)
    output = policy(**inputs, output_router_weights=True)
    state = None
    for step in range(3):
        observations = [
            {
                "image": inputs["images"][row, step].numpy(),
                "direction": int(inputs["directions"][row, step]),
                "mission": MISSIONS[inputs["mission_index"][row, step]],
            }
            for row in range(BATCH)
        ]
        info = policy.get_routing_info(observations, state)
        actions, state = policy.act(observations, state)
        assert torch.equal(actions, output.logits[:, step].argmax(dim=-1))
        for layer, weights in zip(info, output.router_weights, strict=True):
            torch.testing.assert_close(layer["weights"], weights[:, step], atol=1e-6, rtol=1e-5)
    usage = sum(layer["usage_cost"] for layer in info)
    torch.testing.assert_close(usage, policy.usage_cost(output.router_weights)[:, -1], atol=1e-6, rtol=1e-5)


def test_drawn_actions_follow_the_probabilities_and_the_seed():
    policy = build()
    observation = {"image": np.ones((7, 7, 3), dtype=np.uint8), "direction": 0, "mission": "open the door"}
    observations = [observation] * 4000
    draw = lambda seed: policy.act(observations, deterministic=False, generator=torch.Generator().manual_seed(seed))[0]  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    probabilities = policy.step(np.ones((1, 7, 7, 3)), np.zeros(1), ["open the door"]).logits.softmax(dim=-1).flatten()
    torch.testing.assert_close(torch.bincount(draw(1), minlength=7) / 4000, probabilities, atol=0.03, rtol=0)


def test_missions_are_encoded_anew_after_an_update():
    policy = build()
    observation = {"image": np.ones((7, 7, 3), dtype=np.uint8), "direction": 0, "mission": "open the door"}
    first = policy.step(observation["image"][None], np.zeros(1), ["open the door"]).logits
    assert torch.equal(policy.step(observation["image"][None], np.zeros(1), ["open the door"]).logits, first)
    with torch.no_grad():
        policy.encoder.mission.embedding.weight.mul_(3)
    assert not torch.equal(policy.step(observation["image"][None], np.zeros(1), ["open the door"]).logits, first)


def test_missions_are_encoded_anew_after_a_fused_optimizer_which_leaves_no_trace():
    policy = build()
    step = (np.ones((1, 7, 7, 3)), np.zeros(1), ["open the door"])
    first = policy.step(*step).logits
    policy.train()
    optimizer = torch.optim.AdamW(policy.encoder.mission.parameters(), lr=0.1, fused=True)
    policy(**observe(policy)).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(policy.eval().step(*step).logits, first)


def test_missions_differ_by_their_words():
    policy = build()
    embeddings = policy.encoder.mission(**policy.prepare_missions(MISSIONS))
    assert torch.pdist(embeddings).min() > 1e-3
    # Padding of a batch changes nothing.
    alone = policy.encoder.mission(**policy.prepare_missions(MISSIONS[2:3]))
    torch.testing.assert_close(alone[0], embeddings[2], atol=1e-6, rtol=1e-5)


def test_word_that_a_vocabulary_repeats_is_one_word():
    mission = build(mission_vocabulary=["the", "open", "the", "door"]).encoder.mission
    ids = mission.prepare(["open the door"])["mission_input_ids"]
    assert ids.unique().numel() == len(mission.word_ids) == 3
    assert mission(ids).shape == (1, 8)


def test_carrying_is_read_from_the_image():
    policy = build()
    inputs = observe(policy, batch=1, time=1)
    inputs["images"][:, :, 3, 6] = torch.tensor([1, 0, 0])
    features = [policy.encoder(*(inputs[name] for name in PER_STEP[:3]), torch.zeros(len(MISSIONS), 8))]
    inputs["images"][:, :, 3, 6] = torch.tensor([5, 2, 0])
    features.append(policy.encoder(*(inputs[name] for name in PER_STEP[:3]), torch.zeros(len(MISSIONS), 8)))
    carrying = [feature[0, 0, policy.encoder.vision.width + 4].item() for feature in features]
    assert carrying == [0.0, 1.0]


def test_task_embedding_tells_tasks_apart():
    policy = build(num_tasks=2, task_embedding_dim=4)
    inputs = observe(policy)
    tasks = torch.zeros(BATCH, TIME, dtype=torch.long)
    assert (policy(**inputs, task_ids=tasks).logits - policy(**inputs, task_ids=tasks + 1).logits).abs().max() > 1e-3


def test_bfloat16_follows_single_precision():
    policy = build()
    inputs = observe(policy)
    expected = policy(**inputs, labels=torch.zeros(BATCH, TIME, dtype=torch.long))
    policy = policy.bfloat16()
    output = policy(**inputs, labels=torch.zeros(BATCH, TIME, dtype=torch.long), output_router_weights=True)
    assert output.logits.dtype == torch.bfloat16 and output.router_weights[0].dtype == torch.float32
    assert (output.logits.float() - expected.logits).abs().max() < 0.2
    output.loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = build()(**inputs, labels=torch.zeros(BATCH, TIME, dtype=torch.long))
    mixed.loss.backward()
    assert mixed.loss.isfinite() and mixed.state.blocks[0].dtype == torch.float32


def test_observations_and_states_that_do_not_fit():
    policy = build()
    inputs = observe(policy)
    with pytest.raises(ValueError, match=r"\(batch, time, 7, 7, 3\)"):
        policy(**{**inputs, "images": inputs["images"][:, :, :5]})
    with pytest.raises(ValueError, match="holds 2 sequences, but `features` 5"):
        policy(**inputs, state=policy.initial_state(2))
    with pytest.raises(ValueError, match="`reset_mask` has the shape"):
        policy(**inputs, reset_mask=torch.zeros(BATCH, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="4 wide; this model reads 3"):
        MopModel(MopConfig(encoder="features", input_dim=3))(torch.zeros(1, 1, 4))


def test_verbs_of_the_state():
    policy = build(layers="0,8;4,12")
    state = policy(**observe(policy)).state
    names = state.keys()
    assert names == ["router_0", "expert_0_1", "router_1", "expert_1_0", "expert_1_1"]
    assert [state[name].shape for name in names] == [(BATCH, size) for size in (5, 8, 5, 4, 12)]
    assert state["expert_1_1"].data_ptr() == state.blocks[1][:, 9:].data_ptr()
    with pytest.raises(KeyError, match="no part 'expert_0_0'"):
        state["expert_0_0"]
    order = torch.tensor([4, 0, 0])
    for selected in (state.batch_select_indices(order), state.reorder_cache(order)):
        assert torch.equal(selected["expert_1_0"], state["expert_1_0"][order])
    repeated = state.batch_repeat_interleave(2)
    assert repeated.batch_size == 2 * BATCH and torch.equal(repeated["router_1"][2], state["router_1"][1])
    reset = state.reset(torch.arange(BATCH) == 1)
    assert reset["router_0"][1].count_nonzero() == 0
    assert torch.equal(reset["router_0"][2:], state["router_0"][2:]) and state["router_0"][1].count_nonzero() > 0
    assert all(block.count_nonzero() == 0 for block in state.reset().blocks)
    assert state.to(torch.float64).blocks[0].dtype == torch.float64
    restored = policy.initial_state(BATCH).load_dict(state.to_dict())
    assert all(torch.equal(a, b) for a, b in zip(restored.blocks, state.blocks, strict=True))
    with pytest.raises(ValueError, match="The state has the parts"):
        restored.load_dict({"router_0": torch.zeros(1)})
