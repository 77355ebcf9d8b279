"""Results of later evaluations go onto the card, with their pictures, and whole into the repository."""

import json
import shutil

import pytest

from mixturekit.hub_cards import card_problems

LANGUAGE = ("--tasks", "babi2", "--num_questions", 10, "--num_recurrences", 1, 2, "--use_cpu")


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of a run, whose card may change."""
    ignored = shutil.ignore_patterns("checkpoint-*", "runs")
    return lambda system: shutil.copytree(runs[system], tmp_path / system, ignore=ignored)


def check(repository, tmp_path):
    """The card, if it is in order with the files beside it."""
    for name, content in repository.files.items():
        path = tmp_path / "unpacked" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    card = repository.files["README.md"].decode()
    assert card_problems(card, tmp_path / "unpacked") == []
    return card


def test_scores_of_a_language_model(hub, owner, copy, tmp_path):
    folder, results = copy("more"), tmp_path / "scores"
    owner.run_recipe("evaluate_more.py", "--model_name_or_path", folder, *LANGUAGE, "--output_dir", results)
    owner.push("--model_name_or_path", folder, "--evaluation", results, "--repo_id", "owner/scored")
    card = check(hub.model("owner/scored"), tmp_path)
    assert "| babi2 | ranking accuracy | 10 |" in card and "](figures/depth_sweep.png)" in card
    assert "ranking accuracy, 2 recurrences" in card.split("---\n")[1]
    report = json.loads(hub.model("owner/scored").files["evaluation/scores.json"])
    assert report["results"] == json.loads((results / "eval_results.json").read_text())["results"]


def test_a_model_of_the_hub_is_asked_as_it_was_trained(owner, copy, tmp_path):
    folder = copy("more")
    path = folder / "task_arguments.json"
    trained = json.loads(path.read_text())
    # None of them is a default.
    unusual = {"max_facts": 5, "reverse_answer": False, "sequence_length": 96, "validation_fraction": 0.3}
    path.write_text(json.dumps(trained | unusual))
    owner.push("--model_name_or_path", folder, "--repo_id", "owner/asked")
    owner.run_recipe("evaluate_more.py", "--model_name_or_path", "owner/asked", *LANGUAGE, "--output_dir", tmp_path)
    report = json.loads((tmp_path / "eval_results.json").read_text())
    asked = report["settings"] | report["tasks"]
    assert {name: asked[name] for name in unusual} == unusual


def test_scores_that_are_on_the_card_already_stay_there(hub, owner, copy, tmp_path):
    folder, results = copy("more"), tmp_path / "scores"
    options = (*LANGUAGE, "--update_model_card", "--output_dir", results)
    owner.run_recipe("evaluate_more.py", "--model_name_or_path", folder, *options)
    owner.push("--model_name_or_path", folder, "--repo_id", "owner/kept")
    card = check(hub.model("owner/kept"), tmp_path)
    assert card.count("## Evaluation") == 1 and "ranking accuracy, 2 recurrences" in card.split("---\n")[1]
    assert 'from_pretrained("owner/kept"' in card


def test_episodes_of_a_policy(hub, owner, copy, tmp_path):
    folder, results = copy("mop"), tmp_path / "episodes"
    options = ("--num_episodes", 4, "--lesion", "--self_sufficiency", "--weight_thresholds", 0.4, "--use_cpu")
    options += ("--first_seed", 7000, "--output_dir", results)
    owner.run_recipe("evaluate_babyai.py", "--model_name_or_path", folder, *options)
    owner.push("--model_name_or_path", folder, "--evaluation", results, "--repo_id", "owner/played")
    card = check(hub.model("owner/played"), tmp_path)
    assert "| BabyAI-GoToRedBall-v0 | greedy, without the largest experts | 4 |" in card
    assert "Held-out episodes from seed 7,000" in card
    # The headline is of the policy as it is, and not of what is left of it.
    assert card.split("---\n")[1].count("type: success") == 1 and "of 4 held-out episodes" in card


@pytest.fixture
def solved(copy):
    """The folder of a policy, and how to say of its evaluations that they were of GSM8K."""
    folder = copy("ppo")

    def claim(when, place=None, **settings):
        report = json.loads((folder / f"eval_{when}" / "eval_results.json").read_text())
        assert report["settings"]["num_problems"] == 6
        report["settings"] |= {"dataset_name": "openai/gsm8k", "num_problems": None, **settings}
        place = place or folder / f"eval_{when}"
        place.mkdir(exist_ok=True)
        (place / "eval_results.json").write_text(json.dumps(report))

    return folder, claim


def test_solutions_of_a_policy_to_problems_of_the_hub(hub, owner, solved, tmp_path):
    folder, claim = solved
    claim("after", tmp_path / "test")
    owner.push("--model_name_or_path", folder, "--evaluation", tmp_path / "test", "--repo_id", "owner/solved")
    card = check(hub.model("owner/solved"), tmp_path)
    assert "| test | openai/gsm8k | greedy, pass@1 | exact number | 6 |" in card
    entries = hub.model("owner/solved").files[".eval_results/gsm8k.yaml"].decode()
    assert "id: openai/gsm8k" in entries and "n = 6" in entries


@pytest.mark.parametrize(
    ("when", "settings"),
    [("before", {}), ("after", {"split": "train[:100]"}), ("after", {"num_problems": 6})],
    ids=["of the policy before it learned", "of other problems", "of a few problems"],
)
def test_what_is_no_result_on_the_benchmark_is_on_no_leaderboard(hub, owner, solved, tmp_path, when, settings):
    folder, claim = solved
    claim(when, **settings)
    name = f"owner/unranked-{'-'.join([when, *settings])}"
    owner.push("--model_name_or_path", folder, "--repo_id", name)
    card = check(hub.model(name), tmp_path)
    assert f"| {when} | openai/gsm8k | greedy, pass@1 | exact number | 6 |" in card
    assert ".eval_results/gsm8k.yaml" not in hub.model(name).files
    assert ("split: train[:100]" in card.split("---\n")[1]) == ("split" in settings)
