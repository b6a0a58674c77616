"""Pure maths, arrays in and arrays out: jax and chex only."""
