"""Answers of a decoder to prompts that come one after another: a loop of the host over jitted programs.

The programs begin prompts in free slots, write a burst of tokens, widen the cache, and give up most of the slots. Each
is compiled once for a width of the prompts and of the cache, which come in few sizes, so that nothing is compiled after
the first prompts. The host looks at the slots once a burst; all processes see the same and decide alike.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrm.models import cache, prefill
from jaxrm.models.generate import fewer_slots, refill_of
from jaxrm.models.layers import Layer
from jaxrm.models.prefill import Reading
from jaxrm.models.sampling import GenerateOptions
from jaxrm.models.slots import PromptsRead, Slots, Work, Writer, free_groups, pick
from jaxrm.models.transformer import Decoder

_BURST = 32  # tokens between two looks of the host
_FIRST_WIDTH = 64  # least columns of the cache before it grows
_LENGTH_BUCKET = 64  # of prompts


class Answer(NamedTuple):
    """The response to one prompt.

    Attributes:
      place: number of the prompt.
      tokens: ``[T]`` int32, its end token included where it was reached.
      log_probs: ``[T]`` float32, see `jaxrm.models.generate.Generation`.
    """

    place: int
    tokens: np.ndarray
    log_probs: np.ndarray


class Weights(NamedTuple):
    """Parameters of a decoder, as prompts are read with them, and as a loop over tokens reads them.

    Attributes:
      params: its parameters.
      layers: from `Decoder.unstack_layers`.
      head: from `Decoder.decode_head`.
    """

    params: Any
    layers: tuple[Layer, ...]
    head: jax.Array

    def writer(self, graphdef: nnx.GraphDef, options: GenerateOptions) -> Writer:
        """The decoder in slots."""
        return Writer(nnx.merge(graphdef, self.params), self.layers, self.head, options)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt that waits.

    Attributes:
      tokens: its ids.
      key: data of its response's typed PRNG key.
      limit: longest response in tokens.
    """

    tokens: Sequence[int]
    key: np.ndarray
    limit: int


class Stream:
    """Answers prompts in the order in which their responses end.

    Args:
      graphdef: of the decoder.
      params: its parameters.
      options: how prompts are answered, once each; they name the slots, and the prompts to read at once.

    Attributes:
      capacity: tokens that the last call's steps could have drawn; see `jaxrm.models.generate.Generation`.
    """

    def __init__(self, graphdef: nnx.GraphDef, params: Any, *, options: GenerateOptions) -> None:
        assert options.slots is not None and options.responses_per_prompt == 1, options
        self._graphdef, self._options = graphdef, options
        self._static = {"graphdef": graphdef, "options": options}
        self._slots, self._refill = options.slots, options.refill or refill_of(options.slots, 1)
        self._weights = Weights(params, *_unstack(graphdef, params))
        self.capacity = 0

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """The responses to all prompts, each as soon as it is whole."""
        room = max(len(prompt.tokens) for prompt in prompts)
        longest = self._options.sampling.max_new_tokens
        width = min(max(_FIRST_WIDTH, -(-longest // 4)), longest)
        state = _empty(self._weights.params, self._slots, bucket(room), width, graphdef=self._graphdef)
        places = np.full(self._slots, -1)  # the prompt that each slot answers
        first = 0
        while True:
            alive, drawn, start = jax.device_get((state.alive, state.drawn, state.start))
            ended = (places >= 0) & ~alive
            if ended.any():
                yield from _collected(state, np.flatnonzero(ended), places, drawn, start)
                places[ended] = -1
            free, waiting = np.flatnonzero(places < 0), len(prompts) - first
            if waiting and len(free) >= min(self._refill, waiting):
                now = prompts[first : first + self._refill]
                work, rows = self._work(now, free)
                state, reading = self._read_in_chunks(state, work)
                state = _begin(state, self._weights, work, rows, reading, **self._static)
                places[free[: len(now)]] = np.arange(first, first + len(now))
                first += len(now)
                continue
            if len(free) == len(places) and not waiting:
                self.capacity = int(state.capacity)
                return
            fewer = fewer_slots(len(places), self._slots, 1)
            enough = min(self._refill, waiting) if waiting else len(places) - fewer
            if not waiting and len(free) >= enough:
                chosen = np.argsort(places < 0, kind="stable")[:fewer]
                state, places = _picked(state, self._weights.params, chosen, graphdef=self._graphdef), places[chosen]
                continue
            if width < longest and width <= drawn[places >= 0].max():
                width = min(2 * width, longest)
                state = _grown(state, self._weights.params, width, graphdef=self._graphdef)
                continue
            state = _burst(state, self._weights, enough, **self._static)

    def _read_in_chunks(self, state: Slots, work: Work) -> tuple[Slots, Reading | None]:
        """Read prompts that are too long to be read at once, with a burst of the other responses after each chunk."""
        size = prefill.chunk_size(work.prompts.shape[1], self._options.prefill_chunk)
        if size is None:
            return state, None
        params, graphdef = self._weights.params, self._graphdef
        chunks = -(-work.prompts.shape[1] // size)
        reading = _unread(params, len(work.prompts), chunks * size, graphdef=graphdef)
        for number in range(chunks):
            reading = _chunk_read(reading, params, work, number, size=size, graphdef=graphdef)
            state = _burst(state, self._weights, len(state.alive), **self._static)
        return state, reading

    def _work(self, prompts: Sequence[Prompt], free: np.ndarray) -> tuple[Work, np.ndarray]:
        """The next prompts as arrays of one size, and the slot of each; one past the last for what fills them up."""
        count, width = self._refill, bucket(max(len(prompt.tokens) for prompt in prompts))
        tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        mask[:, -1] = True
        rows = np.full(count, self._slots, np.int32)
        rows[: len(prompts)] = free[: len(prompts)]
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt.tokens) :] = prompt.tokens
            mask[row, width - len(prompt.tokens) :] = True
        filled = [prompts[min(row, len(prompts) - 1)] for row in range(count)]
        keys = jax.random.wrap_key_data(jnp.asarray(np.stack([prompt.key for prompt in filled])))[:, None]
        return Work(tokens, mask, keys, np.asarray([prompt.limit for prompt in filled], np.int32)), rows


def bucket(length: int) -> int:
    """The width that a prompt is padded to: few, so that few programs are compiled."""
    return -(-length // _LENGTH_BUCKET) * _LENGTH_BUCKET


def _collected(
    state: Slots, ended: np.ndarray, places: np.ndarray, drawn: np.ndarray, start: np.ndarray
) -> Iterator[Answer]:
    tokens, log_probs = jax.device_get((state.tokens, state.log_probs))
    for slot in ended:
        columns = (start[slot] + np.arange(drawn[slot])) % tokens.shape[1]
        yield Answer(int(places[slot]), tokens[slot, columns], log_probs[slot, columns])


@functools.partial(jax.jit, static_argnames="graphdef")
def _unstack(graphdef: nnx.GraphDef, params: Any) -> tuple[tuple[Layer, ...], jax.Array]:
    model = nnx.merge(graphdef, params)
    return model.unstack_layers(), model.decode_head()


@functools.partial(jax.jit, static_argnames=("slots", "prompt_width", "width", "graphdef"))
def _empty(params: Any, slots: int, prompt_width: int, width: int, *, graphdef: nnx.GraphDef) -> Slots:
    """Slots without a prompt."""
    model = nnx.merge(graphdef, params)
    layers, heads, size = range(model.config.num_layers), model.config.num_kv_heads, model.config.head_dim
    keys = tuple(jnp.zeros((slots, heads, size, prompt_width), model.dtype) for _ in layers)
    values = tuple(jnp.zeros((slots, heads, prompt_width, size), model.dtype) for _ in layers)

    def zeros() -> jax.Array:  # every array of its own, since all are donated
        return jnp.zeros((slots,), jnp.int32)

    occupied = jnp.zeros((slots, prompt_width), bool)
    prompts = model.constrain_cache(cache.SharedPrompts(keys, values, occupied, zeros()))
    return Slots(
        prompts=prompts,
        past=model.empty_cache(prompts, 1, width),
        token=zeros(),
        drawn=zeros(),
        start=zeros(),
        alive=jnp.zeros((slots,), bool),
        limits=zeros(),
        keys=jax.random.split(jax.random.key(0), slots),
        places=zeros(),
        tokens=jnp.zeros((slots, width), jnp.int32),
        log_probs=jnp.zeros((slots, width), jnp.float32),
        capacity=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "options"), donate_argnames="state")
def _begin(
    state: Slots,
    weights: Weights,
    work: Work,
    rows: jax.Array,
    reading: Reading | None,
    *,
    graphdef: nnx.GraphDef,
    options: GenerateOptions,
) -> Slots:
    """The slots with ``work`` begun in ``rows``; it is read here, unless it was in chunks."""
    writer = weights.writer(graphdef, options)
    if reading is None:
        read = writer.read(work)
    else:
        read = PromptsRead(prefill.read_prompts(writer.model, reading, work.mask), reading.hidden)
    return _readable(writer.model, writer.refill(state, work, read, rows, rows[:, None]))


@functools.partial(jax.jit, static_argnames=("size", "graphdef"), donate_argnames="reading")
def _chunk_read(
    reading: Reading, params: Any, work: Work, number: int, *, size: int, graphdef: nnx.GraphDef
) -> Reading:
    """The prompts of ``work`` with one chunk more."""
    return prefill.read_chunk(nnx.merge(graphdef, params), reading, work.prompts, work.mask, number, size)


@functools.partial(jax.jit, static_argnames=("prompts", "width", "graphdef"))
def _unread(params: Any, prompts: int, width: int, *, graphdef: nnx.GraphDef) -> Reading:
    return prefill.empty(nnx.merge(graphdef, params), prompts, width)


@functools.partial(jax.jit, static_argnames=("graphdef", "options"), donate_argnames="state")
def _burst(
    state: Slots,
    weights: Weights,
    enough: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    options: GenerateOptions,
) -> Slots:
    """The slots some tokens later: after a burst, or once ``enough`` are free, or the cache is full."""
    writer = weights.writer(graphdef, options)
    width = state.tokens.shape[1]

    def goes_on(carry: tuple[jax.Array, Slots]) -> jax.Array:
        step, now = carry
        has_room = jnp.all(~now.alive | (now.drawn < width))
        return (step < _BURST) & (jnp.sum(free_groups(now, 1)) < enough) & has_room

    def next_token(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        return carry[0] + 1, writer.step(carry[1])

    _, state = jax.lax.while_loop(goes_on, next_token, (jnp.zeros((), jnp.int32), state))
    return _readable(writer.model, state)


@functools.partial(jax.jit, static_argnames=("width", "graphdef"))
def _grown(state: Slots, params: Any, width: int, *, graphdef: nnx.GraphDef) -> Slots:
    """The slots with a ring of ``width`` columns; every response that is in it begins where it did, seen from the end.

    Those that ended have been collected.
    """
    model, old = nnx.merge(graphdef, params), state.tokens.shape[1]

    def wider(ring: jax.Array) -> jax.Array:
        return jnp.pad(jnp.roll(ring, -state.past.cursor - 1, axis=1), ((0, 0), (0, width - old)))

    return dataclasses.replace(
        state,
        past=model.constrain_cache(cache.grown(state.past, width)),
        start=(state.start - state.past.cursor - 1) % old,
        tokens=wider(state.tokens),
        log_probs=wider(state.log_probs),
    )


@functools.partial(jax.jit, static_argnames="graphdef")
def _picked(state: Slots, params: Any, rows: jax.Array, *, graphdef: nnx.GraphDef) -> Slots:
    return pick(nnx.merge(graphdef, params), state, rows, 1)


def _readable(model: Decoder, state: Slots) -> Slots:
    """What the host reads, whole on every device."""
    names = ("alive", "drawn", "start", "tokens", "log_probs")
    whole: dict[str, Any] = {name: model.constrain(getattr(state, name), (None,)) for name in names[:3]}
    whole |= {name: model.constrain(getattr(state, name), (None, None)) for name in names[3:]}
    return dataclasses.replace(state, **whole)
