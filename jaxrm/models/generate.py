"""Answers of a decoder to a batch of prompts, in one jitted program.

Every row has a slot, or there are fewer slots than rows. Then a slot whose response has ended is taken by the next
prompt, so that no step decodes rows that are over while others wait (continuous batching, Yu et al. 2022, Orca).
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.models.sampling import GenerateOptions, response_keys
from jaxrm.models.slots import Slots, Work, Writer, free_groups, in_order, pick

_LEAST_SLOTS = 8  # the last rows of a batch are not packed into fewer


class Generation(NamedTuple):
    """Sampled responses.

    Attributes:
      tokens: ``[B, max_new_tokens]`` int32; after the end, whatever was there.
      mask: ``[B, max_new_tokens]`` bool, True on tokens of the response, its EOS included.
      log_probs: ``[B, max_new_tokens]`` float32, log-prob of each token of the response under
        ``softmax(logits / temperature)``, before top-k and top-p, as it was computed to draw it; 0 outside the mask.
        Greedy tokens have those of temperature 1.
      capacity: ``[]`` int32, tokens that all steps could have drawn, had no slot been idle; ``sum(mask) / capacity`` is
        the use of the slots.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    capacity: jax.Array


@functools.partial(jax.jit, static_argnames=("graphdef", "options"))
def generate(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    limits: jax.Array | None = None,
    *,
    options: GenerateOptions,
) -> Generation:
    """Sample responses to prompts; stops early once every row has ended.

    Under ``fsdp`` every token gathers the parameters from the other devices, unless the compiler moves that out of the
    loop. For many or long responses use a mesh without ``fsdp``, e.g. ``config.rollout.mesh`` in PPO.

    Args:
      graphdef: of the decoder.
      params: its parameters.
      prompts: ``[G, P]`` int32, padded on the left.
      prompt_mask: ``[G, P]`` bool, False on padding.
      key: typed PRNG keys: ``[G]`` of each prompt, ``[G, n]`` of each response, or ``[]``, from which prompt ``g`` has
        ``fold_in(key, g)``. Response ``i`` of a prompt has ``fold_in(key of the prompt, i)``, and its token ``t`` is
        drawn with ``fold_in(key of the response, t)``, whatever the length limit. So a response depends on its prompt
        and key alone, not on its slot or neighbors. The number of rows, the column that a slot's response begins in and
        the mesh change the order of sums, which in float32 moves logits by about 1e-6; in rare cases that
        decides which of two tokens is drawn.
      limits: ``[G]`` int32, longest response to each prompt where it is shorter than ``options`` say; None for that.
      options: how they are answered, n times each.

    Returns:
      ``G n`` responses; those to one prompt lie next to each other.
    """
    chex.assert_equal_shape([prompts, prompt_mask])
    G, n, T = prompts.shape[0], options.responses_per_prompt, options.sampling.max_new_tokens
    limits = jnp.full((G,), T, jnp.int32) if limits is None else jnp.minimum(limits, T)
    work = Work(prompts, prompt_mask, response_keys(key, G, n), limits)
    model = nnx.merge(graphdef, params)
    writer = Writer(model, model.unstack_layers(), model.decode_head(), options)
    groups = G if options.slots is None else min(options.slots // n, G)
    assert groups > 0, (options.slots, n)
    state = writer.begin(jax.tree.map(lambda x: x[:groups], work), T)
    if groups == G:
        state = jax.lax.while_loop(lambda now: jnp.any(now.alive), writer.step, state)
        out = Generation(*in_order(state, T), state.capacity)
    else:
        out = _in_turn(writer, state, work, options.refill or refill_of(groups, 1))
    # Whole on every device, so that any process can read them.
    return Generation(*(model.constrain(x, (None,) * x.ndim) for x in out))


def refill_of(groups: int, shards: int) -> int:
    """Prompts to read at once: about an eighth of the groups of slots, as many for each of the ``shards`` of rows.

    More would keep slots idle until so many are free; fewer would read the weights for too few prompts (jaxrm choice).
    """
    return max(1, groups // 8 // shards) * shards


def fewer_slots(groups: int, first: int, n: int) -> int:
    """Groups that are left once no prompt waits and so many are free: half, or 0 to go on with what there is.

    They are halved twice at most, since a loop is compiled for every number (jaxrm choice).

    Args:
      groups: of n slots, now.
      first: of n slots, at first.
      n: responses to a prompt.
    """
    return groups // 2 if groups % 2 == 0 and 4 * groups > first and groups * n >= 2 * _LEAST_SLOTS else 0


def num_loops(num_prompts: int, groups: int, n: int, refill: int) -> int:
    """Times that tokens are written until something else is done, where prompts outnumber the groups of slots."""
    loops, first = len(range(groups, num_prompts, refill)) + 1, groups
    while groups := fewer_slots(groups, first, n):
        loops += 1
    return loops


def _in_turn(writer: Writer, state: Slots, work: Work, refill: int) -> Generation:
    """The responses to all of ``work``, of which ``state`` has begun the first."""
    (G, n), T = work.keys.shape, state.tokens.shape[1]
    groups = first_groups = state.alive.shape[0] // n
    shapes = (jnp.int32, jnp.bool_, jnp.float32)
    out = [jnp.zeros((G * n, T), dtype) for dtype in shapes]

    def collect(state: Slots, out: list[jax.Array]) -> list[jax.Array]:
        """The responses so far, at their places; those that are unfinished are overwritten later."""
        return [old.at[state.places].set(new, mode="drop") for old, new in zip(out, in_order(state, T), strict=True)]

    def until_free(state: Slots, count: jax.Array | int) -> Slots:
        return jax.lax.while_loop(lambda now: jnp.sum(free_groups(now, n)) < count, writer.step, state)

    def read_next(carry: tuple[Slots, list[jax.Array]], first: jax.Array) -> tuple[Any, None]:
        state, out = carry
        last = groups - fewer_slots(groups, first_groups, n)
        state = until_free(state, jnp.where(first < G, jnp.minimum(refill, G - first), last))
        out = collect(state, out)
        number = first + jnp.arange(refill)
        chosen = jnp.argsort(~free_groups(state, n), stable=True)[:refill]
        part = jax.tree.map(lambda x: x[jnp.minimum(number, G - 1)], work)
        places = number[:, None] * n + jnp.arange(n)[None]
        return (writer.refill(state, part, writer.read(part), jnp.where(number < G, chosen, groups), places), out), None

    # The last of these reads no prompt that counts: to compile another loop as wide takes longer.
    reads = [*range(groups, G, refill), G]
    (state, out), _ = jax.lax.scan(read_next, (state, out), jnp.asarray(reads))
    while fewer := fewer_slots(groups, first_groups, n):  # no prompt waits, and the slots become fewer with the rows
        chosen = jnp.argsort(free_groups(state, n), stable=True)[:fewer]
        state, groups = pick(writer.model, state, chosen, n), fewer
        state = until_free(state, groups - fewer_slots(groups, first_groups, n))
        out = collect(state, out)
    tokens, mask, log_probs = out
    return Generation(tokens, mask, log_probs, state.capacity)
