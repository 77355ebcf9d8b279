"""A model whose experts are in a store computes, learns and generates as with its experts in memory."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.modeling.configuration_more import EXPERT_TYPES
from mixturekit.modeling.expert_store import ExpertStoreConfig
from mixturekit.modeling.lazy_adamw import LazyAdamW
from mixturekit.modeling.offloaded_experts import find_experts, offload_experts

EXPERTS = 8
# Whose tokens attend to each other within an expert, so that a layer runs at once or not at all.
AT_ONCE = "more_a"


@pytest.fixture
def lively(build_mixture):
    """Builds models in which every expert shows in the logits: MoRE by its kind of experts, others by their type."""

    def build(name):
        if name in EXPERT_TYPES:
            model = MoreForCausalLM(
                MoreConfig.from_preset(
                    "debug", name, num_experts=EXPERTS, num_experts_per_tok=2, vocab_size=64, num_recurrences=2
                )
            )
        else:
            model = build_mixture(name, EXPERTS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    return build


def tokens(batch=2, seq=9, seed=0):
    return torch.randint(3, 64, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["mixtral", "qwen3_moe", "olmoe", "phimoe", *EXPERT_TYPES])
def name(request):
    return request.param


@pytest.fixture
def offload(tmp_path):
    """Offloads a copy of a model, and closes its store."""
    stores = []

    def build(model, capacity, folder="store", **options):
        offloaded = copy.deepcopy(model)
        options = {"ram_capacity": 3, **options}
        config = ExpertStoreConfig(str(tmp_path / folder), fast_capacity=capacity, **options)
        stores.append(offload_experts(offloaded, config))
        return offloaded, stores[-1]

    yield build
    for store in stores:
        store.close()


def capacities(name):
    return (EXPERTS,) if name == AT_ONCE else (1, 3, EXPERTS)


class Routes:
    """Records which experts of a model in memory its tokens are sent to."""

    def __init__(self, model):
        self.model, self.used = model, set()
        for layer, module in enumerate(find_experts(model).values()):
            module.register_forward_pre_hook(lambda _, args, layer=layer: self.add(layer, args[1]))

    def add(self, layer, index):
        self.used.update((layer, expert) for expert in index.unique().tolist())

    def gradients(self):
        """Gradient of each expert that was used, as a store has them."""
        modules = list(find_experts(self.model).values())
        return {
            (layer, expert): {part: own.grad[expert] for part, own in modules[layer].named_parameters(recurse=False)}
            for layer, expert in self.used
        }


def assert_same_gradients(routes, offloaded, store, **tolerance):
    rest = dict(routes.model.named_parameters())
    for path, parameter in offloaded.named_parameters():
        torch.testing.assert_close(parameter.grad, rest[path].grad, **tolerance)
    expected = routes.gradients()
    assert sorted(store.gradients) == sorted(expected)
    for key, parts in expected.items():
        for part, gradient in parts.items():
            torch.testing.assert_close(store.gradients[key][part], gradient, **tolerance)


def rounding(name):
    """Feed-forward experts compute the same to the bit; those with a GRU round by the place of a row in memory."""
    return {} if name.startswith("more") else {"rtol": 0, "atol": 0}


@torch.no_grad()
def test_logits_are_the_same(lively, name, offload):
    model = lively(name)
    expected = model(tokens()).logits
    for capacity in capacities(name):
        offloaded, store = offload(model, capacity, folder=f"store-{capacity}")
        for _ in range(2):
            torch.testing.assert_close(offloaded(tokens()).logits, expected, **rounding(name))
        assert store.room(0) == capacity
        assert not any("experts.gate_up" in path for path, _ in offloaded.named_parameters())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_every_implementation_runs_on_slots(lively, implementation, offload):
    model = lively("mixtral")
    model.set_experts_implementation(implementation)
    expected = model(tokens()).logits
    for capacity in (2, EXPERTS):
        offloaded, _ = offload(model, capacity, folder=f"store-{capacity}")
        torch.testing.assert_close(offloaded(tokens()).logits, expected)


def test_gradients_are_the_same(lively, name, offload):
    model = lively(name)
    routes = Routes(copy.deepcopy(model))
    routes.model(tokens(), labels=tokens()).loss.backward()
    for capacity in capacities(name):
        offloaded, store = offload(model, capacity, folder=f"store-{capacity}")
        offloaded(tokens(), labels=tokens()).loss.backward()
        assert_same_gradients(routes, offloaded, store, rtol=1e-4, atol=1e-6)
        assert store.room(0) == capacity


@pytest.mark.parametrize("capacity", [1, 5, 2 * EXPERTS])
def test_layers_share_a_pool(lively, offload, capacity):
    model = lively("mixtral")
    routes = Routes(copy.deepcopy(model))
    routes.model(tokens(), labels=tokens()).loss.backward()
    offloaded, store = offload(model, capacity, shared_pool=True)
    offloaded(tokens(), labels=tokens()).loss.backward()
    assert_same_gradients(routes, offloaded, store, rtol=1e-4, atol=1e-6)
    assert torch.equal(generated(offloaded, tokens()), generated(routes.model, tokens()))


def generated(model, prompt, **kwargs):
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0, **kwargs
    )


def test_generated_tokens_are_the_same(lively, name, offload):
    model = lively(name)
    prompt = tokens(1, 3) if name == AT_ONCE else tokens()
    for capacity in (6,) if name == AT_ONCE else (2, 5):
        offloaded, store = offload(model, capacity, folder=f"store-{capacity}", prefetch_next_layer=True)
        assert torch.equal(generated(offloaded, prompt), generated(model, prompt))
        assert torch.equal(generated(offloaded, prompt, num_beams=2), generated(model, prompt, num_beams=2))
        assert store.stats.prefetches > 0


def test_attending_experts_beyond_the_room_are_refused(lively, offload):
    offloaded, _ = offload(lively(AT_ONCE), 1)
    with pytest.raises(ValueError, match="experts of layer 0 at once, .* has room for 1: raise fast_capacity"):
        offloaded(tokens())


class InMemoryLazyAdamW:
    """AdamW on each expert of fused parameters on its own, which leaves alone what has no gradient."""

    def __init__(self, model, **options):
        self.modules, self.options, self.optimizers = list(find_experts(model).values()), options, {}

    def step(self, gradients):
        for (layer, expert), parts in gradients.items():
            if (layer, expert) not in self.optimizers:
                own = {part: torch.nn.Parameter(getattr(self.modules[layer], part)[expert].float()) for part in parts}
                self.optimizers[layer, expert] = own, torch.optim.AdamW(own.values(), fused=True, **self.options)
            own, optimizer = self.optimizers[layer, expert]
            for part, gradient in parts.items():
                own[part].grad = gradient.float()
            optimizer.step()
            with torch.no_grad():
                for part, weight in own.items():
                    getattr(self.modules[layer], part)[expert] = weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capacity", [EXPERTS, 3])
def test_training_is_the_same(lively, offload, capacity, dtype):
    model = lively("mixtral").to(dtype)
    offloaded, store = offload(model, capacity)
    routes = Routes(model)
    experts = {id(part) for module in find_experts(model).values() for part in module.parameters(recurse=False)}
    rest = torch.optim.AdamW([part for part in model.parameters() if id(part) not in experts], lr=0.01)
    optimizers = torch.optim.AdamW(offloaded.parameters(), lr=0.01), LazyAdamW(store, lr=0.01)
    reference = InMemoryLazyAdamW(model, lr=0.01)
    for step in range(6):
        batch = tokens(1, 3, seed=step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        rest.step()
        reference.step(routes.gradients())
        routes.used.clear()
        model.zero_grad()
        found = offloaded(batch, labels=batch).loss
        found.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if capacity == EXPERTS:
            assert torch.equal(loss, found)
        torch.testing.assert_close(loss, found, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=0)
    if capacity == EXPERTS:
        for layer, module in enumerate(reference.modules):
            for expert in range(EXPERTS):
                for part, weight in store.read_weights(layer, expert).items():
                    assert torch.equal(weight, getattr(module, part)[expert])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_trains_the_experts(lively, offload, tmp_path, accumulation):
    model = lively("mixtral")
    offloaded, store = offload(model, 3)
    before = {(layer, expert): store.read_weights(layer, expert) for layer in range(2) for expert in range(EXPERTS)}
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=10,
        learning_rate=0.01,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    optimizer = LazyAdamW(store, offloaded.parameters(), lr=0.01, max_grad_norm=1.0)
    trainer = Trainer(offloaded, arguments, train_dataset=rows, optimizers=(optimizer, None))
    first = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < 0.7 * first
    assert optimizer.param_groups[0]["updates"] == 40 // accumulation
    for key, weights in before.items():
        changed = any(not torch.equal(part, store.read_weights(*key)[name]) for name, part in weights.items())
        assert changed == (store.info(*key).step > 0)
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(again(tokens()).logits, offloaded.eval()(tokens()).logits, **rounding("mixtral"))


@pytest.mark.parametrize("capacity", [EXPERTS, 3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_accumulation(lively, offload, capacity, reentrant):
    model = lively("mixtral").train()
    offloaded, store = offload(model, capacity)
    offloaded.gradient_checkpointing_enable({"use_reentrant": reentrant})
    routes = Routes(model)
    for seed in range(3):
        for trained in (model, offloaded):
            trained(inputs_embeds=trained.get_input_embeddings()(tokens(seed=seed)), labels=tokens()).loss.backward()
    assert_same_gradients(routes, offloaded, store, rtol=1e-4, atol=1e-6)
    assert store.room(0) == store.room(1) == capacity


@pytest.mark.parametrize("capacity", [EXPERTS, 3])
def test_autocast_and_a_frozen_store(lively, offload, capacity):
    model = lively("qwen3_moe")
    offloaded, store = offload(model, capacity, training=False)
    for trained in (model, offloaded):
        with torch.autocast("cpu", torch.bfloat16):
            loss = trained(tokens(), labels=tokens()).loss
        loss.backward()
    rest = dict(model.named_parameters())
    for path, parameter in offloaded.named_parameters():
        torch.testing.assert_close(parameter.grad, rest[path].grad, rtol=1e-2, atol=1e-4)
    assert not store.gradients
    assert store.room(0) == capacity


def test_experts_of_a_forgotten_graph_may_leave(lively, offload):
    offloaded, store = offload(lively("mixtral"), EXPERTS)
    loss = offloaded(tokens(), labels=tokens()).loss
    assert store.room(0) < EXPERTS
    del loss
    assert store.room(0) == EXPERTS


@pytest.mark.parametrize("enabled", [True, False], ids=["with gradients", "without"])
def test_pass_after_one_that_failed_while_experts_arrived(lively, offload, enabled):
    offloaded, store = offload(lively("mixtral"), 2)
    experts = offloaded.model.layers[0].mlp.experts.forward
    compute = experts.forward

    def fail(*args):
        experts.forward = compute
        raise RuntimeError("interrupted")

    with torch.set_grad_enabled(enabled):
        expected = offloaded(tokens()).logits
        experts.forward = fail
        with pytest.raises(RuntimeError, match="interrupted"):
            offloaded(tokens())
        assert store.room(0) == 2
        assert torch.equal(offloaded(tokens()).logits, expected)


def test_two_forward_passes_before_one_backward_pass(lively, offload):
    model = lively("mixtral")
    offloaded, store = offload(model, 5)
    routes = Routes(model)
    for trained in (model, offloaded):
        sum(trained(tokens(1, 2, seed=seed), labels=tokens(1, 2)).loss for seed in range(2)).backward()
    assert_same_gradients(routes, offloaded, store)


def test_second_backward_pass_is_refused(lively, offload):
    offloaded, _ = offload(lively("mixtral"), EXPERTS)
    loss = offloaded(tokens(), labels=tokens()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_folder_with_experts_replaces_those_of_the_model(lively, offload):
    model = lively("mixtral")
    offloaded, store = offload(model, 3)
    store.write_weights(1, 5, {part: value.zero_() for part, value in store.read_weights(1, 5).items()})
    store.checkpoint()
    expected = offloaded(tokens()).logits
    store.close()
    again, _ = offload(model, EXPERTS)
    torch.testing.assert_close(again(tokens()).logits, expected, rtol=0, atol=0)


def test_models_that_cannot_be_offloaded_are_refused(build_mixture, tmp_path):
    config = ExpertStoreConfig(str(tmp_path))
    with pytest.raises(ValueError, match="Linear has no fused experts"):
        offload_experts(torch.nn.Linear(2, 2), config)
    model = build_mixture("mixtral")
    model.model.layers[1].mlp.experts.to(torch.bfloat16)
    with pytest.raises(ValueError, match="differ in number, size or type"):
        offload_experts(model, config)
