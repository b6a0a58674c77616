"""Memory of a forward and backward pass on one device, by reckoning: no program is compiled.

A rule of thumb (jaxrm choice): what is kept of every layer for the backward pass, the widest layer's arrays, and one
chunk of logits. `jaxrm.plan` compiles the programs and gives the true figure.
"""

from collections.abc import Mapping

from jaxrm.models.config import ModelConfig
from jaxrm.ops.vocab import DEFAULT_CHUNK

_FLOAT32 = 4


def activation_bytes(
    shape: ModelConfig, tokens: float, itemsize: int, remat: str, axes: Mapping[str, int] | None = None
) -> float:
    """Bytes of the activations of a pass over ``tokens``, about.

    Args:
      shape: of the decoder.
      tokens: of the rows that one device reads at a time, padding included.
      itemsize: bytes of a number in the compute dtype.
      remat: what is kept, one of ``jaxrm.models.transformer.REMAT_POLICIES``.
      axes: sizes of the mesh's axes; ``tensor`` divides heads and the MLP, ``context`` the tokens. None for one device.
    """
    axes = axes or {}
    tensor, tokens_here = axes.get("tensor", 1), tokens / axes.get("context", 1)
    heads, keys = shape.num_heads * shape.head_dim / tensor, shape.num_kv_heads * shape.head_dim / tensor
    mlp, hidden = shape.intermediate_size / tensor, shape.hidden_size
    saved = hidden + heads + _FLOAT32 * shape.num_heads / tensor / itemsize  # input, attention's output and normalizer
    if remat != "full":
        saved += heads + 2 * keys + hidden  # the projections of attention
    if remat in ("dots", "none"):
        saved += 2 * mlp  # gate and up; the result of down is in the next layer's input
    if remat == "none":
        saved += 3 * mlp + heads + keys + 6 * hidden * _FLOAT32 / itemsize  # what the MLP, rotations and norms compute
    widest = 3 * mlp + 4 * hidden + 2 * (heads + 2 * keys)
    logits = 2 * _FLOAT32 * min(DEFAULT_CHUNK, shape.vocab_size)  # and their gradient
    return float(tokens_here * ((shape.num_layers * saved + widest) * itemsize + logits))
