"""Slots of decoding: rows that are written token by token, each taken by the next prompt once its response has ended.

The functions here are traced inside jitted programs: `jaxrm.models.generate` has one for a batch that is known, and
`jaxrm.models.stream` three for prompts that come one after another.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrm.models import cache, prefill
from jaxrm.models.layers import Layer
from jaxrm.models.sampling import GenerateOptions, sample
from jaxrm.models.transformer import Decoder, positions_from_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts to answer, each n times.

    Attributes:
      prompts: ``[G, P]`` int32, padded on the left.
      mask: ``[G, P]`` bool, False on padding.
      keys: ``[G, n]`` typed PRNG keys of the responses.
      limits: ``[G]`` int32, longest response to each in tokens.
    """

    prompts: Any
    mask: Any
    keys: jax.Array
    limits: Any


class PromptsRead(NamedTuple):
    """What a model keeps of prompts.

    Attributes:
      prompts: their keys and values.
      hidden: ``[G, D]`` of the last token of each, of which the first of a response is drawn.
    """

    prompts: cache.SharedPrompts
    hidden: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """S rows that are being written, those of one prompt next to each other.

    The token that a row drew last is not in the cache yet: it is in the column of ``past.cursor``, as are those of all
    rows, and the step that reads it draws the next one.

    Attributes:
      prompts: what the rows begin with.
      past: the tokens after them.
      token: ``[S]`` int32, the last one drawn.
      drawn: ``[S]`` int32, tokens drawn.
      start: ``[S]`` int32, column of a row's first token.
      alive: ``[S]`` bool, whether a row draws more.
      limits: ``[S]`` int32, tokens after which it does not.
      keys: ``[S]`` typed PRNG keys.
      places: ``[S]`` int32, whose response it is, for who collects them; -1 where there is none.
      tokens: ``[S, W]`` int32, as the cache a ring of columns.
      log_probs: ``[S, W]`` float32.
      capacity: ``[]`` int32, tokens that all steps so far could have drawn: the slots of each step.
    """

    prompts: cache.SharedPrompts
    past: cache.Cache
    token: jax.Array
    drawn: jax.Array
    start: jax.Array
    alive: jax.Array
    limits: jax.Array
    keys: jax.Array
    places: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    capacity: jax.Array


@dataclasses.dataclass(frozen=True)
class Writer:
    """The decoder as a loop over tokens reads it.

    Attributes:
      model: the decoder.
      layers: from `Decoder.unstack_layers`.
      head: from `Decoder.decode_head`.
      options: how tokens are drawn and responses end; the longest response that they name is that of no row.
    """

    model: Decoder
    layers: tuple[Layer, ...]
    head: jax.Array
    options: GenerateOptions

    def begin(self, work: Work, width: int) -> Slots:
        """A slot for every response to ``work``, with its first token drawn and a ring of ``width`` columns."""
        n = work.keys.shape[1]
        prompts, hidden = self.read(work)
        token, log_prob = self._first_tokens(work, hidden)
        rows = token.shape[0]
        limits, places = jnp.repeat(work.limits, n), jnp.arange(rows, dtype=jnp.int32)
        return Slots(
            prompts=prompts,
            past=self.model.empty_cache(prompts, n, width),
            token=token,
            drawn=jnp.ones((rows,), jnp.int32),
            start=jnp.zeros((rows,), jnp.int32),
            alive=~self._is_end(token) & (limits > 1),
            limits=limits,
            keys=work.keys.reshape(-1),
            places=places,
            tokens=jnp.zeros((rows, width), jnp.int32).at[:, 0].set(token),
            log_probs=jnp.zeros((rows, width), jnp.float32).at[:, 0].set(log_prob),
            capacity=jnp.asarray(rows, jnp.int32),
        )

    def refill(self, slots: Slots, work: Work, read: PromptsRead, groups: jax.Array, places: jax.Array) -> Slots:
        """Begin the responses to ``work`` in slots whose own have ended.

        Args:
          slots: before.
          work: the next prompts.
          read: what was read of them.
          groups: ``[G]`` int32, which n neighboring slots each prompt gets, counted in groups; past the last for a
            prompt that is not answered.
          places: ``[G, n]`` int32 of the responses.
        """
        G, n = work.keys.shape
        token, log_prob = self._first_tokens(work, read.hidden)
        prompts = cache.widened(read.prompts, slots.prompts.occupied.shape[1])
        rows = (groups[:, None] * n + jnp.arange(n)[None]).reshape(-1)
        limits, cursor = jnp.repeat(work.limits, n), slots.past.cursor

        def put(old: jax.Array, new: jax.Array, where: jax.Array = rows) -> jax.Array:
            return old.at[where].set(new, mode="drop")

        shared = jax.tree.map(lambda old, new: put(old, new, groups), slots.prompts, prompts)
        past = dataclasses.replace(
            slots.past,
            lengths=put(slots.past.lengths, jnp.zeros((G * n,), jnp.int32)),
            next_position=put(slots.past.next_position, jnp.repeat(prompts.next_position, n)),
        )
        return Slots(
            prompts=self.model.constrain_cache(shared),
            past=past,
            token=put(slots.token, token),
            drawn=put(slots.drawn, jnp.ones_like(token)),
            start=put(slots.start, jnp.broadcast_to(cursor, token.shape)),
            alive=put(slots.alive, ~self._is_end(token) & (limits > 1)),
            limits=put(slots.limits, limits),
            keys=put(slots.keys, work.keys.reshape(-1)),
            places=put(slots.places, places.reshape(-1)),
            tokens=slots.tokens.at[rows, cursor].set(token, mode="drop"),
            log_probs=slots.log_probs.at[rows, cursor].set(log_prob, mode="drop"),
            capacity=slots.capacity + jnp.sum(rows < slots.token.shape[0]),
        )

    def step(self, slots: Slots) -> Slots:
        """The next token of every row that is alive."""
        hidden, past = self.model.decode(slots.token[:, None], self.layers, slots.past, slots.prompts)
        keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn)
        token, log_prob = sample(self.model.logits(hidden[:, 0], self.head), keys, self.options.sampling)

        def put(ring: jax.Array, new: jax.Array) -> jax.Array:  # what ended stays as it is until it is collected
            old = jax.lax.dynamic_index_in_dim(ring, past.cursor, axis=1, keepdims=False)
            new = jnp.where(slots.alive, new, old)
            return jax.lax.dynamic_update_index_in_dim(ring, new, past.cursor, axis=1)

        drawn = slots.drawn + slots.alive
        alive = slots.alive & ~self._is_end(token) & (drawn < slots.limits)
        past = dataclasses.replace(past, lengths=jnp.where(alive, past.lengths, cache.ENDED))
        return dataclasses.replace(
            slots,
            past=past,
            token=token,
            drawn=drawn,
            alive=alive,
            tokens=put(slots.tokens, token),
            log_probs=put(slots.log_probs, log_prob),
            capacity=slots.capacity + slots.token.shape[0],
        )

    def read(self, work: Work) -> PromptsRead:
        """Read the prompts, the long ones in chunks."""
        if (size := prefill.chunk_size(work.prompts.shape[1], self.options.prefill_chunk)) is not None:
            hidden, prompts = prefill.in_chunks(self.model, work.prompts, work.mask, size)
            return PromptsRead(prompts, hidden)
        hidden, prompts = self.model.prefill(
            work.prompts, positions=positions_from_mask(work.mask), segment_ids=work.mask.astype(jnp.int32)
        )
        return PromptsRead(prompts, hidden[:, -1])

    def _first_tokens(self, work: Work, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first token of each response, and its log-prob."""
        last = jnp.repeat(hidden, work.keys.shape[1], axis=0)
        keys = jax.vmap(jax.random.fold_in, (0, None))(work.keys.reshape(-1), 0)
        return sample(self.model.logits(last, self.head), keys, self.options.sampling)

    def _is_end(self, token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == jnp.asarray(self.options.end_ids, jnp.int32)[None], axis=1)


def free_groups(slots: Slots, n: int) -> jax.Array:
    """``[S / n]`` bool: groups of n slots none of which is alive."""
    return ~jnp.any(slots.alive.reshape(-1, n), axis=1)


def in_order(slots: Slots, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, mask and log-probs ``[S, length]`` of the responses in the slots, each from its first token on."""
    t = jnp.arange(length)[None]
    columns = (slots.start[:, None] + t) % slots.tokens.shape[1]
    mask = t < slots.drawn[:, None]
    tokens = jnp.take_along_axis(slots.tokens, columns, axis=1)
    return tokens, mask, jnp.where(mask, jnp.take_along_axis(slots.log_probs, columns, axis=1), 0.0)


def pick(model: Decoder, slots: Slots, groups: jax.Array, n: int) -> Slots:
    """Some groups of n slots alone, e.g. half of them, where the others are free."""
    rows = (groups[:, None] * n + jnp.arange(n)[None]).reshape(-1)
    by_name = {field.name: getattr(slots, field.name) for field in dataclasses.fields(Slots)}
    prompts = jax.tree.map(lambda x: x[groups], by_name.pop("prompts"))
    rest = jax.tree.map(lambda x: x[rows] if x.ndim else x, by_name)
    past = model.constrain_cache(rest.pop("past"))
    return Slots(prompts=model.constrain_cache(prompts), past=past, **rest)
