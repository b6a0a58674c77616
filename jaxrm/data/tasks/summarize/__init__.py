"""The summarization task."""
