"""Every config in configs/ builds, fits a mesh, and is described; large models cost nothing to check."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jaxrm.algorithms import sft
from jaxrm.algorithms.state import create
from jaxrm.experiment import Experiment
from jaxrm.models.build import ModelSource
from jaxrm.models.config import preset
from jaxrm.runtime.config import from_config_dict
from jaxrm.runtime.config_file import load_config_file
from jaxrm.runtime.mesh import MeshConfig, build_mesh, check_batch
from jaxrm.runtime.optimizer import build_optimizer
from jaxrm.stages.setup import open_model
from jaxrm.types import TokenBatch

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
SHAPES = {"gemma_2b": "gemma-2b", "llama_2_7b": "llama-2-7b", "smollm2_135m": "smollm2-135m", "quickstart": "tiny"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_of_the_config_builds_on_eight_devices(path):
    """Abstractly: shapes and shardings of the state, and the trace of loss and gradients."""
    config = from_config_dict(Experiment, load_config_file(str(path), Experiment)[0])
    shape = preset(next(name for stem, name in SHAPES.items() if stem in path.stem))
    mesh = build_mesh(MeshConfig(data=2, fsdp=4))
    check_batch(mesh, "config.data.batch_size", config.data.batch_size, config.num_microbatches)
    source = dataclasses.replace(config.model, path=None, preset=SHAPES.get(path.stem, "given"))
    model = open_model(source, mesh, shape)
    optimizer = build_optimizer(config.optimizer, 100)
    state = jax.eval_shape(lambda p: create(p, optimizer, jax.random.key(0)), model.shapes)

    rows = (config.data.batch_size, config.data.max_length)
    batch = TokenBatch(*(jax.ShapeDtypeStruct(rows, t) for t in ("int32", "int32", "int32", "bool")))
    loss_fn = sft.sft_loss(model.graphdef)
    grads = jax.eval_shape(
        lambda p, b: jax.grad(lambda p: loss_fn(p, b, jax.random.key(0))[0][0])(p), state.params, batch
    )
    assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(lambda x: x.shape, state.params)
    counted = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    assert counted == {"gemma-2b": 2_506_172_416, "llama-2-7b": 6_738_415_616}.get(
        next(name for stem, name in SHAPES.items() if stem in path.stem), counted
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_how_to_run_it(path):
    _, docstring = load_config_file(str(path), Experiment)
    assert f"python -m jaxrm.train --config=configs/{path.name}" in docstring and "Needs:" in docstring
    assert len(path.read_text().splitlines()) <= 65


def test_defaults_are_those_of_the_method():
    defaults = Experiment(run_dir="x", model=ModelSource(preset="tiny"))
    assert (defaults.optimizer.lr, defaults.optimizer.schedule, defaults.optimizer.warmup) == (2e-5, "cosine", 0.03)
    assert (defaults.optimizer.b1, defaults.optimizer.b2, defaults.optimizer.clip_norm) == (0.9, 0.95, 1.0)
    assert defaults.num_epochs == 3.0
