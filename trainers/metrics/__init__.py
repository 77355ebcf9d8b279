"""Metrics as modules of `evaluate`: `evaluate.load("trainers/metrics/answer_accuracy.py")`."""
