"""From a stage's config to what it trains: the model over the devices, the loss, and the type of its batches.

Stages train with it, `jaxrm.planning` compiles it for devices that are not there, and tests take steps of it. So
what is planned is what runs.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from jaxrm.algorithms.train_step import LossFn
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.stages.table import module_of


@dataclass(frozen=True)
class Objective:
    """What is minimized, over which parameters.

    Attributes:
      model: the decoder, or the decoder with a scalar head.
      loss_fn: ``(params, batch, key) -> (loss_sum, weight), aux``.
      batch_type: type of the batches, with arrays ``[B, T]``.
      has_scalar_head: whether ``model`` has one.
    """

    model: ShardedModel
    loss_fn: LossFn
    batch_type: type
    has_scalar_head: bool = False


def build_objective(config: Any, decoder: ShardedModel) -> Objective:
    """The objective of a stage that trains on batches of a data set; nothing is allocated.

    Each such stage has a function ``objective(config, decoder)`` beside its ``run``.

    Args:
      config: of SFT, a reward model or DPO.
      decoder: of ``config.model``, over the devices.
    """
    return importlib.import_module(module_of(config)).objective(config, decoder)
