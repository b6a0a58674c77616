"""How the devices lie while a policy writes, where the config leaves it open.

Training wants parameters in shards; writing wants each device to read few bytes for a token. So the weights are split
over ``tensor`` as far as that pays, the rows over ``data``, and nothing is gathered at every token. The bytes are those
that ``jaxrm.plan`` counts in the compiled loop. Latency, which it leaves out, is added, so that a small model is not
split (jaxrm choice).
"""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxrm.sharding.mesh import MeshConfig, slice_indices

_LINK = 8.0  # bytes of memory read in the time of one between devices; data sheets say 4 (TPU v5e) to 12 (TPU7x)
_HOP = 2 << 20  # bytes read while a sum goes on from device to device: 2.6 us of a TPU v5e, 0.6 us of an H100
_WORTH_MOVING = 1.25  # a layout that needs no copy of the weights stays unless it reads so many times as much


@dataclass(frozen=True)
class DecodeLoad:
    """What the rollout of a batch reads and sends for a token of each row.

    Attributes:
      weights: bytes of all weights, as the loop stores them.
      cache: bytes of all keys and values when the rows are full.
      kv_heads: over whose number the cache can be split.
      sums: how often the devices add up what they have: twice a layer.
      sum_bytes: that the rows of the batch have in each of these.
    """

    weights: float
    cache: float
    kv_heads: int
    sums: int
    sum_bytes: float

    def bytes_read(self, mesh: Any) -> float:
        """Bytes of memory that a device could read in the time of a token.

        Args:
          mesh: devices along each axis; over ``fsdp`` and ``context`` the weights are gathered at every token.
        """
        tensor, rows = mesh["tensor"], mesh["data"] * mesh["fsdp"]
        gathered = mesh["fsdp"] * mesh["context"]
        whole = self.weights / tensor
        memory = whole + self.cache / rows / (tensor if self.kv_heads % tensor == 0 else 1)
        sent = (1 - 1 / gathered) * whole + self.sums * 2 * (1 - 1 / tensor) * self.sum_bytes / rows
        hops = self.sums * (tensor if tensor > 1 else 0)
        return memory + _LINK * sent + _HOP * hops


def decode_meshes(mesh: Mesh, load: DecodeLoad) -> list[MeshConfig]:
    """Layouts to write on, the fastest first; the same for every process.

    The axis ``tensor`` stays inside of a slice, or of a host of GPUs.

    Args:
      mesh: of training; without ``fsdp`` and ``context`` it comes first unless another is much faster, since it needs
        no copy of the weights.
      load: of the rollout.
    """
    count, slices = mesh.devices.size, slice_indices(list(mesh.devices.flat))
    ranked = []
    for tensor in (size for size in range(1, count + 1) if count % size == 0):
        if any(len(set(slices[first : first + tensor])) > 1 for first in range(0, count, tensor)):
            continue
        sizes = {"data": count // tensor, "fsdp": 1, "context": 1, "tensor": tensor}
        seconds = load.bytes_read(sizes)
        if sizes == dict(mesh.shape):
            seconds /= _WORTH_MOVING
        ranked.append((seconds, tensor, MeshConfig(**sizes)))
    return [config for _, _, config in sorted(ranked, key=lambda each: each[:2])]
