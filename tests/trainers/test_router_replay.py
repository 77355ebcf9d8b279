"""Routing that is the same in every pass: in training mode, and replayed."""

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from mixturekit.trainers.router_replay import RouterReplay, keep_routing_deterministic, sparse_mixer_weights

TOKENS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["mixtral", "olmoe", "qwen3_moe", "phimoe", "more"])
def model(request, build_mixture):
    torch.manual_seed(0)
    built = build_mixture(request.param, router_jitter_noise=0.3)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1 and ("router" in name or "gate.weight" in name):
                parameter.normal_(0, 0.5)
    return built


def test_two_passes_in_training_mode_are_that_of_evaluation(model):
    expected = model.eval()(TOKENS).logits
    keep_routing_deterministic(model)
    model.train()
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert model.model.layers[0].training


def test_a_pass_that_replays_itself_is_itself(model):
    replay = RouterReplay(keep_routing_deterministic(model))
    replay.record()
    expected = model(TOKENS).logits
    choices = replay.recorded(len(TOKENS))
    assert choices.shape[:3] == (*TOKENS.shape, len(replay.routers))
    replay.replay(choices)
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    assert replay.agreement() == 1


def test_rows_may_be_replayed_in_another_order(model):
    replay = RouterReplay(keep_routing_deterministic(model))
    replay.record()
    logits = torch.cat([model(TOKENS[:2]).logits, model(TOKENS[2:]).logits])
    choices = replay.recorded(len(TOKENS))
    order = torch.tensor([2, 0, 1])
    replay.replay(choices[order])
    torch.testing.assert_close(model(TOKENS[order]).logits, logits[order], atol=1e-5, rtol=1e-4)


def test_other_choices_are_taken_and_weighed_anew(model):
    replay = RouterReplay(keep_routing_deterministic(model))
    replay.record()
    natural = model(TOKENS).logits
    choices = replay.recorded(len(TOKENS))
    others = (choices.long() + 1) % 8
    replay.replay(others)
    forced = model(TOKENS).logits
    assert (forced - natural).abs().max() > 1e-4
    assert replay.agreement() < 1
    # What is replayed is also what is learned from.
    forced.sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in replay.routers)
    replay.stop()
    torch.testing.assert_close(model(TOKENS).logits, natural)


def test_choices_hold_while_checkpointed_layers_are_computed_again(build_mixture):
    torch.manual_seed(0)
    model = build_mixture("qwen3_moe").train()
    replay = RouterReplay(keep_routing_deterministic(model))
    replay.record()
    model(TOKENS)
    others = (replay.recorded(len(TOKENS)).long() + 1) % 8

    def gradients():
        model.zero_grad()
        replay.replay(others)
        model(TOKENS).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_sparse_mixer_weighs_its_own_choice_as_phi_moe_does():
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    for jitter in (0.01, 0.1, 0.5):
        weights, chosen = sparsemixer(logits, jitter, training=False, top_k=2)
        torch.testing.assert_close(sparse_mixer_weights(logits, chosen, jitter), weights)


def test_a_router_that_weighs_in_an_unknown_way_is_refused(build_mixture):
    model = build_mixture("mixtral")
    routers = keep_routing_deterministic(model)
    changed = RouterReplay([_Squared(router) for router in routers[:1]])
    changed.record()
    with pytest.raises(ValueError, match="router_replay to 'off'"):
        changed.routers[0](torch.randn(5, 32))


class _Squared(torch.nn.Module):
    """A router whose weights are neither softmax nor sigmoid."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, hidden):
        logits, weights, indices = self.router(hidden)
        return logits, weights**3 + 0.1, indices
