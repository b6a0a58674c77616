"""jaxrm: RLHF in JAX with reward models that answer in language."""

__version__ = "0.1.0"
