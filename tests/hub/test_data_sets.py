"""Demonstrations and completions on the Hub: data sets that load anywhere, with cards of what is in them."""

import json

import pytest

from mixturekit.hub_cards import card_problems

LEVELS = ("BabyAI-GoToRedBall-v0", "BabyAI-GoToLocal-v0")


@pytest.fixture(scope="module")
def demonstrations(hub, owner):
    options = [option for level in LEVELS for option in ("--env_id", level)]
    options += ["--demonstrations", "generated", "--num_demonstrations", 12, "--repo_id", "owner/demonstrations"]
    assert f"{hub.url}/datasets/owner/demonstrations is there" in owner.push(*options)
    return hub.dataset("owner/demonstrations")


@pytest.fixture(scope="module")
def solutions(hub, owner, runs):
    owner.push("--completions", runs["ppo"] / "eval_after", "--repo_id", "owner/solutions")
    return hub.dataset("owner/solutions")


def code_of(repository):
    return repository.files["README.md"].decode().split("```python\n")[1].split("```")[0]


def test_the_cards_are_in_order(demonstrations, solutions):
    for repository in (demonstrations, solutions):
        card = repository.files["README.md"].decode()
        assert card_problems(card, kind="dataset") == []
        assert f'load_dataset("{repository.name}"' in card


def test_demonstrations_load_where_nothing_of_this_is_installed(demonstrations, stranger):
    told = stranger.do(code_of(demonstrations))
    assert "go to" in told and "7, 7, 3)" in told
    rows = stranger.do("""
        from datasets import load_dataset
        print(len(load_dataset("owner/demonstrations", split="train")))
    """)
    assert rows.split()[-1] == "12"


def test_the_card_counts_what_is_there(demonstrations, stranger):
    lengths = stranger.do("""
        from datasets import load_dataset
        rows = load_dataset("owner/demonstrations", split="train")
        print(sum(map(len, rows["actions"])), sum(len(row["actions"]) for row in rows if "Local" in row["level"]))
    """).split()[-2:]
    card = demonstrations.files["README.md"].decode()
    assert f"12 episodes, {lengths[0]} steps" in card
    assert f"| {LEVELS[1]} | 6 | {lengths[1]} |" in card


def test_a_policy_learns_from_demonstrations_of_the_hub(demonstrations, owner, run_options, tmp_path):
    script, *options = run_options("mop")
    options[options.index("dagger")] = "bc"
    options += ["--demonstrations", "owner/demonstrations", "--output_dir", tmp_path / "out"]
    owner.run_recipe(script, *options)
    assert "| demonstrations | owner/demonstrations |" in (tmp_path / "out" / "README.md").read_text()


def test_solutions_load_with_the_verdicts_of_the_evaluation(solutions, stranger, runs):
    assert "of 6 are wrong" in stranger.do(code_of(solutions))
    report = json.loads((runs["ppo"] / "eval_after" / "eval_results.json").read_text())
    (row,) = [row for row in report["results"] if (row["metric"], row["grader"]) == ("pass@1", "exact")]
    right = stranger.do("""
        from datasets import load_dataset
        print(sum(load_dataset("owner/solutions", split="test")["exact"]))
    """)
    assert int(right.split()[-1]) == round(row["value"] * 6)


def test_solutions_are_under_the_licence_of_their_problems(hub, owner, runs, tmp_path):
    assert "license: apache-2.0\n" in _card_of_solutions(owner, runs, tmp_path, "generated")
    assert "license: mit\n" in _card_of_solutions(owner, runs, tmp_path, "openai/gsm8k")
    told = _card_of_solutions(owner, runs, tmp_path, "me/problems", may_fail=True)
    assert told.endswith("The solutions have the problems of me/problems in them: name their licence with --license.")
    card = _card_of_solutions(owner, runs, tmp_path, "me/problems", "--license", "cc-by-4.0")
    assert "license: cc-by-4.0\n" in card and "cc-by-4.0, as the problems are." in card


def _card_of_solutions(owner, runs, tmp_path, source, *options, may_fail=False):
    for path in (runs["ppo"] / "eval_after").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report = json.loads((tmp_path / "eval_results.json").read_text())
    report["settings"]["dataset_name"] = source
    (tmp_path / "eval_results.json").write_text(json.dumps(report))
    return owner.push("--completions", tmp_path, "--repo_id", "owner/new", "--dry_run", *options, may_fail=may_fail)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--completions", "nowhere"), "nowhere has no completions.jsonl: evaluate_gsm8k.py writes it."),
        (("--demonstrations", "generated", "--env_id", "BabyAI-Nowhere-v0"), "'BabyAI-Nowhere-v0' is no BabyAI level"),
        ((), "Give one of --model_name_or_path, --demonstrations and --completions."),
        (("--completions", "a", "--demonstrations", "b"), "Give one of"),
        (("--completions", "a", "--merge_adapter"), "are for models, not for data sets"),
    ],
)
def test_what_cannot_be_pushed_is_told_in_a_sentence(owner, options, message):
    told = owner.push("--repo_id", "owner/new", *options, may_fail=True)
    assert message in told and "\n" not in told
