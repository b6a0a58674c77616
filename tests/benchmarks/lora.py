"""Training step of adapters at SmolLM2-135M's shape: beside our step of all weights, and torch + peft, in one run.

    pip install -r tests/requirements-torch.txt
    taskset -c 0 python tests/benchmarks/lora.py --rows=4 --length=512 --rank=16
    taskset -c 0 python tests/benchmarks/lora.py --roles --rows=8 --length=128

Each side runs in a process of its own, one after the other and in turns, on the same random tokens with random
weights: forward, backward, clipping and AdamW, in float32. All take the threads of the cores that the process may use.
CPU seconds tell more than seconds where other processes have the same cores. Memory is the compiler's account of
arguments, results and temporary arrays; the peak is that of the process, which has drawn the weights too. Printed,
never asserted: machines are noisy. Figures are in tests/README.md.

With ``--roles`` three models on one base read the same rows, as policy, reference and critic do: in three forwards, or
in one that is batched over their adapters. The latter took 1.1 of the time, so PPO reads them one after another.
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
from typing import Any

sys.path.append(str(Path(__file__).parent))
from train_step import SHAPE, tokens


def timed(one_step: Callable[[], None], steps: int) -> dict[str, float]:
    """Seconds of the best of so many steps, after a first one that does not count."""
    seconds, cpu_seconds = [], []
    for _ in range(steps + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        one_step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {"seconds": min(seconds[1:]), "cpu_seconds": min(cpu_seconds[1:])}


def run_peft(args: argparse.Namespace, rank: int, remat: str) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.0))
    if rank:
        projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=projections))
    if remat != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    ids = torch.as_tensor(tokens(args.rows, args.length))

    def one_step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())

    return timed(one_step, args.steps)


def build_jaxrm(args: argparse.Namespace, rank: int, remat: str) -> tuple[Any, Any, Any, Any]:
    """The compiled step, and what it takes."""
    import jax
    import numpy as np

    from jaxrm.algorithms import sft
    from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer
    from jaxrm.algorithms.state import create
    from jaxrm.algorithms.train_step import build_train_step
    from jaxrm.inference import parameters
    from jaxrm.inference.sharded_model import shard_model, state_shardings
    from jaxrm.models import lora
    from jaxrm.models.build import ModelSource
    from jaxrm.sharding.mesh import MeshConfig, build_mesh
    from jaxrm.sharding.partition import batch_sharding
    from jaxrm.types import TokenBatch

    mesh = build_mesh(MeshConfig())
    source = ModelSource(preset="smollm2-135m", remat=remat)
    model = shard_model(source, mesh, lora=lora.LoRAConfig(rank=rank, alpha=rank or 1.0))
    optimizer = build_optimizer(OptimizerConfig(), 100)
    trained, frozen = lora.split(parameters.init_params(model, jax.random.key(0), seed=0))
    state = jax.jit(lambda p, k: create(p, optimizer, k), donate_argnums=0)(trained, jax.random.key(1))
    rows = batch_sharding(mesh)
    step = build_train_step(
        sft.sft_loss(model.graphdef),
        optimizer,
        state_sharding=state_shardings(model, optimizer, mesh),
        batch_sharding=rows,
        frozen_sharding=model.frozen_shardings,
    )
    ids = tokens(args.rows, args.length).astype(np.int32)
    ones = np.ones_like(ids)
    positions = np.broadcast_to(np.arange(args.length, dtype=np.int32), ids.shape)
    batch = jax.device_put(TokenBatch(ids, ones, positions, ones.astype(bool)), rows)
    return step.lower(state, frozen, batch).compile(), state, frozen, batch


def run_jaxrm(args: argparse.Namespace, rank: int, remat: str) -> dict[str, float]:
    step, state, frozen, batch = build_jaxrm(args, rank, remat)
    account = step.memory_analysis()
    both = account.argument_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    states = [state]

    def one_step() -> None:
        state, metrics = step(states.pop(), frozen, batch)
        states.append(state)
        float(metrics["loss"])

    return timed(one_step, args.steps) | {"memory": (both + account.temp_size_in_bytes) / 2**30}


SIDES = {  # function, whether it has adapters, what the backward pass keeps of a layer
    "jaxrm, whole": (run_jaxrm, False, "full"),
    "jaxrm, LoRA": (run_jaxrm, True, "full"),
    "torch + peft, checkpointing": (run_peft, True, "full"),
    "torch + peft": (run_peft, True, "none"),
    "jaxrm, whole, dots": (run_jaxrm, False, "dots"),
    "jaxrm, LoRA, dots": (run_jaxrm, True, "dots"),
}


def run_roles(args: argparse.Namespace) -> None:
    """Hidden states of three models on one base: three forwards, and one that is batched over their adapters."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxrm.inference import parameters
    from jaxrm.inference.sharded_model import shard_model
    from jaxrm.models import lora
    from jaxrm.models.build import ModelSource
    from jaxrm.sharding.mesh import MeshConfig, build_mesh

    model = shard_model(ModelSource(preset="smollm2-135m"), build_mesh(MeshConfig()), lora=lora.LoRAConfig(args.rank))
    first, base = lora.split(parameters.init_params(model, jax.random.key(0), seed=0))
    roles = [jax.tree.map(lambda x, scale=scale: x + scale, first) for scale in (0.0, 0.001, 0.002)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *roles)
    ids = jnp.asarray(tokens(args.rows, args.length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(args.length)[None], ids.shape)

    def read(base: Any, adapters: Any) -> jax.Array:
        decoder = nnx.merge(model.graphdef, lora.join(base, adapters))
        return decoder(ids, positions=positions, segment_ids=jnp.ones_like(ids))

    three = jax.jit(lambda base, roles: jnp.stack([read(base, one) for one in roles]))
    batched = jax.jit(jax.vmap(read, in_axes=(None, 0)))
    sides = {"three forwards": (three, roles), "one, batched": (batched, stacked)}
    hidden = [np.asarray(run(base, adapters)) for run, adapters in sides.values()]
    print(f"{args.rows} x {args.length} tokens; they differ by at most {np.abs(hidden[0] - hidden[1]).max():.1e}")
    rounds = [
        {side: timed(lambda one=one: jax.block_until_ready(one[0](base, one[1])), 1) for side, one in sides.items()}
        for _ in range(args.rounds)
    ]
    for name in ("seconds", "cpu_seconds"):
        best = {side: min(r[side][name] for r in rounds) for side in sides}
        for side, seconds in best.items():
            print(f"{side:29}{name:12}{seconds:8.2f}{best['three forwards'] / seconds:8.2f}")


def in_a_process(args: argparse.Namespace, side: str) -> dict[str, float]:
    sizes = [f"--{name}={getattr(args, name)}" for name in ("rows", "length", "steps", "rank")]
    command = [sys.executable, __file__, *sizes, f"--one={side}"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    print(side, {name: round(value, 3) for name, value in result.items()}, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sides", nargs="*", default=list(SIDES)[:4], choices=list(SIDES))
    parser.add_argument("--roles", action="store_true", help="compare forwards of three models on one base instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run, has_adapters, remat = SIDES[args.one]
        result = run(args, args.rank if has_adapters else 0, remat)
        print(json.dumps(result | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return
    if args.roles:
        run_roles(args)
        return
    rounds = [{side: in_a_process(args, side) for side in args.sides} for _ in range(args.rounds)]
    best = {side: {name: min(r[side][name] for r in rounds) for name in rounds[0][side]} for side in args.sides}
    first = best[args.sides[0]]
    cores = len(os.sched_getaffinity(0))
    print(f"\n{args.rows} x {args.length} tokens, rank {args.rank}, float32, {cores} cores,", end=" ")
    print(f"best of {args.rounds} x {args.steps} steps; ratios to {args.sides[0]}")
    print(f"{'':29}{'s/step':>8}{'speed':>8}{'CPU s':>8}{'speed':>8}{'GiB':>8}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}")
    for side, numbers in best.items():
        print(f"{side:29}", end="")
        for name in ("seconds", "cpu_seconds"):
            print(f"{numbers[name]:8.2f}{first[name] / numbers[name]:8.2f}", end="")
        has_account = "memory" in numbers and "memory" in first
        print(
            f"{numbers['memory']:8.2f}{numbers['memory'] / first['memory']:8.2f}" if has_account else " " * 16, end=""
        )
        print(f"{numbers['peak']:10.2f}{numbers['peak'] / first['peak']:8.2f}")


if __name__ == "__main__":
    main()
