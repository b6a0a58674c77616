"""How tokens are drawn: the options, the keys of prompts and responses, and the draw itself."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp

from jaxrm.config.fields import above, at_least, at_most, bounded, check
from jaxrm.errors import UserError, flag, option

_BLOCK = 128  # of the vocabulary, for drawing


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn.

    Attributes:
      max_new_tokens: longest response, its EOS included.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw among this many most likely tokens only; 0 for all.
      top_p: draw among the fewest most likely tokens whose probabilities reach this sum (Holtzman et al. 2020,
        arXiv 1904.09751); 1 for all.
    """

    max_new_tokens: int = bounded(128, at_least(1))
    temperature: float = bounded(1.0, at_least(0), meaning=" (0 is greedy)")
    top_k: int = bounded(0, at_least(0), meaning=" (0 is no limit)")
    top_p: float = bounded(1.0, above(0), at_most(1))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class GenerateOptions:
    """How prompts are answered.

    Attributes:
      sampling: how tokens are drawn.
      end_ids: ids that end a response.
      responses_per_prompt: n. The prompts are read, and their keys and values stored, once for all n.
      slots: responses that are written at once, a multiple of n; None or more than there are for all. With n responses
        a prompt the n slots of a prompt are taken anew when the last of them has ended.
      refill: prompts that are read at once, when so many can be begun; None for an eighth of the slots.
      prefill_chunk: most tokens of a prompt that are read at once. Longer ones are read in chunks, see
        `jaxrm.models.prefill` (jaxrm choice).
    """

    sampling: SamplingConfig
    end_ids: tuple[int, ...]
    responses_per_prompt: int = 1
    slots: int | None = None
    refill: int | None = None
    prefill_chunk: int = 1024


@functools.partial(jax.jit, static_argnames="count")
def prompt_keys(key: jax.Array, first: int, count: int) -> jax.Array:
    """Keys ``[count]`` of the prompts from number ``first`` on: ``fold_in(key, number)``."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


@functools.partial(jax.jit, static_argnames=("num_prompts", "n"))
def response_keys(key: jax.Array, num_prompts: int, n: int) -> jax.Array:
    """Keys ``[num_prompts, n]`` of the n responses to each prompt; ``key`` as in `generate`."""
    if key.ndim == 0:
        key = prompt_keys(key, 0, num_prompts)
    if key.ndim == 1:
        key = jax.vmap(lambda one: prompt_keys(one, 0, n))(key)
    assert key.shape == (num_prompts, n), (key.shape, num_prompts, n)
    return key


def sample(logits: jax.Array, keys: jax.Array, sampling: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """Draw a token for each row.

    Args:
      logits: ``[B, V]`` float32.
      keys: ``[B]`` typed PRNG keys.
      sampling: see `SamplingConfig`.

    Returns:
      Token ids ``[B]`` int32, and their log-probs ``[B]`` float32, see `Generation`.
    """
    chex.assert_rank(logits, 2)
    scaled = logits / (sampling.temperature or 1.0)
    token = _draw(scaled, keys, sampling)
    drawn = jnp.take_along_axis(scaled, token[:, None], axis=1)[:, 0]
    return token, drawn - jax.nn.logsumexp(scaled, axis=1)


def _draw(logits: jax.Array, keys: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Token ids ``[B]`` from tempered logits."""
    if sampling.temperature == 0:
        return _pick(logits, jnp.max, (jnp.argmax, jnp.argmax))
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        reached = jnp.cumsum(probs, axis=-1) - probs  # of the tokens before it; the first is always kept
        last = jnp.min(jnp.where(reached < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    parts = jax.vmap(jax.random.split)(keys)
    draws = [functools.partial(_categorical, parts[:, i]) for i in range(2)]
    return _pick(logits, jax.nn.logsumexp, draws)


def _categorical(keys: jax.Array, logits: jax.Array, *, axis: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.categorical, axis=axis))(keys, logits)


def _pick(logits: jax.Array, merge: Callable[..., jax.Array], choose: Sequence[Callable[..., jax.Array]]) -> jax.Array:
    """Choose one of ``logits [B, V]``: a block of the vocabulary by its merged logits, then a token of the block.

    As one choice among all, exactly, but random numbers for a whole vocabulary are a seventh of a step on CPU.
    """
    B, V = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(B, -1, _BLOCK)
    block = choose[0](merge(blocks, axis=-1), axis=-1)
    token = choose[1](jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    return (block * _BLOCK + token).astype(jnp.int32)


def check_on_policy(sampling: SamplingConfig, field: str) -> None:
    """Refuse sampling whose tokens are not drawn from ``softmax(logits / temperature)``, whose log-probs PPO computes.

    Args:
      sampling: how responses are drawn.
      field: the config section that says so, for messages.

    Raises:
      UserError: for greedy sampling, top-k and top-p.
    """
    for name, good, required in (
        ("temperature", sampling.temperature > 0, "above 0"),
        ("top_k", sampling.top_k == 0, "0 (all)"),
        ("top_p", sampling.top_p == 1, "1 (all)"),
    ):
        if not good:
            raise UserError(
                f"{option(f'{field}.{name}')} is {getattr(sampling, name)}, with which tokens are not drawn from "
                f"the policy whose "
                f"log-probs are trained; it must be {required}, e.g. "
                f"{flag(f'{field}.{name}')}={getattr(SamplingConfig, name)}"
            )
