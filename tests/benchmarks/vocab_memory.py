"""Cross-entropy at a vocabulary of 256,000: the chunked pass beside the plain one.

    PYTHONPATH=. python tests/benchmarks/vocab_memory.py

Compiles value and gradients of both at 4,096 tokens, prints their temporary memory and times, and compares every
value and gradient. Needs about 16 GB, all of it for the plain one.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.ops import vocab


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, targets[:, None], axis=1).mean()


def chunked(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    return vocab.linear_cross_entropy(hidden, head, targets).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(args.tokens, args.hidden)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(args.vocab, args.hidden)) * 0.1, jnp.float32)
    targets = jnp.asarray(rng.integers(0, args.vocab, args.tokens), jnp.int32)
    results = {}
    for name, loss in (("plain", plain), ("chunked", chunked)):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head, targets).compile()
        temporary = step.memory_analysis().temp_size_in_bytes / 2**30
        jax.block_until_ready(step(hidden, head, targets))
        start = time.perf_counter()
        value, (d_hidden, d_head) = jax.block_until_ready(step(hidden, head, targets))
        seconds = time.perf_counter() - start
        results[name] = (temporary, seconds, *(np.asarray(x, np.float64) for x in (value, d_hidden, d_head)))
        print(f"{name:8} temporary {temporary:7.3f} GiB  {seconds:6.2f} s  loss {float(value):.6f}", flush=True)
    (plain_memory, plain_seconds, *wants), (memory, seconds, *gots) = results["plain"], results["chunked"]
    print(f"memory {plain_memory / memory:.0f} times less, time {seconds / plain_seconds:.2f} of plain")
    for name, want, got in zip(("loss", "d hidden", "d head"), wants, gots, strict=True):
        print(f"{name:8} largest difference {np.abs(got - want).max() / np.abs(want).max():.1e} of the largest value")


if __name__ == "__main__":
    main()
