"""Causal attention inside segments, by the best kernel of the platform.

Every kernel is a function of the same arguments, an ``Attend``: a token sees itself and the tokens before it in its
own segment, the last ``window`` of them where there is a window.
"""

import functools
from typing import Protocol

import chex
import jax
import jax.numpy as jnp

from jaxrm.errors import UserError, flag, option
from jaxrm.models import blockwise

KERNELS = ("auto", "xla", "cudnn", "splash")
_SPLASH_BLOCKS = (512, 256, 128)  # the largest that divides the row; 128 is the least that the kernel takes


class Attend(Protocol):
    """Self-attention over whole rows.

    Args:
      query: ``[B, T, N, H]``.
      key: ``[B, T, K, H]`` with ``K`` dividing ``N`` (grouped queries).
      value: ``[B, T, K, H]``.
      segment_ids: ``[B, T]`` int; padding is a segment of its own, 0.
      scale: factor on the logits.
      softcap: bound on the absolute logit, or None.
      window: tokens a token sees, itself included, or None for all.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``query``.
    """

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> jax.Array:
        """Attend."""
        ...


def choose(kernel: str, platform: str, dtype: jnp.dtype) -> Attend:
    """The kernel that ``resolve`` names."""
    return {"xla": xla, "cudnn": cudnn, "splash": splash}[resolve(kernel, platform, dtype)]


def resolve(kernel: str, platform: str, dtype: jnp.dtype) -> str:
    """Name of the kernel for a platform.

    Args:
      kernel: one of ``KERNELS``; ``auto`` takes splash on TPU, cuDNN on GPU in 16 bits, XLA elsewhere.
      platform: ``cpu``, ``gpu`` or ``tpu``, of the devices that will run it.
      dtype: compute dtype.

    Raises:
      UserError: for an unknown name, a kernel of another platform, or cuDNN in 32 bits.
    """
    if kernel not in KERNELS:
        raise UserError(f"{option('model.attention')} is {kernel!r}; use one of {', '.join(KERNELS)}")
    sixteen_bits = jnp.dtype(dtype).itemsize == 2
    if kernel == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn" if sixteen_bits else "xla"}.get(platform, "xla")
    home = {"cudnn": "gpu", "splash": "tpu"}.get(kernel, platform)
    if platform != home:
        raise UserError(
            f"{option('model.attention')} is {kernel!r}, which runs on {home.upper()}, but the devices are of platform "
            f"{platform}; use {flag('model.attention')}=auto"
        )
    if kernel == "cudnn" and not sixteen_bits:
        raise UserError(
            f"{option('model.attention')} is 'cudnn', which needs 16 bits, but {option('model.dtype')} is "
            f"{jnp.dtype(dtype)}; "
            f"use {flag('model.dtype')}=bfloat16 or {flag('model.attention')}=xla"
        )
    return kernel


def causal_mask(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """``[B, T, T]`` bool: may the row's token (query) see the column's (key)?"""
    chex.assert_rank(segment_ids, 2)
    index = jnp.arange(segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> jax.Array:
    """``Attend`` in plain XLA, on any platform."""
    return blockwise.attend(query, key, value, segment_ids, scale, softcap, window)


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> jax.Array:
    """``Attend`` by cuDNN's fused attention on GPU; models with a soft-cap take the XLA kernel.

    So do rows of odd length and heads that the GPU's cuDNN has no kernel for, e.g. wider than 128 before Hopper.
    """
    if softcap is None and query.shape[1] % 2 == 0:
        mask = causal_mask(segment_ids, window)[:, None]
        try:
            return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="cudnn")
        except NotImplementedError:  # raised as it is traced
            pass
    return xla(query, key, value, segment_ids, scale=scale, softcap=softcap, window=window)


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """``Attend`` by the splash kernel on TPU; rows that do not fill its blocks of 128 take the XLA kernel."""
    _, T, N, H = query.shape
    block = next((size for size in _SPLASH_BLOCKS if T % size == 0), None)
    if block is None:
        return xla(query, key, value, segment_ids, scale=scale, softcap=softcap, window=window)
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    shape = (T, T)
    mask = tpu.CausalMask(shape) if window is None else tpu.LocalMask(shape, (window - 1, 0), offset=0)
    kernel = tpu.make_splash_mha(
        tpu.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=tpu.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=blockwise.SAVED_BY_REMAT[0],
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    # The kernel wants whole lanes of 128; zeros change neither a dot product nor the columns that are kept.
    widen = ((0, 0), (0, 0), (0, 0), (0, -H % 128))
    query, key, value = (jnp.pad(x, widen).transpose(0, 2, 1, 3) for x in (query * scale, key, value))
    segments = tpu.SegmentIds(q=segment_ids, kv=segment_ids)
    return jax.vmap(kernel)(query, key, value, segments).transpose(0, 2, 1, 3)[..., :H].astype(query.dtype)


splash_interpreted: Attend = functools.partial(splash, interpret=True)
