"""Where every array lies: the one table from logical axes to mesh axes, and what follows from it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.errors import UserError, flag, option
from jaxrm.ops import vocab, vocab_chunks
from jaxrm.sharding.mesh import BATCH_AXES

HOST_MEMORY = "pinned_host"
# Axes over which attention's heads are split: first over tensor, as the projections are, then over context.
_HEADS = ("tensor", "context")
_GATHERED_CHUNK, _WHOLE = 16_384, 2**31 - 1  # most rows of the head in one chunk

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,
    "batch_by_data": "data",  # on the way from the embedding table, see ``Decoder._embed``
    "sequence": "context",
    "embed_by_fsdp": "fsdp",
    # parameters
    "layers": None,  # a scan slices this axis at every layer, so it stays whole
    "vocab": "tensor",
    "embed": ("fsdp", "context"),  # every matrix has this axis, so all are split and gathered layer by layer
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "rank": None,  # of adapters: small
    # scales of quantized kernels, one for a block of the axis
    "embed_blocks": ("fsdp", "context"),
    "heads_blocks": "tensor",
    "head_dim_blocks": None,
    "mlp_blocks": "tensor",
}
# Axes that are copied where the mesh does not divide them: heads shared by several queries, and few scales of many.
_COPIED = ("kv_heads", "embed_blocks", "heads_blocks", "mlp_blocks")


def parameter_shardings(shapes: Any, axes: Any, mesh: Mesh, *, field: str = "mesh") -> Any:
    """Sharding of every parameter.

    Args:
      shapes: pytree of arrays or ``jax.ShapeDtypeStruct``.
      axes: the same tree, with the tuple of logical axis names of each.
      mesh: the devices.
      field: that says how they lie, for messages.

    Raises:
      UserError: where a parameter has an axis that the table does not cover, or a size that the mesh does not
        divide. Heads shared by several queries (``kv_heads``) and scales are copied where they do not divide.
    """

    def one(path: tuple[Any, ...], leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(names) != len(leaf.shape):
            raise UserError(f"parameter {where} has shape {leaf.shape} but logical axes {names}; name each of its axes")
        spec: list[str | tuple[str, ...] | None] = []
        for name, size in zip(names, leaf.shape, strict=True):
            if name not in LOGICAL_TO_MESH:
                raise UserError(
                    f"parameter {where} has logical axis {name!r}, which LOGICAL_TO_MESH does not cover; "
                    f"known: {', '.join(LOGICAL_TO_MESH)}"
                )
            axis = LOGICAL_TO_MESH[name]
            if size % _devices(mesh, axis):
                if name not in _COPIED:
                    raise _does_not_divide(mesh, field, axis, size, f"axis {name!r} of parameter {where}")
                axis = None
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def check_heads(mesh: Mesh, num_heads: int, *, field: str = "mesh") -> None:
    """Refuse a mesh whose tensor and context axes together do not divide the heads of attention.

    Raises:
      UserError: naming the axes of ``field``, and the nearest size that divides.
    """
    if num_heads % _devices(mesh, _HEADS):
        raise _does_not_divide(mesh, field, _HEADS, num_heads, "axis 'heads' of attention")


def optimizer_shardings(
    optimizer: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: Mesh, *, offload: bool = False
) -> Any:
    """Sharding of every array of an optimizer's state: a moment lies like its parameter, the rest is replicated.

    With ``offload`` the moments that lie like their parameters do so in the memory of the hosts, see
    ``check_host_memory``.
    """
    state = jax.eval_shape(optimizer.init, shapes)
    replicated = NamedSharding(mesh, PartitionSpec())

    def moment(leaf: Any, shape: Any, sharding: NamedSharding) -> NamedSharding:
        if leaf.shape != shape.shape:  # factored moments and the like are small
            return replicated
        return sharding.with_memory_kind(HOST_MEMORY) if offload else sharding

    return optax.tree_utils.tree_map_params(
        optimizer, moment, state, shapes, shardings, transform_non_params=lambda _: replicated
    )


def check_host_memory(mesh: Mesh, field: str) -> None:
    """Refuse devices that cannot reach their host's memory; ``field`` asks for it.

    Raises:
      UserError: naming the memories that they have.
    """
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    kinds = [memory.kind for memory in own[0].addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"{option(field)} is True, which needs devices that reach {HOST_MEMORY} memory, but "
            f"{own[0].device_kind} has "
            f"{', '.join(kinds)}; use {flag(field)}=False"
        )


def on_devices(shardings: Any) -> Any:
    """The shardings with device memory in place of host memory."""
    return jax.tree.map(lambda s: s.with_memory_kind("device") if s.memory_kind == HOST_MEMORY else s, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def activation_constraint(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """Function that pins an activation, given the logical name of each of its axes, to the devices of the table.

    An axis that does not divide (a single prompt on eight devices) is not split.
    """

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = [None if name is None else LOGICAL_TO_MESH[name] for name in axes]
        spec = [axis if size % _devices(mesh, axis) == 0 else None for axis, size in zip(spec, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return constrain


def per_device(attend: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """Run an attention kernel on each device's own rows and heads, for kernels that the compiler cannot split.

    Queries, keys and values are split by tokens over context before and after. For the kernel an all-to-all splits them
    by heads instead, so that each device has all tokens of its heads (DeepSpeed-Ulysses, arXiv 2309.14509, Figure 2).

    Args:
      attend: as ``jaxrm.models.attention.Attend``.
      mesh: the devices; rows lie over data and fsdp (whole where they do not divide), heads over tensor and context.
    """
    constrain = activation_constraint(mesh)
    by_token = ("batch", "sequence", "heads", None)

    def sharded(
        query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, **options: Any
    ) -> jax.Array:
        # With fewer key heads than devices, repeat them so that each device has the key heads of its own queries.
        shards = _devices(mesh, _HEADS)
        copies = shards // math.gcd(key.shape[2], shards)
        if copies > 1:
            key, value = (jax.numpy.repeat(x, copies, axis=2) for x in (key, value))
        # Pinned before and after: otherwise the compiler gathers whole rows on every device for the projections too.
        query, key, value = (constrain(x, by_token) for x in (query, key, value))
        batch = BATCH_AXES if query.shape[0] % _devices(mesh, BATCH_AXES) == 0 else None
        rows, heads = PartitionSpec(batch), PartitionSpec(batch, None, _HEADS)
        kernel = jax.shard_map(
            lambda *arrays: attend(*arrays, **options),
            mesh=mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,  # Pallas kernels do not say over which axes their results vary
        )
        return constrain(kernel(query, key, value, segment_ids), by_token)

    return sharded


def read_per_device(read: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Run a kernel that reads a cache on each device's own rows and heads.

    Args:
      read: as ``jaxrm.models.cached_attention.Read``.
      mesh: the devices; rows lie over data and fsdp, key heads over tensor. Key heads that tensor does not divide are
        copied, and the queries of each are split where it divides those.
    """

    def sharded(query: jax.Array, past: Any, **options: Any) -> Any:
        (rows, keys, queries), tensor = query.shape[:3], _devices(mesh, "tensor")
        batch = BATCH_AXES if rows % _devices(mesh, BATCH_AXES) == 0 else None
        heads = PartitionSpec(batch, "tensor" if keys % tensor == 0 else None)
        by_query = keys % tensor > 0 and queries % tensor == 0 and past.mask.shape[0] == rows
        query_spec = PartitionSpec(batch, None, "tensor") if by_query else heads
        kernel = jax.shard_map(
            lambda query, past: read(query, past, **options),
            mesh=mesh,
            in_specs=(query_spec, type(past)(heads, heads, PartitionSpec(batch))),
            out_specs=query_spec,
            check_vma=False,  # Pallas kernels do not say over which axes their results vary
        )
        return kernel(query, past)

    return sharded


def sum_per_device(sum_chunk: vocab_chunks.SumChunk, mesh: Mesh) -> vocab.Chunks:
    """Run a kernel that sums a chunk of the vocabulary on each device's own tokens and ids.

    Tokens lie over data, fsdp and context, the rows of a chunk over tensor, whose sums are then put together. The
    channels of the head lie over fsdp and context, so each chunk is gathered, in the dtype of the hidden states. Where
    nothing is gathered, the vocabulary is one chunk.
    """
    is_gathered = _devices(mesh, LOGICAL_TO_MESH["embed"]) > 1

    def sharded(
        hidden: jax.Array,
        weights: jax.Array,
        targets: jax.Array,
        first: jax.Array,
        step: int,
        softmax: vocab_chunks.Softmax,
    ) -> vocab_chunks.Sums:
        tensor = _devices(mesh, "tensor") if weights.shape[0] % _devices(mesh, "tensor") == 0 else 1
        axes: tuple[str | tuple[str, ...], ...] = (BATCH_AXES, "context")
        sizes = zip(axes, targets.shape, strict=False)
        tokens = PartitionSpec(*(axis if size % _devices(mesh, axis) == 0 else None for axis, size in sizes))

        def on_device(hidden: jax.Array, weights: jax.Array, targets: jax.Array, first: jax.Array) -> vocab_chunks.Sums:
            if tensor == 1:
                return sum_chunk(hidden, weights, targets, first, step, softmax)
            first += jax.lax.axis_index("tensor") * weights.shape[0] * step
            sums = jax.lax.all_gather(sum_chunk(hidden, weights, targets, first, step, softmax), "tensor")
            shares = [jax.tree.map(lambda x, i=i: x[i], sums) for i in range(tensor)]
            return functools.reduce(vocab_chunks.together, shares)

        kernel = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(tokens, PartitionSpec("tensor" if tensor > 1 else None), tokens, PartitionSpec()),
            out_specs=tokens,
            check_vma=False,  # Pallas kernels do not say over which axes their results vary
        )
        return kernel(hidden, weights.astype(hidden.dtype) if is_gathered else weights, targets, first)

    return vocab.Chunks(sharded, _GATHERED_CHUNK if is_gathered else _WHOLE)


def _devices(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """Devices that a table entry spreads an axis over."""
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def _does_not_divide(mesh: Mesh, field: str, axis: str | tuple[str, ...] | None, size: int, what: str) -> UserError:
    """The error for mesh axes that do not divide ``size``; the advice changes the first of them that has to change."""
    names = [name for name in ((axis,) if isinstance(axis, str) else axis or ()) if mesh.shape[name] > 1]
    sizes = " and ".join(f"{option(f'{field}.{name}')} is {mesh.shape[name]}" for name in names)
    product = f", together {_devices(mesh, axis)}" if len(names) > 1 else ""
    rest = size
    advice: list[str] = []
    for name in reversed(names):  # what is left of the size after one axis is for the next
        devices = mesh.shape[name]
        divisor = _divisor(rest, devices)
        rest //= divisor
        if divisor != devices:
            advice.append(f"{flag(f'{field}.{name}')}={divisor}")
    return UserError(f"{sizes}{product}, but {what} has size {size}; use a divisor of it, e.g. {' '.join(advice)}")


def _divisor(size: int, most: int) -> int:
    """Largest divisor of ``size`` up to ``most``."""
    return max(n for n in range(1, most + 1) if size % n == 0)


def device_bytes(tree: Any) -> float:
    """Bytes of device memory that abstract arrays take on one device; arrays in host memory take none."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST_MEMORY]
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _item_bytes(leaf.dtype) for leaf in leaves))


def _item_bytes(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize
