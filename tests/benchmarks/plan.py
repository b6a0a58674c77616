"""Is the planner honest? Memory and FLOPs that jaxrm.plan predicts beside those of the program when it runs here.

    PYTHONPATH=. python tests/benchmarks/plan.py --preset=smollm2-135m --rows=4 --length=512

On an accelerator the measured peak is the device's own count. On CPU it is the resident memory of this process at its
fullest during a step (Linux), less what it was before the arrays were made; programs are compiled before that.
FLOPs are compared with 6 N tokens and attention, by hand, and what the program computes again.
"""

import argparse
import dataclasses
import re
from pathlib import Path

import jax
import numpy as np

from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.config import preset
from jaxrm.models.flops import training_flops_per_token
from jaxrm.models.lora import LoRAConfig
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.flops import matmul_flops
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.topology import GIB, Topology
from jaxrm.runtime.hardware import device_memory
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import STAGES


def resident_bytes(*, peak: bool) -> int:
    """Resident memory of this process, now or at its peak since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def allocate(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), leaf.sharding)
    return jax.jit(lambda: jax.numpy.ones(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--algorithm", default="sft", choices=["sft", "seq2seq_rm", "scalar_rm"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rank", type=int, default=0, help="of adapters; 0 trains all weights")
    args = parser.parse_args()
    config = STAGES[args.algorithm].config_class(
        model=ModelSource(preset=args.preset, dtype=args.dtype, remat=args.remat),
        data=DataConfig(path="task:safety", max_length=args.length, batch_size=args.rows),
        lora=LoRAConfig(rank=args.rank),
    )
    device = jax.devices()[0]
    here = Topology("here", tuple(jax.devices()), None, device.device_kind)
    (predicted,) = plan_stage(config, here).programs
    (program,) = stage_programs(config, build_mesh(config.mesh, here.devices)).programs
    compiled = program.jitted.trace(*program.arguments).lower().compile()
    before = resident_bytes(peak=False)
    state, base, batch = (jax.tree.map(allocate, tree) for tree in program.arguments)
    for _ in range(2):
        state, metrics = compiled(state, base, batch)
        jax.block_until_ready((state, metrics))
    forget_peak()
    state, metrics = compiled(state, base, batch)
    assert np.isfinite(float(metrics["loss"]))
    on_device = device_memory()
    measured = resident_bytes(peak=True) - before if on_device is None else on_device.peak * GIB
    print(f"{args.algorithm}, {args.preset}, {args.rows} x {args.length}, {args.dtype}, remat {args.remat}, "
          f"rank {args.rank}, {len(jax.devices())} x {device.device_kind}")  # fmt: skip
    print(f"peak memory: predicted {predicted.peak / GIB:.3f} GiB, measured {measured / GIB:.3f}, "
          f"ratio {predicted.peak / measured:.3f}")  # fmt: skip
    shape, tokens = preset(args.preset), args.rows * args.length
    is_scalar = args.algorithm == "scalar_rm"
    model_flops = training_flops_per_token(shape, args.length, scalar_head=is_scalar, lora=config.lora) * tokens
    none = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    (program,) = stage_programs(none, build_mesh(config.mesh, here.devices)).programs
    without_remat = matmul_flops(program.jitted.trace(*program.arguments).jaxpr)
    # Computed again rather than kept, whatever remat is: the logits of a loss over words, the scores of attention.
    again = 0 if is_scalar else 2 * shape.hidden_size * shape.vocab_size
    again += shape.num_layers * args.length * shape.num_heads * shape.head_dim
    by_hand = model_flops + again * tokens
    print(f"FLOPs: {predicted.cost.flops:.4g}; without recomputed layers {without_remat:.4g}, by hand {by_hand:.4g}, "
          f"ratio {without_remat / by_hand:.3f}; of the model {model_flops:.4g}")  # fmt: skip


if __name__ == "__main__":
    main()
