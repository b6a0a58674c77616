"""The reward model stages."""
