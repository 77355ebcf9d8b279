"""Card templates of models and data sets, the code that fills and validates them, and what may go to the Hub."""

from .card_validation import card_problems, check_model_card
from .model_card import render_dataset_card, render_model_card

__all__ = ["card_problems", "check_model_card", "render_dataset_card", "render_model_card"]
