"""The page shows what was measured, opens without a network, and says what it would need to show more."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mixturekit.modeling import MopConfig, MopForActionPrediction
from mixturekit.trainers.minigrid_fast_path import make_level
from mixturekit.trainers.pathway_analysis import (
    NO_PHASE,
    expert_use,
    learned_pathway_complexity,
    record_pathways,
    self_sufficiency,
)
from mixturekit.trainers.pathway_film import MAX_FRAMES, expert_colours, film_part, phase_colours, render_episode
from mixturekit.trainers.pathway_report import ALL_TASKS, pathway_findings, write_pathway_report
from mixturekit.trainers.policy_evaluation import HeldOutEpisodes

LEVELS = ["BabyAI-GoToObj-v0", "BabyAI-GoToLocal-v0", "BabyAI-UnlockPickup-v0"]
FIRST = 1_000_000_000
SECTIONS = [
    "Routing over an episode",
    "Expert use by task",
    "Expert use by subgoal phase",
    "Expert use by grid cell",
    "Learned pathway complexity",
    "Complexity and difficulty",
    "Routing consistency",
    "Distinctness of tasks",
    "Self-sufficiency and lesion",
]


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = MopConfig(layers="0,8,16;4,8", intermediate_dim=16, router_dim=4, mission_dim=8, word_dim=4)
    return MopForActionPrediction(config).eval()


@pytest.fixture(scope="module")
def records(policy):
    return record_pathways(policy, LEVELS, 2)


@pytest.fixture(scope="module")
def whole(policy, records):
    """Findings with all that can be given."""
    plays = self_sufficiency(policy, HeldOutEpisodes(LEVELS, 2, FIRST), [0.3])
    difficulty = {
        level: {"difficulty": 3.0 + index, "threshold": 0.25, "updates": [20, 30], "unreached": index % 2}
        for index, level in enumerate(LEVELS)
    }
    return pathway_findings(records, "policy <1>", {"other": expert_use(records, "task")}, difficulty, plays)


@pytest.fixture(scope="module")
def page(records, whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    write_pathway_report(records, whole, path)
    return path


def sections(page):
    """The text of each section, by its title."""
    found = re.findall(r"<section><h2>(.*?)</h2><p>(.*?)</p>(.*?)</section>", page.read_text(), re.DOTALL)
    return {title: (sentence, content) for title, sentence, content in found}


def picture(source):
    head, data = source.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_the_page_has_every_section_with_a_sentence_and_something_to_see(page):
    shown = sections(page)
    assert list(shown) == SECTIONS
    for title, (sentence, content) in shown.items():
        assert sentence.endswith(".") and "Missing" not in sentence, title
        assert "plotly" in content or "<table>" in content, title


def test_the_page_needs_no_network_and_names_are_escaped(page):
    text = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", text)
    assert "Pathways of policy &lt;1&gt;" in text


def test_everything_that_is_shown_is_in_the_numbers(page, whole, records):
    numbers = json.loads(page.with_name("pathways.json").read_text())
    assert numbers == json.loads(json.dumps(whole))
    assert numbers["complexity"] == learned_pathway_complexity(records)
    assert [row["group"] for row in numbers["use_by_task"]] == LEVELS
    assert list(numbers["use_by_phase"]) == [ALL_TASKS, *LEVELS]
    assert numbers["consistency"]["layers"][-1]["correlation"] == pytest.approx(1)
    assert numbers["complexity_and_difficulty"] is not None
    for level in LEVELS:
        steps = numbers["shown_episodes"][level]["steps"]
        own = records.steps["seed"] == numbers["shown_episodes"][level]["seed"]
        own &= records.steps["task"] == LEVELS.index(level)
        assert [step["weights"][0] for step in steps] == records.weights[0][own].tolist()
        assert [step["cell"] for step in steps] == np.stack([records.steps["x"], records.steps["y"]], 1)[own].tolist()


def test_tasks_of_one_room_share_a_map_and_each_has_its_own(whole, records):
    names = list(whole["use_by_cell"])
    assert names == ["one room of 8 by 8 cells: 2 tasks", *LEVELS]
    shared, *own, unlock = whole["use_by_cell"].values()
    assert (unlock["columns"], unlock["rows"]) == (11, 6)
    assert sum(cell["steps"] for cell in shared["cells"]) == sum(cell["steps"] for use in own for cell in use["cells"])


def test_what_was_not_given_is_named_with_the_option_that_gives_it(policy, tmp_path):
    records = record_pathways(policy, LEVELS[:1], 1)
    write_pathway_report(records, pathway_findings(records, "policy"), tmp_path / "report.html")
    shown = sections(tmp_path / "report.html")
    assert list(shown) == SECTIONS
    missing = {title: sentence for title, (sentence, _) in shown.items() if sentence.startswith("Missing:")}
    assert list(missing) == SECTIONS[5:]
    for title, option in zip(SECTIONS[5:8], ("--difficulty_runs", "--other_seeds", "--env_id"), strict=True):
        assert option in missing[title]


def test_a_solved_episode_is_shown_rather_than_another(records):
    episodes = [replace(episode, success=episode.seed == FIRST + 1) for episode in records.episodes]
    findings = pathway_findings(replace(records, episodes=episodes), "policy")
    assert {episode["seed"] for episode in findings["shown_episodes"].values()} == {FIRST + 1}
    nothing = pathway_findings(replace(records, episodes=[replace(one, success=False) for one in episodes]), "policy")
    assert {episode["seed"] for episode in nothing["shown_episodes"].values()} == {FIRST}


def test_frames_are_what_minigrid_renders_before_each_action():
    actions = ["forward", "left", "forward"]
    frames, mission = render_episode(LEVELS[1], FIRST, actions)
    world = make_level(LEVELS[1])
    world.reset(seed=FIRST)
    assert mission == world.mission and len(frames) == 3
    for frame, action in zip(frames, actions, strict=True):
        rendered = world.get_frame(tile_size=28).astype(int)
        # A palette of 48 colours does not keep every shade of the light.
        assert np.abs(picture(frame) - rendered).mean() < 6
        world.step(world.actions[action])


def test_a_long_episode_is_shown_from_its_beginning():
    step = {"action": "left", "phase": "Open", "carried": "red key", "entropy": 0.5, "weights": [[0.25, 0.75]]}
    episode = {"seed": FIRST, "steps": [step] * (MAX_FRAMES + 5)}
    part = film_part(LEVELS[0], episode, ["solved"], [[0, 8]])
    assert f'max="{MAX_FRAMES}"' in part and f"solved · the first {MAX_FRAMES} are shown" in part
    captions = json.loads(re.search(r"captions = (\[.*?\]), part", part).group(1))
    assert len(captions) == MAX_FRAMES
    assert captions[0] == "step 1: left · phase Open · carries red key · entropy of the actions 0.50 nats"


def test_larger_experts_are_darker_and_a_skip_is_grey():
    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)))

    skip, large, small, middle = expert_colours([0, 64, 8, 16])
    assert brightness(small) > brightness(middle) > brightness(large)
    assert skip.startswith("#") and len(set(expert_colours([8, 8, 8]))) == 3
    assert len(expert_colours([5])) == 1


def test_a_phase_has_the_same_colour_in_every_episode():
    one, other = phase_colours(["Open", "GoNextTo"]), phase_colours(["GoNextTo", NO_PHASE, "Later", "Open"])
    assert one.items() <= other.items()
    assert len(set(other.values())) == 4
