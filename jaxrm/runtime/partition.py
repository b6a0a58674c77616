"""Where every array lies: the one table from logical axes to mesh axes, and what follows from it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.errors import UserError
from jaxrm.runtime.mesh import BATCH_AXES

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,
    "batch_by_data": "data",
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
}


def parameter_shardings(shapes: Any, axes: Any, mesh: Mesh, *, field: str = "config.mesh") -> Any:
    """Sharding of every parameter.

    Args:
      shapes: pytree of arrays or `jax.ShapeDtypeStruct`.
      axes: the same tree, with the tuple of logical axis names of each.
      mesh: the devices.
      field: that says how they lie, for messages.

    Raises:
      UserError: where a parameter has an axis that the table does not cover, or a size that the mesh does not
        divide. Heads shared by several queries (``kv_heads``) are copied where they do not divide.
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
            devices = _devices(mesh, axis)
            if size % devices:
                if name != "kv_heads":
                    raise UserError(
                        f"{field}.{axis} is {devices}, but axis {name!r} of parameter {where} has size {size}; "
                        f"use a divisor of it, e.g. --{field}.{axis}={_divisor(size, devices)}"
                    )
                axis = None
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def optimizer_shardings(optimizer: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: Mesh) -> Any:
    """Sharding of every array of an optimizer's state: a moment lies like its parameter, the rest is copied."""
    state = jax.eval_shape(optimizer.init, shapes)
    copied = NamedSharding(mesh, PartitionSpec())

    def moment(leaf: Any, shape: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding if leaf.shape == shape.shape else copied

    return optax.tree_utils.tree_map_params(
        optimizer, moment, state, shapes, shardings, transform_non_params=lambda _: copied
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def activation_constraint(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """Function that pins an activation, given the logical name of each of its axes, to the devices of the table.

    An axis that does not divide (a single prompt on eight devices) is left whole.
    """

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = [None if name is None else LOGICAL_TO_MESH[name] for name in axes]
        spec = [axis if size % _devices(mesh, axis) == 0 else None for axis, size in zip(spec, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return constrain


def per_device(attend: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """Run an attention kernel on each device's own rows and heads, for kernels that the compiler cannot split.

    Args:
      attend: as `jaxrm.models.attention.Attend`.
      mesh: the devices; rows lie over data and fsdp (whole where they do not divide), heads over tensor.
    """

    def sharded(
        query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, **options: Any
    ) -> jax.Array:
        # Fewer key heads than devices: as many copies as give each device the heads that its queries read.
        tensor = mesh.shape["tensor"]
        copies = tensor // math.gcd(key.shape[2], tensor)
        if copies > 1:
            key, value = (jax.numpy.repeat(x, copies, axis=2) for x in (key, value))
        batch = BATCH_AXES if query.shape[0] % _devices(mesh, BATCH_AXES) == 0 else None
        rows, heads = PartitionSpec(batch), PartitionSpec(batch, None, "tensor")
        kernel = jax.shard_map(
            lambda *arrays: attend(*arrays, **options),
            mesh=mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,
        )
        return kernel(query, key, value, segment_ids)

    return sharded


def _devices(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """Devices that a table entry spreads an axis over."""
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def _divisor(size: int, most: int) -> int:
    """Largest divisor of ``size`` up to ``most``."""
    return max(n for n in range(1, most + 1) if size % n == 0)
