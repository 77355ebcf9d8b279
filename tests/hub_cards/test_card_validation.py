"""What the Hub would refuse or show broken is told before anything is sent, each thing in a sentence."""

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from mixturekit.hub_cards import card_problems, check_model_card

METADATA = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["mixturekit"],
}


def card(text="# A model\n\nIt is small.", **changes):
    metadata = {name: value for name, value in {**METADATA, **changes}.items() if value is not None}
    return ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text}\n")


def with_text(text):
    return card(f"# A model\n\n{text}")


def index(**changes):
    metric = {"type": "accuracy", "value": 0.5, **changes}
    result = {"task": {"type": "text-generation"}, "dataset": {"type": "x", "name": "x"}, "metrics": [metric]}
    metadata = {**METADATA, "model-index": [{"name": "a", "results": [result]}]}
    return f"---\n{yaml.safe_dump(metadata)}---\n# A\n"


def test_a_complete_card_has_no_problem_and_survives_a_round_trip():
    complete = card(base_model="user/base", base_model_relation="finetune", datasets=["user/data"])
    assert card_problems(complete) == []
    assert ModelCard(str(complete)).data.to_dict() == complete.data.to_dict()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (card(license=None), "The card lacks the metadata license."),
        (card(license="apache"), "The licence 'apache' is unknown; the Hub knows apache-2.0"),
        (card(license="other"), "The licence is other, so license_name and license_link have to say which."),
        (card(licence="mit"), "The card has unknown metadata: licence; is license meant?"),
        (card(base_modle="a/b"), "The card has unknown metadata: base_modle; is base_model meant?"),
        (card(pipeline_tag="text-generator"), "The pipeline_tag 'text-generator' is unknown."),
        (card(base_model="/models/base"), "The metadata base_model has '/models/base', which is no repository"),
        (card(base_model_relation="finetune"), "The base_model_relation 'finetune' needs a base_model"),
        (card(tags=[]), "The metadata tags is empty."),
    ],
)
def test_metadata_that_the_hub_does_not_know_are_named(broken, message):
    (problem,) = card_problems(broken)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (card("It is small."), "The card has no heading."),
        (with_text("Perplexity None."), "The card has 'None' in its text, so a fact was left out."),
        (with_text("| loss | nan |\n| --- | --- |"), "The card has 'nan' in its text, so a fact was left out."),
        (with_text("[More Information Needed]"), "The card has '[More Information Needed]' in its text"),
        (with_text("Trained on <data set>."), "The card has '<data set>' in its text"),
        (with_text("Trained on {{ data }}."), "The card has '{{' of a template in its text."),
        (with_text('```python\nload("None")\n```'), 'The card has "None" in its code, so a fact was left out.'),
        (with_text("```python\nload(\n```"), "A block of Python code is broken: '(' was never closed, line 1."),
        (with_text("```python\nload()\n"), "A block of code does not end."),
        (with_text("| a | b |\n| --- | --- |\n| 1 |"), "A row of a table has 1 cells and not 2: | 1 |"),
    ],
)
def test_text_that_would_look_broken_is_quoted(broken, message):
    assert any(problem.startswith(message) for problem in card_problems(broken))


@pytest.mark.parametrize(
    "fine",
    [
        with_text("Call it with `state=None`."),
        with_text("```python\nstate, done = None, False\n```"),
        with_text("| a |\n| --- |\n| 1 |\n\n| b | c |\n| --- | --- |\n| 1 | 2 |"),
        with_text("Shares from 0 to inf-ormation."[:-12]),
    ],
)
def test_text_that_only_looks_like_a_leftover_passes(fine):
    check_model_card(fine)


@pytest.mark.parametrize("value", ["0.5", float("nan"), None, True])
def test_a_result_that_is_no_number_is_no_result(value):
    assert card_problems(index()) == []
    assert any("which is no figure" in problem for problem in card_problems(index(value=value)))


def test_a_model_index_that_cannot_be_read_is_told():
    content = str(card()).replace("tags:", "model-index:\n- name: a\n  results: nonsense\ntags:")
    assert any("cannot be read" in problem for problem in card_problems(content))


def test_metadata_that_are_no_yaml_are_told():
    (problem,) = card_problems("---\nlicense: [mit\n---\n# A\n")
    assert problem.startswith("The metadata cannot be read")


def test_links_lead_to_files_that_are_published(tmp_path):
    linked = with_text("![Curve](figures/curve.png) and [home](https://example.org) and [below](#limits)")
    assert card_problems(linked, tmp_path) == ["The card links to figures/curve.png, which is not there."]
    assert card_problems(linked) == []
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curve.png").write_bytes(b"")
    assert card_problems(linked, tmp_path) == []


def test_paths_of_one_machine_are_not_published(tmp_path):
    local = with_text("Load it from /home/somebody/out/model.")
    assert card_problems(local) == []
    assert card_problems(local, tmp_path) == [
        "The card has the path /home/somebody/out/model., which is of one machine."
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- value: 0.5\n", "cannot be read"),
        ("- dataset: {id: a/b, task_id: b}\n  value: high\n", "has the value 'high', which is no figure"),
    ],
)
def test_results_for_leaderboards_are_read_as_the_hub_does(tmp_path, content, message):
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "b.yaml").write_text(content)
    (problem,) = card_problems(card(), tmp_path)
    assert message in problem


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError) as refused:
        check_model_card(card("None", license="apache", pipeline_tag=None))
    for part in ("lacks the metadata pipeline_tag", "'apache' is unknown", "no heading", "'None' in its text"):
        assert part in str(refused.value)


def test_cards_of_data_sets_have_metadata_of_their_own():
    content = "---\nlicense: mit\npretty_name: Data\ntags: [a]\nsize_categories: [n<1K]\n---\n# Data\n"
    assert card_problems(content, kind="dataset") == []
    assert any("lacks the metadata library_name" in problem for problem in card_problems(content))
