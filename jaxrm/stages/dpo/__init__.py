"""The DPO stage."""
