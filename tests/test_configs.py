"""Every config in configs/ builds, fits a mesh, and is described; large models cost nothing to check."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jaxrm.algorithms import scalar_rm, seq2seq_rm, sft
from jaxrm.algorithms.state import create
from jaxrm.experiment import Experiment
from jaxrm.models.build import ModelSource
from jaxrm.models.config import preset
from jaxrm.runtime.config import from_config_dict
from jaxrm.runtime.config_file import load_config_file
from jaxrm.runtime.mesh import MeshConfig, build_mesh, check_batch
from jaxrm.runtime.optimizer import build_optimizer
from jaxrm.stages.setup import open_model, open_scalar_model
from jaxrm.types import ComparisonBatch, MappingBatch, TokenBatch

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
TRAINED = [path for path in CONFIGS if not path.stem.startswith("pairs_")]
SHAPES = {
    "gemma_2b": "gemma-2b",
    "llama_2_7b": "llama-2-7b",
    "smollm2_135m": "smollm2-135m",
    "quickstart": "tiny",
    "_tiny": "tiny",
}
COLUMNS = {"loss_mask": "bool", "is_correction": "bool", "is_chosen_end": "bool"}  # the others are int32


def described(path):
    return from_config_dict(Experiment, load_config_file(str(path), Experiment)[0])


def model_and_loss(config, source, mesh, shape):
    if config.algorithm == "scalar_rm":
        model = open_scalar_model(source, mesh, shape)
        return model, scalar_rm.scalar_rm_loss(model.graphdef, config.scalar_rm), ComparisonBatch
    model = open_model(source, mesh, shape)
    if config.algorithm == "seq2seq_rm":
        return model, seq2seq_rm.seq2seq_rm_loss(model.graphdef), MappingBatch
    assert config.algorithm == "sft"
    return model, sft.sft_loss(model.graphdef), TokenBatch


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_step_of_the_config_builds_on_eight_devices(path):
    """Abstractly: shapes and shardings of the state, and the trace of loss and gradients."""
    config = described(path)
    name = next(name for stem, name in SHAPES.items() if stem in path.stem)
    mesh = build_mesh(MeshConfig(data=2, fsdp=4))
    check_batch(mesh, "config.data.batch_size", config.data.batch_size, config.num_microbatches)
    source = dataclasses.replace(config.model, path=None, preset=name)
    model, loss_fn, batch_type = model_and_loss(config, source, mesh, preset(name))
    optimizer = build_optimizer(config.optimizer, 100)
    state = jax.eval_shape(lambda p: create(p, optimizer, jax.random.key(0)), model.shapes)

    rows = (config.data.batch_size, config.data.max_length)
    names = [field.name for field in dataclasses.fields(batch_type)]
    batch = batch_type(**{name: jax.ShapeDtypeStruct(rows, COLUMNS.get(name, "int32")) for name in names})
    grads = jax.eval_shape(
        lambda p, b: jax.grad(lambda p: loss_fn(p, b, jax.random.key(0))[0][0])(p), state.params, batch
    )
    assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(lambda x: x.shape, state.params)
    counted = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    known = {"gemma-2b": 2_506_172_416, "llama-2-7b": 6_738_415_616}.get(name)
    if known is not None and config.algorithm == "scalar_rm":  # a head of D in place of Llama's [V, D]
        known += preset(name).hidden_size - (0 if preset(name).tie_embeddings else 32_000 * 4096)
    assert known in (None, counted)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("rm_")], ids=lambda path: path.stem)
def test_reward_models_have_the_published_defaults(path):
    config = described(path)
    assert (config.num_epochs, config.optimizer.weight_decay) == (2.0, 0.1)
    assert (config.reward.kind == "scalar") == (config.algorithm == "scalar_rm")
    if "gemma" in path.stem or "llama" in path.stem:
        assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup) == (2e-5, "cosine", 0.03)


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
