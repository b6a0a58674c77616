"""Training on batches that a data set gives: SFT, reward models and DPO."""
