"""Folders of runs as training leaves them, made in a moment instead of trained."""

import dataclasses

import jax
import numpy as np
import pytest
from support.stage_configs import stage_config

from jaxrm.config import dicts
from jaxrm.data.config import DataConfig
from jaxrm.data.tasks import write_task
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.inference.base import describe_base, keep_base
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.models import build, lora
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.models.lora import NO_LORA
from jaxrm.runtime import run_lock
from jaxrm.runtime.checkpoint import CheckpointConfig, Checkpoints
from jaxrm.runtime.run_folder import open_run

SMALL = dataclasses.replace(
    PRESETS["tiny"], hidden_size=32, intermediate_size=48, num_layers=2, head_dim=8, max_position=256
)


@pytest.fixture(scope="session")
def small():
    """Shape of a model that compiles in a moment."""
    return SMALL


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """The embedded task's files."""
    folder = tmp_path_factory.mktemp("task")
    write_task("safety", folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def make_run(task_folder):
    """Function that writes the folder of a run and returns the parameters of each of its checkpoints.

    With ``lora`` those are its adapters, which stand on the run ``base``; ``seed`` gives other parameters.
    """
    tokenizer = load_tokenizer(str(task_folder / "tokenizer"))

    def make(folder, algorithm="sft", losses=((4, 1.0),), config=SMALL, template="auto", base=None, seed=0, **fields):
        experiment = stage_config(
            algorithm,
            run_dir=str(folder),
            model=ModelSource(preset="tiny") if base is None else ModelSource(path=str(base)),
            **{"data": DataConfig(path="task:safety", template=template)} | fields,
        )
        run = open_run(experiment.run_dir, dicts.to_dict(experiment))
        save_shape_and_tokenizer(config, tokenizer, run)
        abstract = build.abstract_scalar_model if algorithm == "scalar_rm" else build.abstract_decoder
        _, shapes, _ = abstract(config, experiment.model, lora=fields.get("lora", NO_LORA))
        shapes, _ = lora.split(shapes)
        if base is not None:
            keep_base(run, describe_base(experiment.model, 0))
        saved = {}
        checkpoints = Checkpoints(run.checkpoints, CheckpointConfig(keep=len(losses) or 1))
        for step, loss in losses:
            rng = np.random.default_rng((step, seed) if seed else step)
            saved[step] = jax.tree.map(lambda x, rng=rng: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
            placed = jax.tree.map(jax.numpy.asarray, saved[step])
            checkpoints.save(step, {"params": placed}, {"loader": {}, "data": ""}, loss)
        checkpoints.close()
        run_lock.give_back(run.path)
        return saved

    return make
