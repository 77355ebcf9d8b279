"""Templates say what they were given and nothing else; what they lack is named."""

import pytest

from mixturekit.hub_cards import model_card, render_dataset_card, render_model_card

TEMPLATES = sorted(path.name for path in model_card.TEMPLATES.glob("*.md.jinja"))
METADATA = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["mixturekit"],
}
LANGUAGE_MODEL = {
    "model_name": "a",
    "repository": "user/a",
    "revision": None,
    "parameters": "1,000",
    "num_experts": 4,
    "experts_per_token": 1,
    "expert_kind": "GRU",
    "is_recurrent": True,
    "generate_options": "",
    "prompt": "The",
    "dataset_name": "stories",
    "vocab_size": "400",
    "steps": "",
    "loss": "",
    "perplexity": "",
    "architecture": {"layers": 2},
    "training": {"updates": 3},
    "routing": [],
    "pictures": {},
    "command": None,
    "licence": "apache-2.0",
    "citations": [],
}


def test_every_system_and_data_set_has_a_template():
    names = {"language_model", "pathway_policy", "ppo_policy", "demonstrations", "completions"}
    assert names <= {name.removesuffix(".md.jinja") for name in TEMPLATES}


def test_what_was_not_measured_has_no_section():
    text = str(render_model_card("language_model", METADATA, **LANGUAGE_MODEL))
    for absent in ("## Results", "## Routing", "## Reproduce", "## Sources", "![", "perplexity", "revision="):
        assert absent not in text, absent


def test_what_was_measured_is_told():
    measured = {"perplexity": "12.34", "loss": "2.5128", "steps": "3", "revision": "0" * 40, "command": "run it"}
    routing = [{"layer": "0", "entropy, nats": "1.2"}]
    text = str(render_model_card("language_model", METADATA, **{**LANGUAGE_MODEL, **measured, "routing": routing}))
    for present in (
        "12.34",
        "2.5128",
        f'revision = "{"0" * 40}"',
        "run it",
        "| layer | entropy, nats |",
        "| 0 | 1.2 |",
    ):
        assert present in text, present


def test_a_fact_that_a_template_needs_is_named_when_it_is_missing():
    with pytest.raises(ValueError, match="'model_name' is undefined"):
        render_model_card("language_model", METADATA)
    with pytest.raises(ValueError, match="'demonstrations' lacks a fact"):
        render_dataset_card("demonstrations", {"license": "mit"})


def test_a_fact_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'None' in its text"):
        render_model_card("language_model", METADATA, **{**LANGUAGE_MODEL, "parameters": None})
