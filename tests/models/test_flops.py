"""Counted FLOPs against a count of the parameters and a count of the pairs that attend."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import pytest

from jaxrm.models.build import ModelSource, abstract_decoder
from jaxrm.models.config import PRESETS, preset
from jaxrm.models.flops import mfu, peak_bandwidth, peak_flops, training_flops_per_token

SMALL = dataclasses.replace(
    PRESETS["tiny"], vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=8, tie_embeddings=True, layer_is_sliding=(), sliding_window=None,
)  # fmt: skip


def products_per_token(config):
    """Parameters that a token is multiplied with: all but norms, biases and a table that is only looked up."""
    _, shapes, _ = abstract_decoder(config, ModelSource(preset="tiny"))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape) for path, leaf in leaves}
    head = "embedder/embedding" if config.tie_embeddings else "head/embedding"
    return sum(size for name, size in sizes.items() if name.endswith("kernel") or name == head)


def attention_flops(config, length):
    """12 for each query channel and pair that attends (4 forward, 8 backward), a token of a row on average."""
    pairs = 0
    for sliding in config.layer_is_sliding or (False,) * config.num_layers:
        window = config.sliding_window if sliding else length
        pairs += sum(min(t + 1, window) for t in range(length))
    return 12 * config.num_heads * config.head_dim * pairs / length


def test_a_layer_by_hand():
    config = dataclasses.replace(SMALL, num_layers=1)
    query, output, key_and_value = 32 * 4 * 8, 4 * 8 * 32, 2 * 32 * 2 * 8
    weights = query + output + key_and_value + 3 * 32 * 48 + 32 * 61
    assert training_flops_per_token(config, length=10) == 6 * weights + 12 * 5 * 4 * 8


@pytest.mark.parametrize("name", ["gemma-2b", "llama-2-7b", "smollm2-135m", "gemma-3-1b", "qwen2.5-0.5b"])
def test_short_rows_cost_six_times_the_weights(name):
    """6 N (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), N counted in the decoder itself."""
    weights = products_per_token(PRESETS[name])
    assert training_flops_per_token(PRESETS[name], length=1) == pytest.approx(6 * weights, rel=1e-3)


def test_llama_2_7b_is_near_its_published_size():
    """6.74 G parameters (Touvron et al. 2023, arXiv 2307.09288), 0.13 G of them the input table."""
    assert training_flops_per_token(PRESETS["llama-2-7b"], length=1) == pytest.approx(
        6 * (6.738e9 - 0.131e9), rel=0.001
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_only_looked_up_costs_nothing(tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    once, twice = (training_flops_per_token(config, length) for length in (1, 2))
    assert 2 * once - twice == 6 * products_per_token(config)  # attention is in proportion to the length


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, sliding_window=16, layer_is_sliding=(True,) * 4),
        dataclasses.replace(SMALL, sliding_window=16, layer_is_sliding=(True, False, True, True)),
        dataclasses.replace(SMALL, sliding_window=4096, layer_is_sliding=(True,) * 4),
    ],
    ids=["full", "sliding", "mixed", "window longer than the row"],
)
def test_attention_is_near_a_count_of_the_pairs(config):
    length = 1024
    got = training_flops_per_token(config, length) - 6 * products_per_token(config)
    assert got == pytest.approx(attention_flops(config, length), rel=0.01)


def test_a_scalar_head_saves_the_products_with_the_vocabulary():
    config = preset("smollm2-135m")
    both = [training_flops_per_token(config, 128, scalar_head=scalar) for scalar in (False, True)]
    assert both[0] - both[1] == 6 * config.hidden_size * (config.vocab_size - 1)


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "float32", 918),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("cpu", "float32", None),
        ("NVIDIA GH200 480GB", "bfloat16", None),
    ],
)
def test_the_peak_is_the_makers_where_it_is_known(kind, dtype, teraflops):
    peak = peak_flops(kind, dtype)
    assert peak is None if teraflops is None else math.isclose(peak, teraflops * 1e12)


@pytest.mark.parametrize(
    ("kind", "gigabytes"),
    [
        ("TPU v5 lite", 819),
        ("TPU v4", 1200),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H200", 4800),
        ("cpu", None),
    ],
)
def test_the_bandwidth_is_the_makers_where_it_is_known(kind, gigabytes):
    bandwidth = peak_bandwidth(kind)
    assert bandwidth is None if gigabytes is None else math.isclose(bandwidth, gigabytes * 1e9)


def test_mfu_is_the_share_of_all_devices_peak():
    device = SimpleNamespace(device_kind="TPU v4")
    assert mfu(275e12, 1.0, [device] * 2) == pytest.approx(0.5)
    assert mfu(275e12, 1.0, [device, SimpleNamespace(device_kind="cpu")]) is None
    assert mfu(1.0, 1.0, jax.devices()) is None
