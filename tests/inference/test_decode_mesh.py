"""The mesh that a policy writes on where the config names none."""

import types

import numpy as np
import pytest

from jaxrm.inference.decode_mesh import DecodeLoad, decode_meshes

GIB = 2.0**30


def mesh(hosts, devices, **sizes):
    """A mesh of training on GPUs, without GPUs."""
    each = [types.SimpleNamespace(platform="gpu", process_index=i // devices) for i in range(hosts * devices)]
    shape = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    return types.SimpleNamespace(devices=np.asarray(each, object), shape=shape)


def load(weights, cache, kv_heads, layers=32):
    return DecodeLoad(weights * GIB, cache * GIB, kv_heads, 2 * layers, 2.0**20)


@pytest.mark.parametrize(
    ("of", "devices", "tensor"),
    [
        (load(12.5, 64, 32), 8, 8),  # a 7B is split as far as it can be
        (load(4.7, 2.3, 1, layers=18), 16, 4),  # one head of keys: each split holds the cache of more rows
        (load(0.25, 1, 3, layers=30), 8, 1),  # of a small model the sums over devices take longest
    ],
    ids=["7B", "2B with one head of keys", "135M"],
)
def test_weights_are_split_as_far_as_it_pays(of, devices, tensor):
    best = decode_meshes(mesh(1, devices, fsdp=devices), of)[0]
    assert (best.data, best.fsdp, best.context, best.tensor) == (devices // tensor, 1, 1, tensor)


def test_bytes_of_a_token_are_those_counted_by_hand():
    of = DecodeLoad(weights=800.0, cache=1600.0, kv_heads=4, sums=2, sum_bytes=40.0)
    sizes = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    # Half of the weights; of 8 the share of the cache; half of the weights from elsewhere, and twice a half of 10 bytes
    # for each of two sums, eight times as slow; two hops for each sum.
    assert of.bytes_read(sizes) == 400 + 200 + 8 * (200 + 2 * 2 * 0.5 * 10) + (2 << 20) * 2 * 2


def test_a_split_stays_inside_of_a_host():
    big = load(130, 64, 64)
    assert decode_meshes(mesh(2, 8, fsdp=16), big)[0].tensor == 8
    assert decode_meshes(mesh(1, 16, fsdp=16), big)[0].tensor == 16


def test_a_mesh_of_copies_stays_unless_another_is_much_faster():
    """Then no weights are copied. A 7B reads 12.0 GiB for a token on four, 11.5 on eight and 20.5 on one."""
    of = load(12.5, 64, 32)
    assert decode_meshes(mesh(1, 8, data=2, tensor=4), of)[0].tensor == 4
    assert decode_meshes(mesh(1, 8, data=8), of)[0].tensor == 8
