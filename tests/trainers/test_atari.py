"""Environments by the names of their games, the emulator's and those that ship here, one or several at once."""

import numpy as np
import pytest

from mixturekit.trainers.atari import DEFAULT_GAMES, GameEnvironments, check_games, own_actions


def test_names_are_understood_in_every_spelling():
    pytest.importorskip("ale_py")
    given = ["Pong", "MsPacman", "ALE/Breakout-v5", "QbertNoFrameskip-v4", "TicTacToe3D", "up_n_down", "builtin:catch"]
    assert check_games(given) == ["pong", "ms_pacman", "breakout", "qbert", "tic_tac_toe_3d", "up_n_down", given[-1]]
    assert check_games(DEFAULT_GAMES) == list(DEFAULT_GAMES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pnog", "no game 'Pnog'; did you mean pong"),
        ("catch", "builtin:catch"),
        ("Combat", "a game for two players"),
        ("xyzzyplugh", "there are adventure, air_raid"),
    ],
)
def test_unknown_games_of_the_emulator_are_refused(name, message):
    pytest.importorskip("ale_py")
    with pytest.raises(ValueError, match=message):
        check_games([name])


def test_unknown_builtin_games_are_refused():
    with pytest.raises(ValueError, match="did you mean builtin:catch"):
        check_games(["builtin:cacth"])


@pytest.fixture
def two_games():
    return GameEnvironments(["builtin:catch", "builtin:signal"], 4, seed=0)


@pytest.mark.parametrize("actions", [[0, 1, 2, 18], [0, 1, 2, -1], [0, 1, 2], [0.0, 1.0, 2.0, 3.0]])
def test_actions_that_would_hang_the_emulator_are_refused(two_games, actions):
    two_games.reset()
    with pytest.raises(ValueError, match="^Actions are "):
        two_games.step(np.array(actions))


def test_games_share_the_environments(two_games):
    assert two_games.game_of_row.tolist() == [0, 0, 1, 1]
    frames = two_games.reset()
    assert frames.shape == (4, 4, 84, 84)
    for number in range(1, 65):
        step = two_games.step(np.zeros(4, dtype=int))
        assert step.over.any() == (number == 64)
    # Episodes of `signal` are shorter.
    assert step.truncated.tolist() == step.over.tolist() == [False, False, True, True]
    assert not (step.final_frames[2:] == step.frames[2:]).all()
    with pytest.raises(ValueError, match="3 environments cannot be shared evenly by 2 games"):
        GameEnvironments(["builtin:catch", "builtin:signal"], 3, seed=0)


@pytest.mark.parametrize("preprocessing", ["current", "classic"])
def test_the_emulator_plays_breakout(preprocessing):
    pytest.importorskip("ale_py")
    assert own_actions("breakout") == (0, 1, 3, 4)
    environments = GameEnvironments(["breakout"], 2, seed=1, preprocessing=preprocessing, num_threads=1)
    environments.reset()
    random, ends, overs = np.random.default_rng(0), 0, 0
    for _ in range(300):
        step = environments.step(random.choice(own_actions("breakout"), 2))
        ends, overs = ends + (step.terminated | step.truncated).sum(), overs + step.over.sum()
    assert overs > 0
    # Five lives: with the classic preprocessing each that is lost is an end.
    assert ends > 3 * overs if preprocessing == "classic" else ends == overs
    assert not environments.can_be_saved
    environments.close()


def test_a_game_with_fewer_actions_is_played_with_the_full_set():
    pytest.importorskip("ale_py")
    environments = GameEnvironments(["skiing"], 1, seed=1, num_threads=1)
    environments.reset()
    for action in range(18):
        environments.step(np.array([action]))
    environments.close()
