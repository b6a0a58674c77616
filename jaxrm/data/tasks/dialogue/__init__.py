"""The dialogue task."""
