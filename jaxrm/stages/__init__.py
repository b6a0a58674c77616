"""One file a stage: from a checked config to a finished run, in a straight line."""
