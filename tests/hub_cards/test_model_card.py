"""Model cards are complete, and broken ones are refused before they reach the Hub."""

import pytest
from huggingface_hub import ModelCard, ModelCardData

from mixturekit.hub_cards import check_model_card, render_model_card

METADATA = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["mixturekit"],
}


def card(text="A model.", **changes):
    metadata = {name: value for name, value in {**METADATA, **changes}.items() if value is not None}
    return ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text}\n")


def test_a_complete_card_passes_and_survives_a_round_trip():
    complete = card()
    check_model_card(complete)
    assert ModelCard(str(complete)).data.to_dict() == complete.data.to_dict()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        pytest.param(card(license=None), "lacks the metadata license", id="no_licence"),
        pytest.param(card(license="apache"), "The licence 'apache' is unknown", id="unknown_licence"),
        pytest.param(card(licence="mit"), "unknown metadata: licence", id="misspelt_key"),
        pytest.param(card("Perplexity None."[:-1]), "'None' in its text", id="missing_fact"),
        pytest.param(card("| loss | nan |"), "'nan' in its text", id="not_a_number"),
    ],
)
def test_a_broken_card_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        check_model_card(broken)


def test_a_fact_that_the_template_needs_is_named_when_it_is_missing():
    with pytest.raises(ValueError, match="'model_name' is undefined"):
        render_model_card("language_model", METADATA)
