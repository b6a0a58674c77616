"""The PPO stage."""
