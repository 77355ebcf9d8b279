"""Demonstrations are episodes of the bot that can be played again, kept, shared, and learnt from without a gap."""

import json
import logging
from collections import Counter, defaultdict

import datasets
import numpy as np
import pytest

from mixturekit.trainers.babyai import FIRST_HELD_OUT_SEED, BabyAIEnvironments
from mixturekit.trainers.babyai_demonstrations import (
    FEATURES,
    DemonstrationStreams,
    generate_demonstrations,
    load_demonstrations,
)
from mixturekit.trainers.babyai_player import LevelPlayer

LOCAL, PUT_NEXT, ENDLESS = "BabyAI-GoToLocal-v0", "BabyAI-PutNextLocal-v0", "BabyAI-UnlockToUnlock-v0"
LEVELS = [LOCAL, PUT_NEXT]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("demonstrations"))


@pytest.fixture(scope="module")
def demonstrations(cache_dir):
    return generate_demonstrations(LEVELS, 31, seed=4, cache_dir=cache_dir)


def episode(row):
    """The arrays of a row."""
    images, directions, actions = (np.frombuffer(row[name], np.uint8) for name in ("images", "directions", "actions"))
    return images.reshape(-1, 7, 7, 3), directions, actions


def rows_of(dataset):
    return [tuple(row[name] for name in FEATURES) for row in dataset]


# The data set


def test_a_demonstration_is_what_its_level_shows_when_its_actions_are_taken(demonstrations):
    assert demonstrations.features == FEATURES and len(demonstrations) == 31
    for row in demonstrations:
        images, directions, actions = episode(row)
        player = LevelPlayer(row["level"])
        player.begin(row["seed"])
        assert player.observation["mission"] == row["mission"]
        for image, direction, action in zip(images, directions, actions, strict=True):
            np.testing.assert_array_equal(player.observation["image"], image)
            assert player.observation["direction"] == direction and player.label() == action
            _, done = player.act(int(action))
        assert done and player.episode_return == pytest.approx(row["episode_return"]) and row["episode_return"] > 0


def test_levels_take_turns_and_no_episode_is_held_out_or_repeated(demonstrations):
    assert list(demonstrations["level"][:4]) == [LOCAL, PUT_NEXT, LOCAL, PUT_NEXT]
    seeds = list(demonstrations["seed"])
    assert len(set(seeds)) == len(seeds) and max(seeds) < FIRST_HELD_OUT_SEED
    environments = BabyAIEnvironments(LEVELS, num_envs=31, seed=4)
    assert not set(seeds) & {player.seed for player in environments._players}


def test_more_demonstrations_begin_with_the_same_and_processes_do_not_matter(demonstrations, tmp_path):
    more = generate_demonstrations(LEVELS, 150, seed=4, cache_dir=str(tmp_path / "one"))
    assert rows_of(more.select(range(31))) == rows_of(demonstrations)
    shared = generate_demonstrations(LEVELS, 150, seed=4, cache_dir=str(tmp_path / "two"), num_proc=2)
    assert rows_of(shared) == rows_of(more)
    other = generate_demonstrations(LEVELS, 31, seed=5, cache_dir=str(tmp_path / "one"))
    assert not set(other["seed"]) & set(more["seed"])


def test_the_same_call_comes_from_the_cache(demonstrations, cache_dir):
    again = generate_demonstrations(LEVELS, 31, seed=4, cache_dir=cache_dir)
    assert again.cache_files == demonstrations.cache_files
    assert generate_demonstrations(LEVELS[:1], 31, seed=4, cache_dir=cache_dir).cache_files != again.cache_files


def test_failures_of_the_bot_are_left_out_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mixturekit.trainers.babyai_demonstrations"):
        dataset = generate_demonstrations([ENDLESS], 10, seed=0, cache_dir=str(tmp_path))
    failures = sum(dataset["bot_failures"])
    assert len(dataset) == 10 and min(dataset["episode_return"]) > 0 and failures > 0
    assert f"Left out {failures} episodes in which the bot failed; 10 remain." in caplog.text


def test_demonstrations_come_back_from_disk_and_from_parquet(demonstrations, tmp_path):
    demonstrations.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=demonstrations).save_to_disk(str(tmp_path / "splits"))
    demonstrations.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    for name in ("saved", "splits", "parquet", "parquet/train.parquet"):
        loaded = load_demonstrations(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        assert loaded.features == FEATURES and rows_of(loaded) == rows_of(demonstrations)


def test_other_data_is_refused(tmp_path):
    datasets.Dataset.from_dict({"level": ["a"], "text": ["b"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="other holds no demonstrations: it lacks the columns seed, mission"):
        load_demonstrations(str(tmp_path / "other"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no demonstrations: expected"):
        load_demonstrations(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_demonstrations(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "arguments, message",
    (
        ((["BabyAI-GoToLocl-v0"], 1), "did you mean BabyAI-GoToLocal-v0"),
        (([LOCAL], 0), "num_episodes is 0"),
        (([LOCAL], 1, -1), "seed is -1"),
    ),
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_demonstrations(*arguments)


# The streams


def pieces_of(streams, num_unrolls):
    """What every stream gave, as one list of episodes each; the first steps of an episode begin a new one."""
    pieces = defaultdict(list)
    for _ in range(num_unrolls):
        unroll = streams.next_unroll()
        for stream, time in np.ndindex(unroll.labels.shape):
            if unroll.reset_mask[stream, time]:
                mission, task = unroll.missions[unroll.mission_index[stream, time]], unroll.task_ids[stream, time]
                pieces[stream].append((streams.levels[task], mission, [], [], []))
            images, directions, actions = pieces[stream][-1][2:]
            images.append(unroll.images[stream, time].tobytes())
            directions.append(unroll.directions[stream, time])
            actions.append(unroll.labels[stream, time])
            assert unroll.missions[unroll.mission_index[stream, time]] == pieces[stream][-1][1]
    return pieces


def as_key(piece):
    level, mission, images, directions, actions = piece
    return level, mission, b"".join(images), bytes(directions), bytes(actions)


def keys_of(dataset):
    return [tuple(row[name] for name in ("level", "mission", "images", "directions", "actions")) for row in dataset]


def frames_of(dataset):
    return sum(map(len, dataset["actions"]))


@pytest.mark.parametrize("batch_size, unroll_len", ((1, 5), (3, 7), (8, 64)))
def test_streams_are_whole_episodes_one_after_another(demonstrations, batch_size, unroll_len):
    streams = DemonstrationStreams(demonstrations, LEVELS, batch_size, unroll_len, seed=0)
    pieces = pieces_of(streams, 2 * frames_of(demonstrations) // (batch_size * unroll_len) + 2)
    known = set(keys_of(demonstrations))
    # The last of each stream may not have come to its end.
    taken = Counter(as_key(piece) for stream in pieces.values() for piece in stream[:-1])
    assert set(taken) <= known
    assert streams.epoch >= 2 and set(taken) == known
    assert max(taken.values()) - min(taken.values()) <= 2


def test_an_epoch_has_every_demonstration_once_and_the_next_another_order(demonstrations):
    streams = DemonstrationStreams(demonstrations, LEVELS, 1, 1, seed=0)
    (taken,) = pieces_of(streams, 2 * frames_of(demonstrations)).values()
    epochs = [list(map(as_key, part)) for part in (taken[:31], taken[31:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(keys_of(demonstrations))
    assert epochs[0] != epochs[1]


def test_streams_of_some_levels_leave_out_the_others(demonstrations):
    streams = DemonstrationStreams(demonstrations, [PUT_NEXT], 2, 20, seed=0)
    assert streams.num_demonstrations == 15
    taken = {as_key(piece) for stream in pieces_of(streams, 20).values() for piece in stream[:-1]}
    assert {level for level, *_ in taken} == {PUT_NEXT} and len(taken) == 15


def test_task_ids_follow_the_order_of_the_levels(demonstrations):
    tasks = [
        DemonstrationStreams(demonstrations, order, 4, 16).next_unroll().task_ids for order in (LEVELS, LEVELS[::-1])
    ]
    np.testing.assert_array_equal(tasks[0], 1 - tasks[1])


def test_an_unroll_has_the_promised_types(demonstrations):
    unroll = DemonstrationStreams(demonstrations, LEVELS, 3, 9).next_unroll()
    assert unroll.images.shape == (3, 9, 7, 7, 3) and unroll.images.dtype == np.uint8
    for array in (unroll.directions, unroll.mission_index, unroll.labels, unroll.task_ids):
        assert array.shape == (3, 9) and array.dtype == np.int64
    assert unroll.reset_mask.dtype == bool and unroll.reset_mask[:, 0].all()
    assert sorted(set(unroll.mission_index.ravel())) == list(range(len(unroll.missions)))


def test_interrupted_streams_go_on_as_if_they_had_not_been(demonstrations):
    streams = DemonstrationStreams(demonstrations, LEVELS, 5, 11, seed=3)
    for _ in range(20):
        streams.next_unroll()
    state = json.loads(json.dumps(streams.state_dict()))
    restored = DemonstrationStreams(demonstrations, LEVELS, 5, 11, seed=0)
    restored.load_state_dict(state)
    for _ in range(20):
        ours, theirs = vars(restored.next_unroll()), vars(streams.next_unroll())
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        assert restored.epoch == streams.epoch > 1


def test_a_state_of_other_streams_is_refused(demonstrations):
    state = DemonstrationStreams(demonstrations, LEVELS, 5, 11).state_dict()
    with pytest.raises(ValueError, match="batch_size is 4, but the state is of 5"):
        DemonstrationStreams(demonstrations, LEVELS, 4, 11).load_state_dict(state)
    with pytest.raises(ValueError, match="num_demonstrations is 16, but the state is of 31"):
        DemonstrationStreams(demonstrations, [LOCAL], 5, 11).load_state_dict(state)


def test_wrong_streams_are_refused(demonstrations):
    with pytest.raises(ValueError, match=f"no demonstration of {ENDLESS}, only of {LOCAL}, {PUT_NEXT}"):
        DemonstrationStreams(demonstrations, [LOCAL, ENDLESS], 2, 2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        DemonstrationStreams(demonstrations, [LOCAL], 0, 2)
