"""One file an algorithm, on one step builder."""
