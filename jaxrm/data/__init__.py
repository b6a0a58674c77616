"""From text to batches, in NumPy only."""
