"""What is recorded of a policy is what it does when it is stepped by hand, and the measures are what they say."""

import itertools
import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from minigrid.utils.baby_ai_bot import BabyAIBot

from mixturekit.modeling import MopConfig, MopForActionPrediction
from mixturekit.trainers.babyai import run_episodes
from mixturekit.trainers.babyai_player import LevelPlayer
from mixturekit.trainers.pathway_analysis import (
    ACTIONS,
    NO_PHASE,
    NOTHING,
    ExpertUse,
    TrainingRun,
    expert_use,
    learned_pathway_complexity,
    pathway_distinctness,
    rank_correlation,
    record_pathways,
    routing_consistency,
    self_sufficiency,
    task_difficulty,
)
from mixturekit.trainers.policy_evaluation import ALL_LEVELS, HeldOutEpisodes, PlayOptions, PolicyPlayer

LEVELS = ["BabyAI-GoToObj-v0", "BabyAI-UnlockPickup-v0"]
FIRST = 1_000_000_000
SMALL = dict(layers="0,8,16;4,8", intermediate_dim=16, router_dim=4, mission_dim=8, word_dim=4)


def new_policy(**changes):
    torch.manual_seed(0)
    return MopForActionPrediction(MopConfig(**SMALL | changes)).eval()


@pytest.fixture(scope="module")
def policy():
    """Knows by heart what the bot does in some episodes, so that it goes through all phases of them."""
    played = []
    for level, seed in itertools.product(LEVELS, range(FIRST, FIRST + 3)):
        player = LevelPlayer(level)
        player.begin(seed)
        steps, done = [], False
        while not done:
            steps.append((player.observation, player.label()))
            _, done = player.act(player.label())
        played.append(steps)
    return learn(new_policy(), played)


def learn(policy, played):
    """Trains until episodes, lists of observations and actions, are known by heart."""
    longest = max(map(len, played))
    padded = [steps + [(steps[-1][0], -100)] * (longest - len(steps)) for steps in played]
    missions = [steps[0][0]["mission"] for steps in played]
    batch = {
        "images": torch.tensor(np.array([[seen["image"] for seen, _ in steps] for steps in padded])),
        "directions": torch.tensor([[seen["direction"] for seen, _ in steps] for steps in padded]),
        "mission_index": torch.arange(len(played))[:, None].expand(-1, longest),
        "labels": torch.tensor([[label for _, label in steps] for steps in padded]),
    }
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2)
    for _ in range(300):
        reached = policy(**batch, **policy.prepare_missions(missions)).loss
        if reached < 0.02:
            break
        optimizer.zero_grad()
        reached.backward()
        optimizer.step()
    assert reached < 0.02, reached
    return policy


@pytest.fixture(scope="module")
def records(policy):
    # One episode of each level is new to it.
    return record_pathways(policy, LEVELS, 4)


def use_of(*weights, groups=None):
    """A profile, of a table of tasks by experts for each layer."""
    layers = [np.array(layer, dtype=float) for layer in weights]
    return ExpertUse(groups or list(range(len(layers[0]))), np.ones(len(layers[0]), dtype=int), layers)


def random_use(seed, tasks=4, experts=(3, 2)):
    generator = np.random.default_rng(seed)
    return use_of(*(generator.dirichlet(np.ones(size), tasks) for size in experts))


@pytest.mark.parametrize("level", LEVELS)
def test_every_step_is_that_of_a_loop_that_a_user_writes(policy, records, level):
    part = records.of_task(level)
    environment, row = gymnasium.make(level), 0
    for seed in range(FIRST, FIRST + 4):
        observation, _ = environment.reset(seed=seed)
        world, bot, taken = environment.unwrapped, BabyAIBot(environment.unwrapped), None
        state, done, number = None, False, 0
        while not done:
            step = part.steps[row]
            actions, state, layers = policy.act([observation], state, output_router_weights=True)
            for recorded, weights in zip(part.weights, layers, strict=True):
                np.testing.assert_allclose(recorded[row], weights[0], atol=1e-5)
            assert (step["seed"], step["step"], step["action"]) == (seed, number, actions.item())
            assert (step["x"], step["y"]) == tuple(world.agent_pos)
            carried = f"{world.carrying.color} {world.carrying.type}" if world.carrying else NOTHING
            assert records.carried[step["carried"]] == carried
            if bot is not None:
                bot = watched(bot, taken)
            assert records.phases[step["phase"]] == (phase_of(bot.stack[-1]) if bot and bot.stack else NO_PHASE)
            taken = actions.item()
            observation, _, terminated, truncated, _ = environment.step(taken)
            done, number, row = terminated or truncated, number + 1, row + 1
    assert row == len(part.steps)


def phase_of(subgoal):
    return "Explore" if subgoal.is_exploratory() else type(subgoal).__name__.removesuffix("Subgoal")


def watched(bot, action):
    """Minigrid's own bot after it has seen an action; nobody where it gave up."""
    try:
        bot.replan(action)
    except Exception:
        return None
    return bot


def test_a_policy_that_acts_like_the_bot_goes_through_its_phases(records):
    assert [episode.success for episode in records.episodes[:3] + records.episodes[4:7]] == [True] * 6
    unlocking = records.select((records.steps["task"] == 1) & (records.steps["seed"] < FIRST + 3))
    done = {records.phases[step["phase"]]: ACTIONS[step["action"]] for step in unlocking.steps}
    assert done.items() >= {"Pickup": "pickup", "Open": "toggle"}.items()
    held = [records.carried[step["carried"]] for step in unlocking.steps if ACTIONS[step["action"]] == "toggle"]
    assert held and all(thing.endswith(" key") for thing in held)
    assert records.grids == [(8, 8), (11, 6)] and records.rooms == [1, 2]


def straight_to_a_box(level):
    """The first seed with a box straight ahead, and what is seen and done on the way to it and when opening it."""
    for seed in itertools.count(FIRST):
        player, steps = LevelPlayer(level, with_bot=False), []
        player.begin(seed)
        # The cell in front of the agent is empty, or a box: minigrid's codes 1 and 7.
        while (ahead := player.observation["image"][3, 5, 0]) in (1, 7):
            steps.append((player.observation, ACTIONS.index("toggle" if ahead == 7 else "forward")))
            player.act(steps[-1][1])
            if ahead == 7:
                return seed, steps


def test_a_bot_that_has_given_up_has_no_phase_any_more():
    # Without the box that the policy has opened, minigrid's bot has no plan.
    seed, steps = straight_to_a_box("BabyAI-GoToLocal-v0")
    opener = learn(new_policy(), [steps])
    recorded = record_pathways(opener, ["BabyAI-GoToLocal-v0"], 1, first_seed=seed)
    phases = [recorded.phases[phase] for phase in recorded.steps["phase"]]
    assert len(phases) > len(steps) and NO_PHASE not in phases[: len(steps)]
    assert set(phases[len(steps) :]) == {NO_PHASE}


def test_the_bot_that_watches_changes_nothing(policy, records):
    asked = [(level, FIRST + index) for level in LEVELS for index in range(4)]
    played = run_episodes(asked, PolicyPlayer(policy, PlayOptions()), 6)
    assert sorted(played, key=lambda episode: asked.index((episode.level, episode.seed))) == records.episodes
    assert sum(episode.length for episode in records.episodes) == len(records.steps)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_how_many_play_at_once_changes_nothing(policy, records, num_envs):
    others = record_pathways(policy, LEVELS, 4, num_envs=num_envs)
    assert others.episodes == records.episodes
    for name in ("seed", "step", "x", "y", "action"):
        assert (others.steps[name] == records.steps[name]).all()
    np.testing.assert_allclose(others.weights[0], records.weights[0], atol=1e-5)


def test_entropy_is_of_the_distribution_over_the_actions(policy, records):
    assert (records.steps["entropy"] >= 0).all() and (records.steps["entropy"] <= np.log(7)).all()
    sure = new_policy()
    with torch.no_grad():
        sure.action_head.bias[2] = 100
    assert record_pathways(sure, LEVELS[:1], 1).steps["entropy"].max() < 1e-6


def test_a_policy_that_is_recorded_is_left_as_it_was(policy):
    random_state = torch.get_rng_state()
    policy.train()
    record_pathways(policy, LEVELS[:1], 1)
    assert policy.training and torch.equal(torch.get_rng_state(), random_state)
    policy.eval()


@pytest.mark.parametrize(
    ("policy_type", "levels", "episodes", "message"),
    [
        pytest.param("gru", LEVELS, 1, "no routers", id="baseline"),
        pytest.param("pathways", ["BabyAI-GoToRedBal-v0"], 1, "did you mean BabyAI-GoToRedBall-v0", id="level"),
        pytest.param("pathways", LEVELS, 0, "num_episodes is 0", id="no_episodes"),
    ],
)
def test_what_cannot_be_recorded_is_refused(policy_type, levels, episodes, message):
    config = MopConfig(**SMALL)
    config = config if policy_type == "pathways" else config.matched_gru()
    with pytest.raises(ValueError, match=message):
        record_pathways(MopForActionPrediction(config), levels, episodes)


@pytest.mark.parametrize("by", ["task", "phase", "cell", "carried", "action", ("task", "phase"), ("cell", "carried")])
def test_use_averaged_over_groups_is_the_use_in_all_steps(records, by):
    use = expert_use(records, by)
    assert len(set(use.groups)) == len(use.groups) and use.steps.sum() == len(records.steps)
    for layer, all_steps in zip(use.weights, records.weights, strict=True):
        np.testing.assert_allclose(layer.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(use.steps @ layer / use.steps.sum(), all_steps.mean(axis=0, dtype=float), rtol=1e-5)


def test_use_in_a_group_is_that_of_its_steps_alone(records):
    both, task = expert_use(records, ("task", "phase")), records.of_task(LEVELS[1])
    alone = expert_use(task, "phase")
    for phase, weights in zip(alone.groups, alone.weights[0], strict=True):
        np.testing.assert_allclose(both.weights[0][both.groups.index((LEVELS[1], phase))], weights)
    cells = expert_use(task, "cell")
    x, y = cells.groups[0]
    there = (task.steps["x"] == x) & (task.steps["y"] == y)
    np.testing.assert_allclose(cells.weights[1][0], task.weights[1][there].mean(axis=0, dtype=float))
    with pytest.raises(ValueError, match="steps are grouped by task, phase, cell"):
        expert_use(records, "colour")


@pytest.mark.parametrize("normalize", [True, False])
def test_complexity_is_the_mean_usage_cost_of_a_task(normalize):
    policy = new_policy(normalize_routing_cost=normalize)
    recorded = record_pathways(policy, LEVELS, 2)
    for level, measured in learned_pathway_complexity(recorded).items():
        part = recorded.of_task(level)
        costs = policy.usage_cost(tuple(map(torch.from_numpy, part.weights)))
        assert measured["usage_cost"] == pytest.approx(costs.mean().item(), rel=1e-5)
        assert measured["steps"] == len(part.steps)
        sizes = [np.array(layer) ** 2.0 for layer in recorded.expert_sizes]
        by_hand = sum((weights @ cost).mean() for weights, cost in zip(part.weights, sizes, strict=True))
        assert measured["complexity"] == pytest.approx(by_hand, rel=1e-5)
        assert measured["share"] == pytest.approx(by_hand / (16**2 + 8**2), rel=1e-5)


def test_without_a_choice_there_is_no_complexity():
    recorded = record_pathways(new_policy(layers="8;4"), LEVELS[:1], 1)
    (measured,) = learned_pathway_complexity(recorded).values()
    assert measured["complexity"] == measured["share"] == 0
    assert pathway_distinctness(expert_use(recorded, "task"))["divergence"] is None


def test_pathways_that_share_no_expert_differ_by_one_bit_and_equal_ones_by_nothing():
    apart = pathway_distinctness(use_of([[1, 0], [0, 1]], [[0.3, 0.7], [0.3, 0.7]]))
    assert [layer["divergence"] for layer in apart["layers"]] == pytest.approx([1, 0])
    assert apart["divergence"] == pytest.approx(0.5)
    np.testing.assert_allclose(apart["between"], [[0, 0.5], [0.5, 0]])
    half = pathway_distinctness(use_of([[1, 0], [0.5, 0.5]]))["divergence"]
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert half == pytest.approx(entropy - 0.5)


def test_distinctness_is_the_mean_over_the_pairs_of_tasks():
    measured = pathway_distinctness(random_use(0))
    between = np.array(measured["between"])
    pairs = [between[one, other] for one, other in itertools.combinations(range(4), 2)]
    assert measured["divergence"] == pytest.approx(np.mean(pairs))
    assert (between == between.T).all() and (between >= 0).all() and (between <= 1).all()


def test_the_order_of_experts_and_tasks_matters_to_no_measure():
    uses = [random_use(seed) for seed in range(3)]

    def turned(use):
        return replace(use, weights=[layer[::-1, ::-1] for layer in use.weights])

    assert pathway_distinctness(turned(uses[0]))["divergence"] == pytest.approx(
        pathway_distinctness(uses[0])["divergence"]
    )
    before, after = routing_consistency(uses), routing_consistency([turned(use) for use in uses])
    for one, other in zip(before["layers"], after["layers"], strict=True):
        assert one == pytest.approx(other)


def test_a_checkpoint_is_consistent_with_itself(records):
    use = expert_use(records, "task")
    same = routing_consistency([use, use, use])
    assert same["pairs"] == 3 and [row["layer"] for row in same["layers"]] == [0, 1, "all"]
    for row in same["layers"]:
        assert row["correlation"] == pytest.approx(1) == row["task_specific"]


def test_a_preference_that_all_tasks_share_is_consistent_but_not_special_to_tasks():
    common = use_of([[0.7, 0.2, 0.1]] * 3)
    (row, everything) = routing_consistency([common, common])["layers"]
    assert row["correlation"] == row["exchanged_tasks"] == pytest.approx(1)
    assert row["task_specific"] is None
    assert everything["correlation"] == row["correlation"]


def test_tasks_that_are_exchanged_correlate_less_where_tasks_differ():
    special = use_of([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    row = routing_consistency([special, special])["layers"][0]
    assert row["correlation"] == pytest.approx(1)
    assert row["exchanged_tasks"] == pytest.approx(-0.5)


def test_only_checkpoints_of_the_same_layers_and_tasks_are_compared():
    assert routing_consistency([random_use(0)]) is None
    for other in (random_use(1, experts=(3, 3)), random_use(1, tasks=5)):
        with pytest.raises(ValueError, match="other tasks or layers"):
            routing_consistency([random_use(0), other])


def run_folder(folder, losses, task_names=("task",), every=10):
    folder.mkdir(parents=True)
    history = [{"step": every * (index + 1), "action_loss": loss} for index, loss in enumerate(losses)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 5, "eval_loss": 0.0}]}))
    (folder / "config.json").write_text(json.dumps({"task_names": list(task_names)}))
    return TrainingRun.read(folder)


def test_difficulty_is_the_log_of_the_median_updates_until_the_loss_stays_below(tmp_path):
    curves = {"early": [0.2, 0.1, 0.1], "dip": [0.1, 0.9, 0.2], "late": [0.9, 0.9, 0.1], "never": [0.9, 0.1, 0.9]}
    runs = {name: run_folder(tmp_path / name, losses) for name, losses in curves.items()}
    assert {name: run.updates_below(0.25) for name, run in runs.items()} == {
        "early": (10, True),
        "dip": (30, True),
        "late": (30, True),
        "never": (30, False),
    }
    measured = task_difficulty([runs["early"], runs["late"], runs["never"]], 0.25)["task"]
    assert measured["difficulty"] == pytest.approx(np.log(30))
    assert (measured["updates"], measured["unreached"]) == ([10, 30, 30], 1)


def test_a_run_is_read_from_its_folder_or_from_its_last_checkpoint(tmp_path):
    run_folder(tmp_path / "run" / "checkpoint-90", [0.9])
    run_folder(tmp_path / "run" / "checkpoint-100", [0.9, 0.1])
    assert TrainingRun.read(tmp_path / "run").updates.tolist() == [10, 20]
    assert TrainingRun.read(tmp_path / "run" / "checkpoint-90").updates.tolist() == [10]
    with pytest.raises(ValueError, match="is no run of train_babyai.py"):
        TrainingRun.read(tmp_path)
    with pytest.raises(ValueError, match="learned 2 tasks"):
        task_difficulty([run_folder(tmp_path / "two", [0.1], ["one", "other"])])


def test_rank_correlation_sees_only_the_order():
    values = np.random.default_rng(0).normal(size=9)
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -(values**3)) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_self_sufficiency_starts_from_all_experts_and_ends_with_the_lesion(policy):
    episodes = HeldOutEpisodes(LEVELS, 2, FIRST)
    rows = self_sufficiency(policy, episodes, [0.4])
    ways = [(row["weight_threshold"], row["lesion_largest"]) for row in rows if row["level"] == ALL_LEVELS]
    assert ways == [(0.0, False), (0.4, False), (None, True)]
    assert [row["success"] for row in rows[:3]] == [row["success"] for row in episodes.play(policy)]
