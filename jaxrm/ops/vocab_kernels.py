"""Which kernel goes through the vocabulary."""

import jax.numpy as jnp

from jaxrm.errors import UserError, flag, option
from jaxrm.ops.vocab_chunks import SumChunk

KERNELS = ("auto", "xla", "pallas")
_LANES, _MOST_CHANNELS = 128, 512  # of a step of the kernel for TPU


def choose(kernel: str, platform: str, dtype: jnp.dtype, hidden_size: int) -> SumChunk | None:
    """The kernel that ``resolve`` names; None for plain XLA."""
    if resolve(kernel, platform, dtype, hidden_size) == "xla":
        return None
    from jaxrm.ops import vocab_gpu, vocab_tpu

    return {"tpu": vocab_tpu.sum_chunk, "gpu": vocab_gpu.sum_chunk}[platform]


def resolve(kernel: str, platform: str, dtype: jnp.dtype, hidden_size: int) -> str:
    """Name of the kernel for a platform, ``xla`` or ``pallas``.

    Args:
      kernel: one of ``KERNELS``; ``auto`` takes Pallas on TPU wherever ``pallas`` is not refused, XLA elsewhere.
      platform: ``cpu``, ``gpu`` or ``tpu``, of the devices that will run it.
      dtype: of the hidden states.
      hidden_size: ``D``.

    Raises:
      UserError: for an unknown name, and for ``pallas`` where it has no kernel.
    """
    name = option("model.vocabulary")
    if kernel not in KERNELS:
        raise UserError(f"{name} is {kernel!r}; use one of {', '.join(KERNELS)}")
    reason = ""
    if platform not in ("tpu", "gpu"):
        reason = f"which runs on TPU and GPU, but the devices are of platform {platform}"
    elif platform == "tpu" and channels_of_a_step(hidden_size) is None:
        reason = f"which on TPU needs a multiple of 128 channels, but the model has {hidden_size}"
    elif platform == "gpu" and jnp.dtype(dtype).itemsize != 2:
        reason = f"which needs 16 bits on GPU, but {option('model.dtype')} is {jnp.dtype(dtype)}"
    if kernel == "xla" or (kernel == "auto" and (reason or platform != "tpu")):
        return "xla"
    if reason:
        raise UserError(f"{name} is 'pallas', {reason}; use {flag('model.vocabulary')}=auto")
    return "pallas"


def channels_of_a_step(size: int) -> int | None:
    """How many of ``size`` channels a step of the kernel for TPU takes: a divisor in whole lanes, None without one.

    XLA would copy a head of other channels to fill the lanes.
    """
    return next((n for n in range(_MOST_CHANNELS, 0, -_LANES) if size % n == 0), None)
