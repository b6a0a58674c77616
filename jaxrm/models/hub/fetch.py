"""Parameters from the devices to this host, one tensor of a checkpoint at a time."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm.models.hub.names import NamedTensor


def fetch_tensor(params: dict[str, Any], tensor: NamedTensor) -> np.ndarray:
    """A checkpoint's tensor, from parameters of JAX (sharded or not) or NumPy arrays.

    With several processes, all must call this for the same tensors in the same order.
    """
    return tensor.to_file(_fetch(leaf_of(params, tensor.path), tensor.layer))


def check_shapes(table: list[NamedTensor], params: dict[str, Any]) -> None:
    """Assert that the parameters hold every tensor of a checkpoint, in its shape."""
    for tensor in table:
        leaf = leaf_of(params, tensor.path)
        shape = leaf.shape if tensor.layer is None else leaf.shape[1:]
        assert shape == tensor.shape, ("/".join(tensor.path), leaf.shape, tensor.shape)


def leaf_of(params: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The parameter at a path."""
    node: Any = params
    for key in path:
        assert key in node, f"the parameters lack {'/'.join(path)}"
        node = node[key]
    return node


def _fetch(array: Any, layer: int | None) -> np.ndarray:
    """Bring one tensor to this host, of a stacked parameter one layer."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer])
    if array.is_fully_addressable:
        return np.asarray(array if layer is None else _take_layer(array, layer))
    assert isinstance(array.sharding, NamedSharding), array.sharding
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    take = _take_layer if layer is not None else (lambda whole, _: whole)
    gathered = jax.jit(take, out_shardings=everywhere)(array, layer)
    return np.asarray(gathered.addressable_data(0))


@jax.jit
def _take_layer(array: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)
