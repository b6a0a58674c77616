"""Which kernel goes through the vocabulary."""

import jax.numpy as jnp

from jaxrm.ops import pallas_kernels
from jaxrm.ops.vocab_chunks import SumChunk

KERNELS = pallas_kernels.KERNELS
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
    has_steps = channels_of_a_step(hidden_size) is not None
    tpu = "" if has_steps else f"on TPU needs a multiple of 128 channels, but the model has {hidden_size}"
    obstacles = {"tpu": tpu, "gpu": pallas_kernels.obstacle_of_dtype(dtype)}
    return pallas_kernels.resolve("model.vocabulary", kernel, platform, obstacles, automatic=("tpu",))


def channels_of_a_step(size: int) -> int | None:
    """How many of ``size`` channels a step of the kernel for TPU takes: a divisor in whole lanes, None without one.

    XLA would copy a head of other channels to fill the lanes.
    """
    return next((n for n in range(_MOST_CHANNELS, 0, -_LANES) if size % n == 0), None)
