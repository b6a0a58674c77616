"""Decoders on a quantized base: logits, gradients of adapters, decoding, and weights quantized as they come."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from jaxrm.errors import UserError
from jaxrm.models import build, hub, lora, quantized, quantized_params
from jaxrm.models.build import ModelSource
from jaxrm.models.config import preset
from jaxrm.models.hub import read
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.transformer import positions_from_mask
from jaxrm.sharding import partition

CONFIG = dataclasses.replace(preset("tiny"), vocab_size=320, tie_embeddings=False)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12)), jnp.int32)
ADAPTERS = LoRAConfig(rank=4)


def on_one_device(tree):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: one, tree)


def model(kind, config=CONFIG, adapters=lora.NO_LORA, remat="full"):
    source = ModelSource(preset="tiny", quantize=kind, remat=remat)
    return source, *build.abstract_decoder(config, source, lora=adapters)


def drawn(kind, config=CONFIG):
    source, _, shapes, _ = model(kind, config)
    return build.init_params(config, source, jax.random.key(0), on_one_device(shapes))


@functools.partial(jax.jit, static_argnums=0)
def hidden(graphdef, params):
    mask = jnp.ones(TOKENS.shape, jnp.int32)
    return nnx.merge(graphdef, params)(TOKENS, positions=positions_from_mask(mask), segment_ids=mask)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_drawn_codes_are_those_of_the_drawn_kernels(kind):
    """To rounding: a kernel that is drawn in one program with its codes may differ in the last bit."""
    codes = drawn(kind)
    again = quantized_params.quantize_params(drawn(None), kind, on_one_device(codes))
    for a, b in zip(jax.tree.leaves(codes), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype and np.mean(np.isclose(a, b, rtol=1e-6)) > 0.999
    assert quantized_params.kind_of(codes) == kind and quantized_params.kind_of(drawn(None)) is None
    _, _, shapes, axes = model(kind)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), codes)
    assert axes["layers"]["attention"]["output"]["scales"] == ("layers", "heads_blocks", "head_dim_blocks", "embed")
    plain = model(None)[2]
    assert jax.tree.map(lambda x: x.shape, quantized_params.plain_shapes(shapes)) == jax.tree.map(
        lambda x: x.shape, plain
    )


def test_only_projections_are_quantized_and_used_up():
    params = drawn(None)
    kernel, table = params["layers"]["mlp"]["up"]["kernel"], params["embedder"]["embedding"]
    stored = quantized_params.quantize_params(params, "nf4", on_one_device(drawn("nf4")))
    assert kernel.is_deleted() and stored["embedder"]["embedding"] is table
    assert stored["head"]["embedding"].dtype == jnp.float32
    assert set(stored["layers"]["mlp"]["up"]) == {"codes", "scales"}


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_hidden_states_are_those_of_the_dequantized_model(kind, remat):
    params = drawn(kind)
    expected = hidden(model(None)[1], quantized_params.dequantize_params(params))
    np.testing.assert_allclose(hidden(model(kind, remat=remat)[1], params), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_adapters_are_those_on_dequantized_kernels():
    """All of the adapters, below the top layer too, whose gradients go through the quantized products."""
    shapes = model("nf4", adapters=ADAPTERS)[2]
    trained = lora.split(shapes)[0]
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trained))))
    adapters = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), trained)
    base = drawn("nf4")

    def loss(adapters, base, kind):
        return jnp.mean(hidden(model(kind, adapters=ADAPTERS)[1], lora.join(base, adapters)) ** 2 * TOKENS[..., None])

    gradients = jax.jit(jax.grad(loss), static_argnums=2)(adapters, base, "nf4")
    expected = jax.jit(jax.grad(loss), static_argnums=2)(adapters, quantized_params.dequantize_params(base), None)
    assert all(np.any(x) for x in jax.tree.leaves(gradients))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), gradients, expected)


def test_decoding_step_is_that_of_the_whole_row():
    """With adapters too; the loop has dequantized and merged its own copy."""
    _, graphdef, shapes, _ = model("nf4", adapters=ADAPTERS)
    adapters = jax.tree.map(lambda x: 0.05 * jnp.ones(x.shape), lora.split(shapes)[0])
    params = lora.join(drawn("nf4"), adapters)

    @jax.jit
    def last(params):
        decoder = nnx.merge(graphdef, params)
        mask = jnp.ones((2, 11), jnp.int32)
        _, prompts = decoder.prefill(TOKENS[:, :11], positions=positions_from_mask(mask), segment_ids=mask)
        past = decoder.empty_cache(prompts, 1, 1)
        return decoder.decode(TOKENS[:, 11:], decoder.unstack_layers(), past, prompts)[0][:, 0]

    np.testing.assert_allclose(last(params), hidden(graphdef, params)[:, -1], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    hub.export_model(path / "model", drawn(None), CONFIG)
    return str(path / "model")


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_streamed_codes_are_those_of_loaded_kernels(kind, folder):
    """Bit for bit, over eight devices: tensor by tensor as they are read, or from the whole tree afterwards."""
    devices = np.asarray(jax.devices()).reshape(1, 4, 1, 2)
    mesh = Mesh(devices, ("data", "fsdp", "context", "tensor"))
    shardings = partition.parameter_shardings(*model(kind)[2:], mesh)
    streamed = read.load_params(folder, CONFIG, shardings=shardings, quantize=kind)
    whole = read.load_params(folder, CONFIG, shardings=quantized_params.plain_shardings(shardings))
    afterwards = quantized_params.quantize_params(whole, kind, shardings)
    jax.tree.map(np.testing.assert_array_equal, streamed, afterwards)
    assert jax.tree.map(lambda x: x.sharding, streamed) == shardings
    codes = streamed["layers"]["mlp"]["up"]["codes"]
    assert codes.addressable_shards[0].data.size * 8 == codes.size


def test_no_stack_of_kernels_is_whole_while_it_streams(folder, monkeypatch):
    """Whenever a kernel has been read, it is the only one in float32: none of its shape is left, and no stack."""
    counts = []
    to_devices = read._to_devices
    before = {id(x) for x in jax.live_arrays()}

    def counting(tensor, *rest):
        array = to_devices(tensor, *rest)
        if tensor.path[-1] == "kernel":
            new = [x for x in jax.live_arrays() if id(x) not in before and x.dtype == jnp.float32]
            counts.append(sum(tensor.shape in (x.shape, x.shape[1:]) for x in new))
        return array

    monkeypatch.setattr(read, "_to_devices", counting)
    read.load_params(folder, CONFIG, quantize="nf4")
    assert counts == [1] * (7 * CONFIG.num_layers)


def test_weights_that_are_trained_whole_are_not_quantized():
    source = ModelSource(preset="tiny", quantize="nf4")
    build.check_trainable(source, ADAPTERS)
    build.check_trainable(dataclasses.replace(source, quantize=None), lora.NO_LORA)
    with pytest.raises(UserError, match=r"model\.quantize is 'nf4', but .*lora\.rank is 0.*, e\.g\. .*lora\.rank=16"):
        build.check_trainable(source, lora.NO_LORA)


def test_quantize_is_one_of_the_kinds():
    with pytest.raises(UserError, match="must be one of int8, nf4, or None"):
        ModelSource(preset="tiny", quantize="int4")
