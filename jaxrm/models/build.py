"""From the ``model`` section of a config to a decoder: its shape, its graph and its first parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.config.fields import bounded, check, one_of, place, typed
from jaxrm.errors import UserError, flag, option
from jaxrm.models import attention, cached_attention, hub, layers, quantized
from jaxrm.models.config import ModelConfig, preset
from jaxrm.models.heads import ActorCritic, ScalarHead, ScalarModel
from jaxrm.models.kernels import PLAIN, Kernels
from jaxrm.models.lora import NO_LORA, LoRAConfig
from jaxrm.models.transformer import REMAT_POLICIES, Decoder, DecodingStorage
from jaxrm.ops import vocab_kernels

DTYPES = ("float32", "bfloat16")
AUTO_REMAT = "auto"  # decided by a stage before it opens its model


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it computes. Give a path or a preset.

    Attributes:
      path: published weights: hub name, folder with config.json and safetensors, or GGUF file.
      adapter: adapters that stand on those weights: the folder of a run, or a PEFT folder. A run with adapters can be
        given as ``path`` too, and then finds its base by itself.
      quantize: how the frozen base of adapters is stored: ``int8``, a byte for each weight of a projection, or ``nf4``,
        half a byte; None as it is. Perplexity of SmolLM2-135M goes from 3.50 to 3.50 or 4.08
        (tests/benchmarks/quantize.py).
      preset: shape by public name (``jaxrm.models.config.PRESETS``), with random parameters.
      dtype: compute dtype, ``float32`` or ``bfloat16``; parameters are float32 whatever it is.
      remat: what the backward pass keeps of a layer, and does not compute again: ``full`` least, ``attention`` the
        projections of attention, ``dots`` those of the MLP too, ``none`` all. ``auto`` is the first of ``dots``,
        ``attention`` and ``full`` that the devices have room for (`jaxrm.stages.remat`).
      attention: ``auto`` (by platform), ``xla``, ``cudnn`` or ``splash``.
      cached_attention: of one token to those before it, as responses are drawn: ``auto``, ``xla`` or ``pallas``, which
        reads of a cache what its rows hold. ``auto`` takes it where it can: on TPU with heads of 128 or 256, on GPU in
        16 bits with heads of 64, 128 or 256. On TPU a cache that is no whole number of 128s is read in XLA.
      vocabulary: of log-probs, entropies and most likely tokens: ``auto``, ``xla`` or ``pallas``, whose logits never
        leave the chip. ``auto`` takes it on TPU where channels are a multiple of 128. The pass backward is in XLA.
    """

    path: str | None = None
    adapter: str | None = None
    quantize: str | None = bounded(None, one_of(*quantized.KINDS))
    preset: str | None = None
    dtype: str = bounded("float32", one_of(*DTYPES))
    remat: str = bounded("full", one_of(*REMAT_POLICIES, AUTO_REMAT))
    attention: str = bounded("auto", one_of(*attention.KERNELS))
    cached_attention: str = bounded("auto", one_of(*cached_attention.KERNELS))
    vocabulary: str = bounded("auto", one_of(*vocab_kernels.KERNELS))

    def __post_init__(self) -> None:
        check(self)
        if self.path is not None and self.preset is not None:
            raise UserError(
                f"{place(self)} has both path {self.path!r} and preset {self.preset!r}; give weights or a shape, "
                f"e.g. {typed(self, 'preset', None)}"
            )
        if self.adapter is not None and self.path is None:
            raise UserError(
                f"{place(self)} has the adapter {self.adapter!r}, but no path of the weights that it stands on; give "
                f"them, e.g. {typed(self, 'path', 'google/gemma-2b')}"
            )


def read_shape(source: ModelSource) -> ModelConfig:
    """Shape of the model that ``source`` names, without its weights.

    Raises:
      UserError: where there is no such model, or neither path nor preset.
    """
    if source.path is not None:
        return hub.read_model_config(source.path)
    if source.preset is not None:
        return preset(source.preset)
    raise UserError(
        f"{option('model')} has neither path nor preset; give weights, e.g. {flag('model.path')}=google/gemma-2b, "
        f"or a shape with random parameters, e.g. {flag('model.preset')}=tiny"
    )


def check_length(config: ModelConfig, field: str, length: int) -> None:
    """Refuse rows of more tokens than the model has positions for.

    Args:
      config: shape of the model.
      field: that says ``length``, for the message.
      length: tokens in a row.
    """
    if length > config.max_position:
        raise UserError(
            f"{option(field)} is {length}, but the model reads at most {config.max_position} tokens; "
            f"e.g. {flag(field)}={config.max_position}"
        )


def check_weights(config: ModelConfig, source: ModelSource) -> None:
    """Refuse weights that ``init_params`` could not read, by their headers; nothing is allocated.

    Raises:
      UserError: naming the missing, extra, misshapen or unreadable tensors.
    """
    if source.path is not None:
        hub.check_weights(source.path, config)


def check_trainable(source: ModelSource, lora: LoRAConfig) -> None:
    """Refuse to train quantized weights.

    Raises:
      UserError: ``config.model.quantize`` without adapters.
    """
    if source.quantize is not None and not lora.is_on:
        raise UserError(
            f"{option('model.quantize')} is {source.quantize!r}, but {option('lora.rank')} is 0, which trains all "
            f"weights, and quantized ones cannot be trained; train adapters, e.g. {flag('lora.rank')}=16, or give "
            f"{flag('model.quantize')}=None"
        )


def abstract_decoder(
    config: ModelConfig,
    source: ModelSource,
    *,
    kernels: Kernels = PLAIN,
    constrain: layers.Constrain = layers.unconstrained,
    lora: LoRAConfig = NO_LORA,
    on_cpu: bool = False,
) -> tuple[nnx.GraphDef, Any, Any]:
    """The decoder without memory: its graph, the shapes of its parameters and their logical axes.

    Returns:
      ``graphdef`` (static, for ``nnx.merge(graphdef, params)``), a nested dict of ``jax.ShapeDtypeStruct`` and the
      same dict of tuples of logical axis names.
    """
    return _abstract(lambda: _decoder(config, source, nnx.Rngs(0), kernels, constrain, lora, on_cpu))


def abstract_scalar_model(
    config: ModelConfig,
    source: ModelSource,
    *,
    kernels: Kernels = PLAIN,
    constrain: layers.Constrain = layers.unconstrained,
    lora: LoRAConfig = NO_LORA,
    on_cpu: bool = False,
) -> tuple[nnx.GraphDef, Any, Any]:
    """A ``jaxrm.models.heads.ScalarModel`` without memory; arguments and returns as ``abstract_decoder``."""
    trunk = replace(config, tie_embeddings=True)  # no language head

    def make() -> ScalarModel:
        rngs = nnx.Rngs(0)
        return ScalarModel(_decoder(trunk, source, rngs, kernels, constrain, lora, on_cpu), rngs=rngs)

    return _abstract(make)


def abstract_actor_critic(
    config: ModelConfig,
    source: ModelSource,
    *,
    kernels: Kernels = PLAIN,
    constrain: layers.Constrain = layers.unconstrained,
    lora: LoRAConfig = NO_LORA,
    on_cpu: bool = False,
) -> tuple[nnx.GraphDef, Any, Any]:
    """A ``jaxrm.models.heads.ActorCritic`` without memory; arguments and returns as ``abstract_decoder``."""

    def make() -> ActorCritic:
        rngs = nnx.Rngs(0)
        return ActorCritic(_decoder(config, source, rngs, kernels, constrain, lora, on_cpu), rngs=rngs)

    return _abstract(make)


def init_scalar_head(config: ModelConfig, key: jax.Array, shardings: Any) -> Any:
    """First parameters of a ``jaxrm.models.heads.ScalarHead``, drawn with ``key``."""

    def draw(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(ScalarHead(config.hidden_size, rngs=nnx.Rngs(params=key))))

    return jax.jit(draw, out_shardings=shardings)(key)


def init_params(config: ModelConfig, source: ModelSource, key: jax.Array, shardings: Any) -> Any:
    """First parameters, each made where it lies: read from ``source.path``, or drawn with ``key``.

    They are float32, but for kernels that the source quantizes.
    """
    if source.path is not None:
        return hub.load_params(source.path, config, shardings=shardings, quantize=source.quantize)

    def draw(key: jax.Array) -> Any:
        decoder = _decoder(config, source, nnx.Rngs(params=key), PLAIN, layers.unconstrained, NO_LORA)
        return nnx.to_pure_dict(nnx.state(decoder))

    return jax.jit(draw, out_shardings=shardings)(key)


def _abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Any, Any]:
    graphdef, state = nnx.split(nnx.eval_shape(make))
    axes = jax.tree.map(
        lambda param: param.get_metadata()["logical_axes"], state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def _decoder(
    config: ModelConfig,
    source: ModelSource,
    rngs: nnx.Rngs,
    kernels: Kernels,
    constrain: layers.Constrain,
    lora: LoRAConfig,
    on_cpu: bool = False,
) -> Decoder:
    return Decoder(
        config,
        rngs=rngs,
        dtype=jnp.dtype(source.dtype),
        remat="full" if source.remat == AUTO_REMAT else source.remat,  # undecided: of what is not trained
        kernels=kernels,
        constrain=constrain,
        projections=layers.ProjectionOptions(lora=lora, quantize=source.quantize, on_cpu=on_cpu),
    )


def with_storage(graphdef: nnx.GraphDef, params: Any, storage: DecodingStorage) -> nnx.GraphDef:
    """The graph of a decoder that stores what it reads at every token as ``storage`` says.

    Args:
      graphdef: of the decoder.
      params: its parameters or their shapes.
      storage: in a loop over tokens.
    """
    decoder = nnx.merge(graphdef, params)
    decoder.storage = storage
    return nnx.split(decoder)[0]
