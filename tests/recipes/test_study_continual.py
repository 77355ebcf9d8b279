"""The study of what agents forget: its arms are agents that can be trained, and its verdicts follow the figures."""

import json
import runpy
from pathlib import Path

import pytest

from mixturekit.trainers.continual import load_agent_config
from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
from mixturekit.trainers.recipe_parser import parse_recipe
from mixturekit.trainers.study import configured

RECIPES = Path(__file__).parents[2] / "recipes"
STUDY = runpy.run_path(str(RECIPES / "study_continual.py"))
FIGURES = {"forgetting": 0.2, "acting_hits": 0.9, "updating_hits": 0.85, "information": 0.3, "fast_memory": 0.4}


@pytest.mark.parametrize("arm", STUDY["ARMS"])
def test_every_arm_is_an_agent_of_the_same_study(arm):
    options = [option.format(run="run") for option in STUDY["ARMS"][arm]]
    types = (AgentArguments, GameArguments, ContinualPpoConfig)
    agent, games, config = parse_recipe(types, ["--config", str(RECIPES / "atari/study.yaml"), *options])
    config.check_segments(games.num_envs)
    model = load_agent_config(agent, games.games)
    assert games.games == configured(RECIPES / "atari/study.yaml", "games") == model.games
    # Arms are compared in one thing each: whoever has experts has as many.
    assert model.num_experts == (1 if "dense, as" in arm else 32)
    assert games.interleaved == (arm == "all games at once")


def rows(**changes):
    experts = {name: [value] for name, value in {**FIGURES, **changes}.items()}
    return {"experts": experts, "dense, as many active": {"forgetting": [0.3]}}


def held(**changes):
    return [verdict["held"] for verdict in STUDY["expected_results"](rows(**changes)).values()]


def test_verdicts_follow_the_figures():
    assert held() == [True, True, True, True]
    assert held(updating_hits=0.7) == [False, True, True, True]
    assert held(information=0.05) == [True, False, True, True]
    assert held(fast_memory=1.0) == [True, True, False, True]
    assert held(forgetting=0.3) == [True, True, True, False]
    assert STUDY["expected_results"]({}) == {}


def test_nothing_is_claimed_of_forgetting_where_no_game_has_a_score():
    unknown = rows()
    unknown["experts"]["forgetting"] = []
    assert len(STUDY["expected_results"](unknown)) == 3


def test_agents_with_heads_by_game_are_judged_among_themselves():
    measures = rows() | {
        "experts, heads by game": {"forgetting": [0.1, 0.2]},
        "dense, as many active, heads by game": {"forgetting": [0.3, 0.15]},
    }
    verdicts = list(STUDY["expected_results"](measures).values())
    assert [verdict["held"] for verdict in verdicts] == [True, True, True, True, False]
    assert verdicts[-1]["measured"].startswith("0.15 (0.10 to 0.20) against 0.22 (0.15 to 0.30)")


def test_mastery_is_the_least_that_counts_as_one(tmp_path):
    """Two agents that learned a game alone: 1 is their mean return, or that of one who has mastered it."""

    def single(returns, random=-4.0):
        for seed, value in enumerate(returns):
            run = tmp_path / f"single-builtin-catch_{seed}"
            run.mkdir(exist_ok=True)
            results = {"games": ["builtin:catch"], "random_returns": [random], "curves": []}
            results["evaluations"] = [[{"return": random}], [{"return": value}]]
            (run / "continual_results.json").write_text(json.dumps(results))
        return STUDY["single_scores"](tmp_path, ["builtin:catch"], range(len(returns)))[0]["builtin:catch"]

    assert single([9.0, 10.0]) == 9.5
    assert single([1.0, 2.0]) == 8.0
