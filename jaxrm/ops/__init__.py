"""Pure math, arrays in and arrays out: jax and chex only."""
