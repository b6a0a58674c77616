"""A small stage to plan, and the topologies of the tests."""

import dataclasses
import importlib.util

import pytest
from support.stage_configs import stage_config

from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.generate import SamplingConfig
from jaxrm.planning.topology import CHIPS, Topology
from jaxrm.sharding.mesh import MeshConfig

EIGHT = "cpu:8"
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs (libtpu) is not here"
)


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
