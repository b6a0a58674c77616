"""FLOPs of forward passes and training steps, counted by hand, and the share of the devices' peak that they use."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrm.models.config import ModelConfig
from jaxrm.models.lora import NO_LORA, LoRAConfig

# Dense matrix products of one jax device, in 10^12 FLOP/s, as (bfloat16, float32), from the makers' data sheets
# (without sparsity). float32 is what jax computes by default: one bfloat16 pass on TPU, TF32 on GPUs that have it.
# A device of TPU v2, v3 and TPU7x is one of a chip's two cores. T4 and V100 have no bfloat16: what stands there is
# float16.
_PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "tpu v2": (22.5, 22.5),
    "tpu v3": (61.5, 61.5),
    "tpu v4": (275.0, 275.0),
    "tpu v5 lite": (197.0, 197.0),
    "tpu v5e": (197.0, 197.0),
    "tpu v5": (459.0, 459.0),
    "tpu v5p": (459.0, 459.0),
    "tpu v6 lite": (918.0, 918.0),
    "tpu v6e": (918.0, 918.0),
    "tpu7x": (1153.5, 1153.5),
    "v100": (125.0, 15.7),
    "t4": (65.0, 8.1),
    "a100": (312.0, 156.0),
    "h100": (989.4, 494.7),
    "h100 pcie": (756.0, 378.0),
    "h100 nvl": (835.5, 417.5),
    "h200": (989.4, 494.7),
    "b200": (2250.0, 1125.0),
    "l4": (121.0, 60.0),
    "l40s": (362.0, 183.0),
}

# Of the memory of one jax device, in 10^9 bytes/s, from the same sheets.
_PEAK_BANDWIDTH: dict[str, float] = {
    "tpu v2": 350.0,
    "tpu v3": 450.0,
    "tpu v4": 1200.0,
    "tpu v5 lite": 819.0,
    "tpu v5e": 819.0,
    "tpu v5": 2765.0,
    "tpu v5p": 2765.0,
    "tpu v6 lite": 1640.0,
    "tpu v6e": 1640.0,
    "tpu7x": 3690.0,
    "v100": 900.0,
    "t4": 320.0,
    "a100": 1555.0,
    "a100 sxm4 80gb": 2039.0,
    "a100 80gb pcie": 1935.0,
    "h100": 3350.0,
    "h100 pcie": 2000.0,
    "h100 nvl": 3900.0,
    "h200": 4800.0,
    "b200": 8000.0,
    "l4": 300.0,
    "l40s": 864.0,
}


def forward_flops(
    config: ModelConfig, length: int, *, predicted: int, scalar_head: bool = False, lora: LoRAConfig = NO_LORA
) -> float:
    """FLOPs of one row forward: 2 a weight for each token, and attention.

    Args:
      config: shape of the model.
      length: tokens in a row; a token attends to half of them on average, or to its window.
      predicted: tokens of the row that the head is applied to.
      scalar_head: a scalar head stands in place of the one over the vocabulary.
      lora: adapters of the projections.
    """
    weights = _projections(config) + _adapters(config, lora)
    return (2.0 * weights + _attention(config, length)) * length + 2.0 * _head(config, scalar_head) * predicted


def training_flops(
    config: ModelConfig, length: int, *, predicted: int, scalar_head: bool = False, lora: LoRAConfig = NO_LORA
) -> float:
    """FLOPs of one row forward and backward: 2 a weight forward, 4 backward, and attention three times.

    Of a weight that is not trained, as those under adapters, the gradient is not computed: 2 forward, 2 backward.
    Recomputation under remat is not counted: it is a cost of the method, not of the model (the MFU of PaLM,
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Arguments as for ``forward_flops``.
    """
    per_weight = 4.0 if lora.is_on else 6.0
    layers = per_weight * _projections(config) + 6.0 * _adapters(config, lora) + 3.0 * _attention(config, length)
    head = (6.0 if scalar_head else per_weight) * _head(config, scalar_head)
    return layers * length + head * predicted


def training_flops_per_token(
    config: ModelConfig, length: int, *, scalar_head: bool = False, lora: LoRAConfig = NO_LORA
) -> float:
    """FLOPs of forward and backward for one token of rows whose every token is trained; see ``training_flops``."""
    return training_flops(config, length, predicted=length, scalar_head=scalar_head, lora=lora) / length


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Peak of dense matrix products of one device in FLOP/s; None where it is unknown, as on CPU.

    Args:
      device_kind: ``jax.Device.device_kind``, e.g. "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: what the products are computed in: "bfloat16", "float16" or "float32".
    """
    assert dtype in ("bfloat16", "float16", "float32"), dtype
    name = _longest_name_in(device_kind, _PEAK_TFLOPS)
    if name is None:
        return None
    half, single = _PEAK_TFLOPS[name]
    return (single if dtype == "float32" else half) * 1e12


def peak_bandwidth(device_kind: str) -> float | None:
    """Peak of what one device reads from its memory, in bytes/s; None where it is unknown, as on CPU.

    Args:
      device_kind: as for `peak_flops`.
    """
    name = _longest_name_in(device_kind, _PEAK_BANDWIDTH)
    return None if name is None else _PEAK_BANDWIDTH[name] * 1e9


def mfu(flops: float, seconds: float, devices: Sequence[Any], dtype: str = "bfloat16") -> float | None:
    """Model FLOPs utilization in [0, 1]: the share of the devices' peak that the FLOPs of the model use.

    Recomputation (remat) does not count (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Args:
      flops: floating-point operations of the model in the measured time, over all devices.
      seconds: the measured time.
      devices: the ``jax.Device`` objects that took part, those of other processes included.
      dtype: what the products are computed in.

    Returns:
      None where the peak of a device is unknown.
    """
    peaks = [peak_flops(device.device_kind, dtype) for device in devices]
    if not peaks or None in peaks or seconds <= 0:
        return None
    return flops / (seconds * sum(peak for peak in peaks if peak is not None))


def _longest_name_in(device_kind: str, names: Iterable[str]) -> str | None:
    words = " ".join(re.findall(r"[a-z0-9]+", device_kind.lower()))
    return max((name for name in names if re.search(rf"\b{name}\b", words)), key=len, default=None)


def _projections(config: ModelConfig) -> int:
    """Weights of the projections of all layers."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    return config.num_layers * (2 * D * (config.num_heads + config.num_kv_heads) * H + 3 * D * F)


def _adapters(config: ModelConfig, lora: LoRAConfig) -> int:
    """Weights of the adapters of all layers."""
    if not lora.is_on:
        return 0
    D, F = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}  # and o_proj's inputs
    return config.num_layers * lora.rank * sum(D + outputs.get(name, F) for name in lora.targets)


def _attention(config: ModelConfig, length: int) -> float:
    """FLOPs of attention forward for one token of a row, in all layers."""
    sliding = sum(config.layer_is_sliding)
    window = min(config.sliding_window or length, length / 2)
    seen = (config.num_layers - sliding) * length / 2 + sliding * window
    return 4.0 * seen * config.num_heads * config.head_dim


def _head(config: ModelConfig, scalar_head: bool) -> int:
    """Weights of the head."""
    return config.hidden_size * (1 if scalar_head else config.vocab_size)
