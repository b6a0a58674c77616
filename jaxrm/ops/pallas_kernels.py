"""Whether a Pallas kernel is taken, or plain XLA, which is beside each of them and runs anywhere."""

from collections.abc import Collection, Mapping

import jax.numpy as jnp

from jaxrm.errors import UserError, flag, option

KERNELS = ("auto", "xla", "pallas")


def resolve(
    field: str, kernel: str, platform: str, obstacles: Mapping[str, str], *, automatic: Collection[str] = ("tpu", "gpu")
) -> str:
    """Name of the kernel for a platform, ``xla`` or ``pallas``.

    Args:
      field: of the config that names the kernel.
      kernel: one of ``KERNELS``; ``auto`` takes Pallas on the ``automatic`` platforms wherever nothing is in its way.
      platform: ``cpu``, ``gpu`` or ``tpu``, of the devices that will run it.
      obstacles: what is in the way of the kernel of each platform that has one, as ``needs this, but there is that``;
        empty where nothing is.
      automatic: platforms on which it is known to be worth it.

    Raises:
      UserError: for an unknown name, and for ``pallas`` where it has no kernel.
    """
    if kernel not in KERNELS:
        raise UserError(f"{option(field)} is {kernel!r}; use one of {', '.join(KERNELS)}")
    homes = " and ".join(home.upper() for home in obstacles)
    obstacle = obstacles.get(platform, f"runs on {homes}, but the devices are of platform {platform}")
    if kernel == "xla" or (kernel == "auto" and (obstacle or platform not in automatic)):
        return "xla"
    if obstacle:
        raise UserError(f"{option(field)} is 'pallas', which {obstacle}; use {flag(field)}=auto")
    return "pallas"


def obstacle_of_dtype(dtype: jnp.dtype) -> str:
    """What is in the way of a kernel for GPUs, which computes in 16 bits; empty where nothing is."""
    dtype = jnp.dtype(dtype)
    return "" if dtype.itemsize == 2 else f"needs 16 bits on GPU, but {option('model.dtype')} is {dtype}"
