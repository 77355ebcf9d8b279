"""Cards of models and data sets: filling a template, and refusing what the Hub would show broken."""

from pathlib import Path

import jinja2
import yaml
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
    return _render(template, ModelCard, ModelCardData, metadata, facts)


def render_dataset_card(template: str, metadata: dict, **facts) -> DatasetCard:
    """Fills `template` and checks the result, as [`render_model_card`] does.

    Args:
        template (`str`): Name of a template in this folder, such as `"demonstrations"`.
        metadata (`dict`): The card's metadata, as for `huggingface_hub.DatasetCardData`.
        facts: What the template asks for.
    """
    return _render(template, DatasetCard, DatasetCardData, metadata, facts)


def _render(template: str, card_class: type, data_class: type, metadata: dict, facts: dict) -> RepoCard:
    try:
        card_data = data_class(**metadata).to_yaml()
    # The library trusts the shape of what it is given.
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata cannot be written: {str(error).splitlines()[0]}.") from error
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
        text = environment.get_template(f"{template}.md.jinja").render(card_data=card_data, **facts)
    except jinja2.UndefinedError as error:
        raise ValueError(f"The card template {template!r} lacks a fact: {error}.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"The card template {template!r} has another use for a fact: {error}.") from error
    check_model_card(text, kind="model" if card_class is ModelCard else "dataset")
    return card_class(text)
