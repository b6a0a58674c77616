"""The safety task."""
