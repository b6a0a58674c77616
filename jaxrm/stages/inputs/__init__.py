"""Data of a stage, from files to batches."""
