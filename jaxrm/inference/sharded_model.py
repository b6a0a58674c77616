"""What every stage sets up: a model over the devices, the files of an embedded task, batches on the devices."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms.state import TrainState
from jaxrm.data import templates
from jaxrm.data.config import DataConfig
from jaxrm.data.tokenizer import first_without_row, load_tokenizer, token_ranges, vocabulary_conflict
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import weights
from jaxrm.models import attention, build, cached_attention, lora
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.models.kernels import Kernels
from jaxrm.models.lora import NO_LORA, LoRAConfig
from jaxrm.ops import vocab, vocab_kernels
from jaxrm.sharding import partition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ShardedModel:
    """A model and where its parameters lie, before any of them exists.

    Attributes:
      config: shape of its decoder.
      mesh: the devices.
      graphdef: for ``nnx.merge(graphdef, params)``.
      shapes: pytree of `jax.ShapeDtypeStruct`.
      shardings: the same tree of shardings.
      source: which model it is, and how it computes.
      lora: its adapters.
    """

    config: ModelConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    shapes: Any
    shardings: Any
    source: ModelSource
    lora: LoRAConfig = NO_LORA

    @property
    def kernels(self) -> str:
        """The kernels that it runs, in words."""
        platform, dtype = self.mesh.devices.flat[0].platform, np.dtype(self.source.dtype)
        names = {
            "attention": attention.resolve(self.source.attention, platform, dtype),
            "cached_attention": cached_attention.resolve(
                self.source.cached_attention, platform, dtype, self.config.head_dim
            ),
            "vocabulary": vocab_kernels.resolve(self.source.vocabulary, platform, dtype, self.config.hidden_size),
        }
        return ", ".join(f"{name} {kernel}" for name, kernel in names.items())

    @property
    def trained_shapes(self) -> Any:
        """Shapes of what is trained: of all parameters, or of the adapters and a scalar head."""
        return lora.split(self.shapes)[0]

    @property
    def trained_shardings(self) -> Any:
        """Shardings of what is trained."""
        return lora.split(self.shardings)[0]

    @property
    def frozen_shapes(self) -> Any:
        """Shapes of the base under the adapters, in the compute dtype; ``{}`` where there are none."""
        return self._in_compute_dtype(lora.split(self.shapes)[1])

    @property
    def read_only_shapes(self) -> Any:
        """Shapes of all parameters, in the compute dtype, of a model that is never trained."""
        return self._in_compute_dtype(self.shapes)

    def _in_compute_dtype(self, shapes: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, _frozen_dtype(path, x.dtype, self.source.dtype)), shapes
        )

    @property
    def frozen_shardings(self) -> Any:
        """Shardings of the base under the adapters."""
        return lora.split(self.shardings)[1]

    def end_ids(self, tokenizer: "PreTrainedTokenizerBase", template: str) -> tuple[int, ...]:
        """Ids that end a response: those of template and tokenizer, and those that the model's makers list."""
        own = (id_ for id_ in self.config.end_ids if id_ < self.config.vocab_size)
        return tuple(sorted({*templates.end_ids(tokenizer, template), *own}))


def shard_model(
    source: ModelSource,
    mesh: Mesh,
    config: ModelConfig | None = None,
    *,
    lora: LoRAConfig = NO_LORA,
    field: str = "mesh",
) -> ShardedModel:
    """Lay a model over the devices; nothing is allocated.

    Args:
      source: which model, and how it computes.
      mesh: the devices.
      config: its shape, read from ``source`` where it is None.
      lora: its adapters.
      field: that says how the devices lie, for messages.

    Raises:
      UserError: where there is no such model, or it does not fit the mesh.
    """
    return _open(build.abstract_decoder, source, mesh, config, lora, field)


def shard_scalar_model(
    source: ModelSource, mesh: Mesh, config: ModelConfig | None = None, *, lora: LoRAConfig = NO_LORA
) -> ShardedModel:
    """Lay a decoder with a scalar head over the devices; arguments and errors as for `shard_model`."""
    return _open(build.abstract_scalar_model, source, mesh, config, lora)


def shard_actor_critic(
    source: ModelSource, mesh: Mesh, config: ModelConfig | None = None, *, lora: LoRAConfig = NO_LORA
) -> ShardedModel:
    """Lay a decoder with both heads over the devices; arguments and errors as for `shard_model`."""
    return _open(build.abstract_actor_critic, source, mesh, config, lora)


def _open(
    abstract: Callable[..., Any],
    source: ModelSource,
    mesh: Mesh,
    config: ModelConfig | None,
    adapters: LoRAConfig,
    field: str = "mesh",
) -> ShardedModel:
    config = config or weights.read_shape(source)
    platform = mesh.devices.flat[0].platform
    partition.check_heads(mesh, config.num_heads, field=field)
    constrain = partition.activation_constraint(mesh)
    # The graph holds the kernel and the constraints, so the same functions run on any mesh without being told of it.
    graphdef, shapes, axes = abstract(
        config,
        source,
        kernels=_kernels(source, mesh, config),
        constrain=constrain,
        lora=adapters,
        on_cpu=platform == "cpu",
    )
    shardings = partition.parameter_shardings(shapes, axes, mesh, field=field)
    return ShardedModel(config, mesh, graphdef, shapes, shardings, source, adapters)


def _kernels(source: ModelSource, mesh: Mesh, config: ModelConfig) -> Kernels:
    """The kernels of the platform, each for a device's own part where the compiler cannot split it."""
    platform, dtype = mesh.devices.flat[0].platform, np.dtype(source.dtype)
    attend = attention.choose(source.attention, platform, dtype)
    # The compiler splits plain XLA attention over rows and heads by itself. It cannot split other kernels, and over the
    # context axis it would gather whole rows.
    if attend is not attention.xla or mesh.shape["context"] > 1:
        attend = partition.per_device(attend, mesh)
    read_cache = cached_attention.choose(source.cached_attention, platform, dtype, config.head_dim)
    if read_cache is not cached_attention.read_in_xla:
        read_cache = partition.read_per_device(read_cache, mesh)
    sum_chunk = vocab_kernels.choose(source.vocabulary, platform, dtype, config.hidden_size)
    vocabulary = vocab.Chunks() if sum_chunk is None else partition.sum_per_device(sum_chunk, mesh)
    return Kernels(attend, read_cache, vocabulary)


def state_shardings(
    model: ShardedModel, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """Where each array of a training state lies: a moment like its parameter, step and key on every device.

    With ``offload`` (``config.optimizer.offload``) moments lie in the memory of the hosts.
    """
    copied = NamedSharding(mesh, PartitionSpec())
    # Moments are as large as the parameters, so each is split like its own.
    shapes, shardings = model.trained_shapes, model.trained_shardings
    moments = partition.optimizer_shardings(optimizer, shapes, shardings, mesh, offload=offload)
    return TrainState(copied, shardings, moments, copied)


def tokenizer_path(data: DataConfig, source: ModelSource) -> str:
    """Where the tokenizer is: as the data section says, else beside the weights."""
    path = data.tokenizer or weights.tokenizer_of(source)
    if path is None:
        raise UserError(
            f"{option('data.tokenizer')} is None and there are no weights to find it beside; give a hub name, a "
            f"folder or "
            f"a GGUF file, e.g. {flag('data.tokenizer')}=google/gemma-2b"
        )
    return path


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", path: str, template: str, source: ModelSource, config: ModelConfig
) -> None:
    """Refuse a tokenizer whose ids mean other tokens to the model, or nothing.

    Args:
      tokenizer: the one to be used.
      path: where it is, for the message.
      template: chat template, as in ``config.data.template``.
      source: of the weights, which may have a tokenizer of their own beside them.
      config: shape of the model.

    Raises:
      UserError: naming an id that it does not share with the tokenizer of the weights, or one without embedding.
    """
    own = weights.tokenizer_of(source)
    if own is not None and own != path:
        try:
            conflict = vocabulary_conflict(load_tokenizer(own), tokenizer)
        except UserError:  # published weights may come without one
            conflict = None
        if conflict is not None:
            raise UserError(
                f"the tokenizer {path} is not that of the weights {source.path}: {conflict}; use their own, "
                f"{flag('data.tokenizer')}={own}"
            )
    outside = first_without_row(tokenizer, config.vocab_size, templates.text_of(tokenizer, template))
    if outside is not None:
        raise UserError(
            f"the tokenizer {path} has {outside[1]!r} with id {outside[0]}, but the model's vocabulary holds "
            f"{config.vocab_size} tokens; use the tokenizer that belongs to the model ({flag('data.tokenizer')}=...) "
            "or a model with a larger vocabulary"
        )


def with_tokens(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> ModelConfig:
    """The shape of a model that never draws an id for which its tokenizer has no token, as padded vocabularies have."""
    return replace(config, drawable=token_ranges(tokenizer, config.vocab_size))


def pad_id(tokenizer: "PreTrainedTokenizerBase", config: ModelConfig) -> int:
    """Id that rows are filled up with. It is never attended to and never a target, so any id will do."""
    id_ = tokenizer.pad_token_id
    return 0 if id_ is None or id_ >= config.vocab_size else int(id_)


def in_compute_dtype(params: Any, dtype: str) -> Any:
    """Parameters that are never trained, in the dtype that they are computed with anyway.

    Norms, adapters and scalar heads stay as they are. What is given is used up: arrays that had another dtype are
    deleted.
    """

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if x.dtype == _frozen_dtype(path, x.dtype, dtype):
            return x
        small = jax.block_until_ready(x.astype(dtype))
        x.delete()  # so that no more than one of them is there twice
        return small

    return jax.tree_util.tree_map_with_path(one, params)


def _frozen_dtype(path: tuple[Any, ...], dtype: Any, compute_dtype: str) -> Any:
    """Dtype of a parameter that is never trained: that of the computation, but for what computes in float32."""
    is_wide = path[-1].key not in ("kernel", "embedding") or path[0].key == lora.SCALAR_HEAD
    return dtype if is_wide else np.dtype(compute_dtype)


def pad_to_multiple_of(mesh: Mesh) -> int:
    """What the width of rows that are put together on the devices is a multiple of: the blocks of their kernels, and
    the devices that share a row's tokens."""
    return math.lcm(1 if mesh.devices.flat[0].platform == "cpu" else 128, mesh.shape["context"])


def to_devices(mesh: Mesh, batch_type: type[Batch]) -> Callable[[dict[str, np.ndarray]], Batch]:
    """Function that puts this process's rows ``[local_B, T]`` on its devices as part of a whole batch of that type."""
    sharding = partition.batch_sharding(mesh)

    def place(batch: dict[str, np.ndarray]) -> Batch:
        # Each process gives its own rows; no process needs the whole batch.
        arrays = {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
        return batch_type(**arrays)

    return place
