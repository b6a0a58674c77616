"""A small stage to plan, and the topologies of the tests."""

import dataclasses
import importlib.util

import jax
import pytest
from support.stage_configs import stage_config

from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.planning.topology import CHIPS, Topology, open_topology
from jaxrm.sharding.mesh import MeshConfig

EIGHT = "cpu:8"
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs (libtpu) is not here"
)
gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the compiler for GPUs (jax[cuda13]) is not here"
)


def compiled_for(topology: str, function, shapes, dtypes):
    """A function compiled for one device that is not there, on arguments of these shapes and dtypes."""
    device = jax.sharding.SingleDeviceSharding(open_topology(topology).devices[0])
    arguments = jax.tree.map(lambda dtype, shape: jax.ShapeDtypeStruct(shape, dtype, sharding=device), dtypes, shapes)
    return jax.jit(function).lower(*arguments).compile()


def config(algorithm: str = "sft", **sections):
    """A stage of the smallest model on a mesh of eight."""
    return stage_config(
        algorithm,
        model=ModelSource(preset="lab-tiny", remat="none"),
        data=DataConfig(path="task:safety", max_length=64, batch_size=16),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=16), mesh=MESH),
        mesh=MESH,
        **sections,
    )


def with_memory(topology: Topology, gib: float) -> Topology:
    """The topology with the speeds of TPU v5e and another memory."""
    return dataclasses.replace(topology, chip=dataclasses.replace(CHIPS["v5e"], memory=gib))
