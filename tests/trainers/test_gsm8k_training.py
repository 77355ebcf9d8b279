"""What a run of reinforcement learning on word problems is made of, before it begins."""

import json

import pytest

from mixturekit.trainers.gsm8k_training import load_splits
from mixturekit.trainers.gsm8k_training_config import GSM8KDataArguments

PROBLEMS = [{"question": f"How many are {number} and 1?", "answer": f"#### {number + 1}"} for number in range(3)]


@pytest.fixture
def problem_file(tmp_path, monkeypatch):
    """A file in the home folder, named as a user does in YAML, where no shell puts the folder in place of the `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return "~/problems.jsonl"


def test_generated_problems_are_judged_by_others_if_these_are_named(problem_file):
    train, held_out = load_splits(GSM8KDataArguments("generated", problem_file, num_train_problems=5))
    assert len(train) == 5 and held_out.to_list() == PROBLEMS
    train, held_out = load_splits(GSM8KDataArguments("generated", num_train_problems=5, num_eval_problems=4))
    assert len(held_out) == 4 and not set(train["question"]) & set(held_out["question"])


def test_generated_problems_judge_what_was_learned_from_others(problem_file):
    train, held_out = load_splits(GSM8KDataArguments(problem_file, "generated"))
    assert train.to_list() == PROBLEMS and len(held_out) == 200


def test_one_file_is_not_judged_by_itself(problem_file):
    with pytest.raises(ValueError, match="~/problems.jsonl is one file: name other problems to judge by"):
        load_splits(GSM8KDataArguments(problem_file))
