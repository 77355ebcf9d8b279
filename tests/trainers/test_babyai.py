"""BabyAI environments: labels of the bot, episodes that repeat, interruptions without a trace, honest evaluation."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mixturekit.trainers.babyai import (
    FIRST_HELD_OUT_SEED,
    NUM_ACTIONS,
    REFERENCE_RETURNS,
    BabyAIEnvironments,
    Episode,
    Observations,
    bot_episode,
    check_level,
    check_levels,
    known_levels,
    normalized_score,
    run_episodes,
    training_seed,
)
from mixturekit.trainers.babyai_player import IGNORED_LABEL, LevelPlayer, without_rejections

RED_BALL, LOCAL, PUT_NEXT = "BabyAI-GoToRedBall-v0", "BabyAI-GoToLocal-v0", "BabyAI-PutNextLocal-v0"
UNLOCK, ENDLESS = "BabyAI-UnlockPickup-v0", "BabyAI-UnlockToUnlock-v0"


def mixed_actions(environments, rng, share):
    """The bot's actions, some replaced by random ones."""
    random = rng.integers(0, NUM_ACTIONS, environments.num_envs)
    return np.where(rng.random(environments.num_envs) < share, random, environments.expert_actions())


def record(environments, rng, num_steps, share=0.4):
    """Everything that the environments give in some steps, in a form that `==` compares."""
    seen = []
    for _ in range(num_steps):
        labels = environments.expert_actions()
        observations, rewards, dones, episodes = environments.step(mixed_actions(environments, rng, share))
        values = labels, observations.images, observations.directions, rewards, dones
        seen.append((*(value.tolist() for value in values), observations.missions, episodes))
    return seen


# Levels


@pytest.mark.parametrize(
    "wrong", ("BabyAI-GoToRedBal-v0", "GoToRedBall", "BabyAI-GoToRedBall-v1", "babyai-gotoredball-v0")
)
def test_a_wrong_level_is_named_with_close_ones(wrong):
    with pytest.raises(ValueError, match=f"'{wrong}' is no BabyAI level.*{RED_BALL}"):
        check_level(wrong)


@pytest.mark.parametrize("name", ("KeyInBox", "PutNextS5N2Carrying", "PutNextS6N3Carrying", "PutNextS7N4Carrying"))
def test_levels_that_the_bot_cannot_solve_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"BabyAI-{name}-v0 is a level that minigrid's bot cannot solve"):
        BabyAIEnvironments([RED_BALL, f"BabyAI-{name}-v0"], num_envs=2, seed=0)


@pytest.mark.parametrize("levels", ([], RED_BALL))
def test_levels_are_a_list_of_at_least_one(levels):
    with pytest.raises(ValueError, match="give a list of at least one BabyAI level"):
        check_levels(levels)


def test_known_levels_can_be_played():
    assert len(known_levels()) > 80 and set(REFERENCE_RETURNS) <= set(known_levels())
    check_levels(known_levels())


def test_the_normalized_score_is_0_for_random_actions_and_1_for_the_bot():
    for level, (random, expert) in REFERENCE_RETURNS.items():
        assert normalized_score(level, random) == 0 and normalized_score(level, expert) == 1
    assert normalized_score("BabyAI-GoToObj-v0", 0.5) is None


def test_training_seeds_stay_below_those_held_out_and_differ():
    seeds = [training_seed(run, stream, index) for run in range(5) for stream in range(20) for index in range(20)]
    assert min(seeds) >= 0 and max(seeds) < FIRST_HELD_OUT_SEED
    assert len(set(seeds)) == len(seeds)


def test_without_minigrid_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['minigrid'] = None; import mixturekit.trainers.babyai"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == (
        'ImportError: BabyAI needs gymnasium and minigrid: pip install "mixturekit[babyai]"'
    )


# Environments


def test_environments_play_the_levels_in_turn_and_keep_them():
    environments = BabyAIEnvironments([RED_BALL, UNLOCK], num_envs=5, seed=0)
    assert environments.level_index.tolist() == [0, 1, 0, 1, 0] and environments.level_index.dtype == np.int64
    weighted = BabyAIEnvironments([RED_BALL, UNLOCK], num_envs=5, seed=0, level_weights=[1, 2])
    assert weighted.level_index.tolist() == [0, 1, 1, 0, 1]
    for _ in range(60):
        _, _, dones, episodes = environments.step(environments.expert_actions())
        levels = [environments.levels[index] for index in environments.level_index[dones]]
        assert [episode.level for episode in episodes] == levels


def test_the_bot_solves_what_it_labels():
    environments = BabyAIEnvironments([RED_BALL, PUT_NEXT, UNLOCK], num_envs=6, seed=1)
    finished = [e for _ in range(80) for e in environments.step(environments.expert_actions())[3]]
    assert len(finished) > 20 and {episode.level for episode in finished} == {RED_BALL, PUT_NEXT, UNLOCK}
    for episode in finished:
        assert episode.success and not episode.aborted and 0 < episode.episode_return <= 1
        assert episode == bot_episode(episode.level, episode.seed)


def test_observations_are_the_current_ones_and_have_minigrids_form():
    environments = BabyAIEnvironments([LOCAL], num_envs=3, seed=2)
    observations, rewards, dones, _ = environments.step(np.array([0, 1, 2]))
    assert observations is environments.observations and len(observations) == 3
    assert observations.images.shape == (3, 7, 7, 3) and observations.images.dtype == np.uint8
    assert observations.directions.dtype == np.int64 and rewards.dtype == np.float32 and dones.dtype == bool
    columns = zip(observations.images, observations.directions.tolist(), observations.missions, strict=True)
    rows = [dict(zip(("image", "direction", "mission"), row, strict=True)) for row in columns]
    again = Observations.from_dictionaries(rows)
    np.testing.assert_array_equal(again.images, observations.images)
    np.testing.assert_array_equal(again.directions, observations.directions)
    assert again.missions == observations.missions


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    def run(seed):
        return record(BabyAIEnvironments([LOCAL, PUT_NEXT], 4, seed), np.random.default_rng(0), 40)

    first = run(3)
    assert first == run(3)
    assert first[0] != run(4)[0]


def test_reset_begins_the_run_again():
    environments = BabyAIEnvironments([LOCAL, PUT_NEXT], 4, seed=3)
    first = record(environments, np.random.default_rng(0), 30)
    environments.reset()
    assert record(environments, np.random.default_rng(0), 30) == first


def test_episodes_do_not_depend_on_what_was_done_before():
    def seeds_of(share):
        environments, seeds = BabyAIEnvironments([RED_BALL], 2, seed=5), {0: [], 1: []}
        rng = np.random.default_rng(1)
        while min(map(len, seeds.values())) < 3:
            _, _, dones, episodes = environments.step(mixed_actions(environments, rng, share))
            for index, episode in zip(np.flatnonzero(dones), episodes, strict=True):
                seeds[index].append(episode.seed)
        return [seeds[index][:3] for index in seeds]

    assert seeds_of(0.0) == seeds_of(0.5)


def test_asking_the_bot_again_or_not_at_all_changes_nothing():
    often, never = (BabyAIEnvironments([PUT_NEXT, UNLOCK], 4, seed=6) for _ in range(2))
    rng = np.random.default_rng(2)
    for _ in range(50):
        actions = rng.integers(0, NUM_ACTIONS, 4)
        labels = often.expert_actions()
        np.testing.assert_array_equal(labels, often.expert_actions())
        assert often.step(actions)[3] == never.step(actions)[3]
    np.testing.assert_array_equal(often.expert_actions(), never.expert_actions())


def test_where_the_bot_gives_up_the_label_is_ignored_and_the_episode_broken_off():
    environments = BabyAIEnvironments([PUT_NEXT], num_envs=8, seed=0)
    rng = np.random.default_rng(0)
    aborted = 0
    for _ in range(300):
        labels = environments.expert_actions()
        # The label itself is an action that is not looked at where there is none.
        actions = np.where(labels == IGNORED_LABEL, labels, rng.integers(0, NUM_ACTIONS, 8))
        _, rewards, dones, episodes = environments.step(actions)
        given_up = labels == IGNORED_LABEL
        assert dones[given_up].all() and (rewards[given_up] == 0).all()
        broken_off = [episode for episode in episodes if episode.aborted]
        assert len(broken_off) == given_up.sum() and not any(episode.success for episode in broken_off)
        aborted += len(broken_off)
    assert environments.num_bot_failures == aborted > 3
    assert "DisappearedBoxError" in environments.bot_failures


def test_an_endless_plan_of_the_bot_comes_to_an_end():
    environments = BabyAIEnvironments([ENDLESS], num_envs=8, seed=0)
    while not environments.num_bot_failures:
        environments.step(environments.expert_actions())
    assert environments.bot_failures["EndlessPlanError"] == environments.num_bot_failures


def test_an_end_without_reward_is_no_success():
    episodes = [bot_episode("BabyAI-OpenDoorsOrderN4Debug-v0", seed) for seed in range(20)]
    assert {episode.success for episode in episodes} == {True, False}
    assert all(episode.success == (episode.episode_return > 0) for episode in episodes)
    assert not any(episode.aborted for episode in episodes)


@pytest.mark.parametrize("share", (0.0, 0.4))
@pytest.mark.parametrize("levels", ([LOCAL, PUT_NEXT], [UNLOCK, ENDLESS, "BabyAI-MiniBossLevel-v0"]))
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(levels, share):
    environments = BabyAIEnvironments(levels, num_envs=6, seed=8)
    record(environments, np.random.default_rng(3), 45, share)
    state = json.loads(json.dumps(environments.state_dict()))
    restored = BabyAIEnvironments(levels, num_envs=6, seed=0)
    restored.load_state_dict(state)
    np.testing.assert_array_equal(restored.observations.images, environments.observations.images)
    assert restored.bot_failures == environments.bot_failures
    runs = [record(each, np.random.default_rng(4), 60, share) for each in (environments, restored)]
    assert runs[0] == runs[1]
    assert restored.state_dict() == environments.state_dict()


def test_a_run_saved_while_the_bot_has_given_up_counts_it_once():
    environments = BabyAIEnvironments([PUT_NEXT], num_envs=4, seed=0)
    rng = np.random.default_rng(0)
    while (environments.expert_actions() != IGNORED_LABEL).all():
        environments.step(rng.integers(0, NUM_ACTIONS, 4))
    restored = BabyAIEnvironments([PUT_NEXT], num_envs=4, seed=0)
    restored.load_state_dict(environments.state_dict())
    assert record(environments, np.random.default_rng(1), 3) == record(restored, np.random.default_rng(1), 3)
    assert restored.num_bot_failures == environments.num_bot_failures > 0


def test_a_state_of_other_environments_is_refused():
    state = BabyAIEnvironments([LOCAL], num_envs=2, seed=0).state_dict()
    weighted = BabyAIEnvironments([LOCAL, RED_BALL], num_envs=3, seed=0, level_weights=[1, 2])
    with pytest.raises(ValueError, match=r"level_index is \[0, 1, 0\], but the state is of \[0, 1, 1\]"):
        BabyAIEnvironments([LOCAL, RED_BALL], num_envs=3, seed=0).load_state_dict(weighted.state_dict())
    with pytest.raises(ValueError, match="num_envs is 3, but the state is of 2"):
        BabyAIEnvironments([LOCAL], num_envs=3, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="levels is .*GoToRedBall.*, but the state is of .*GoToLocal"):
        BabyAIEnvironments([RED_BALL], num_envs=2, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="install that version to resume"):
        BabyAIEnvironments([LOCAL], num_envs=2, seed=0).load_state_dict({**state, "actions": [[0], [0]]})


@pytest.mark.parametrize(
    "actions, message",
    (
        (np.zeros(3, dtype=np.int64), r"actions is int64 \(3,\): give 2 integers"),
        (np.zeros(2), r"actions is float64 \(2,\): give 2 integers"),
        (np.array([0, 7]), r"actions\[1\] is 7: choose a number from 0 to 6"),
    ),
)
def test_wrong_actions_are_refused(actions, message):
    with pytest.raises(ValueError, match=message):
        BabyAIEnvironments([LOCAL], num_envs=2, seed=0).step(actions)


def test_wrong_numbers_are_refused():
    with pytest.raises(
        ValueError, match=r"level_weights is \[1\]: give a whole number above 0 for each of the 2 levels"
    ):
        BabyAIEnvironments([LOCAL, RED_BALL], num_envs=4, seed=0, level_weights=[1])
    with pytest.raises(ValueError, match=r"num_envs is 1: levels with weights \[1, 1\] need at least 2"):
        BabyAIEnvironments([LOCAL, RED_BALL], num_envs=1, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        BabyAIEnvironments([LOCAL], num_envs=1, seed=-1)
    with pytest.raises(ValueError, match="nobody to ask"):
        BabyAIEnvironments([LOCAL], num_envs=1, seed=0, with_bot=False).expert_actions()


def test_nothing_is_printed_about_missions_that_are_drawn_anew(capsys):
    player = LevelPlayer(LOCAL)
    for seed in range(60):
        player.begin(seed)
    assert capsys.readouterr().out == ""
    with without_rejections():
        print("Sampling rejected: unreachable object at (1, 1)")
        print("something else")
    assert capsys.readouterr().out == "something else\n"


# Evaluation


def play(episodes, num_envs):
    """Plays by a policy that remembers, per slot, how often it was asked, and acts by what it sees and remembers."""
    memory = np.zeros(num_envs, dtype=np.int64)
    playing = {}

    def act(turn):
        nonlocal memory
        memory = np.where(turn.started, 0, memory[turn.kept])
        for slot, episode in enumerate(turn.episodes):
            assert playing.setdefault(episode, 0) == memory[slot]
            playing[episode] += 1
        sums = turn.observations.images.reshape(len(memory), -1).sum(1, dtype=np.int64)
        memory = memory + 1
        return (sums + memory * 5) % 3

    finished = list(run_episodes(episodes, act, num_envs))
    assert {(episode.level, episode.seed): episode.length for episode in finished} == playing
    return finished


def test_every_episode_is_played_once_to_its_end_whatever_the_number_of_slots():
    episodes = [(level, FIRST_HELD_OUT_SEED + index) for index in range(7) for level in (RED_BALL, LOCAL)]
    one_by_one = play(episodes, num_envs=1)
    assert [(episode.level, episode.seed) for episode in one_by_one] == episodes
    assert {episode.length for episode in one_by_one} != {64}
    for num_envs in (3, 14, 20):
        finished = play(episodes, num_envs)
        assert sorted(finished, key=str) == sorted(one_by_one, key=str)


def test_no_episodes_are_no_turns():
    assert list(run_episodes([], lambda turn: None)) == []
    with pytest.raises(ValueError, match="num_envs is 0"):
        list(run_episodes([(LOCAL, 0)], lambda turn: None, num_envs=0))


def test_an_episode_that_is_not_solved_in_time_is_no_success():
    spin = list(run_episodes([(RED_BALL, FIRST_HELD_OUT_SEED)], lambda turn: np.zeros(len(turn.observations), int)))
    assert spin == [Episode(RED_BALL, FIRST_HELD_OUT_SEED, 0.0, 64, success=False)]
