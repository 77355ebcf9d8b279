"""Model-card templates and the code that fills and validates them."""
