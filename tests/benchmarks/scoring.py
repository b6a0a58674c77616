"""What token rewards cost: one forward beside a plain one, beside greedy decoding, and its memory.

    PYTHONPATH=. python tests/benchmarks/scoring.py
    PYTHONPATH=. python tests/benchmarks/scoring.py --preset=tiny --prompt=16 --response=32 --vocab=16000

A seq2seq reward model with random weights scores random responses, each as long as it may be, in turns with the sides
it is compared with; every time is the best of its rounds. Decoding is greedy, with the key-value cache, as many tokens
as the response has: the paper's rule taken to the letter. Memory is the compiler's account of temporary arrays, at a
vocabulary of 256,000. Printed, never asserted: machines are noisy. The defaults take some minutes and 4 GB on CPU.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrm.algorithms import scoring
from jaxrm.inference.sharded_model import pad_to_multiple_of, shard_model
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import ResponseBatch

REQUEST = 24  # tokens that ask for the correction, in a chat template


def read_rows(model: nnx.Module, rows: jax.Array) -> jax.Array:
    """Hidden states ``[B, W, D]`` of rows without padding."""
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32)[None], rows.shape)
    return model(rows, positions=positions, segment_ids=jnp.ones_like(rows))


def statistics_of_logits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0], jnp.argmax(logits, axis=-1)


def sides(graphdef: nnx.GraphDef, request: tuple[int, ...], response: int, multiple: int) -> dict[str, Callable]:
    """Functions of ``(params, batch, rows)``; rows are those that scoring puts together itself."""
    score = scoring.build_scorer(KINDS["literal"], graphdef, request=request, end_ids=(), pad_to_multiple_of=multiple)

    def scored(params: Any, batch: ResponseBatch, rows: jax.Array) -> Any:
        del rows
        return score(params, reward_scaling.uncalibrated(), batch)

    def hidden_states(params: Any, batch: ResponseBatch, rows: jax.Array) -> Any:
        del batch
        return read_rows(nnx.merge(graphdef, params), rows)

    def all_logits(params: Any, batch: ResponseBatch, rows: jax.Array) -> Any:
        del batch
        model = nnx.merge(graphdef, params)
        return model.logits(read_rows(model, rows))

    def response_logits(params: Any, batch: ResponseBatch, rows: jax.Array) -> Any:
        model = nnx.merge(graphdef, params)
        hidden = read_rows(model, rows)[:, -response - 1 : -1]
        return statistics_of_logits(model.logits(hidden), batch.responses)

    def row_logits(params: Any, batch: ResponseBatch, rows: jax.Array) -> Any:
        del batch
        model = nnx.merge(graphdef, params)
        return statistics_of_logits(model.logits(read_rows(model, rows))[:, :-1], rows[:, 1:])

    return {
        "scoring (jaxrm)": scored,
        "forward to hidden states": hidden_states,
        "forward to logits of the rows": all_logits,
        "log-probs from the responses' logits": response_logits,
        "log-probs from the rows' logits": row_logits,
    }


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def print_times(args: argparse.Namespace) -> None:
    source = ModelSource(preset=args.preset, dtype=args.dtype)
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    model = shard_model(source, mesh)
    params = build.init_params(model.config, source, jax.random.key(0), model.shardings)
    rng = np.random.default_rng(0)
    lengths = (args.prompt, args.response, REQUEST)
    texts = (rng.integers(0, model.config.vocab_size, (args.batch, n)) for n in lengths)
    prompts, responses, asked = (jnp.asarray(text, jnp.int32) for text in texts)
    asked = jnp.broadcast_to(asked[:1], asked.shape)
    request = tuple(asked[0].tolist())
    batch = ResponseBatch(prompts, jnp.ones_like(prompts, bool), responses, jnp.ones_like(responses, bool))
    context = jnp.concatenate([prompts, responses, asked], axis=1)
    rows = jnp.concatenate([context, responses], axis=1)

    functions = sides(model.graphdef, request, args.response, pad_to_multiple_of(mesh))
    jitted = {name: jax.jit(function) for name, function in functions.items()}
    calls = {name: lambda f=function: f(params, batch, rows) for name, function in jitted.items()}
    sampling = SamplingConfig(max_new_tokens=args.response, temperature=0.0)
    key, everywhere = jax.random.key(0), jnp.ones_like(context, bool)
    decoding = f"greedy decoding of {args.response} tokens"
    if args.decodings:
        options = GenerateOptions(sampling, ())
        calls[decoding] = lambda: generate(model.graphdef, params, context, everywhere, key, options=options)
    for call in calls.values():
        jax.block_until_ready(call())  # compile
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(args.rounds):
        for name, call in calls.items():
            if name != decoding or i < args.decodings:
                times[name].append(seconds_of(call))

    print(
        f"\n{args.preset}, {args.dtype}, {jax.devices()[0].device_kind}; {args.batch} rows of prompt {args.prompt}, "
        f"response {args.response}, request {REQUEST}, response {args.response}; best of {args.rounds} rounds, "
        f"decoding of {args.decodings}"
    )
    first = min(times["scoring (jaxrm)"])
    print(f"{'':40}{'seconds':>10}{'median':>10}{'scoring takes':>20}")
    for name, found in times.items():
        best = min(found)
        ratio = f"{best / first:.1f} times less" if name == decoding else f"{first / best:.2f} of it"
        print(f"{name:40}{best:10.3f}{np.median(found):10.3f}{ratio if name != 'scoring (jaxrm)' else '':>20}")


def print_memory(args: argparse.Namespace) -> None:
    source = ModelSource(preset=args.preset, dtype=args.dtype)
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(build.read_shape(source), vocab_size=args.vocab)
    model = shard_model(source, mesh, config)
    request = tuple(range(REQUEST))
    functions = sides(model.graphdef, request, args.response, pad_to_multiple_of(mesh))
    P, T, W = args.prompt, args.response, args.prompt + 2 * args.response + REQUEST
    ids = {length: jax.ShapeDtypeStruct((args.batch, length), jnp.int32) for length in (P, T, W)}
    masks = {length: jax.ShapeDtypeStruct((args.batch, length), bool) for length in (P, T)}
    batch, rows = ResponseBatch(ids[P], masks[P], ids[T], masks[T]), ids[W]
    whole = args.batch * args.response * args.vocab * 4 / 2**30
    print(
        f"\nTemporary memory at a vocabulary of {args.vocab:,}; logits [B, T, V] of the responses are {whole:.2f} GiB"
    )
    print(f"{'':40}{'GiB':>10}{'scoring takes':>20}")
    first = None
    for name in ("scoring (jaxrm)", "forward to hidden states", *list(functions)[3:]):
        compiled = jax.jit(functions[name]).lower(model.shapes, batch, rows).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
        first = first or temporary
        print(f"{name:40}{temporary:10.3f}{f'{first / temporary:.2f} of it' if temporary != first else '':>20}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decodings", type=int, default=2, help="rounds that decode too; 0 for none")
    parser.add_argument("--vocab", type=int, default=256_000)
    args = parser.parse_args()
    print_times(args)
    print_memory(args)


if __name__ == "__main__":
    main()
