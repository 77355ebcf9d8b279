"""Model cards: filling a template, and refusing one that the Hub would show broken."""

from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent
REQUIRED = {"license", "library_name", "pipeline_tag", "tags"}
KNOWN = REQUIRED | {"base_model", "datasets", "language", "metrics", "model-index", "model_name"}
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "openrail", "other"}
LEFTOVERS = ("None", "[More Information Needed]", "nan", "{{")


def render_model_card(template: str, metadata: dict, **facts) -> ModelCard:
    """Fills `template` and checks the result.

    Args:
        template (`str`): Name of a template in this folder, such as `"language_model"`.
        metadata (`dict`): The card's metadata, as for `huggingface_hub.ModelCardData`.
        facts: What the template asks for.

    Raises:
        ValueError: If a fact is missing, or the card would be broken on the Hub.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=False
    )
    try:
        text = environment.get_template(f"{template}.md.jinja").render(
            card_data=ModelCardData(**metadata).to_yaml(), **facts
        )
    except jinja2.UndefinedError as error:
        raise ValueError(f"The card template {template!r} lacks a fact: {error}.") from error
    card = ModelCard(text)
    check_model_card(card)
    return card


def check_model_card(card: ModelCard) -> None:
    """Raises `ValueError` at the first thing in `card` that the Hub would refuse or show broken."""
    metadata = card.data.to_dict()
    missing, unknown = sorted(REQUIRED - metadata.keys()), sorted(metadata.keys() - KNOWN)
    if missing:
        raise ValueError(f"The model card lacks the metadata {', '.join(missing)}.")
    if unknown:
        raise ValueError(f"The model card has unknown metadata: {', '.join(unknown)}.")
    if metadata["license"] not in LICENSES:
        raise ValueError(
            f"The licence {metadata['license']!r} is unknown; choose one of {', '.join(sorted(LICENSES))}."
        )
    words = card.text.replace("|", " ").replace("`", " ").split()
    for leftover in LEFTOVERS:
        if leftover in words or (" " in leftover and leftover in card.text):
            raise ValueError(f"The model card has {leftover!r} in its text, so a fact was left out.")
