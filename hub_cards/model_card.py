"""Cards of models and data sets: filling a template, and refusing what the Hub would show broken."""

from pathlib import Path

import jinja2
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData, RepoCard

from .card_validation import check_model_card

TEMPLATES = Path(__file__).parent


def render_model_card(template: str, metadata: dict, **facts) -> ModelCard:
    """Fills `template` and checks the result.

    Args:
        template (`str`): Name of a template in this folder, such as `"language_model"`.
        metadata (`dict`): The card's metadata, as for `huggingface_hub.ModelCardData`.
        facts: What the template asks for.

    Raises:
        ValueError: If a fact is missing, or the card would be broken on the Hub.
    """
    return _render(template, ModelCard, ModelCardData(**metadata), "model", facts)


def render_dataset_card(template: str, metadata: dict, **facts) -> DatasetCard:
    """Fills `template` and checks the result, as [`render_model_card`] does.

    Args:
        template (`str`): Name of a template in this folder, such as `"demonstrations"`.
        metadata (`dict`): The card's metadata, as for `huggingface_hub.DatasetCardData`.
        facts: What the template asks for.
    """
    return _render(template, DatasetCard, DatasetCardData(**metadata), "dataset", facts)


def _render(template: str, card_class: type, metadata, kind: str, facts: dict) -> RepoCard:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        # A fact that is missing would be empty text otherwise.
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    try:
        text = environment.get_template(f"{template}.md.jinja").render(card_data=metadata.to_yaml(), **facts)
    except jinja2.UndefinedError as error:
        raise ValueError(f"The card template {template!r} lacks a fact: {error}.") from error
    check_model_card(text, kind=kind)
    return card_class(text)
