"""Floating-point operations of a training step, counted by hand."""

from jaxrm.models.config import ModelConfig


def training_flops_per_token(config: ModelConfig, length: int, *, scalar_head: bool = False) -> float:
    """FLOPs of forward and backward for one token: 2 a weight forward, 4 backward, and attention.

    Recomputation under remat is not counted: it is a cost of the method, not work asked for (the MFU of PaLM,
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Args:
      config: shape of the model.
      scalar_head: a scalar head stands in place of the one over the vocabulary.
      length: tokens in a row; a token attends to half of them on average, or to its window.
    """
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_heads + config.num_kv_heads
    weights = config.num_layers * (2 * D * heads * H + 3 * D * F) + D * (1 if scalar_head else config.vocab_size)
    sliding = sum(config.layer_is_sliding)
    near = min(config.sliding_window or length, length / 2)
    seen = (config.num_layers - sliding) * length / 2 + sliding * near
    return 6.0 * weights + 12.0 * seen * config.num_heads * H
