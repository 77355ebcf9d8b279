"""What is forgotten and carried over, on matrices that can be followed by hand; and what experts tell about games."""

import numpy as np
import pytest

from mixturekit.trainers.continual_metrics import (
    area_under_curve,
    average_forgetting,
    backward_transfer,
    forward_transfer,
    isolated_forgetting,
    normalise,
    own_reference,
    zero_shot_transfer,
)
from mixturekit.trainers.expert_specialisation import entropy, miller_madow, mutual_information, specialisation

# Three games, learned in turn: the first is forgotten by half, the second not at all.
SCORES = np.array([[0.0, 0.0, 0.0], [1.0, 0.2, 0.0], [0.8, 1.0, 0.1], [0.5, 1.0, 1.0]])


def test_returns_are_put_on_a_scale_from_chance_to_the_reference():
    random, reference = np.array([-5.0, 0.0, 3.0]), np.array([5.0, 2.0, 3.0])
    scores = normalise(np.array([[0.0, 1.0, 9.0]]), random, reference)
    assert scores[0, :2].tolist() == [0.5, 0.5] and np.isnan(scores[0, 2])
    # Who plays worse than chance sets no scale: its losses would count as gains.
    assert np.isnan(normalise(np.array([0.0]), np.array([2.0]), np.array([1.0])))
    # Games with negative returns are no exception.
    assert normalise(np.array([-20.0]), np.array([-21.0]), np.array([-19.0])) == 0.5


def test_forgetting_is_what_is_lost_since_the_end_of_a_games_own_training():
    assert average_forgetting(SCORES, [0, 1, 2]) == pytest.approx((0.5 + 0.0) / 2)
    assert backward_transfer(SCORES, [0, 1, 2]) == pytest.approx(-0.25)
    assert own_reference(SCORES, [0, 1, 2]).tolist() == [1.0, 1.0, 1.0]


def test_a_revisit_starts_the_count_anew():
    again = np.vstack([SCORES, [[0.9, 0.6, 0.4]]])
    assert average_forgetting(again, [0, 1, 2, 0]) == pytest.approx((0.4 + 0.6) / 2)


def test_changes_are_told_by_the_game_that_made_them():
    forgetting, transfer = isolated_forgetting(SCORES, [0, 1, 2]), zero_shot_transfer(SCORES, [0, 1, 2])
    assert forgetting[0, 1] == pytest.approx(0.2) and forgetting[0, 2] == pytest.approx(0.3)
    assert transfer[1, 0] == pytest.approx(0.2) and transfer[2, 1] == pytest.approx(0.1)
    assert np.isnan(forgetting[1, 0]) and np.isnan(transfer[0, 1]) and np.isnan(np.diag(forgetting)).all()


def test_forward_transfer_compares_areas_under_learning_curves():
    fast = area_under_curve([(0, 0.0), (50, 1.0), (100, 1.0)], 100)
    slow = area_under_curve([(0, 0.0), (100, 1.0)], 100)
    assert (fast, slow) == (pytest.approx(0.75, abs=0.01), pytest.approx(0.5, abs=0.01))
    assert forward_transfer(fast, slow) == pytest.approx(0.5, abs=0.02)
    assert forward_transfer(slow, slow) == 0


def test_information_is_that_of_the_table():
    assert mutual_information(np.eye(4) * 100) == pytest.approx(2)
    assert mutual_information(np.ones((3, 5))) == pytest.approx(0)
    assert entropy(np.array([1, 1, 1, 1])) == pytest.approx(2)
    assert mutual_information(np.zeros((2, 2))) == 0


def test_the_correction_takes_most_of_the_bias_away():
    random = np.random.default_rng(0)
    tables = [random.multinomial(400, np.full(40, 1 / 40)).reshape(4, 10) for _ in range(200)]
    plain, corrected = (
        np.mean([estimate(table) for table in tables]) for estimate in (mutual_information, miller_madow)
    )
    assert plain > 0.04
    assert abs(corrected) < plain / 5


def test_tokens_of_an_episode_that_belong_together_are_no_specialisation():
    random = np.random.default_rng(0)
    # Each episode has favourites of its own, whatever its game.
    counts = np.stack([random.multinomial(500, random.dirichlet(np.full(8, 0.2))) for _ in range(24)])
    figures = specialisation(counts, np.repeat(["a", "b", "c"], 8))
    assert figures["information_corrected"] > 0.05
    assert figures["information"] < 2 * figures["shuffled_high"]
    assert abs(figures["normalised"]) < 0.2


def test_experts_of_one_game_are_told_from_chance():
    counts = np.zeros((24, 8), dtype=int)
    for episode in range(24):
        counts[episode, 2 * (episode // 8)] = 300
    figures = specialisation(counts, np.repeat(["a", "b", "c"], 8))
    assert figures["information"] == pytest.approx(np.log2(3))
    assert figures["information"] > figures["shuffled_high"]
    assert figures["normalised"] > 0.8


def test_games_without_a_scale_are_left_out():
    scores = SCORES.copy()
    scores[:, 1] = np.nan
    assert average_forgetting(scores, [0, 1, 2]) == pytest.approx(0.5)
    assert np.isnan(average_forgetting(scores * np.nan, [0, 1, 2]))
    assert np.isnan(average_forgetting(scores[:, :1], [0]))
