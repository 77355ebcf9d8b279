"""Evaluation plays every held-out episode once and to its end, however many at a time."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from mixturekit.modeling import MopConfig, MopForActionPrediction
from mixturekit.trainers.babyai import bot_episode, run_episodes
from mixturekit.trainers.episode_video import VideoFrame, film_episode, write_episode_video
from mixturekit.trainers.metrics.answer_accuracy import wilson_interval
from mixturekit.trainers.policy_evaluation import (
    ALL_LEVELS,
    HeldOutEpisodes,
    PlayOptions,
    PolicyEvaluation,
    PolicyPlayer,
)
from mixturekit.trainers.policy_evaluation_config import PolicyEvaluationArguments
from mixturekit.trainers.policy_evaluation_report import draw_curves, print_results

LEVEL, OTHER = "BabyAI-GoToRedBall-v0", "BabyAI-GoToObj-v0"
FIRST = 1_000_000_000


@pytest.fixture(scope="module")
def policy():
    """Wanders about: its actions have random preferences, which observations tip."""
    torch.manual_seed(0)
    config = MopConfig(layers="0,8,16;4,8", intermediate_dim=16, router_dim=4, mission_dim=8, word_dim=4)
    policy = MopForActionPrediction(config).eval()
    with torch.no_grad():
        policy.action_head.bias.copy_(torch.tensor([0.0, 0.2, 0.3, -9, -9, -9, -9]))
    return policy


def episodes_of(policy, seeds, num_envs, **options):
    player = PolicyPlayer(policy, PlayOptions(**options))
    return sorted(run_episodes([(LEVEL, seed) for seed in seeds], player, num_envs), key=lambda episode: episode.seed)


def test_the_figures_are_those_of_a_loop_that_a_user_writes(policy):
    (record,) = HeldOutEpisodes([LEVEL], 6, FIRST).play(policy)
    returns, lengths, weights = [], [], []
    environment = gymnasium.make(LEVEL)
    for seed in range(FIRST, FIRST + 6):
        observation, _ = environment.reset(seed=seed)
        state, done, steps = None, False, 0
        while not done:
            actions, state, layers = policy.act([observation], state, output_router_weights=True)
            weights.append(layers)
            observation, reward, terminated, truncated, _ = environment.step(actions.item())
            steps += 1
            done = terminated or truncated
        returns.append(reward)
        lengths.append(steps)
    assert record["return"] == pytest.approx(np.mean(returns))
    assert record["length"] == pytest.approx(np.mean(lengths))
    assert record["success"] == np.mean(np.array(returns) > 0)
    assert record["length_ratio"] == pytest.approx(
        np.mean(lengths) / np.mean([bot_episode(LEVEL, seed).length for seed in range(FIRST, FIRST + 6)])
    )
    costs = [policy.usage_cost(layers).item() for layers in weights]
    assert record["routing_cost"] == pytest.approx(np.mean(costs), rel=1e-4)


@pytest.mark.parametrize("num_envs", [1, 3, 64])
def test_how_many_play_at_once_changes_nothing(policy, num_envs):
    alone = [episodes_of(policy, [seed], 1)[0] for seed in range(8)]
    assert episodes_of(policy, range(8), num_envs) == alone


def test_sampling_repeats_with_its_seed_and_differs_from_another(policy):
    first, again, other = (episodes_of(policy, range(8), 8, decoding="sampled", seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_policy_that_plays_is_left_as_it_was(policy):
    before, random_state = policy.training, torch.get_rng_state()
    policy.train()
    HeldOutEpisodes([LEVEL], 2, FIRST).play(policy, PlayOptions(decoding="sampled"))
    assert policy.training
    assert torch.equal(torch.get_rng_state(), random_state)
    policy.train(before)


def test_levels_have_a_record_each_and_one_together(policy):
    one, other, together = HeldOutEpisodes([LEVEL, OTHER], 4, FIRST).play(policy)
    assert [record["level"] for record in (one, other, together)] == [LEVEL, OTHER, ALL_LEVELS]
    assert together["episodes"] == 8
    assert together["success"] == (one["success"] + other["success"]) / 2
    assert together["return"] == pytest.approx((one["return"] + other["return"]) / 2)
    bounds = wilson_interval(round(4 * one["success"]), 4)
    assert (one["success_low"], one["success_high"]) == pytest.approx(bounds)
    assert one["normalised_score"] is not None


def test_dropping_experts_below_nothing_drops_none_and_a_lesion_is_felt(policy):
    held_out = HeldOutEpisodes([LEVEL], 4, FIRST)
    whole, same, lesioned = (
        held_out.play(policy, options)[0]
        for options in (PlayOptions(), PlayOptions(weight_threshold=0.0), PlayOptions(lesion_largest=True))
    )
    different = {"weight_threshold", "lesion_largest"}
    assert {name for name in whole if whole[name] != same[name]} <= different | {"routing_cost"}
    assert {name for name in whole if whole[name] != lesioned[name]} > different - {"weight_threshold"}


def test_an_evaluation_plays_in_every_way_that_is_asked_for_and_saves_it(policy, tmp_path):
    arguments = PolicyEvaluationArguments(
        "policy", num_episodes=3, self_sufficiency=True, weight_thresholds=[0.5, 0.0], lesion=True,
        output_dir=str(tmp_path),
    )  # fmt: skip
    report = PolicyEvaluation(policy, [LEVEL], arguments).run()
    saved = json.loads((tmp_path / "eval_results.json").read_text())
    assert saved["results"] == report["results"]
    assert [(row["decoding"], row["weight_threshold"], row["lesion_largest"]) for row in saved["results"]] == [
        ("greedy", None, False),
        ("sampled", None, False),
        ("greedy", 0.0, False),
        ("greedy", 0.5, False),
        ("greedy", None, True),
    ]
    with pytest.raises(FileExistsError, match="--overwrite"):
        PolicyEvaluationArguments("policy", output_dir=str(tmp_path))
    PolicyEvaluationArguments("policy", output_dir=str(tmp_path), overwrite=True)


def test_the_table_has_every_record_and_the_picture_only_what_was_left_out(policy, tmp_path, capsys):
    held_out = HeldOutEpisodes([LEVEL], 2, FIRST)
    plain = held_out.play(policy)
    assert not draw_curves(plain, tmp_path / "curves.png")
    records = plain + held_out.play(policy, PlayOptions(weight_threshold=0.25))
    assert draw_curves(records, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 100
    print_results(records)
    printed = capsys.readouterr().out
    assert "weights from 0.25" in printed and printed.count(LEVEL) == 2


def test_a_video_has_a_frame_for_each_step(policy, tmp_path):
    episode = film_episode(policy, LEVEL, FIRST, tmp_path / "episode.gif")
    (played,) = episodes_of(policy, [FIRST], 1)
    assert episode == played
    with Image.open(tmp_path / "episode.gif") as video:
        assert video.n_frames == episode.length
        assert video.width > 300


def test_a_video_shows_heavier_experts_by_longer_bars(tmp_path):
    grid = np.zeros((40, 40, 3), dtype=np.uint8)
    frames = [VideoFrame(grid, [np.array([weight, 1 - weight])], "forward") for weight in (0.1, 0.9)]
    write_episode_video(frames, [[8, 16]], "go to the red ball", tmp_path / "two.gif")
    with Image.open(tmp_path / "two.gif") as video:
        blue = []
        for index in range(2):
            video.seek(index)
            pixels = np.asarray(video.convert("RGB")).astype(int)
            blue.append((np.abs(pixels - [0x44, 0x77, 0xAA]).sum(-1) < 30).sum())
    assert blue[1] > 5 * blue[0] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"decoding": ["beam"]}, "decoding has 'beam': choose of greedy, sampled", id="decoding"),
        pytest.param({"num_episodes": 0}, "num_episodes is 0", id="no_episodes"),
        pytest.param({"video": "film.mp4"}, "its name must end in .gif", id="video"),
        pytest.param({"weight_thresholds": [2.0]}, "weights lie between 0 and 1", id="threshold"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PolicyEvaluationArguments("policy", output_dir=str(tmp_path), **changes)


@pytest.mark.parametrize("place", ["taken", "taken/eval"])
def test_a_file_where_the_results_should_go_is_named_at_once(place, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match=f"{place} cannot be a folder, because .*taken is a file"):
        PolicyEvaluationArguments("policy", output_dir=str(tmp_path / place), overwrite=True)
