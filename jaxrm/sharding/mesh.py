"""The devices as a grid with named axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxrm.config.fields import Bound, bounded, check, place, wrong
from jaxrm.errors import UserError, flag, option

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
_DEVICES = Bound(lambda size: size == -1 or size >= 1, "a number of devices, or -1 for the rest", 1)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which takes what the others leave.

    Attributes:
      data: copies of the model, each with its share of the batch.
      fsdp: shards of the parameters, gathered layer by layer; each has its share of the batch too.
      tensor: shards of heads, MLP and vocabulary; the batch is the same on all of them.
      context: shards of long rows: each device holds its tokens of every row, and for attention all tokens of its
        heads, by two all-to-alls a layer (DeepSpeed-Ulysses, arXiv 2309.14509). Parameters are sharded over it as over
        fsdp; the batch is the same on all of them. ``tensor`` x ``context`` has to divide the heads. The axis is idle
        during generation, which adds one token a row at a time, so use another mesh there: ``config.rollout.mesh``.
    """

    data: int = bounded(-1, _DEVICES)
    fsdp: int = bounded(1, _DEVICES)
    tensor: int = bounded(1, _DEVICES)
    context: int = bounded(1, _DEVICES)

    def __post_init__(self) -> None:
        check(self)
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(rest) > 1:
            required = f"a number of devices, since {place(self, rest[1])} is -1, the rest, too"
            raise wrong(self, rest[0], required, 1)


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, context and tensor over all devices.

    Over several slices of TPUs only the data axis crosses the DCN between them, since it needs the least of it: one
    sum of gradients a step.

    Raises:
      UserError: where the sizes do not multiply to the number of devices, or the slices do not divide the data axis.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape, kinds = _shape(config, len(devices), "mesh"), (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices == 1:
        # JAX refuses an axis that is a part of a row of chips, such as 8 of 16, unless it is told that it may split.
        return Mesh(
            mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=kinds
        )
    if shape[0] % slices:
        raise UserError(
            f"{option('mesh.data')} is {shape[0]}, but there are {slices} slices, across which only the data axis "
            f"goes; use "
            f"a multiple of {slices}, e.g. {flag('mesh.data')}={slices} {flag('mesh.fsdp')}=-1"
        )
    one_slice, across = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(one_slice, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=kinds)


def reshape_mesh(mesh: Mesh, config: MeshConfig, field: str) -> Mesh:
    """The devices of ``mesh`` in the same order, along axes of other sizes.

    Since the order is the same, one jitted program may take arrays on either of the two and return them on the other.

    Args:
      mesh: whose devices they are.
      config: the other sizes.
      field: that says them, for messages.

    Raises:
      UserError: where the sizes do not multiply to the number of devices.
    """
    shape = _shape(config, mesh.devices.size, field)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_indices(devices: Sequence[Any]) -> list[int]:
    """The slice of each device; for a GPU its host.

    ICI (NVLink) joins the devices of a slice, DCN joins the slices.
    """
    if devices[0].platform == "tpu":
        return [getattr(device, "slice_index", None) or 0 for device in devices]
    return [device.process_index for device in devices]


def _shape(config: MeshConfig, count: int, field: str) -> tuple[int, ...]:
    """Devices along each axis, ``count`` in all."""
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if count % known or (-1 not in sizes and known != count):
        named = [(axis, size) for axis, size in zip(AXES, sizes, strict=True) if axis != "context" or size != 1]
        shown = " x ".join(f"{axis} {size}" for axis, size in named)
        example = " ".join(f"{flag(f'{field}.{axis}')}={-1 if axis == 'data' else 1}" for axis, _ in named)
        raise UserError(
            f"{option(field)} is {shown}, which does not fit {count} devices; the product must be {count}, "
            f"e.g. {example}"
        )
    return tuple(count // known if size == -1 else size for size in sizes)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Index of the share of a batch's rows that this process supplies, and the number of shares.

    Processes that differ along the context and tensor axes alone supply the same rows.

    Raises:
      UserError: where the processes' shares of the rows overlap or differ in size.
    """
    shards_of: dict[int, set[int]] = {}  # by process
    for shard, devices in enumerate(mesh.devices.reshape(batch_shards(mesh), -1)):
        for device in devices:
            shards_of.setdefault(device.process_index, set()).add(shard)
    # Processes with the same shards supply the same rows, so they count as one share.
    shares = sorted({tuple(sorted(shards)) for shards in shards_of.values()})
    if any(len(share) * len(shares) != batch_shards(mesh) for share in shares):
        axes = [axis for axis in ("context", "tensor") if mesh.shape[axis] > 1]
        sizes = " and ".join(f"{option(f'mesh.{axis}')} is {mesh.shape[axis]}" for axis in axes)
        raise UserError(
            f"{sizes}, which spreads the rows unevenly over the processes; use a divisor or a multiple of the "
            f"{mesh.devices.size // len(shards_of)} devices of a process, e.g. {flag(f'mesh.{axes[-1]}')}=1"
        )
    return shares.index(tuple(sorted(shards_of[jax.process_index()]))), len(shares)


def check_batch(
    mesh: Mesh,
    field: str,
    batch_size: int,
    num_microbatches: int = 1,
    *,
    mesh_field: str = "mesh",
    microbatches_field: str = "num_microbatches",
) -> None:
    """Refuse a batch that does not divide over the mesh and its microbatches; the fields are for the message.

    Raises:
      UserError: naming ``field``, or ``microbatches_field`` where that alone does not divide; and what does.
    """
    shards = batch_shards(mesh)
    unit = shards * num_microbatches
    nearest = max(unit, round(batch_size / unit) * unit)
    if batch_size % shards:
        microbatches = f" x {num_microbatches} microbatches" if num_microbatches > 1 else ""
        fewer = math.gcd(shards, batch_size // math.gcd(batch_size, num_microbatches))
        split = (
            f", or give each row to several devices, e.g. {flag(f'{mesh_field}.tensor')}={shards // fewer}"
            if fewer > 1
            else ""
        )
        raise UserError(
            f"{option(field)} is {batch_size}, but the data and fsdp axes of {option(mesh_field)} have {shards} "
            f"devices{microbatches}; "
            f"use a multiple of {unit}, e.g. {flag(field)}={nearest}{split}"
        )
    if batch_size % unit:
        rows = batch_size // shards
        divisor = max(each for each in range(1, min(rows, num_microbatches) + 1) if rows % each == 0)
        raise UserError(
            f"{option(microbatches_field)} is {num_microbatches}, which does not divide the rows of a device "
            f"({option(field)} {batch_size} over {shards}: {rows}); use {flag(microbatches_field)}={divisor}, "
            f"or a multiple of {unit}, e.g. {flag(field)}={nearest}"
        )


def check_row_length(mesh: Mesh, field: str, length: int) -> None:
    """Refuse rows of tokens that do not divide over the context axis.

    Raises:
      UserError: naming ``field``, and the nearest length that divides.
    """
    shards = mesh.shape["context"]
    if length % shards:
        nearest = max(shards, round(length / shards) * shards)
        raise UserError(
            f"{option(field)} is {length}, but {option('mesh.context')} is {shards} and each of its devices takes "
            f"as many tokens of "
            f"a row; use a multiple of {shards}, e.g. {flag(field)}={nearest}"
        )
