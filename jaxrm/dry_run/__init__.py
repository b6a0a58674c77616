"""What a run would do, before it does it: all the checks of a config, and nothing else."""
