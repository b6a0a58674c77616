"""Adapters in the model and in the step: nothing at first, the same as merged weights, what is trained and what not."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxrm.algorithms import sft
from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer
from jaxrm.algorithms.state import create
from jaxrm.algorithms.train_step import build_train_step
from jaxrm.errors import UserError
from jaxrm.inference.sharded_model import in_compute_dtype, shard_model, shard_scalar_model, state_shardings
from jaxrm.models import build, layers, lora
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.models.lora import PROJECTIONS, LoRAConfig
from jaxrm.models.transformer import positions_from_mask
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import TokenBatch

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
SIZES |= {"num_kv_heads": 2, "head_dim": 8}
FAMILIES = {  # grouped keys; biases; norms of queries and keys; norms after, soft-caps and a window
    "llama": dataclasses.replace(PRESETS["llama-3-8b"], **SIZES),
    "qwen2": dataclasses.replace(PRESETS["qwen2.5-0.5b"], **SIZES),
    "qwen3": dataclasses.replace(PRESETS["qwen3-0.6b"], **SIZES),
    "gemma2": dataclasses.replace(PRESETS["gemma-2-2b"], **SIZES, layer_is_sliding=(True, False), sliding_window=3),
}
LLAMA = FAMILIES["llama"]
# Every projection has as many inputs as the adapters have ranks.
SQUARE = dataclasses.replace(LLAMA, hidden_size=16, intermediate_size=16, num_heads=2, num_kv_heads=1, head_dim=8)
RANK_4, FULL_RANK = LoRAConfig(rank=4, alpha=8.0), LoRAConfig(rank=16, alpha=16.0)
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)


def opened(config, adapters=lora.NO_LORA, *, mesh=ONE, shard=shard_model, **options):
    devices = jax.devices()[: math.prod(dataclasses.astuple(mesh))]
    return shard(ModelSource(preset="tiny", **options), build_mesh(mesh, devices), config, lora=adapters)


def drawn(shapes, seed, scale=0.1):
    """A tree of numbers that are nowhere the zeros and ones which biases, norms and adapters begin with."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), shapes)


@functools.cache
def base_of(config, dtype="float32"):
    plain = opened(config)
    params = build.init_params(config, plain.source, jax.random.key(0), None)
    params = jax.tree.map(lambda x, noise: x + noise, params, drawn(plain.shapes, 1))
    return in_compute_dtype(params, dtype)


def first_adapters(model):
    return lora.init_adapters(model.trained_shapes, jax.random.key(2), None)


def rows_of(config, B=3, T=11, seed=0):
    """Tokens, positions and segments of rows that begin with padding."""
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (B, T)), jnp.int32)
    mask = jnp.arange(T)[None] >= (2 * jnp.arange(B) % 5)[:, None]
    return tokens, positions_from_mask(mask), mask.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward_logits(graphdef, params, tokens, positions, segments):
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens, positions=positions, segment_ids=segments))


@functools.partial(jax.jit, static_argnums=0)
def decoded_logits(graphdef, params, tokens, positions, segments):
    """Logits of prompts of six tokens and of the tokens after them, one by one, with a cache."""
    model, prompt = nnx.merge(graphdef, params), slice(None, 6)
    hidden, prompts = model.prefill(tokens[:, prompt], positions=positions[:, prompt], segment_ids=segments[:, prompt])
    unstacked, head = model.unstack_layers(), model.decode_head()

    def one_token(past, token):
        hidden, past = model.decode(token[:, None], unstacked, past, prompts)
        return past, model.logits(hidden[:, 0], head)

    after = jax.lax.scan(one_token, model.empty_cache(prompts, 1, tokens.shape[1] - 6), tokens[:, 6:].T)[1]
    return jnp.concatenate([model.logits(hidden), after.swapaxes(0, 1)], axis=1)


READ = {"forward": forward_logits, "decode": decoded_logits}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_adapters_change_no_bit_of_the_logits(family, dtype, read):
    config, base = FAMILIES[family], base_of(FAMILIES[family], dtype)
    plain, adapted = opened(config, dtype=dtype), opened(config, RANK_4, dtype=dtype)
    joined = lora.join(base, first_adapters(adapted))
    assert len(jax.tree.leaves(joined)) == len(jax.tree.leaves(base)) + 2 * len(PROJECTIONS)
    rows = rows_of(config)
    without, with_adapters = READ[read](plain.graphdef, base, *rows), READ[read](adapted.graphdef, joined, *rows)
    np.testing.assert_array_equal(with_adapters, without)


@pytest.mark.parametrize("merges", [True, False], ids=["merged-kernels", "narrow-products"])
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_equal_base_and_adapters(family, read, merges):
    """However the adapters are multiplied with."""
    config, base = FAMILIES[family], base_of(FAMILIES[family])
    plain, adapted = opened(config), opened(config, RANK_4)
    graphdef, *_ = build.abstract_decoder(config, adapted.source, lora=RANK_4, on_cpu=merges)
    joined = lora.join(base, drawn(adapted.trained_shapes, 3))
    merged = lora.merge(joined, RANK_4)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, base)
    rows = rows_of(config)
    expected = READ[read](plain.graphdef, merged, *rows)
    moved = jnp.abs(expected - READ[read](plain.graphdef, base, *rows)).max()
    assert moved > 0.1
    real = rows[2][..., None] > 0
    difference = jnp.where(real, READ[read](graphdef, joined, *rows) - expected, 0.0)
    np.testing.assert_allclose(difference, 0.0, atol=1e-5)


def test_merged_kernels_by_hand():
    """With two inputs of one head each, rank 1 and a factor of 3; what stands beside the kernel stays."""
    output = {
        "kernel": jnp.asarray([[[[1.0, 2.0]], [[3.0, 4.0]]]]),  # [L, N, H, D]
        "bias": jnp.asarray([[7.0, 8.0]]),
        "lora_a": jnp.asarray([[[[1.0]], [[-2.0]]]]),
        "lora_b": jnp.asarray([[[10.0, 100.0]]]),
    }
    params = {"layers": {"attention": {"output": output}}, "final_norm": {"scale": jnp.ones(2)}}
    merged = lora.merge(params, LoRAConfig(rank=1, alpha=3.0))
    assert merged["final_norm"]["scale"] is params["final_norm"]["scale"]
    assert merged["layers"]["attention"]["output"]["kernel"].tolist() == [[[[31.0, 302.0]], [[-57.0, -596.0]]]]
    assert set(merged["layers"]["attention"]["output"]) == {"kernel", "bias"}


def test_split_and_join_are_inverse_and_copy_nothing():
    tree = {
        "decoder": {
            "layers": {"mlp": {"up": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "down": {"kernel": 4}}},
            "final_norm": {"scale": 5},
        },
        "scalar_head": {"kernel": 6},
    }
    trained, frozen = lora.split(tree)
    assert trained == {
        "decoder": {"layers": {"mlp": {"up": {"lora_a": 2, "lora_b": 3}}}},
        "scalar_head": {"kernel": 6},
    }
    assert sorted(jax.tree.leaves(frozen)) == [1, 4, 5]
    assert lora.join(frozen, trained) == tree and lora.join(trained, frozen) == tree
    arrays = jax.tree.map(jnp.asarray, tree)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (arrays, lora.join(*lora.split(arrays)))), strict=True))


def test_without_adapters_all_is_trained():
    tree = {"decoder": {"norm": {"scale": 1}}, "scalar_head": {"kernel": 2}}
    assert lora.split(tree) == (tree, {})
    assert lora.join({}, tree) == tree


def test_a_leaf_both_frozen_and_trained_is_an_error():
    with pytest.raises(AssertionError, match="both frozen and trained"):
        lora.join({"up": {"kernel": 1}}, {"up": {"kernel": 2}})


def test_targets_alone_have_adapters():
    model = opened(LLAMA, LoRAConfig(rank=2, targets=("q_proj", "o_proj", "down_proj")))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.trained_shapes)
    }
    assert shapes == {
        "layers/attention/query/lora_a": (2, 32, 2),
        "layers/attention/query/lora_b": (2, 2, 4, 8),
        "layers/attention/output/lora_a": (2, 4, 8, 2),
        "layers/attention/output/lora_b": (2, 2, 32),
        "layers/mlp/down/lora_a": (2, 48, 2),
        "layers/mlp/down/lora_b": (2, 2, 32),
    }


def test_a_scalar_head_is_trained_whole():
    trained = opened(LLAMA, RANK_4, shard=shard_scalar_model).trained_shapes
    assert set(trained) == {"decoder", "scalar_head"} and trained["scalar_head"]["kernel"].shape == (32,)
    assert set(trained["decoder"]) == {"layers"}


def test_scales_by_hand():
    assert LoRAConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoRAConfig(rank=16, alpha=8.0, rank_stabilized=True).scale == 2.0


def test_rank_stabilized_adapters_count_root_rank_more():
    base, rows = base_of(LLAMA), rows_of(LLAMA)
    stable, plain = LoRAConfig(rank=4, alpha=8.0, rank_stabilized=True), LoRAConfig(rank=4, alpha=16.0)
    models = [opened(LLAMA, one) for one in (stable, plain)]
    joined = lora.join(base, drawn(models[0].trained_shapes, 3))
    np.testing.assert_array_equal(*(forward_logits(model.graphdef, joined, *rows) for model in models))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": -1}, r"rank is -1.*at least 0"),
        ({"rank": 4, "alpha": 0.0}, r"alpha is 0\.0.*above 0"),
        ({"rank": 4, "alpha": math.inf}, r"alpha is inf"),
        ({"targets": ("q_prj",)}, r"targets is .*'q_prj'.*q_proj, k_proj, .*targets=\('q_proj',\)"),
        ({"targets": ("attention",)}, r"targets is .*'attention' is none; they are q_proj"),
        ({"targets": ()}, r"targets is \(\).*at least one"),
        ({"targets": ("q_proj", "q_proj")}, r"targets is .*each projection once"),
    ],
)
def test_unusable_adapters_are_refused_in_one_line(fields, words):
    with pytest.raises(UserError, match=words) as error:
        LoRAConfig(**fields)
    assert "\n" not in str(error.value)


def test_adapters_are_drawn_as_peft_draws_them():
    """A uniform within 1 / sqrt(inputs), which of heads are all of them, and each from a key of its own."""
    first = first_adapters(opened(LLAMA, RANK_4))["layers"]
    for part, projection in (PROJECTIONS[name][0] for name in PROJECTIONS):
        a, b = first[part][projection]["lora_a"], first[part][projection]["lora_b"]
        bound = math.prod(a.shape[1:-1]) ** -0.5
        assert 0.8 * bound < jnp.abs(a).max() <= bound and not b.any() and a.dtype == b.dtype == jnp.float32
    gate, up = first["mlp"]["gate"]["lora_a"], first["mlp"]["up"]["lora_a"]
    assert (gate != up).all() and (gate[0] != gate[1]).all()


class Setup:
    """A state, the frozen parameters and the step that moves the one on the other."""

    def __init__(self, config, adapters=RANK_4, *, mesh=ONE, optimizer=None, num_microbatches=1, **options):
        self.model = opened(config, adapters, mesh=mesh, **options)
        self.optimizer = optimizer or build_optimizer(OptimizerConfig(lr=1e-2, warmup=0.0, schedule="constant"), 100)
        self.sharding = state_shardings(self.model, self.optimizer, self.model.mesh)
        self.rows = partition.batch_sharding(self.model.mesh)
        self.step = build_train_step(
            sft.sft_loss(self.model.graphdef),
            self.optimizer,
            state_sharding=self.sharding,
            batch_sharding=self.rows,
            frozen_sharding=self.model.frozen_shardings,
            num_microbatches=num_microbatches,
        )

    def state(self, trained):
        state = create(jax.tree.map(jnp.copy, trained), self.optimizer, jax.random.key(1))  # the step takes its buffers
        return jax.device_put(state, self.sharding)

    def frozen(self, base):
        return jax.device_put(base, self.model.frozen_shardings)

    def batch(self, seed, B=8, T=12):
        tokens, positions, segments = rows_of(self.model.config, B, T, seed)
        return jax.device_put(TokenBatch(tokens, segments, positions, segments > 0), self.rows)

    def run(self, trained, frozen, steps):
        state, frozen, losses = self.state(trained), self.frozen(frozen), []
        for i in range(steps):
            state, metrics = self.step(state, frozen, self.batch(i % 2))
            losses.append(float(metrics["loss"]))
        return state, frozen, losses

    def temporary_bytes(self, batch):
        state = jax.eval_shape(lambda x: create(x, self.optimizer, jax.random.key(0)), self.model.trained_shapes)
        batch = jax.eval_shape(lambda: batch)
        compiled = self.step.lower(state, self.model.frozen_shapes, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes


def only(names):
    """Gradient descent on the leaves of these names; the others stay."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "moves" if path[0].key == "layers" and path[-1].key in names else "stays", params
        )

    return optax.multi_transform({"moves": optax.sgd(0.5), "stays": optax.set_to_zero()}, labels)


def test_adapters_of_full_rank_learn_what_the_weights_learn():
    """With A the identity and a scale of 1, x W + (x A) B = x (W + B), and the gradient of B is that of W."""
    whole = Setup(SQUARE, lora.NO_LORA, optimizer=only({"kernel"}))
    adapted = Setup(SQUARE, FULL_RANK, optimizer=only({"lora_b"}))
    base = base_of(SQUARE)

    def identity(path, x):
        return jnp.zeros(x.shape) if path[-1].key == "lora_b" else jnp.broadcast_to(jnp.eye(16), (2, 16, 16))

    first = jax.tree_util.tree_map_with_path(identity, adapted.model.trained_shapes)
    first = jax.tree.map(lambda x, shape: x.reshape(shape.shape), first, adapted.model.trained_shapes)
    whole_state, _, whole_losses = whole.run(base, {}, 4)
    state, frozen, losses = adapted.run(first, base, 4)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    merged = lora.merge(lora.join(frozen, state.params), FULL_RANK)
    chex.assert_trees_all_close(merged, whole_state.params, rtol=1e-4, atol=1e-5)
    for part, projection in (PROJECTIONS[name][0] for name in PROJECTIONS):
        moved = merged["layers"][part][projection]["kernel"] - base["layers"][part][projection]["kernel"]
        assert jnp.abs(moved).max() > 1e-3, (part, projection)


def test_frozen_weights_keep_their_bits_and_have_no_moments():
    setup = Setup(LLAMA)
    base = base_of(LLAMA)
    before = jax.tree.map(np.array, base)
    first = first_adapters(setup.model)
    state, frozen, losses = setup.run(first, base, 3)
    assert losses[2] < losses[0]
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    chex.assert_trees_all_equal(frozen, before)
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (state.params, first)), strict=True))
    sizes = [sum(x.size for x in jax.tree.leaves(tree) if x.ndim) for tree in (state.opt_state, state.params)]
    assert sizes[0] == 2 * sizes[1] < 0.5 * sum(x.size for x in jax.tree.leaves(base))


def test_microbatches_of_adapters_give_the_same_update():
    whole, cut = Setup(LLAMA), Setup(LLAMA, num_microbatches=4)
    first = first_adapters(whole.model)
    (whole_state, _, losses), (state, _, cut_losses) = (one.run(first, base_of(LLAMA), 2) for one in (whole, cut))
    np.testing.assert_allclose(cut_losses, losses, rtol=1e-5)
    chex.assert_trees_all_close(state.params, whole_state.params, rtol=1e-3, atol=1e-5)


def test_adapters_lie_as_the_table_says_and_learn_the_same():
    """On eight devices; ranks are whole everywhere, the other axes lie like those of the kernel."""
    one, eight = Setup(LLAMA), Setup(LLAMA, mesh=EIGHT)
    first = drawn(one.model.trained_shapes, 3, scale=0.05)
    (_, _, losses), (state, frozen, several) = (setup.run(first, base_of(LLAMA), 3) for setup in (one, eight))
    np.testing.assert_allclose(several, losses, rtol=1e-5)
    params, embed = state.params["layers"], ("fsdp", "context")
    specs = {
        name: tuple(params[part][projection][leaf].sharding.spec for leaf in (lora.A, lora.B))
        for name, ((part, projection), _) in PROJECTIONS.items()
    }
    into_heads = PartitionSpec(None, embed, None), PartitionSpec(None, None, "tensor", None)
    into_mlp = PartitionSpec(None, embed, None), PartitionSpec(None, None, "tensor")
    assert specs == dict.fromkeys(("q_proj", "k_proj", "v_proj"), into_heads) | {
        "o_proj": (PartitionSpec(None, "tensor", None, None), PartitionSpec(None, None, embed)),
        "gate_proj": into_mlp,
        "up_proj": into_mlp,
        "down_proj": (PartitionSpec(None, "tensor", None), PartitionSpec(None, None, embed)),
    }
    moments = state.opt_state[1][0].nu["layers"]["mlp"]["up"][lora.A]
    assert moments.sharding.spec == into_mlp[0]
    assert frozen["layers"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, embed, "tensor")


def test_a_frozen_head_has_no_gradient():
    """Which would be as large as the head, 4 MiB here; the step of all weights has it."""
    config = dataclasses.replace(LLAMA, vocab_size=32768)
    head = 4 * config.vocab_size * config.hidden_size
    adapted, whole = Setup(config), Setup(config, lora.NO_LORA)
    batch = adapted.batch(0, B=2, T=8)
    assert adapted.temporary_bytes(batch) < 0.5 * head < head < whole.temporary_bytes(batch)


def test_inputs_of_frozen_kernels_are_not_saved():
    """For the backward pass of a layer of which everything is kept: those of its wide down projection, here."""
    config = dataclasses.replace(LLAMA, intermediate_size=2048, num_layers=4)
    some = dataclasses.replace(RANK_4, targets=("q_proj",))
    adapted, whole = Setup(config, some, remat="none"), Setup(config, lora.NO_LORA, remat="none")
    batch = adapted.batch(0, B=2, T=64)
    inputs, kernels = 4 * 4 * 2 * 64 * 2048, 4 * 4 * 3 * 32 * 2048  # in bytes, of all layers
    assert adapted.temporary_bytes(batch) < whole.temporary_bytes(batch) - kernels - 0.9 * inputs


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_projection_saves_inputs_for_a_trained_kernel_only(is_frozen):
    x, kernel = jnp.ones((5, 3)), jnp.ones((3, 2))
    arguments = (x,) if is_frozen else (x, kernel)
    _, back = jax.vjp(lambda x, kernel=kernel: layers._project(x, kernel, 1), *arguments)
    saved = {leaf.shape for leaf in jax.tree.leaves(back)}
    assert (x.shape in saved) != is_frozen and kernel.shape in saved


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}], ids=lambda x: str(x))
def test_kept_matrix_products_are_kept_once(options):
    """A sum of the base's product and the adapters' is one array; for the gate and for up, of all layers."""
    model = opened(LLAMA, RANK_4, remat="dots", **options)
    rows = rows_of(LLAMA)

    def backward(trained, frozen):
        def states(trained):
            decoder = nnx.merge(model.graphdef, lora.join(frozen, trained))
            return decoder(rows[0], positions=rows[1], segment_ids=rows[2])

        return jax.vjp(states, trained)[1]

    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, model.trained_shapes, model.frozen_shapes))]
    assert kept.count((2, *rows[0].shape, LLAMA.intermediate_size)) == 2
    assert kept.count((2, *rows[0].shape, LLAMA.num_heads, LLAMA.head_dim)) == 2  # queries, and what attention gives
