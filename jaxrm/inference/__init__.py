"""Models and runs opened, sampled from and scored: what commands, stages and notebooks share."""
