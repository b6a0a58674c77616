"""Readings and updates of PPO on packed rows beside rows of their own, in one run.

    PYTHONPATH=.:tests python tests/benchmarks/packing.py
    PYTHONPATH=.:tests python tests/benchmarks/packing.py --batch=64 --prompt=128 --mean=64 --response=256

A critic of its own, random parameters, prompts of 1 to --prompt tokens, and responses that end at each token with a
chance of 1 / mean. The two take turns; the least seconds of each count.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from support.ppo import ONE, SMALL, Setup, experiment, rewarded

from jaxrm.algorithms import ppo
from jaxrm.algorithms.ppo_one_pass import OnePassBatch
from jaxrm.types import ResponseBatch

SHAPE = dataclasses.replace(
    SMALL, vocab_size=256, hidden_size=96, intermediate_size=256, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=24
)


def ragged_batch(arguments):
    """Prompts padded on the left, responses on the right."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, arguments.prompt + 1, arguments.batch)
    responses = np.minimum(rng.geometric(1 / arguments.mean, arguments.batch), arguments.response)
    masks = [np.arange(-arguments.prompt, 0)[None] >= -prompts[:, None]]
    masks.append(np.arange(arguments.response)[None] < responses[:, None])
    tokens = [np.where(mask, rng.integers(2, SHAPE.vocab_size, mask.shape), 0).astype(np.int32) for mask in masks]
    return ResponseBatch(*map(jnp.asarray, (tokens[0], masks[0], tokens[1], masks[1])))


def seconds(function, *args):
    started = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - started, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--response", type=int, default=256, help="tokens of the longest response")
    parser.add_argument("--mean", type=int, default=64, help="mean tokens of a response without a limit")
    parser.add_argument("--rounds", type=int, default=3, help="times that the two take turns, after one to compile")
    arguments = parser.parse_args()
    lengths = arguments.prompt + arguments.response
    batch = ragged_batch(arguments)
    rewards = rewarded(batch, np.arange(arguments.batch) / arguments.batch)
    setups, times = {}, {}
    for packing in (False, True):
        config = experiment(batch_size=arguments.batch, new_tokens=arguments.response, packing=packing)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=lengths))
        setups[packing] = Setup(config, ONE, shape=SHAPE)
    for number in range(arguments.rounds + 1):
        for packing, s in setups.items():
            read = lambda s=s: s.programs.reference_log_probs(s.base, s.reference, s.programs.pack_rows(batch))  # noqa: E731
            log_probs, reference = seconds(read)
            inputs, state = OnePassBatch(batch, reference, rewards), s.init_state()
            update, _ = seconds(ppo.update_in_one_pass, s.programs, state, s.base, inputs)
            if number:
                times.setdefault(packing, []).append((log_probs, update))
            kind = "packed" if packing else "plain"
            print(f"round {number}, {kind:6s}: log_probs {log_probs:.3f} s, update {update:.3f} s", flush=True)
    packed = setups[True].programs.pack_rows(batch).packing
    real = int(batch.prompt_mask.sum() + batch.response_mask.sum())
    print(
        f"{arguments.batch} rows of {lengths} tokens, {real / arguments.batch / lengths:.0%} of them real; packed: "
        f"{packed.num_rows} rows, {packed.num_tokens} places for {int(batch.response_mask.sum())} response tokens"
    )
    plain, ours = (np.min(times[packing], axis=0) for packing in (False, True))
    for index, phase in enumerate(("log_probs of the reference", "update in one pass")):
        ratio = ours[index] / plain[index]
        print(f"  {phase:27s} {plain[index]:.3f} s plain, {ours[index]:.3f} s packed: {ratio:.2f}")


if __name__ == "__main__":
    main()
