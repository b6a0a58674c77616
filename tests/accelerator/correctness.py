"""The accelerator against this machine's CPU, in one process: the same weights and batches, bounds on the differences.

In float32 matrix products are of full precision on both sides, and attention is plain XLA. In bfloat16 the accelerator
takes the kernels that jaxrm chooses for its platform, and is compared with the CPU's float32. What the CPU's own
bfloat16 differs by stands beside it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import ppo_on_both
from accelerator.report import Report
from accelerator.shapes import Shape
from flax import nnx

from jaxrm.algorithms import sft
from jaxrm.inference.sharded_model import ShardedModel, shard_model
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig, preset
from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import TokenBatch

ROWS = 2
# Rounding in float32 has differences of about 1e-6 on these shapes, and in bfloat16 of about 1e-2.
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-4, 5e-2


def float32(shape: Shape, report: Report) -> None:
    """Everything in float32, and greedy tokens, which must be the same."""
    config, cpu, device = _checked(shape), jax.devices("cpu")[0], jax.devices()[0]
    batch = _batch(config, shape.checked_length)
    with jax.default_matmul_precision("highest"):
        report.doing("float32 on CPU")
        expected = _answers(_open(config, cpu, "float32", "xla"), batch)
        report.doing("float32 on the accelerator")
        computed = _answers(_open(config, device, "float32", "xla"), batch)
        for name, difference in _differences(computed, expected).items():
            report.within(f"{name}: difference, of the norm", difference, FLOAT32_BOUND)
        same = float(np.mean(computed["tokens"] == expected["tokens"]))
        report.row("greedy tokens that are the same", same, beside="all of them", passed=same == 1)
        report.doing("PPO step in float32")
        _compare_ppo(config, "float32", FLOAT32_BOUND, report)


def bfloat16(shape: Shape, report: Report) -> None:
    """Everything in bfloat16 but for tokens, which rounding changes."""
    config, cpu, device = _checked(shape), jax.devices("cpu")[0], jax.devices()[0]
    batch = _batch(config, shape.checked_length)
    report.doing("bfloat16 on CPU")
    with jax.default_matmul_precision("highest"):
        expected = _answers(_open(config, cpu, "float32", "xla"), batch, with_tokens=False)
    on_cpu = _answers(_open(config, cpu, "bfloat16", "xla"), batch, with_tokens=False)
    report.doing("bfloat16 on the accelerator")
    computed = _answers(_open(config, device, "bfloat16", "auto"), batch, with_tokens=False)
    own = _differences(on_cpu, expected)
    for name, difference in _differences(computed, expected).items():
        note = f", CPU's own {own[name]:.1g}"
        report.within(f"{name}: difference from float32, of the norm", difference, BFLOAT16_BOUND, note)
    report.doing("PPO step in bfloat16")
    _compare_ppo(config, "bfloat16", BFLOAT16_BOUND, report)


def relative_difference(one: Any, other: Any) -> float:
    """The norm of the difference of two trees, of the norm of the second."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in
             zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]  # fmt: skip
    difference = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return float(np.sqrt(difference / sum(float(np.sum(b**2)) for _, b in pairs)))


def _differences(computed: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """By name; of logits that of the worst token."""
    logits = zip(computed["logits"], expected["logits"], strict=True)
    return {
        "logits of the worst token": max(relative_difference(*token) for token in logits),
        "loss": relative_difference(computed["loss"], expected["loss"]),
        "gradients": relative_difference(computed["gradients"], expected["gradients"]),
    }


def _checked(shape: Shape) -> ModelConfig:
    """Two layers of Gemma's kind: one head of keys for two of queries, scaled embeddings."""
    width = shape.checked_width
    return dataclasses.replace(
        preset("gemma-2b"),
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=width // 2,
    )


def _open(config: ModelConfig, device: jax.Device, dtype: str, attention: str) -> ShardedModel:
    source = ModelSource(preset="tiny", dtype=dtype, attention=attention)
    return shard_model(source, build_mesh(MeshConfig(1, 1, 1), [device]), config)


def _batch(config: ModelConfig, length: int) -> TokenBatch:
    """Rows of unequal lengths, on the right of which is padding; the first half is a prompt."""
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (ROWS, length)).astype(np.int32)
    column = np.arange(length, dtype=np.int32)[None]
    is_text = column < length - np.arange(ROWS, dtype=np.int32)[:, None] * (length // 4)
    positions = np.where(is_text, column, 0)
    return TokenBatch(tokens * is_text, is_text.astype(np.int32), positions, is_text & (column >= length // 2))


def _answers(model: ShardedModel, batch: TokenBatch, *, with_tokens: bool = True) -> dict[str, Any]:
    """Logits, loss, gradients and greedy tokens of a model with the weights of key 0, drawn on CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        drawn = build.init_params(model.config, model.source, jax.random.key(0), None)
    params = jax.device_put(drawn, model.shardings)
    on_device = jax.device_put(batch, model.mesh.devices.flat[0])
    loss_fn = sft.sft_loss(model.graphdef)

    def logits(params: Any, batch: TokenBatch) -> jax.Array:
        opened = nnx.merge(model.graphdef, params)
        hidden = opened(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        return opened.logits(hidden).astype(jnp.float32)

    def loss(params: Any, batch: TokenBatch) -> jax.Array:
        (total, weight), _ = loss_fn(params, batch, jax.random.key(0))
        return total / weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, on_device)
    answers = {"loss": np.asarray(value), "gradients": jax.device_get(gradients)}
    answers["logits"] = np.asarray(jax.jit(logits)(params, on_device))[batch.segment_ids > 0]
    if with_tokens:
        half = batch.tokens.shape[1] // 2
        prompts = jax.device_put((batch.tokens[:, :half], np.ones((ROWS, half), bool)), model.mesh.devices.flat[0])
        sampling = SamplingConfig(max_new_tokens=min(16, half), temperature=0.0)
        key = jax.device_put(jax.random.key(0), model.mesh.devices.flat[0])
        answers["tokens"] = np.asarray(
            generate(model.graphdef, params, *prompts, key, options=GenerateOptions(sampling, ())).tokens
        )
    return answers


def _compare_ppo(config: ModelConfig, dtype: str, bound: float, report: Report) -> None:
    """Rows of one PPO step on the same responses."""
    attention = "xla" if dtype == "float32" else "auto"
    with jax.default_matmul_precision("highest"):
        expected = ppo_on_both.step(config, jax.devices("cpu")[0], "float32", "xla")
    computed = ppo_on_both.step(config, jax.devices()[0], dtype, attention)
    for name in expected:
        difference = relative_difference(computed[name], expected[name])
        report.within(f"PPO step, {name}: difference, of the norm", difference, bound)
