"""Sampling beside its peers: Hugging Face transformers and tunix, the same shape, batch and lengths.

    PYTHONPATH=. python tests/benchmarks/decode.py
    PYTHONPATH=. python tests/benchmarks/decode.py --preset=tiny --rounds=20
    PYTHONPATH=. python tests/benchmarks/decode.py --of=ragged --rounds=2
    PYTHONPATH=. python tests/benchmarks/decode.py --of=equal --rounds=2
    PYTHONPATH=. python tests/benchmarks/decode.py --of=shared --prompt=512 --batch=16 --rounds=2

``--of=ragged`` answers four batches of prompts, with lengths from a geometric distribution of mean ``--response`` and
limit four times that: in slots, and in static batches, each of which ends with its longest response. Random weights end
nowhere, so every prompt has its length as a limit. ``--of=equal`` is the same with ``--response`` as the length of all,
where slots gain nothing and must not lose. ``--of=shared`` draws ``--batch`` responses to one prompt that is
read once, and beside it to as many copies of it.

Random weights, random prompts of equal length, and nothing ends early, so every side reads and draws as many tokens.
The sides take turns and every time is the best of its rounds; what one side leaves out (compiling, text) is left out
of all. transformers runs eagerly, as ``model.generate`` does by default. A peer that is not installed is left out:
``pip install torch==2.13.0``; ``pip install google-tunix==0.1.7``, in an environment of its own, for it pins much.
Printed, never asserted: machines are noisy. The defaults take some minutes and 5 GB on CPU.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrm.inference.sharded_model import ShardedModel, shard_model
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig, preset
from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig, response_keys
from jaxrm.models.stream import Prompt, Stream
from jaxrm.sharding.mesh import MeshConfig, build_mesh

PAD = 0
Side = Callable[[], np.ndarray]  # sampled tokens [B, T]


def opened(args: argparse.Namespace) -> tuple[ShardedModel, Any]:
    source, shape = ModelSource(preset=args.preset, dtype=args.dtype), preset(args.preset)
    shape = dataclasses.replace(shape, num_layers=args.layers or shape.num_layers)
    model = shard_model(source, build_mesh(MeshConfig(), jax.devices()[:1]), shape)
    return model, build.init_params(model.config, source, jax.random.key(0), model.shardings)


def jaxrm_side(args: argparse.Namespace, prompts: np.ndarray) -> Side:
    model, params = opened(args)
    sampling = SamplingConfig(max_new_tokens=args.response, temperature=args.temperature)
    key, mask = jax.random.key(0), np.ones_like(prompts, bool)

    def run() -> np.ndarray:
        drawn = generate(model.graphdef, params, prompts, mask, key, options=GenerateOptions(sampling, ()))
        return np.asarray(drawn.tokens)

    return run


def transformers_side(args: argparse.Namespace, prompts: np.ndarray) -> Side:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = preset(args.preset)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    model.generation_config.eos_token_id = None
    choice = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    ids = torch.tensor(prompts, dtype=torch.long)

    def run() -> np.ndarray:
        with torch.no_grad():
            drawn = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.response,
                **(choice if args.temperature else {"do_sample": False}),
            )
        return drawn[:, ids.shape[1] :].numpy()

    return run


def tunix_side(args: argparse.Namespace, prompts: np.ndarray) -> Side:
    from tunix.generate import sampler
    from tunix.models.llama3 import model as llama3

    shape = preset(args.preset)

    class Tokens:
        """A tokenizer whose texts are row numbers."""

        def encode(self, text: str) -> list[int]:
            return prompts[int(text)].tolist()

        def decode(self, ids: list[int]) -> str:
            return str(len(ids))

        def bos_id(self) -> None:
            return None

        def eos_id(self) -> int:
            return -1

        def pad_id(self) -> int:
            return PAD

    config = llama3.ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=int(shape.rope_theta),
        norm_eps=shape.norm_eps,
        weight_tying=shape.tie_embeddings,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    state = jax.tree.map(lambda x: x.astype(args.dtype), nnx.state(model))
    nnx.update(model, state)
    longest = args.prompt + args.response
    cache = sampler.CacheConfig(longest, shape.num_layers, shape.num_kv_heads, shape.head_dim)
    sample = sampler.Sampler(model, Tokens(), cache)
    choice = {"temperature": args.temperature, "top_p": 1.0} if args.temperature else {}
    texts = [str(row) for row in range(len(prompts))]

    def run() -> np.ndarray:
        drawn = sample(
            texts,
            max_generation_steps=args.response,
            max_prompt_length=args.prompt,
            eos_tokens=[-1],
            **choice,
        )
        return np.stack([np.asarray(row) for row in drawn.tokens])

    return run


def compare(sides: dict[str, Callable[[], tuple[int, int]]], args: argparse.Namespace) -> None:
    """Print the best time of each compiled side, which says how many tokens it drew, of how many it could have drawn.

    Seconds of the CPU say more than those of the wall where others use the machine too.
    """
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    work: dict[str, tuple[int, int]] = {}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = {clock: read() for clock, read in clocks.items()}
            work[name] = side()
            times[name].append({clock: read() - start[clock] for clock, read in clocks.items()})
    for name, (tokens, capacity) in work.items():
        line = f"{name:16}slot use {tokens / capacity:4.0%}"
        for clock in clocks:
            best, first = (min(each[clock] for each in times[side]) for side in (name, next(iter(sides))))
            line += f"{best:10.2f} s {clock}{tokens / best:8.0f} tokens/s, the first {best / first:.2f} times as fast;"
        print(line)


def ragged(args: argparse.Namespace) -> None:
    model, params = opened(args)
    rng, count, longest = np.random.default_rng(0), 4 * args.batch, args.response * (4 if args.of == "ragged" else 1)
    lengths = np.minimum(rng.geometric(1 / args.response, count), longest).astype(np.int32)
    if args.of == "equal":
        lengths[:] = longest
    ids = rng.integers(1, preset(args.preset).vocab_size, (count, args.prompt)).astype(np.int32)
    sampling = SamplingConfig(max_new_tokens=longest, temperature=args.temperature)
    data = np.asarray(jax.random.key_data(response_keys(jax.random.key(0), count, 1)))[:, 0]

    def draw(rows: slice, slots: int | None = None, lengths: np.ndarray = lengths) -> tuple[int, int]:
        keys = jax.random.wrap_key_data(data[rows])
        given = (params, ids[rows], np.ones_like(ids[rows], bool), keys[:, None], lengths[rows])
        drawn = generate(model.graphdef, *given, options=GenerateOptions(sampling, (), slots=slots))
        return int(drawn.mask.sum()), int(drawn.capacity)

    def in_batches() -> tuple[int, int]:
        parts = [draw(slice(start, start + args.batch)) for start in range(0, count, args.batch)]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    stream = Stream(model.graphdef, params, options=GenerateOptions(sampling, (), slots=args.batch))

    waiting = [Prompt(*row) for row in zip(ids.tolist(), data, lengths.tolist(), strict=True)]

    def streamed() -> tuple[int, int]:
        tokens = sum(len(answer.tokens) for answer in stream.answer(waiting))
        return tokens, stream.capacity

    streamed()  # compiles; which programs it needs depends on the lengths
    short = np.ones_like(lengths)
    draw(slice(None), args.batch, short)
    draw(slice(0, args.batch), lengths=short)
    print(f"{args.preset}: {count} prompts of {args.prompt}, lengths {lengths.mean():.0f} on average")
    sides = {"slots": lambda: draw(slice(None), args.batch), "stream": streamed, "static batches": in_batches}
    compare(sides, args)


def shared(args: argparse.Namespace) -> None:
    model, params = opened(args)
    sampling = SamplingConfig(max_new_tokens=args.response, temperature=args.temperature)
    one = np.random.default_rng(0).integers(1, preset(args.preset).vocab_size, (1, args.prompt)).astype(np.int32)

    def draw(ids: np.ndarray, n: int) -> tuple[int, int]:
        given = (params, ids, np.ones_like(ids, bool), jax.random.key(0))
        drawn = generate(model.graphdef, *given, options=GenerateOptions(sampling, (), n))
        return int(drawn.mask.sum()), int(drawn.capacity)

    print(f"{args.preset}: {args.batch} responses of {args.response} to a prompt of {args.prompt}")
    copies = np.repeat(one, args.batch, axis=0)
    sides = {"read once": lambda: draw(one, args.batch), "read each": lambda: draw(copies, 1)}
    for side in sides.values():
        side()  # compiles
    compare(sides, args)


def check_shape(config: ModelConfig) -> None:
    if config.family != "llama" or config.rope_scaling is not None:
        raise SystemExit("this benchmark knows Llama shapes without scaled rotations, e.g. --preset=smollm2-135m")


def peers(args: argparse.Namespace) -> None:

    ids = np.random.default_rng(0).integers(PAD + 1, preset(args.preset).vocab_size, (args.batch, args.prompt))
    sides: dict[str, Side] = {}
    for name, make in (("jaxrm", jaxrm_side), ("transformers", transformers_side), ("tunix", tunix_side)):
        try:
            sides[name] = make(args, ids.astype(np.int32))
        except ImportError as missing:
            print(f"{name} is left out: {missing}")
    for name, side in sides.items():
        assert side().shape == (args.batch, args.response), name  # compiles too
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)

    print(
        f"\n{args.preset}, {args.dtype}, {jax.devices()[0].device_kind}, jax {jax.__version__}; {args.batch} rows of "
        f"prompt {args.prompt} and response {args.response}, temperature {args.temperature:g}; best of {args.rounds}"
    )
    first = min(times["jaxrm"])
    print(f"{'':16}{'seconds':>10}{'median':>10}{'tokens/s':>10}{'jaxrm is faster':>18}")
    for name, seconds in times.items():
        best = min(seconds)
        faster = "" if name == "jaxrm" else f"{best / first:.2f} times"
        rate = args.batch * args.response / best
        print(f"{name:16}{best:10.3f}{np.median(seconds):10.3f}{rate:10.0f}{faster:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=build.DTYPES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for greedy")
    parser.add_argument("--layers", type=int, help="take so many of the shape's layers; not beside peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--of", default="peers", choices=["peers", "ragged", "equal", "shared"])
    args = parser.parse_args()
    check_shape(preset(args.preset))
    {"peers": peers, "ragged": ragged, "equal": ragged, "shared": shared}[args.of](args)


if __name__ == "__main__":
    main()
