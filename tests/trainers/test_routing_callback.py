import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard import data_compat
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.util import tensor_util
from torch.utils.data import Dataset
from torch.utils.tensorboard.summary import histogram_raw
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils

from mixturekit.modeling.routing_statistics import Routing
from mixturekit.trainers.routing_callback import RoutingCallback, RoutingWindow, write_load_histogram

TINY = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    pad_token_id=0,
)


class PaddedRows(Dataset):
    """Row `i` has 3 to 8 tokens, padded to 8 on the right."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        length = 3 + i % 6
        ids = torch.randint(1, 32, (8,), generator=torch.Generator().manual_seed(i))
        mask = (torch.arange(8) < length).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


class RecordingTrainer(Trainer):
    """Keeps what the routers of each training batch return, computed apart from any hook of the callback."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorded = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        with torch.no_grad():
            model.eval()
            logits = model.model(**{k: v for k, v in inputs.items() if k != "labels"}, output_router_logits=True)
            model.train()
        self.recorded.append((inputs["attention_mask"].flatten().bool(), logits.router_logits))
        return super().training_step(model, inputs, num_items_in_batch)


def mixtral(num_experts=4):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=num_experts))
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.normal_(0, 1)
    return model


def make_trainer(output_dir, model=None, trainer_class=Trainer, **kwargs):
    args = dict(
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        report_to=["tensorboard"],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    return trainer_class(
        model=model or mixtral(),
        args=TrainingArguments(output_dir=str(output_dir), **args | kwargs),
        train_dataset=PaddedRows(),
        eval_dataset=PaddedRows(),
    )


def train(output_dir, **kwargs):
    trainer = make_trainer(output_dir, **kwargs)
    trainer.add_callback(RoutingCallback(trainer))
    trainer.train()
    return trainer


def events(output_dir):
    (run,) = (Path(output_dir) / "runs").iterdir()
    assert len(list(run.iterdir())) == 1, "the metrics must be in the Trainer's own event file"
    return EventAccumulator(str(run)).Reload()


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def expected_statistics(recorded, layer, num_experts=4):
    """Straight from the definitions, by loops and boolean indexing."""
    logits = torch.cat([router_logits[layer][mask] for mask, router_logits in recorded]).double()
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(2).indices.flatten().tolist()
    load = torch.tensor([chosen.count(e) / len(chosen) for e in range(num_experts)], dtype=torch.float64)
    mean = 1 / num_experts
    return {
        "load": load.tolist(),
        "entropy": -(probabilities * probabilities.log()).sum(-1).mean().item(),
        "load_balance_cv": (((load - mean) ** 2).mean().sqrt() / mean).item(),
        "dead_experts": sum(chosen.count(e) == 0 for e in range(num_experts)),
    }


def test_metrics_equal_an_independent_computation(tmp_path):
    # Evaluation inside a window, accumulation, checkpointing: none of them may change what is counted.
    model = mixtral()
    model.gradient_checkpointing_enable()
    trainer = train(
        tmp_path,
        model=model,
        trainer_class=RecordingTrainer,
        max_steps=5,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    accumulator = events(tmp_path)
    # Steps 2, 4, and the last half of a window at 5; two batches a step.
    windows = {2: trainer.recorded[0:4], 4: trainer.recorded[4:8], 5: trainer.recorded[8:10]}
    for layer in (0, 1):
        for name in ("entropy", "load_balance_cv", "dead_experts"):
            written = {e.step: e.value for e in accumulator.Scalars(f"routing/layer_{layer}/{name}")}
            expected = {step: expected_statistics(recorded, layer)[name] for step, recorded in windows.items()}
            assert written == pytest.approx(expected, rel=1e-4)
        for event in accumulator.Histograms(f"routing/layer_{layer}/expert_load"):
            expected = expected_statistics(windows[event.step], layer)["load"]
            assert event.histogram_value.bucket == pytest.approx(expected)
            assert event.histogram_value.bucket_limit == [0.5, 1.5, 2.5, 3.5]
    assert trainer.callback_handler.callbacks[-1].metrics["routing/layer_1/entropy"] == pytest.approx(
        expected_statistics(windows[5], 1)["entropy"], rel=1e-4
    )
    assert not any("mean_recurrence_steps" in tag for tag in accumulator.Tags()["scalars"])


def test_a_run_without_the_callback_gives_the_same_losses(tmp_path):
    with_callback = train(tmp_path / "with")
    without = make_trainer(tmp_path / "without")
    without.train()

    def losses(trainer):
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    assert losses(with_callback) == losses(without)
    assert not any("routing" in key for log in with_callback.state.log_history for key in log)


@pytest.fixture
def collapsed():
    """A model whose first router sends all tokens to the experts 1 and 4."""
    model = mixtral(num_experts=6)
    gate = model.model.layers[0].mlp.gate

    def route_to_1_and_4(hidden_states, forward=gate.forward):
        logits, weights, indices = forward(hidden_states)
        return logits, weights, torch.tensor([1, 4]).expand_as(indices)

    gate.forward = route_to_1_and_4
    return model


def test_router_that_sends_all_tokens_to_the_same_experts_is_warned_of_once(tmp_path, collapsed, caplog):
    train(tmp_path, model=collapsed, report_to=[])
    warnings = [record.message for record in caplog.records if "dead_experts" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("routing/layer_0/dead_experts is 4 of 6 at step 2: the router chooses the same")


def test_dead_experts_leave_their_buckets_empty(tmp_path, collapsed):
    train(tmp_path, model=collapsed)
    accumulator = events(tmp_path)
    assert [e.value for e in accumulator.Scalars("routing/layer_0/dead_experts")] == [4, 4]
    assert [e.value for e in accumulator.Scalars("routing/layer_0/load_balance_cv")] == pytest.approx([2**0.5] * 2)
    histogram = accumulator.Histograms("routing/layer_0/expert_load")[0].histogram_value
    assert histogram.bucket == [0, 0.5, 0, 0, 0.5, 0]
    # TensorBoard drops the empty ends and lets min and max stand for the outer edges of what is left.
    assert (histogram.min, histogram.max) == (0.5, 4.5)


def test_tensorboard_shows_one_bucket_per_expert():
    class Writer:
        def add_histogram_raw(self, tag, global_step, **kwargs):
            self.summary = histogram_raw(tag, **kwargs)

    writer = Writer()
    write_load_histogram(writer, "load", torch.tensor([0, 3, 0, 1, 0]), step=1)
    value = Summary.FromString(writer.summary.SerializeToString()).value[0]
    shown = tensor_util.make_ndarray(data_compat.migrate_value(value).tensor)
    assert shown.tolist() == [[0.5, 1.5, 0.75], [1.5, 2.5, 0], [2.5, 3.5, 0.25]]


def test_recurrence_steps_are_averaged_over_tokens_and_slots():
    window = RoutingWindow("softmax")
    mask = torch.tensor([True, True, False])
    logits = torch.randn(3, 4)
    weights, indices = logits.softmax(-1).topk(2)
    for steps in ([[1, 2], [3, 4], [9, 9]], [[4, 4], [4, 4], [9, 9]]):
        window.add_routing(3, Routing(logits, weights, indices, mask))
        window.add_steps(3, torch.tensor(steps), mask)

    class OneProcess:
        args = type("args", (), {"device": "cpu"})
        accelerator = type("accelerator", (), {"reduce": staticmethod(lambda tensor, reduction: tensor)})

    scalars = window.reduce(OneProcess)[3].scalars()
    assert scalars["mean_recurrence_steps"] == (1 + 2 + 3 + 4 + 4 * 4) / 8
    window.reset()
    assert window.reduce(OneProcess) == {}


def test_sigmoid_routers_are_recognised(tmp_path):
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **TINY,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    )
    model.model.layers[1].mlp.gate.weight.data.normal_(0, 1)
    trainer = train(tmp_path, model=model, trainer_class=RecordingTrainer)
    written = [e.value for e in events(tmp_path).Scalars("routing/layer_1/entropy")]
    for value, recorded in zip(written, (trainer.recorded[:2], trainer.recorded[2:]), strict=True):
        scores = torch.cat([logits[0][mask] for mask, logits in recorded]).sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
        assert value == pytest.approx(-(probabilities * probabilities.log()).sum(-1).mean().item(), rel=1e-4)


def test_other_trackers_receive_the_scalars(tmp_path, monkeypatch):
    class Tracker(TrainerCallback):
        logs = []

        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            self.logs.append((state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    train(tmp_path, report_to=["tensorboard", "trackio"])
    routing = [(step, logs) for step, logs in Tracker.logs if "routing/layer_0/entropy" in logs]
    assert [step for step, _ in routing] == [2, 4]
    assert set(routing[0][1]) == {
        f"routing/layer_{layer}/{name}" for layer in (0, 1) for name in ("entropy", "load_balance_cv", "dead_experts")
    }
    # TensorBoard has each name once, without the prefix.
    assert not any(tag.startswith("train/routing") for tag in events(tmp_path).Tags()["scalars"])


def test_runs_without_tensorboard(tmp_path):
    trainer = train(tmp_path, report_to="none")
    assert trainer.callback_handler.callbacks[-1].metrics["routing/layer_0/entropy"] > 0


def test_hooks_are_removed_after_training_and_on_detach(tmp_path):
    trainer = make_trainer(tmp_path)
    before = num_hooks(trainer.model)
    callback = RoutingCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert num_hooks(trainer.model) == before

    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    trainer.compute_loss = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            trainer.train()
    # Two routers, and the forward of their model before and after: once, though two trainings failed.
    assert num_hooks(trainer.model) == before + 4
    callback.detach()
    assert num_hooks(trainer.model) == before


def test_hooks_go_with_a_trainer_that_failed(tmp_path):
    model = mixtral()

    def run():
        trainer = make_trainer(tmp_path, model=model, max_steps=1)
        trainer.add_callback(RoutingCallback(trainer))
        trainer.compute_loss = None
        with pytest.raises(TypeError):
            trainer.train()

    run()
    gc.collect()
    assert num_hooks(model) == 0


def test_a_dense_model_is_refused(tmp_path):
    dense = {k: v for k, v in TINY.items() if k != "num_experts_per_tok"}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router"):
        train(tmp_path, model=LlamaForCausalLM(LlamaConfig(**dense)))


def test_two_processes_are_summed(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # What torchrun would set, without waiting for a third Python to start.
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    accumulator = events(tmp_path)
    recorded = [torch.load(tmp_path / f"recorded_{rank}.pt") for rank in (0, 1)]
    seen = [json.loads((tmp_path / f"metrics_{rank}.json").read_text()) for rank in (0, 1)]
    both = [batch for process in recorded for batch in process]
    expected = expected_statistics(both, 0)
    assert seen[0]["routing/layer_0/entropy"] == pytest.approx(expected["entropy"], rel=1e-4) and seen[1] == {}
    histogram = accumulator.Histograms("routing/layer_0/expert_load")[0].histogram_value
    assert histogram.bucket == pytest.approx(expected["load"])


def train_one_of_two_processes(output_dir):
    class Recording(RecordingTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            with torch.no_grad():
                body = model.module.eval().model
                outputs = body(inputs["input_ids"], inputs["attention_mask"], output_router_logits=True)
            model.train()
            self.recorded.append((inputs["attention_mask"].flatten().bool(), outputs.router_logits))
            return Trainer.training_step(self, model, inputs, num_items_in_batch)

    trainer = train(output_dir, trainer_class=Recording, max_steps=1, logging_steps=1)
    rank = trainer.args.process_index
    torch.save(trainer.recorded, Path(output_dir) / f"recorded_{rank}.pt")
    (Path(output_dir) / f"metrics_{rank}.json").write_text(json.dumps(trainer.callback_handler.callbacks[-1].metrics))


if __name__ == "__main__":
    train_one_of_two_processes(sys.argv[1])
