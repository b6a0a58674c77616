"""Responses of unequal lengths: slots that the next prompt takes over, against batches that end with their longest."""

from typing import Any

import jax
import numpy as np
from accelerator import here
from accelerator.decoding import draw_in_compute_dtype
from accelerator.report import Report
from accelerator.shapes import Shape

from jaxrm.inference.sharded_model import shard_model
from jaxrm.models.build import ModelSource
from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.sharding.partition import batch_sharding


def refill(shape: Shape, report: Report) -> None:
    """Lengths are geometric, up to the limit; every response is as long in both ways."""
    sizes, name = shape.ragged, shape.models[0]
    source = ModelSource(preset=name, dtype="bfloat16")
    model = shard_model(source, build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    report.doing(f"draw the weights of {name}")
    params = draw_in_compute_dtype(model)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, model.config.vocab_size, (sizes.prompts, sizes.prompt)).astype(np.int32)
    limits = np.minimum(rng.geometric(1 / sizes.mean, sizes.prompts), sizes.limit).astype(np.int32)
    rows = jax.device_put((ids, np.ones(ids.shape, bool)), batch_sharding(model.mesh))
    keys = jax.random.split(jax.random.key(0), sizes.prompts)
    sampling = SamplingConfig(max_new_tokens=sizes.limit)

    def answer(first: int, count: int, slots: int | None) -> Any:
        part = slice(first, first + count)
        prompts = (x[part] for x in (*rows, keys, limits))
        options = GenerateOptions(sampling, (), slots=slots)
        return generate(model.graphdef, params, *prompts, options=options)

    def in_batches() -> Any:
        return [answer(first, sizes.slots, None) for first in range(0, sizes.prompts, sizes.slots)]

    def in_slots() -> Any:
        return answer(0, sizes.prompts, sizes.slots)

    report.doing("batches that end with their longest row")
    batches = here.best_seconds(in_batches, rounds=shape.rounds)
    report.doing("slots that are taken over")
    slots = here.best_seconds(in_slots, rounds=shape.rounds)
    tokens, capacity = int(limits.sum()), int(in_slots().capacity)
    report.row(
        f"{name}, {sizes.prompts} prompts in {sizes.slots} slots, lengths of mean {tokens / sizes.prompts:.0f} "
        f"up to {sizes.limit}",
        tokens / slots,
        "tokens/s",
        beside=f"in batches {tokens / batches:,.0f}",
    )
    report.row("slots / batches", batches / slots)
    report.row("use of the slots", tokens / capacity)
