"""The games that ship here keep to the interface of ale-py's vector environment, and reward those who play them."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from mixturekit.trainers.builtin_games import BUILTIN_GAMES, DOWN, FIRE, RIGHT


@pytest.fixture(params=BUILTIN_GAMES)
def game(request):
    return BUILTIN_GAMES[request.param](8)


def joystick(right, down, fire):
    """The action that moves so."""
    matching = (right[:, None] == RIGHT) & (down[:, None] == DOWN) & (fire[:, None] == FIRE)
    return matching.argmax(axis=1)


def expert_actions(game):
    """What one who sees the fields would do."""
    f, none = game.fields, np.zeros(game.num_envs, dtype=int)
    name = type(game).__name__
    if name == "Catch":
        return joystick(np.sign(f["fruit_x"] - f["basket"]), none, none > 0)
    if name == "Tunnel":
        return joystick(np.sign(f["gap"] - f["car"]), none, none > 0)
    if name == "Shoot":
        away = f["target"] - f["cannon"]
        return joystick(np.sign(away), none, (np.abs(away) <= 1) & (f["loading"] == 0))
    if name == "Collect":
        right = np.sign(f["pellet_x"] - f["x"])
        return joystick(right, np.where(right == 0, np.sign(f["pellet_y"] - f["y"]), 0), none > 0)
    if name == "Rally":
        return joystick(none, np.sign(f["y"] - f["bat"]), none > 0)
    side = f["side"]
    return joystick(np.array([0, 1, 0, -1])[side], np.array([-1, 0, 1, 0])[side], none > 0)


def mean_return(game, choose, episodes=48):
    game.reset(seed=0)
    total, returns = np.zeros(game.num_envs), []
    while len(returns) < episodes:
        _, rewards, terminated, truncated, _ = game.step(choose(game))
        total += rewards
        over = terminated | truncated
        returns += total[over].tolist()
        total[over] = 0
    return np.mean(returns)


def test_who_plays_well_is_rewarded_and_chance_is_not(game):
    random = np.random.default_rng(0)
    assert mean_return(game, expert_actions) >= game.solved_return
    assert mean_return(game, lambda game: random.choice(game.actions, game.num_envs)) < game.solved_return / 2


def test_the_interface_is_that_of_the_emulator(game):
    assert game.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    frames, info = game.reset(seed=1)
    assert frames.shape == game.observation_space.shape == (8, 4, 84, 84)
    assert game.single_action_space.n == 18
    for _ in range(game.max_steps):
        frames, rewards, terminated, truncated, info = game.step(np.zeros(8, dtype=np.int64))
        assert frames.dtype == np.uint8 and rewards.dtype == np.int32
        assert "final_obs" in info or not (terminated | truncated).any()
    assert truncated.all()
    final = info["final_obs"]
    # What is seen next is a new episode, whose first frame stands in for those before it.
    assert (frames[:, :1] == frames).all() and not (final == frames).all()


def test_seeds_decide_and_a_saved_game_goes_on_as_it_would_have(game):
    random = np.random.default_rng(0)
    actions = random.choice(game.actions, (80, 8))
    other = type(game)(8)

    def run(which, steps):
        return [which.step(step)[:2] for step in steps]

    assert (game.reset(seed=3)[0] == other.reset(seed=3)[0]).all()
    run(game, actions[:40])
    other.load_state_dict(game.state_dict())
    for (frames, rewards), (expected, gained) in zip(run(other, actions[40:]), run(game, actions[40:]), strict=True):
        assert (frames == expected).all() and (rewards == gained).all()


def test_games_look_unlike_each_other():
    looks = np.stack([game(1).reset(seed=0)[0][0, -1].astype(float) for game in BUILTIN_GAMES.values()])
    far = np.abs(looks[:, None] - looks[None]).mean(axis=(2, 3))
    assert far[~np.eye(len(looks), dtype=bool)].min() > 10


def test_sticky_actions_repeat_the_last_one():
    game = BUILTIN_GAMES["collect"](256, repeat_action_probability=0.25)
    game.reset(seed=0)
    game.step(np.full(256, 3))
    # The action before the first is none.
    assert 0.15 < (game.fields["last_action"] == 0).mean() < 0.35
    assert set(game.fields["last_action"].tolist()) == {0, 3}
