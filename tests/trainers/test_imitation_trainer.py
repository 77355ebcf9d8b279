"""Imitation of BabyAI's bot: what acts is what learns, and a resumed run is the run that was never stopped."""

import inspect
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer

from mixturekit.hub_cards import check_model_card
from mixturekit.modeling import MopConfig, MopForActionPrediction
from mixturekit.trainers import imitation_trainer
from mixturekit.trainers.babyai import IGNORED_LABEL, BabyAIEnvironments
from mixturekit.trainers.imitation import load_policy_config, load_source, train_policy
from mixturekit.trainers.imitation_config import EnvironmentArguments, ImitationConfig, PolicyArguments
from mixturekit.trainers.imitation_trainer import ImitationTrainer, save_source, unroll_inputs
from mixturekit.trainers.unroll_sources import DaggerSource, RecentEpisodes

LEVEL, OTHER = "BabyAI-GoToRedBall-v0", "BabyAI-GoToLocal-v0"
TINY = {"layers": "0,8;4,8", "intermediate_dim": 16, "router_dim": 4, "mission_dim": 8, "word_dim": 4}


def small_policy(seed=0, **changes):
    torch.manual_seed(seed)
    return MopForActionPrediction(MopConfig(**{**TINY, **changes}))


def dagger_source(levels=(LEVEL,), num_envs=4, unroll_len=8, seed=3, **changes):
    return DaggerSource(BabyAIEnvironments(list(levels), num_envs, seed), unroll_len, seed=seed, **changes)


def configuration(folder, **changes):
    options = {"output_dir": str(folder), "max_steps": 6, "logging_steps": 2, "eval_strategy": "no", "use_cpu": True}
    return ImitationConfig(**{**options, "report_to": ["none"], "disable_tqdm": True, **changes})


def environments(folder, **changes):
    options = {"env_id": [LEVEL], "num_envs": 4, "unroll_len": 8, "eval_episodes": 4, "num_demonstrations": 12}
    return EnvironmentArguments(**{**options, "cache_dir": str(Path(folder).parent / "cache"), **changes})


def trainer_in(folder, policy_changes=None, environment_changes=None, **changes):
    arguments, config = environments(folder, **(environment_changes or {})), configuration(folder, **changes)
    policy = small_policy(num_tasks=len(arguments.env_id), **(policy_changes or {}))
    return ImitationTrainer(policy, config, load_source(arguments, config), arguments)


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


# What acts


def test_the_student_acts_by_the_logits_that_the_update_then_sees():
    policy = small_policy()
    source = dagger_source(beta_start=0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-2, fused=True)
    reference = BabyAIEnvironments([LEVEL], 4, 3)
    observations = reference.reset()
    for _ in range(3):
        unroll, start = source.next_unroll(policy)
        outputs = policy(**unroll_inputs(unroll, policy), state=start)
        actions = outputs.logits.argmax(-1).numpy()
        for step in range(8):
            assert (unroll.images[:, step] == observations.images).all()
            assert (unroll.labels[:, step] == reference.expert_actions()).all()
            named = [unroll.missions[index] for index in unroll.mission_index[:, step]]
            assert named == observations.missions
            observations, *_ = reference.step(actions[:, step])
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_state_goes_on_from_one_unroll_to_the_next():
    policy = small_policy().eval()
    source = dagger_source()
    first, start = source.next_unroll(policy)
    assert first.reset_mask[:, 0].all() and not first.reset_mask[:, 1:].all()
    after = policy(**unroll_inputs(first, policy), state=start).state
    _, following = source.next_unroll(policy)
    for ours, theirs in zip(after.blocks, following.blocks, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_reset_comes_where_an_episode_has_ended():
    policy, source = small_policy(), dagger_source(beta_start=1.0)
    ended = []
    step = source.environments.step
    source.environments.step = lambda actions: ended.append((result := step(actions))[2]) or result
    unrolls = [source.next_unroll(policy)[0] for _ in range(4)]
    masks = np.concatenate([unroll.reset_mask for unroll in unrolls], axis=1)
    assert masks[:, 0].all()
    assert (masks[:, 1:] == np.stack(ended[:-1], axis=1)).all()
    assert masks[:, 1:].any()


def test_nothing_is_dropped_in_the_policy_that_acts():
    unrolls = []
    for seed in (1, 2):
        policy, source = small_policy(expert_dropout_max_prob=1.0), dagger_source(beta_start=0.0)
        torch.manual_seed(seed)
        policy.train()
        unrolls.append(source.next_unroll(policy)[0])
        assert policy.training
    assert (unrolls[0].images == unrolls[1].images).all()


def test_beta_falls_linearly_and_then_the_student_is_alone():
    policy, source = small_policy(), dagger_source(beta_start=0.8, beta_unrolls=4)
    betas = []
    for _ in range(6):
        betas.append(source.beta)
        source.next_unroll(policy)
    assert betas == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    assert dagger_source(beta_start=0.8, beta_unrolls=0).beta == 0


def test_with_beta_one_the_bot_plays_and_solves_all_in_its_own_time():
    source = dagger_source(num_envs=8, unroll_len=100, beta_start=1.0, beta_unrolls=math.inf)
    source.next_unroll(small_policy())
    figures = source.metrics()
    assert figures["success"] == 1
    assert figures["length_ratio"] == pytest.approx(1, abs=0.3)


def test_sampled_actions_follow_the_policy_and_repeat_with_the_seed():
    policy = small_policy()
    with torch.no_grad():
        policy.action_head.weight.zero_()
        policy.action_head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -30, -30, -30, -30]))
    sources = [dagger_source(num_envs=8, unroll_len=32, beta_start=0, sample=True) for _ in range(2)]
    one, two = (source.next_unroll(policy)[0] for source in sources)
    assert (one.images == two.images).all()
    assert len(np.unique(one.directions)) > 1
    other = dagger_source(num_envs=8, unroll_len=32, beta_start=0, sample=True)
    other.seed += 1
    assert (other.next_unroll(policy)[0].images != one.images).any()


def test_recent_episodes_count_by_level_and_leave_out_what_the_bot_broke_off():
    source = dagger_source((LEVEL, OTHER), num_envs=4, unroll_len=64, beta_start=1.0, beta_unrolls=math.inf)
    source.next_unroll(small_policy())
    figures = source.metrics()
    assert {f"success/{LEVEL}", f"success/{OTHER}", "length_ratio", f"length_ratio/{LEVEL}"} <= set(figures)
    recent = RecentEpisodes([LEVEL])
    assert recent.metrics() == {}


# What learns


@pytest.mark.parametrize("algorithm", ["bc", "dagger"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, cache, algorithm):
    noise = {"expert_dropout_max_prob": 0.8, "expert_dropout_threshold": 0.9}
    acting = {"algorithm": algorithm, "student_acting": "sampled", "dagger_beta_start": 0.5, "dagger_beta_steps": 4}
    options = {"save_steps": 3, "policy_changes": noise, "environment_changes": acting}
    whole = trainer_in(tmp_path / "whole", **options)
    whole.train()
    stopped = tmp_path / "whole" / "checkpoint-3"
    kept = tmp_path / "stopped" / "checkpoint-3"
    shutil.copytree(stopped, kept)
    resumed = trainer_in(tmp_path / "stopped", **{**options, "policy_changes": {**noise, "seed": 7}})
    resumed.train(resume_from_checkpoint=str(kept))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    ours, theirs = (
        [entry for entry in trainer.state.log_history if entry["step"] > 4 and "loss" in entry]
        for trainer in (whole, resumed)
    )
    for mine, its in zip(ours, theirs, strict=True):
        del mine["frames_per_second"], its["frames_per_second"]
        assert mine == its


def test_what_a_run_resumes_from_is_whole_and_free_of_pickles(tmp_path):
    source = dagger_source()
    source.next_unroll(small_policy())
    save_source(source, tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environments_1.json", "environments_1.safetensors"]


def test_a_checkpoint_without_environments_cannot_be_resumed(tmp_path):
    trainer_in(tmp_path / "whole", save_steps=3).train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (checkpoint / "environments_0.json").unlink()
    with pytest.raises(FileNotFoundError, match="no environments of process 0"):
        imitation_trainer.load_source(dagger_source(), small_policy(), checkpoint, 0)


@pytest.mark.parametrize("algorithm", ["bc", "dagger"])
def test_every_parameter_learns_and_the_policy_comes_to_agree_with_the_bot(tmp_path, cache, algorithm):
    acting = {"algorithm": algorithm, "num_envs": 8, "dagger_beta_steps": 1000}
    trainer = trainer_in(
        tmp_path / "run", environment_changes=acting, max_steps=40, logging_steps=5, learning_rate=1e-2
    )
    before = weights(trainer)
    trainer.train()
    for name, value in weights(trainer).items():
        assert not torch.equal(value, before[name]), name
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["agreement"] > logs[0]["agreement"] + 0.1
    assert logs[-1]["action_loss"] < logs[0]["action_loss"] - 0.3
    assert logs[-1]["frames"] == 40 * 8 * 8


def test_the_log_names_losses_agreement_success_and_speed(tmp_path):
    trainer = trainer_in(
        tmp_path, {"routing_cost_coef": 0.1}, {"env_id": [LEVEL, OTHER], "unroll_len": 32}, report_to=["tensorboard"]
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert logged >= {
        "loss", "action_loss", "routing_cost", "agreement", "success", f"success/{LEVEL}", "length_ratio", "frames",
        "frames_per_second", "bot_failures", "dagger_beta", "grad_norm", "learning_rate",
    }  # fmt: skip
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert last["loss"] > last["action_loss"] and 0 < last["routing_cost"] < 1 and 0 < last["agreement"] < 1
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    for layer in range(2):
        assert {f"routing/layer_{layer}/entropy", f"routing/layer_{layer}/usage_cost"} <= set(events.scalars.Keys())
        assert f"routing/layer_{layer}/expert_load" in events.histograms.Keys()
        assert 0 < events.Scalars(f"routing/layer_{layer}/entropy")[-1].value <= math.log(2) + 1e-6
    load = events.Histograms("routing/layer_0/expert_load")[-1].histogram_value
    assert sum(load.bucket) == pytest.approx(1)


def test_evaluation_plays_held_out_episodes_and_leaves_the_training_alone(tmp_path):
    plain = trainer_in(tmp_path / "plain", environment_changes={"env_id": [LEVEL, OTHER]})
    plain.train()
    seen = trainer_in(
        tmp_path / "seen", environment_changes={"env_id": [LEVEL, OTHER]}, eval_strategy="steps", eval_steps=2
    )
    seen.train()
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(seen)[name]), name
    metrics = seen.evaluate()
    assert {f"eval_{name}{level}" for name in ("success", "return", "length_ratio", "length", "normalised_score")
            for level in ("", f"/{LEVEL}", f"/{OTHER}")} <= set(metrics)  # fmt: skip
    assert metrics["eval_success"] == pytest.approx(
        (metrics[f"eval_success/{LEVEL}"] + metrics[f"eval_success/{OTHER}"]) / 2
    )
    assert metrics["eval_length_ratio"] > 1


def test_a_run_leaves_the_policy_with_most_success_and_its_card(tmp_path, cache):
    run = configuration(
        tmp_path / "run", eval_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True
    )
    policy = PolicyArguments(mop_layers="0,8;4,8", mop_intermediate_dim=16, mop_router_dim=4, mission_dim=8)
    metrics = train_policy(policy, environments(tmp_path / "run"), run)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert metrics["eval_success"] == state["best_metric"]
    card = ModelCard.load(tmp_path / "run" / "README.md")
    check_model_card(card)
    (result,) = card.data.eval_results
    assert result.dataset_type == LEVEL and result.metric_value == pytest.approx(metrics["eval_success"], abs=1e-4)
    saved = MopForActionPrediction.from_pretrained(tmp_path / "run")
    assert saved.config.task_names == [LEVEL]
    # A warm start: the same policy goes on with another teacher.
    warm = configuration(tmp_path / "dagger", max_steps=1, learning_rate=0.0)
    teacher = environments(tmp_path / "dagger", algorithm="dagger")
    train_policy(PolicyArguments(model_name_or_path=str(tmp_path / "run")), teacher, warm)
    again = MopForActionPrediction.from_pretrained(tmp_path / "dagger")
    for name, value in saved.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path):
    trainer = trainer_in(tmp_path)
    with torch.no_grad():
        trainer.model.action_head.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan; no checkpoint"):
        trainer.train()


def test_labels_that_the_bot_could_not_give_count_in_no_figure(tmp_path):
    trainer = trainer_in(tmp_path)
    unroll, state = trainer.source.next_unroll(trainer.model)
    unroll.labels[:] = IGNORED_LABEL
    outputs = trainer.model(**unroll_inputs(unroll, trainer.model), state=state)
    trainer._window.start()
    trainer._window.add(outputs, torch.from_numpy(unroll.labels))
    figures = trainer._window.figures(trainer)
    assert figures["agreement"] == 0 and figures["action_loss"] == 0


# Arguments


def test_the_baseline_has_as_many_parameters_as_the_pathways():
    arguments = {"mop_layers": "16,32,64;32,64,128"}
    pathways, baseline = (
        MopForActionPrediction(load_policy_config(PolicyArguments(policy_type=kind, **arguments), [LEVEL]))
        for kind in ("pathways", "gru")
    )
    assert baseline.config.policy_type == "gru"
    assert baseline.num_parameters() == pytest.approx(pathways.num_parameters(), rel=0.01)


def test_several_processes_make_the_demonstrations_if_asked_to(tmp_path):
    # More than what one process plays at a time.
    options = {"algorithm": "bc", "num_envs": 1, "unroll_len": 200, "num_demonstrations": 129}
    unrolls, files = [], []
    for count in (None, 2):
        folder = tmp_path / str(count)
        options |= {"demonstration_num_proc": count, "cache_dir": str(folder)}
        unrolls.append(load_source(environments(folder, **options), configuration(tmp_path)).streams.next_unroll())
        files.append(len([*folder.rglob("*.arrow")]))
    assert files == [1, 2]
    np.testing.assert_array_equal(unrolls[0].images, unrolls[1].images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"demonstration_num_proc": 0}, "demonstration_num_proc is 0: it must be", id="no_processes"),
        pytest.param({"algorithm": "ppo"}, "algorithm is 'ppo': choose bc or dagger", id="algorithm"),
        pytest.param({"num_envs": 0}, "num_envs is 0: it must be at least 1", id="no_environments"),
        pytest.param({"env_id": [LEVEL, OTHER], "num_envs": 1}, "num_envs is 1 for 2 levels", id="few_environments"),
        pytest.param({"unroll_len": 0}, "unroll_len is 0", id="no_steps"),
        pytest.param({"eval_first_seed": -1}, "eval_first_seed is -1: it must be at least 0", id="first_seed"),
        pytest.param({"student_acting": "random"}, "student_acting is 'random'", id="acting"),
        pytest.param({"dagger_beta_start": 1.5}, "a probability is between 0 and 1", id="beta"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EnvironmentArguments(**changes)


def test_a_baseline_goes_on_with_the_sizes_that_it_was_made_from(tmp_path):
    begun = load_policy_config(PolicyArguments(policy_type="gru", mop_layers="16,32;32"), [LEVEL])
    begun.save_pretrained(tmp_path)
    for policy_type in ("gru", None):
        arguments = PolicyArguments(str(tmp_path), mop_layers="16,32;32", policy_type=policy_type)
        assert load_policy_config(arguments, [LEVEL]).layers == begun.layers
    with pytest.raises(ValueError, match="cannot replace"):
        load_policy_config(PolicyArguments(str(tmp_path), mop_layers="16,64;32"), [LEVEL])


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    small_policy().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has layers=\[\[0, 8\], \[4, 8\]\], which"):
        load_policy_config(PolicyArguments(model_name_or_path=str(tmp_path), mop_layers="8,8"), [LEVEL])


def test_the_trainer_still_has_the_hooks_that_are_used():
    """An upgrade of transformers that moves one of these has to be looked at."""
    assert list(inspect.signature(Trainer._prepare_inputs).parameters) == ["self", "inputs"]
    assert "self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert list(inspect.signature(Trainer._save_rng_state).parameters) == ["self", "output_dir"]
    assert "self._save_rng_state(output_dir)" in inspect.getsource(Trainer._save_checkpoint)
    assert list(inspect.signature(Trainer._load_rng_state).parameters) == ["self", "checkpoint"]
    # After the counter's first item has been taken, and before the first step.
    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.index("self._load_rng_state(resume_from_checkpoint)") < epoch.index("self.training_step(")
    assert "_memory_tracker.stop_and_update_metrics(output.metrics)" in inspect.getsource(Trainer.evaluate)
    assert "self.evaluate(ignore_keys=" in inspect.getsource(Trainer._evaluate)
