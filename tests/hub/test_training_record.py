"""A run is recorded as anybody could repeat it: its command, its arguments and what it measured, and no secrets."""

import json
import sys

import pytest

from mixturekit.modeling import MopConfig, MopForActionPrediction, MoreConfig, MoreForCausalLM
from mixturekit.trainers.card_figures import draw_curve, draw_expert_loads
from mixturekit.trainers.shared_card import on_hub, readable_time
from mixturekit.trainers.training_record import launch_command, load_training_record, parameter_counts


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (["--output_dir", "out"], "accelerate launch recipes/train_more.py --output_dir out"),
        (["--output_dir", "/home/me/out"], "accelerate launch recipes/train_more.py --output_dir out"),
        (["--hub_token", "hf_secret", "--seed", "1"], "accelerate launch recipes/train_more.py --seed 1"),
        (["--hub_token=hf_secret"], "accelerate launch recipes/train_more.py"),
        (["--train_tokenizer", "true"], "accelerate launch recipes/train_more.py --train_tokenizer true"),
        (
            ["--config", "/somewhere/recipes/more/quickstart.yaml", "--mop_layers", "0,8;4"],
            "accelerate launch recipes/train_more.py --config recipes/more/quickstart.yaml --mop_layers '0,8;4'",
        ),
    ],
)
def test_the_command_is_one_that_others_can_give(monkeypatch, given, command):
    monkeypatch.setattr(sys, "argv", ["/home/me/mixturekit/recipes/train_more.py", *given])
    assert launch_command() == command


@pytest.mark.parametrize(
    ("name", "is_repository"),
    [("openai/gsm8k", True), ("~/problems.jsonl", False), ("./problems", False), ("generated", False), (None, False)],
)
def test_what_lies_here_is_not_taken_for_a_repository(name, is_repository):
    assert on_hub(name) is is_repository


def test_what_is_no_recipe_has_no_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    assert launch_command() is None
    monkeypatch.setattr(sys, "argv", ["recipes/train_more.py"])
    assert launch_command(4) == "accelerate launch --num_processes 4 recipes/train_more.py"


def test_a_token_uses_as_many_experts_as_it_is_sent_to():
    model = MoreForCausalLM(MoreConfig.from_preset("debug", "base", num_experts=4, num_experts_per_tok=1))
    experts = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    counts = parameter_counts(model)
    assert counts["total"] == model.num_parameters() and counts["total"] - counts["active"] == experts * 3 // 4
    policy = MopForActionPrediction(MopConfig(layers="0,4;6,12", intermediate_dim=16, router_dim=5, mission_dim=8))
    # All of its experts take part in every step.
    assert len(set(parameter_counts(policy).values())) == 1


@pytest.mark.parametrize("system", ["more", "mop", "ppo"])
def test_the_record_has_what_the_run_measured(runs, system):
    record = load_training_record(runs[system])
    assert record["system"] == system and record["steps"] in (4, 6) and record["seconds"] > 0
    assert record["command"].startswith("accelerate launch recipes/train_")
    history = json.loads((runs[system] / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "loss" in entry][-1]
    assert record["last_log"]["loss"] == last["loss"] and record["last_log"]["step"] == last["step"]
    assert ("routing" in record) == (system != "ppo")
    if system != "ppo":
        assert all(sum(load) == pytest.approx(1) for load in record["routing"]["loads"].values())


def test_what_has_no_record_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no training_record.json"):
        load_training_record(tmp_path)


def test_a_curve_takes_two_points(tmp_path):
    history = [{"step": 1, "reward": 0.1}, {"step": 2, "kl": 0.3}, {"step": 2, "kl": 0.2}]
    assert not draw_curve(history, {"reward": "reward", "kl": "divergence"}, tmp_path / "curve.png")
    assert draw_curve([*history, {"step": 3, "reward": 0.2}], {"reward": "reward"}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_same_figures_are_the_same_picture(tmp_path):
    for name in ("one.png", "two.png"):
        draw_expert_loads({"0": [0.5, 0.5], "1": [0.2, 0.3, 0.5]}, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5678, "0.568 seconds"), (48, "48 seconds"), (600, "10 minutes"), (12_240, "3.4 hours")]
)
def test_times_are_for_people(seconds, text):
    assert readable_time(seconds) == text
