"""Floating-point operations of forward passes and training steps, counted by hand."""

from jaxrm.models.config import ModelConfig


def forward_flops(config: ModelConfig, length: int, *, predicted: int, scalar_head: bool = False) -> float:
    """FLOPs of one row forward: 2 a weight for each token, and attention.

    Args:
      config: shape of the model.
      length: tokens in a row; a token attends to half of them on average, or to its window.
      predicted: tokens of the row that the head is applied to.
      scalar_head: a scalar head stands in place of the one over the vocabulary.
    """
    return _layers(config, length) * length + _head(config, scalar_head) * predicted


def training_flops_per_token(config: ModelConfig, length: int, *, scalar_head: bool = False) -> float:
    """FLOPs of forward and backward for one token: 2 a weight forward, 4 backward, and attention.

    Recomputation under remat is not counted: it is a cost of the method, not of the model (the MFU of PaLM,
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Arguments as for ``forward_flops``.
    """
    return 3.0 * (_layers(config, length) + _head(config, scalar_head))


def _layers(config: ModelConfig, length: int) -> float:
    """FLOPs of the layers for one token of a row."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    weights = config.num_layers * (2 * D * (config.num_heads + config.num_kv_heads) * H + 3 * D * F)
    sliding = sum(config.layer_is_sliding)
    window = min(config.sliding_window or length, length / 2)
    seen = (config.num_layers - sliding) * length / 2 + sliding * window
    return 2.0 * weights + 4.0 * seen * config.num_heads * H


def _head(config: ModelConfig, scalar_head: bool) -> float:
    return 2.0 * config.hidden_size * (1 if scalar_head else config.vocab_size)
