"""Training step of SmolLM2-135M: jaxrm beside torch + transformers, on the same machine in one run.

    pip install -r tests/requirements-torch.txt
    python tests/benchmarks/train_step.py --rows=4 --length=512 --steps=4

Each side runs in a process of its own, one after the other and in turns, on the same random tokens with random
weights: forward, backward, clipping and AdamW, in float32. Printed, never asserted: machines are noisy.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def tokens(rows: int, length: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (rows, length))


def run_torch(rows: int, length: int, steps: int, remat: str, clock: Callable[[], float]) -> list[float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.0))
    if remat != "none":
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    ids = torch.as_tensor(tokens(rows, length))
    seconds = []
    for _ in range(steps + 1):
        start = clock()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        seconds.append(clock() - start)
    return seconds[1:]


def run_jaxrm(rows: int, length: int, steps: int, remat: str, clock: Callable[[], float]) -> list[float]:
    import jax
    import numpy as np

    from jaxrm.algorithms import sft
    from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer
    from jaxrm.algorithms.state import create
    from jaxrm.algorithms.train_step import build_train_step
    from jaxrm.inference.sharded_model import shard_model
    from jaxrm.models import build
    from jaxrm.models.build import ModelSource
    from jaxrm.sharding.mesh import MeshConfig, build_mesh
    from jaxrm.sharding.partition import batch_sharding
    from jaxrm.types import TokenBatch

    source = ModelSource(preset="smollm2-135m", remat=remat)
    mesh = build_mesh(MeshConfig())
    model = shard_model(source, mesh)
    optimizer = build_optimizer(OptimizerConfig(), 100)
    params = build.init_params(model.config, source, jax.random.key(0), model.shardings)
    state = jax.jit(lambda p, k: create(p, optimizer, k), donate_argnums=0)(params, jax.random.key(1))
    step = build_train_step(
        sft.sft_loss(model.graphdef),
        optimizer,
        state_sharding=jax.tree.map(lambda x: x.sharding, state),
        batch_sharding=batch_sharding(mesh),
    )
    ids = tokens(rows, length).astype(np.int32)
    ones = np.ones_like(ids)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    batch = jax.device_put(TokenBatch(ids, ones, positions, ones.astype(bool)), batch_sharding(mesh))
    seconds = []
    for _ in range(steps + 1):
        start = clock()
        state, metrics = step(state, {}, batch)
        float(metrics["loss"])
        seconds.append(clock() - start)
    return seconds[1:]


SIDES = {
    "torch + transformers": (run_torch, "none"),
    "torch, checkpointing": (run_torch, "full"),
    "jaxrm, remat full": (run_jaxrm, "full"),
    "jaxrm, remat dots": (run_jaxrm, "dots"),
    "jaxrm, remat attention": (run_jaxrm, "attention"),
    "jaxrm, remat none": (run_jaxrm, "none"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds, which other work changes less")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run, remat = SIDES[args.one]
        clock = time.process_time if args.cpu else time.perf_counter
        seconds = run(args.rows, args.length, args.steps, remat, clock)
        print(json.dumps([min(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
        return
    results: dict[str, list[tuple[float, float]]] = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            sizes = [f"--{name}={getattr(args, name)}" for name in ("rows", "length", "steps")]
            command = [sys.executable, __file__, *sizes, *(["--cpu"] if args.cpu else []), f"--one={side}"]
            environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            results[side].append(tuple(json.loads(output.splitlines()[-1])))
    first = args.sides[0]
    print(f"\n{args.rows} x {args.length} tokens, float32, best of {args.rounds} x {args.steps} steps")
    print(f"{'':24}{'tokens/s':>10}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}")
    speed = {side: args.rows * args.length / min(s for s, _ in rounds) for side, rounds in results.items()}
    memory = {side: min(m for _, m in rounds) for side, rounds in results.items()}
    for side in args.sides:
        ratios = speed[side] / speed[first], memory[side] / memory[first]
        print(f"{side:24}{speed[side]:10.0f}{ratios[0]:8.2f}{memory[side]:10.2f}{ratios[1]:8.2f}")


if __name__ == "__main__":
    main()
