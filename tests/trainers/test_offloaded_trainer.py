"""A Trainer whose model has its experts in a store learns what one with all in memory learns, and resumes exactly."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from mixturekit.modeling import ExpertStoreConfig, initialize_offloaded, offload_experts
from mixturekit.trainers.offloaded_trainer import EXPERTS, REST, OffloadedTrainer

CONFIG = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=True,
)  # fmt: skip
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (16, 6), generator=torch.manual_seed(0))]


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


@pytest.fixture
def build(tmp_path):
    """A trainer of a copy of one model, with its experts in a store of its own."""
    torch.manual_seed(0)
    model, stores = MixtralForCausalLM(CONFIG), []

    def build(folder, capacity=3, **options):
        offloaded = copy.deepcopy(model)
        config = ExpertStoreConfig(str(tmp_path / f"store-{len(stores)}"), fast_capacity=capacity, ram_capacity=2)
        stores.append(offload_experts(offloaded, config))
        return OffloadedTrainer(
            offloaded, arguments(tmp_path / folder, **options), train_dataset=ROWS, eval_dataset=ROWS, store=stores[-1]
        )

    build.model = model
    yield build
    for store in stores:
        store.close()


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_model(trainer, other):
    rest = dict(other.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, rest[name]), name
    for layer in range(2):
        for expert in range(8):
            weights = other.store.read_weights(layer, expert)
            for name, weight in trainer.store.read_weights(layer, expert).items():
                assert torch.equal(weight, weights[name]), (layer, expert, name)
            assert trainer.store.info(layer, expert).step == other.store.info(layer, expert).step


@pytest.mark.parametrize("accumulation", [1, 2])
def test_first_steps_are_those_of_experts_in_memory(build, tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 3}
    # So many tokens that each expert has some, because AdamW in memory moves also experts that have none.
    options |= {"per_device_train_batch_size": 8, "learning_rate": 1e-3}
    reference = Trainer(copy.deepcopy(build.model), arguments(tmp_path / "memory", **options), train_dataset=ROWS)
    reference.train()
    offloaded = build("offloaded", **options)
    offloaded.train()
    assert all(offloaded.store.info(layer, expert).step == 3 for layer in range(2) for expert in range(8))
    for name in ("loss", "grad_norm"):
        assert logged(offloaded, name) == pytest.approx(logged(reference, name), rel=1e-4)
    rest = dict(reference.model.named_parameters())
    for name, parameter in offloaded.model.named_parameters():
        torch.testing.assert_close(parameter, rest[name], rtol=1e-3, atol=1e-5)
    for layer, block in enumerate(reference.model.model.layers):
        for expert in range(8):
            for name, weight in offloaded.store.read_weights(layer, expert).items():
                torch.testing.assert_close(weight, getattr(block.mlp.experts, name)[expert], rtol=1e-3, atol=1e-5)


def test_resumed_run_equals_the_uninterrupted_one(build):
    straight = build("straight")
    straight.train()
    stopped = build("stopped", save_strategy="steps", save_steps=2, save_total_limit=2)
    stopped.train()
    assert_same_model(stopped, straight)
    checkpoint = f"{stopped.args.output_dir}/checkpoint-4"
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same_model(resumed, straight)
    # Wherever the experts are kept meanwhile.
    elsewhere = build("elsewhere", capacity=8)
    elsewhere.train(resume_from_checkpoint=checkpoint)
    assert logged(elsewhere, "loss") == pytest.approx(logged(straight, "loss"), rel=1e-5)


def test_checkpoints_are_ordinary_models_with_records_beside_them(build, tmp_path):
    trainer = build("run", save_strategy="steps", save_steps=3)
    trainer.train()
    saved = tmp_path / "run" / "checkpoint-6"
    assert {EXPERTS, REST, "config.json", "trainer_state.json", "optimizer.pt"} <= {
        path.name for path in saved.iterdir()
    }
    assert json.loads((saved / EXPERTS / "manifest.json").read_text())["metadata"] == {"step": 6}
    batch = torch.stack([row["input_ids"] for row in ROWS])
    expected = trainer.model.eval()(batch).logits
    torch.testing.assert_close(MixtralForCausalLM.from_pretrained(saved)(batch).logits, expected)


def test_best_model_has_its_own_experts(build):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    # The worst in truth, which is not the last.
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = build("run", **options, load_best_model_at_end=True)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses[-1] < max(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)


def test_without_a_store_experts_that_are_saved_one_by_one_come_back_fused(build, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    # The worst in truth, which is not the last.
    options |= {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    train = lambda folder, **more: OffloadedTrainer(  # noqa: E731
        copy.deepcopy(build.model), arguments(tmp_path / folder, **options | more), train_dataset=ROWS,
        eval_dataset=ROWS,
    )  # fmt: skip
    straight = train("run")
    straight.train()
    assert straight.state.best_model_checkpoint.endswith("checkpoint-2")
    assert straight.evaluate()["eval_loss"] == pytest.approx(max(logged(straight, "eval_loss")), rel=1e-5)
    last, resumed = (train(name, load_best_model_at_end=False) for name in ("last", "resumed"))
    last.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, value in last.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_checkpoint_without_some_weights_is_no_checkpoint(build, tmp_path):
    OffloadedTrainer(
        copy.deepcopy(build.model),
        arguments(tmp_path / "run", save_strategy="steps", save_steps=6),
        train_dataset=ROWS,
    ).train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    weights = load_file(checkpoint / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "layers.1" not in name}
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    trainer = OffloadedTrainer(copy.deepcopy(build.model), arguments(tmp_path / "other"), train_dataset=ROWS)
    with pytest.raises(ValueError, match=r"checkpoint-6 lacks \d+ weights of this model, such as model.layers.1."):
        trainer._load_from_checkpoint(str(checkpoint))


def test_experts_decay_by_the_rule_for_those_in_memory(build):
    trainer = build("run")
    trainer.get_decay_parameter_names = lambda model: [
        name for name, _ in model.named_parameters() if name.endswith("gate_up_proj")
    ]
    experts, decayed, rest = trainer.create_optimizer().param_groups
    assert experts["no_decay"] == ["down_proj"]
    assert experts["weight_decay"] == 0.1
    assert (decayed["params"], decayed["weight_decay"]) == ([], 0.1)
    assert (len(rest["params"]), rest["weight_decay"]) == (len(list(trainer.model.parameters())), 0.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optim": "adafactor"}, "trained by AdamW, not by optim=.*adafactor"),
        ({"save_only_model": True, "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
         "set save_only_model=False"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build("run", **options).train()


def test_checkpoint_of_another_run_is_refused(build, tmp_path):
    options = arguments(tmp_path / "memory", save_strategy="steps", save_steps=3)
    OffloadedTrainer(copy.deepcopy(build.model), options, train_dataset=ROWS).train()
    with pytest.raises(ValueError, match="checkpoint-3 is of a model with other parameters"):
        build("run").train(resume_from_checkpoint=str(tmp_path / "memory" / "checkpoint-3"))


def test_new_model_is_drawn_into_the_store(tmp_path):
    """One layer at a time, from the distributions that transformers draws from."""
    torch.manual_seed(0)
    model, store = initialize_offloaded(CONFIG, ExpertStoreConfig(str(tmp_path), fast_capacity=3))
    with store:
        assert not any(part.is_meta for part in [*model.parameters(), *model.buffers()])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.num_parameters() == MixtralForCausalLM(CONFIG).num_parameters()
        weights = [store.read_weights(layer, expert) for layer in range(2) for expert in range(8)]
        drawn = torch.cat([part.flatten() for parts in weights for part in parts.values()])
        assert drawn.mean().abs() < 1e-3
        assert drawn.std().item() == pytest.approx(CONFIG.initializer_range, rel=0.02)
        assert len({part.sum().item() for parts in weights for part in parts.values()}) == 32
        reference = dict(MixtralForCausalLM(CONFIG).named_buffers())
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, reference[name])


def test_hooks_of_trainer_are_there():
    """What [`OffloadedTrainer`] overrides, so that another version of transformers fails here first."""
    loading = ("_load_from_checkpoint", "_load_best_model", "_save_optimizer_and_scheduler")
    for name in ("_clip_grad_norm", "_get_grad_norm", *loading):
        assert callable(getattr(Trainer, name)), name
