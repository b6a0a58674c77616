"""Whether the devices have room for the keys and values of responses, by reckoning, before anything is allocated."""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxrm.errors import UserError, flag, option
from jaxrm.models.cache import bytes_of_a_token
from jaxrm.models.config import ModelConfig
from jaxrm.runtime.hardware import GIB, device_limit
from jaxrm.sharding.mesh import batch_shards

WHILE_FILLED = 1.5  # caches that exist at once: half of one twice, while prompts are written into it (jaxrm choice)


@dataclass(frozen=True)
class CacheRoom:
    """What a device has to hold while responses are written.

    Attributes:
      limit: bytes of its memory; None where that is unknown.
      weights: bytes of what the loop over tokens reads, at the least.
      group: bytes of the keys and values of a prompt and its responses, were they on one device alone.
      unit: responses that share ``group``, times the devices that rows lie over.
    """

    limit: float | None
    weights: float
    group: float
    unit: int

    def is_too_small(self, rows: int) -> bool:
        """Whether so many responses cannot be written at once, even if nothing else were there."""
        return self.limit is not None and self.weights + rows / self.unit * self.group > self.limit

    @property
    def rows(self) -> int:
        """The most responses that can be; 0 where one prompt and its responses cannot."""
        assert self.limit is not None
        return rows_that_fit(self.limit - self.weights, self.group, self.unit)


def rows_that_fit(free: float, group: float, unit: int) -> int:
    """Responses that can be written at once in ``free`` bytes of a device, in whole units; see `CacheRoom`."""
    return max(int(free / (WHILE_FILLED * group)), 0) * unit


def cache_room(
    shape: ModelConfig, mesh: Mesh, *, token_bytes: int, weights: float, tokens: int, responses_per_prompt: int = 1
) -> CacheRoom:
    """The room on a device of ``mesh``.

    Args:
      shape: of the model.
      mesh: that it writes on.
      token_bytes: see `jaxrm.models.cache.bytes_of_a_token`.
      weights: bytes of all weights that the loop over tokens reads.
      tokens: in the cache, of a prompt and all of its responses.
      responses_per_prompt: n.
    """
    sizes = mesh.shape
    heads = sizes["tensor"] if shape.num_kv_heads % sizes["tensor"] == 0 else 1
    shares = sizes["tensor"] * sizes["fsdp"] * sizes["context"]
    unit = responses_per_prompt * batch_shards(mesh)
    return CacheRoom(device_limit(), weights / shares, tokens * token_bytes / heads, unit)


def check_room(room: CacheRoom, rows: int, prompt: int, response: int, fields: "CacheFields") -> None:
    """Refuse more responses at once than a device can hold.

    Args:
      room: from `cache_room`.
      rows: responses that are to be written at once.
      prompt: tokens that a prompt may have.
      response: tokens that a response may have.
      fields: what they are called.

    Raises:
      UserError: with the most that fit, by the planner's rule, and what to type.
    """
    if not room.is_too_small(rows):
        return
    assert room.limit is not None
    memory = f"a device has {room.limit / GIB:.3g} GiB, {room.weights / GIB:.3g} of them for weights"
    size = f"{rows / room.unit * room.group / GIB:.3g} GiB of keys and values on each"
    if room.rows:
        raise UserError(
            f"{option(fields.rows)} is {rows}, and so many responses at once, to prompts of up to {prompt} tokens and "
            f"of up to {response} themselves, take {size}, but {memory}; use {fields.remedy}={room.rows}"
        )
    fitting = max((room.limit - room.weights) / (WHILE_FILLED * room.group), 0)
    shorter = max(int(fitting * response), 1)
    raise UserError(
        f"{option(fields.response)} is {response}, but the keys and values of one prompt of up to {prompt} tokens and "
        f"of its responses take {room.group / GIB:.3g} GiB, and {memory}; use shorter prompts and responses, e.g. "
        f"{flag(fields.response)}={shorter}"
    )


@dataclass(frozen=True)
class CacheFields:
    """Options that decide how much memory responses take.

    Attributes:
      rows: how many are written at once.
      remedy: what to type for fewer, without the number.
      response: the longest response.
    """

    rows: str
    remedy: str
    response: str


def check_rollout(config: Any, shape: ModelConfig, mesh: Mesh, weights: float, prompt: int) -> None:
    """Refuse a rollout whose keys and values do not fit, see `check_room`.

    Args:
      config: the whole config.
      shape: of the policy.
      mesh: that it writes on.
      weights: bytes of all weights that the loop over tokens reads.
      prompt: tokens that prompts are padded to.

    Raises:
      UserError: naming the slots, or the batch where there are none.
    """
    rollout, n = config.rollout, config.rollout.responses_per_prompt
    response = rollout.sampling.max_new_tokens
    token_bytes = bytes_of_a_token(shape, 2 if config.model.dtype == "bfloat16" else 4, rollout.cache)
    tokens = prompt + n * response
    room = cache_room(shape, mesh, token_bytes=token_bytes, weights=weights, tokens=tokens, responses_per_prompt=n)
    rows, fields = rollout.slots, CacheFields("rollout.slots", flag("rollout.slots"), "rollout.sampling.max_new_tokens")
    if rows is None:
        rows = config.data.batch_size // rollout.num_microbatches
        whole = f"{flag('rollout.num_microbatches')}=1 " if rollout.num_microbatches > 1 else ""
        fields = CacheFields("data.batch_size", f"{whole}{flag('rollout.slots')}", fields.response)
    check_room(room, rows, prompt, response, fields)
