"""The best-of-n stage."""
