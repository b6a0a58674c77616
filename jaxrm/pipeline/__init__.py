"""Several stages in one config."""
