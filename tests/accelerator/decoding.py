"""Sampling: tokens/s, and how near it is to reading weights and cache once a token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import here
from accelerator.report import Report
from accelerator.shapes import Answers, Shape

from jaxrm.inference.sharded_model import ShardedModel, in_compute_dtype, shard_model
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.models.flops import peak_bandwidth
from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.sharding.partition import batch_sharding


def decode(shape: Shape, report: Report) -> None:
    """Sample from the first of the models, in bfloat16, on one device."""
    sizes, name = shape.decoding, shape.models[0]
    source = ModelSource(preset=name, dtype="bfloat16")
    model = shard_model(source, build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    report.doing(f"draw the weights of {name}")
    params = draw_in_compute_dtype(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, model.config.vocab_size, (sizes.rows, sizes.prompt)).astype(np.int32)
    prompts = jax.device_put((tokens, np.ones(tokens.shape, bool)), batch_sharding(model.mesh))

    def seconds(new_tokens: int) -> float:
        sampling, key = SamplingConfig(max_new_tokens=new_tokens), jax.random.key(0)
        # Nothing ends a response, so all of them have `new_tokens`.
        return here.best_seconds(
            lambda: generate(model.graphdef, params, *prompts, key, options=GenerateOptions(sampling, ())),
            rounds=shape.rounds,
        )

    report.doing(f"{sizes.rows} responses of {sizes.response} tokens")
    whole = seconds(sizes.response)
    report.row(
        f"{name}, {sizes.rows} × ({sizes.prompt} + {sizes.response}) tokens",
        sizes.rows * sizes.response / whole,
        "tokens/s",
        beside=f"{whole:.3g} s, prompts included",
    )
    report.doing("prompts alone")
    prefill = seconds(1)
    report.row("prompts alone", sizes.rows * sizes.prompt / prefill, "tokens/s", beside=f"{prefill:.3g} s")
    a_token = (whole - prefill) / max(1, sizes.response - 1)
    report.row("one token of every row", 1e3 * a_token, "ms")
    _report_bandwidth(report, model.config, params, sizes, a_token)


def draw_in_compute_dtype(model: ShardedModel) -> Any:
    """Random weights as a policy that is only read has them."""
    params = build.init_params(model.config, model.source, jax.random.key(0), model.shardings)
    return in_compute_dtype(params, model.source.dtype)


def bytes_a_token(config: ModelConfig, params: Any, sizes: Answers, dtype: str) -> float:
    """What a step of decoding has to read: weights, and keys and values of half of the response's tokens.

    A row of the embeddings is read for each response; the whole table only where it is the head too.
    """
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_embeddings:
        weights -= params["embedding"].nbytes
    slots = sizes.rows * (sizes.prompt + sizes.response / 2)
    return weights + 2 * config.num_layers * slots * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def _report_bandwidth(report: Report, config: ModelConfig, params: Any, sizes: Answers, seconds: float) -> None:
    needed = bytes_a_token(config, params, sizes, "bfloat16")
    kind = jax.devices()[0].device_kind
    bandwidth = peak_bandwidth(kind)
    if bandwidth is None:
        report.row("bytes to read a token", needed / 1e9, "GB", beside="the bandwidth of this device is unknown")
        return
    beside = f"{needed / 1e9:.3g} GB a token at {bandwidth / 1e12:.3g} TB/s take {1e3 * needed / bandwidth:.3g} ms"
    report.row("share of the bandwidth", needed / bandwidth / seconds, beside=beside)
