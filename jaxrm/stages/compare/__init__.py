"""Policies compared on prompts, by judges."""
