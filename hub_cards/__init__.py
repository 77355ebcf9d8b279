"""Model-card templates and the code that fills and validates them."""

from .model_card import check_model_card, render_model_card

__all__ = ["check_model_card", "render_model_card"]
