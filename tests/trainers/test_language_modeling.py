"""Training MoRE: what a run leaves behind, how it resumes, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixturekit.hub_cards import check_model_card
from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.checkpoints import MANIFEST, check_checkpoint
from mixturekit.trainers.language_modeling import load_data, train_language_model
from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
from mixturekit.trainers.language_modeling_trainer import LanguageModelingTrainer
from mixturekit.trainers.recipe_parser import parse_recipe
from mixturekit.trainers.task_data import TASK_FILE, saved_task_arguments
from mixturekit.trainers.tokenization import load_tokenizer

ROOT = Path(__file__).parents[2]
GOLDEN_LOSSES = [5.700, 5.510, 5.347, 5.259]
DATA = {"train_tokenizer": True, "vocab_size": 300, "num_examples": 400, "max_facts": 4, "max_digits": 2}


def arguments(output_dir, model=(), data=(), **training):
    """Arguments of a run of seconds: a debug model on generated tasks."""
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 2, "eval_steps": 3, "save_steps": 3,
        "use_cpu": True, "seed": 7, "disable_tqdm": True, "learning_rate": 1e-3, "warmup_steps": 2,
    }  # fmt: skip
    return (
        ModelArguments(preset="debug", **{"expert_type": "more_c", "num_recurrences": 2, **dict(model)}),
        DataArguments(**{**DATA, **dict(data)}),
        LanguageModelingConfig(output_dir=str(output_dir), **{**defaults, **training}),
    )


def history(folder, key):
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log if key in entry]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    metrics = train_language_model(*arguments(folder, max_steps=8))
    return folder, metrics


def test_the_loss_falls_and_follows_the_golden_losses(finished):
    folder, _ = finished
    torch.testing.assert_close(history(folder, "lm_loss"), GOLDEN_LOSSES, rtol=2e-2, atol=0)


def test_loss_is_the_language_modelling_loss_plus_the_weighted_balancing_loss(finished):
    folder, _ = finished
    for loss, lm_loss, aux_loss in zip(
        *(history(folder, key) for key in ("loss", "lm_loss", "aux_loss")), strict=True
    ):
        assert loss == pytest.approx(lm_loss + 0.01 * aux_loss, rel=1e-5)
        assert aux_loss >= 0.99


def test_perplexity_is_of_the_language_modelling_loss_alone(finished):
    folder, metrics = finished
    losses, perplexities = history(folder, "lm_loss"), history(folder, "perplexity")
    torch.testing.assert_close(torch.tensor(losses).exp(), torch.tensor(perplexities), rtol=1e-4, atol=0)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_evaluation_is_per_token_however_answers_and_batches_differ(finished, tmp_path, batch):
    folder, _ = finished
    _, data_arguments, config = arguments(tmp_path, per_device_eval_batch_size=batch)
    tokenizer, _, validation = load_data(data_arguments)
    lengths = {int((row["labels"] != -100).sum()) for row in validation}
    assert len(lengths) > 1
    model = MoreForCausalLM.from_pretrained(folder).eval()
    nats = labels = 0
    for row in validation:
        targets = row["labels"][1:]
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        labels += (targets != -100).sum().item()
    trainer = LanguageModelingTrainer(model=model, args=config, eval_dataset=validation, processing_class=tokenizer)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nats / labels, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-5)


def test_every_checkpoint_knows_what_its_evaluation_asks(tmp_path):
    asked = {"reverse_answer": False, "max_digits": 2, "sequence_length": 192, "validation_fraction": 0.3}
    train_language_model(*arguments(tmp_path, data=asked, max_steps=3))
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        assert asked.items() <= saved_task_arguments(folder).items()
    manifest = json.loads((tmp_path / "checkpoint-3" / MANIFEST).read_text())
    assert TASK_FILE in manifest["files"] and check_checkpoint(tmp_path / "checkpoint-3") is None


def test_tensorboard_has_the_losses_the_speed_and_the_routing_of_each_layer(finished):
    folder, _ = finished
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    names = ("loss", "lm_loss", "aux_loss", "perplexity", "learning_rate", "tokens_per_second")
    assert {f"train/{name}" for name in names} | {"eval/loss", "eval/perplexity"} <= set(tags["scalars"])
    for layer in range(2):
        for name in ("entropy", "load_balance_cv", "dead_experts", "mean_recurrence_steps"):
            assert f"routing/layer_{layer}/{name}" in tags["scalars"]
        assert f"routing/layer_{layer}/expert_load" in tags["histograms"]
    assert events.Scalars("routing/layer_0/mean_recurrence_steps")[0].value == 2


def test_a_fresh_process_loads_the_folder_and_generates(finished):
    folder, _ = finished
    script = (
        "import sys, mixturekit.modeling\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "prompt = tokenizer('Mary went to the kitchen.', return_tensors='pt')\n"
        "print(model.generate(**prompt, max_new_tokens=5, do_sample=False, num_recurrences=3).tolist())\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    model, tokenizer = MoreForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    prompt = tokenizer("Mary went to the kitchen.", return_tensors="pt")
    again = model.generate(**prompt, max_new_tokens=5, do_sample=False, num_recurrences=3)
    assert again.tolist() == json.loads(run.stdout)


def test_the_model_card_has_the_figures_of_the_run_and_code_that_runs_in_a_fresh_process(finished):
    folder, metrics = finished
    card = ModelCard.load(folder / "README.md")
    check_model_card(card)
    assert f"{metrics['eval_perplexity']:.2f}" in card.text and f"{metrics['parameters']:,}" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Mary went to the kitchen.")


@pytest.mark.parametrize("variant", ["base", "more_a", "more_b", "more_c", "more_d"])
def test_every_parameter_moves(tmp_path, variant):
    model_arguments, data_arguments, config = arguments(tmp_path, {"expert_type": variant}, max_steps=2, save_steps=2)
    tokenizer, train, _ = load_data(data_arguments)
    model = MoreForCausalLM(MoreConfig.from_preset("debug", variant, vocab_size=len(tokenizer), num_recurrences=2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config.eval_strategy = "no"
    LanguageModelingTrainer(model=model, args=config, train_dataset=train, processing_class=tokenizer).train()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"recurrence_sampling": "log_normal_poisson", "num_recurrences": 3}, id="sampled_recurrences"),
        pytest.param({"expert_type": "more_a", "state_initialization": "noise"}, id="noisy_state"),
        pytest.param({"router_balancing": "bias"}, id="bias_balancing"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, model):
    options = {"gradient_accumulation_steps": 2, "load_best_model_at_end": False}
    train_language_model(*arguments(tmp_path / "whole", model, **options))
    resumed = arguments(tmp_path / "resumed", model, **options)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "resumed" / "checkpoint-3")
    resumed[-1].resume_from_checkpoint = "last"
    train_language_model(*resumed)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert history(tmp_path / "whole", "lm_loss")[2:] == history(tmp_path / "resumed", "lm_loss")[2:]


def test_accumulated_batches_train_like_one_large_batch(tmp_path):
    train_language_model(*arguments(tmp_path / "one", per_device_train_batch_size=8, logging_steps=1))
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logging_steps": 1}
    train_language_model(*arguments(tmp_path / "four", **accumulated))
    for key in ("lm_loss", "aux_loss", "loss"):
        torch.testing.assert_close(history(tmp_path / "one", key), history(tmp_path / "four", key), rtol=1e-3, atol=0)


def test_two_processes_train_like_one_with_twice_the_batch(tmp_path):
    def run(folder, batch, *launcher):
        options = {"preset": "debug", "expert_type": "more_c", "num_recurrences": 2, "train_tokenizer": True}
        options |= {"vocab_size": 300, "num_examples": 200, "max_facts": 4, "max_digits": 2, "max_steps": 4}
        options |= {"logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "use_cpu": True, "seed": 7}
        options |= {"output_dir": tmp_path / folder, "per_device_train_batch_size": batch}
        # The last batch of two processes has one example and fifteen that fill it up.
        options |= {"num_validation_examples": 17, "per_device_eval_batch_size": 8}
        flags = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, *launcher, str(ROOT / "recipes" / "train_more.py"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    run("one", 8)
    run("two", 4, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611")
    for key in ("lm_loss", "aux_loss"):
        torch.testing.assert_close(history(tmp_path / "one", key), history(tmp_path / "two", key), rtol=1e-3, atol=0)
    one, two = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    # One process writes, what all have counted.
    files = [list((tmp_path / folder).rglob("events.out.tfevents.*")) for folder in ("one", "two")]
    assert len(files[0]) == len(files[1])
    routing = []
    for folder in ("one", "two"):
        (run,) = (tmp_path / folder / "runs").iterdir()
        events = EventAccumulator(str(run)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("routing/")]
        routing.append({tag: [event.value for event in events.Scalars(tag)] for tag in tags})
    assert len(routing[0]) == 2 * 4
    for tag, values in routing[0].items():
        torch.testing.assert_close(routing[1][tag], values, rtol=1e-3, atol=1e-5, msg=tag)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    model_arguments, data_arguments, config = arguments(tmp_path, save_steps=1, max_steps=5)
    tokenizer, train, _ = load_data(data_arguments)

    class Poisoned(LanguageModelingTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 2:
                self.model.model.norm.weight.data.fill_(float("nan"))
            return super().training_step(model, inputs, num_items_in_batch)

    config.eval_strategy = "no"
    model = MoreForCausalLM(MoreConfig.from_preset("debug", vocab_size=len(tokenizer)))
    trainer = Poisoned(model=model, args=config, train_dataset=train, processing_class=tokenizer)
    with pytest.raises(
        FloatingPointError, match=r"the loss of step 3 is nan; the last good checkpoint is .*checkpoint-2"
    ):
        trainer.train()
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path):
    model_arguments, data_arguments, config = arguments(
        tmp_path, save_steps=1, max_steps=2, learning_rate=float("inf")
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        train_language_model(model_arguments, data_arguments, config)
    assert not (tmp_path / "config.json").exists()


def test_weight_decay_is_for_matrices_only(tmp_path):
    model_arguments, data_arguments, config = arguments(tmp_path)
    tokenizer, train, _ = load_data(data_arguments)
    preset = MoreConfig.from_preset("debug", "more_a", vocab_size=len(tokenizer), state_initialization="learned")
    config.eval_strategy = "no"
    trainer = LanguageModelingTrainer(model=MoreForCausalLM(preset), args=config, processing_class=tokenizer)
    decayed = {
        name.rsplit(".", 1)[-1] if "experts" in name else name
        for name in trainer.get_decay_parameter_names(trainer.model)
    }
    assert {"qkv_proj", "adapter_state", "down_proj", "model.embed_tokens.weight"} <= decayed
    assert not [name for name in decayed if "norm" in name or "initial_state" in name]


BAD_INPUT = {
    "unknown_expert_type": ({"expert_type": "more_z"}, {}, {}, "`expert_type` is 'more_z'; choose one of base"),
    "too_many_experts_per_token": ({"num_experts_per_tok": 9}, {}, {}, "`num_experts_per_tok` is 9; it must"),
    "zero_recurrences": ({"num_recurrences": 0}, {}, {}, "`num_recurrences` is 0"),
    "unknown_preset": ({"preset": "huge"}, {}, {}, "Unknown preset 'huge'; choose one of debug, tiny"),
    "missing_data": ({}, {"dataset_name": "./nowhere.txt"}, {}, "nowhere.txt"),
    "too_long": ({}, {"sequence_length": 2049}, {}, "sequence_length is 2049: the model takes 2048 tokens at most"),
    "no_tokenizer": ({}, {"train_tokenizer": False}, {}, "No tokenizer"),
    "nothing_to_resume": ({}, {}, {"resume_from_checkpoint": "last"}, "No checkpoint to resume"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_clear_sentence(tmp_path, case):
    model, data, training, message = BAD_INPUT[case]
    run = arguments(
        tmp_path / "out", {name: value for name, value in model.items() if name != "preset"}, data, **training
    )
    run[0].preset = model.get("preset", "debug")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train_language_model(*run)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_data_set_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty"):
        train_language_model(*arguments(tmp_path / "out", data={"dataset_name": str(tmp_path / "empty.txt")}))


def test_a_finished_run_is_never_overwritten_silently(finished):
    folder, _ = finished
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run; choose another --output_dir"):
        train_language_model(*arguments(folder))
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_vocabulary_that_does_not_fit_the_tokenizer_is_refused(finished, tmp_path):
    folder, _ = finished
    run = arguments(
        tmp_path / "out", data={"train_tokenizer": False, "tokenizer_name_or_path": str(folder), "vocab_size": 20}
    )
    with pytest.raises(ValueError, match="The tokenizer has [0-9]+ tokens but the model's vocabulary only 20"):
        train_language_model(*run)


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path):
    folder, _ = finished
    data = {"train_tokenizer": False, "tokenizer_name_or_path": str(folder)}
    with pytest.raises(ValueError, match="has expert_type=more_c, which more_a cannot replace"):
        train_language_model(
            *arguments(tmp_path / "a", {"expert_type": "more_a", "model_name_or_path": str(folder)}, data)
        )
    with pytest.raises(ValueError, match="expert_type=more_c there, more_d here"):
        run = arguments(tmp_path / "b", {"expert_type": "more_d"}, data)
        run[-1].resume_from_checkpoint = str(folder / "checkpoint-6")
        train_language_model(*run)


def test_training_continues_from_a_checkpoint_with_another_number_of_recurrences(finished, tmp_path):
    folder, metrics = finished
    data = {"train_tokenizer": False}
    options = {"expert_type": "base", "model_name_or_path": str(folder), "num_recurrences": 3}
    continued = train_language_model(*arguments(tmp_path, options, data))
    assert continued["eval_loss"] < metrics["eval_loss"]
    assert MoreConfig.from_pretrained(tmp_path).num_recurrences == 3


def test_text_is_trained_on_with_its_last_documents_held_out(tmp_path):
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text(f"Document {index} says that water is wet.\n" * 40)
    metrics = train_language_model(
        *arguments(tmp_path / "out", data={"dataset_name": str(tmp_path), "sequence_length": 32})
    )
    assert metrics["eval_loss"] < 5.5


def test_options_override_the_file_and_unknown_keys_are_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("expert_type: more_b\nlearning_rate: 1e-4\nmax_steps: 5\n")
    types = (ModelArguments, DataArguments, LanguageModelingConfig)
    model, _, config = parse_recipe(types, ["--config", str(file), "--max_steps", "9", "--use_cpu"])
    assert (model.expert_type, config.learning_rate, config.max_steps) == ("more_b", 1e-4, 9)
    file.write_text("expert_typ: more_b\n")
    with pytest.raises(ValueError, match="unknown options: expert_typ"):
        parse_recipe(types, [f"--config={file}"])


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "more").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_parses(file):
    types = (ModelArguments, DataArguments, LanguageModelingConfig)
    model, _, _ = parse_recipe(types, ["--config", str(file), "--use_cpu", "true", "--bf16", "false"])
    MoreConfig.from_preset(model.preset, model.expert_type, model.match)
    assert len(file.read_text().splitlines()) <= 60
