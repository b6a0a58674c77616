"""Tiny decoders with random parameters, which compile in a moment."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from jaxrm.models.config import PRESETS, ModelConfig
from jaxrm.models.transformer import Decoder

TINY = dataclasses.replace(
    PRESETS["tiny"], vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, head_dim=8
)


def random_decoder(config: ModelConfig = TINY, **options: Any) -> tuple[nnx.GraphDef, dict]:
    """Graph, which is static under jit, and parameters of a decoder.

    Args:
      config: its shape; that alone decides the parameters.
      options: of `jaxrm.models.transformer.Decoder`, e.g. its dtype.
    """
    return abstract_decoder(config, **options)[0], _parameters(config)


def abstract_decoder(config: ModelConfig = TINY, **options: Any) -> tuple[nnx.GraphDef, dict]:
    """The same with the shapes of the parameters in their place."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options)))
    return graphdef, nnx.to_pure_dict(shapes)


@functools.cache
def _parameters(config: ModelConfig) -> dict:
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(0)))))()
