"""Where token rewards come from."""
