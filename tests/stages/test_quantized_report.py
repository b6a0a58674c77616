"""What a run prints of its quantized base."""

import jax
import pytest

from jaxrm.inference.sharded_model import shard_model
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.report import print_quantized


@pytest.mark.parametrize(("kind", "megabytes"), [("int8", 164), ("nf4", 116)])
def test_a_run_says_what_its_quantized_base_saves(kind, megabytes, capsys):
    """By hand: 106,168,320 weights in projections, 28,311,552 of the embedding in bfloat16, norms and scales."""
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    source = ModelSource(preset="smollm2-135m", quantize=kind, dtype="bfloat16")
    print_quantized(shard_model(source, mesh, lora=LoRAConfig(rank=8)))
    line = capsys.readouterr().out
    assert line.startswith(f"Base: {kind}, {megabytes} MB in place of 269 MB (SmolLM2-135M: perplexity ")
    print_quantized(shard_model(ModelSource(preset="smollm2-135m"), mesh, lora=LoRAConfig(rank=8)))
    assert capsys.readouterr().out == ""
