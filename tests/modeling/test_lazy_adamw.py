"""What the optimizer of a store promises beyond the equality that the tests of the store check."""

import pytest
import torch

from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig
from mixturekit.modeling.lazy_adamw import LazyAdamW, clip_grad_norm_
from mixturekit.modeling.lazy_adamw_in_memory import InMemoryLazyAdamW

SHAPES = {"up": (6, 3), "gate": (5,)}
EXPERTS = 5


def random_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def store(tmp_path):
    with ExpertStore(ExpertStoreConfig(str(tmp_path), fast_capacity=2, ram_capacity=1), SHAPES, 1, EXPERTS) as store:
        for expert in range(EXPERTS):
            store.write_weights(0, expert, random_weights(expert))
        yield store


@pytest.mark.parametrize("fused", [True, False])
def test_experts_without_a_gradient_rest_and_the_others_count_their_own_steps(store, fused):
    optimizer = LazyAdamW(store, lr=0.1, fused=fused)
    weights = {name: torch.nn.Parameter(part) for name, part in random_weights(3).items()}
    reference = torch.optim.AdamW(weights.values(), lr=0.1, fused=fused)
    for number in range(6):
        for name, part in random_weights(number).items():
            weights[name].grad = part
        if number % 2 == 0:
            store.add_gradient(0, 3, random_weights(number))
            reference.step()
        else:
            store.add_gradient(0, 1, random_weights(number))
        optimizer.step()
        optimizer.zero_grad()
    assert [store.info(0, expert).step for expert in range(EXPERTS)] == [0, 3, 0, 3, 0]
    for name, part in store.read_weights(0, 3).items():
        assert torch.equal(part, weights[name])
        assert torch.equal(store.read_weights(0, 4)[name], random_weights(4)[name])


def test_moments_of_a_resting_expert_decay_if_asked_to(store):
    optimizer = LazyAdamW(store, decay_moments=True)
    weights = {name: torch.nn.Parameter(part) for name, part in random_weights(1).items()}
    reference = torch.optim.AdamW(weights.values())
    for number in range(4):
        if number in (0, 3):
            store.add_gradient(0, 1, random_weights(number))
            for name, part in random_weights(number).items():
                weights[name].grad = part
            for state in reference.state.values():
                state["exp_avg"].mul_(0.9**2)
                state["exp_avg_sq"].mul_(0.999**2)
            reference.step()
        else:
            store.add_gradient(0, 2, random_weights(number))
        optimizer.step()
        optimizer.zero_grad()
    for name, part in store.read_weights(0, 1).items():
        torch.testing.assert_close(part, weights[name].data)


def test_schedulers_and_checkpoints_work_as_with_any_optimizer(store):
    optimizer = LazyAdamW(store, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for number in range(3):
        store.add_gradient(0, 0, random_weights(number))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    resumed = LazyAdamW(store)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["updates"] == 3
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_closure_computes_the_gradients(store):
    def closure():
        store.add_gradient(0, 0, random_weights(0))
        return torch.ones(())

    assert LazyAdamW(store).step(closure) == 1
    assert store.info(0, 0).step == 1


def test_closure_computes_the_gradients_of_experts_in_memory():
    """Of which only the one with a token moves, as if each were a parameter of its own."""
    weight = torch.nn.Parameter(torch.rand(4, 3))
    module = torch.nn.Module()
    module.experts, module.forward = weight, lambda rows, index: (rows * weight[index[:, 0]]).sum()
    alone = torch.nn.Parameter(weight[2].detach().clone())
    optimizer = InMemoryLazyAdamW([module], [], lr=0.1)
    reference = torch.optim.AdamW([alone], lr=0.1, fused=True)
    before = weight.detach().clone()
    for number in range(3):
        rows = torch.full((1, 3), 1.0 + number)

        def closure(rows=rows):
            optimizer.zero_grad()
            loss = module(rows, torch.tensor([[2]]))
            loss.backward()
            return loss

        expected = (rows * weight[2]).sum()
        assert torch.equal(optimizer.step(closure), expected)
        alone.grad = rows[0]
        reference.step()
    assert torch.equal(weight[2], alone)
    rest = [0, 1, 3]
    assert torch.equal(weight[rest], before[rest])


def test_norm_is_that_of_model_and_experts_together(store):
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 2.0)
    store.add_gradient(0, 1, {"up": torch.full((6, 3), 3.0), "gate": torch.zeros(5)})
    norm = clip_grad_norm_([weight], store, 1.0)
    expected = (4 * 2.0**2 + 18 * 3.0**2) ** 0.5
    assert norm.item() == pytest.approx(expected)
    assert weight.grad[0].item() == pytest.approx(2.0 / expected)
    assert store.gradients[0, 1]["up"][0, 0].item() == pytest.approx(3.0 / expected)
    assert clip_grad_norm_([weight], store, 5.0).item() == pytest.approx(1.0)
    assert weight.grad[0].item() == pytest.approx(2.0 / expected)


def test_one_optimizer_has_the_experts_and_the_rest(store):
    weight, alone = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = LazyAdamW(store, [weight], lr=0.1, max_grad_norm=1.0)
    reference = torch.optim.AdamW([alone], lr=0.1, fused=True)
    for number in range(3):
        weight.grad = torch.arange(4.0) + number
        store.add_gradient(0, 1, random_weights(number))
        alone.grad = weight.grad.clone()
        norm = torch.nn.utils.get_total_norm([alone.grad, *random_weights(number).values()])
        alone.grad.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert weight.grad is None
        assert not store.gradients
    assert torch.equal(weight, alone)
    assert store.info(0, 1).step == 3
    resumed = LazyAdamW(store, [weight])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[weight]["step"] == 3


def test_store_that_cannot_train_is_refused(tmp_path):
    config = ExpertStoreConfig(str(tmp_path), training=False)
    with ExpertStore(config, SHAPES, 1, EXPERTS) as store, pytest.raises(ValueError, match="training=False"):
        LazyAdamW(store)
