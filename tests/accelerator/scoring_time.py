"""Token rewards by one pass of a seq2seq reward model, against forwards of the same rows (`benchmarks.scoring`)."""

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import here
from accelerator.decoding import draw_in_compute_dtype
from accelerator.report import Report
from accelerator.shapes import Shape
from benchmarks import scoring as sides_of_scoring

from jaxrm.inference.sharded_model import pad_to_multiple_of, shard_model
from jaxrm.models.build import ModelSource
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import ResponseBatch

COMPARED = ("scoring (jaxrm)", "forward to hidden states", "log-probs from the responses' logits")


def score(shape: Shape, report: Report) -> None:
    """Score random responses on one device, in bfloat16."""
    sizes, name, request = shape.scoring, shape.models[0], sides_of_scoring.REQUEST
    source, mesh = ModelSource(preset=name, dtype="bfloat16"), build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = shard_model(source, mesh)
    report.doing(f"draw the weights of {name}")
    params = draw_in_compute_dtype(model)
    rng = np.random.default_rng(0)
    lengths = (sizes.prompt, sizes.response, request)
    texts = (rng.integers(0, model.config.vocab_size, (sizes.rows, n)) for n in lengths)
    prompts, responses, asks = (jnp.asarray(text, jnp.int32) for text in texts)
    asks = jnp.broadcast_to(asks[:1], asks.shape)
    batch = ResponseBatch(prompts, jnp.ones_like(prompts, bool), responses, jnp.ones_like(responses, bool))
    rows = jnp.concatenate([prompts, responses, asks, responses], axis=1)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % pad_to_multiple_of(mesh))))  # the width that scoring reads
    functions = sides_of_scoring.sides(
        model.graphdef, tuple(asks[0].tolist()), sizes.response, pad_to_multiple_of(mesh)
    )
    seconds = {}
    for side in COMPARED:
        report.doing(side)
        jitted = jax.jit(functions[side])
        seconds[side] = here.best_seconds(lambda run=jitted: run(params, batch, rows), rounds=shape.rounds)
    first = seconds[COMPARED[0]]
    report.row(
        f"{name}, {sizes.rows} × ({sizes.prompt} + {sizes.response}) tokens",
        sizes.rows * sizes.response / first,
        "response tokens/s",
        beside=f"{first:.3g} s, rows of {rows.shape[1]}",
    )
    for side in COMPARED[1:]:
        report.row(f"scoring / {side}", first / seconds[side], beside=f"{seconds[side]:.3g} s")
