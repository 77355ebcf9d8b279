"""Models whose experts are more than feed-forward layers."""
