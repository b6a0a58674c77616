"""Best-of-n: of several responses to a prompt, the one that the reward model likes best.

It needs no training, and it is a policy of its own: at most ``log n - (n - 1) / n`` nats from the one that it draws
from. Fine-tuning on the winners (rejection sampling fine-tuning, Touvron et al. 2023, arXiv 2307.09288, section 3.2.3;
RAFT, Dong et al. 2023, arXiv 2304.06767) puts what it gains into the weights.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.algorithms.rollout import Sampled
from jaxrm.config.fields import at_least, bounded, check
from jaxrm.models.sampling import prompt_keys
from jaxrm.types import ResponseBatch, TokenRewards

SampleFn = Callable[[Any, jax.Array, jax.Array, jax.Array], Sampled]
Score = Callable[[ResponseBatch], TokenRewards]


@dataclass(frozen=True)
class BestOfNConfig:
    """How many responses compete, and what becomes of the winners.

    Attributes:
      n: responses drawn for each prompt, which is read once for as many of them as are drawn at once: all n, where
        ``config.data.batch_size`` responses have room for them.
      keep_truncated: keep winners that were cut off before their end token. Fine-tuning on such a one teaches to stop
        in the middle of a sentence (jaxrm choice: they are dropped and counted).
    """

    n: int = bounded(16, at_least(1))
    keep_truncated: bool = False

    def __post_init__(self) -> None:
        check(self)


class Best(NamedTuple):
    """The winners among n responses to each of B prompts.

    Attributes:
      responses: the winners.
      rewards: ``[B]`` float32, sum of the token rewards of each winner.
      token_rewards: of the winners.
      candidate_rewards: ``[B, n]`` float32, that sum for every response, in the order in which they were drawn.
      first: the first response to each prompt, which is a plain sample of the policy.
      candidate_parts: ``[B, n]`` of each source of a sum of rewards by name, before its weight; ``{}`` of one source.
    """

    responses: ResponseBatch
    rewards: jax.Array
    token_rewards: TokenRewards
    candidate_rewards: jax.Array
    first: ResponseBatch
    candidate_parts: dict[str, jax.Array]


def best_of_n(
    sample: SampleFn, score: Score, n: int, *, at_once: int = 1, drawn: Callable[[int], None] | None = None
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], Best]:
    """Function ``(params, prompts [B, P], prompt_mask [B, P], keys [B]) -> Best``.

    Draw ``i`` to a prompt is made with ``fold_in(its key, i)``, so the n responses are the first of those of ``n + 1``.
    A few batches are in memory, whatever n is. The winner has the highest sum of token rewards, which PPO maximizes; of
    equal ones the first wins, and a NaN wins only where all are.

    Args:
      sample: samples ``at_once`` responses to each prompt, e.g. a `jaxrm.algorithms.rollout.BatchSampler`, which reads
        the prompt once for them.
      score: token rewards of a batch, calibrated; it need not be a jax program.
      n: responses to each prompt, a multiple of ``at_once``.
      at_once: responses to each prompt in one draw.
      drawn: called after each draw with how many responses each prompt has; what it raises ends the work.
    """
    assert n >= 1 and n % at_once == 0, (n, at_once)

    def select(params: Any, prompts: jax.Array, prompt_mask: jax.Array, keys: jax.Array) -> Best:
        every = jax.vmap(lambda key: prompt_keys(key, 0, n))(keys)
        first: ResponseBatch | None = None
        best: tuple[ResponseBatch, TokenRewards] | None = None
        sums, parts = [], []
        for i in range(0, n, at_once):
            candidates = sample(params, prompts, prompt_mask, every[:, i : i + at_once]).responses
            scored = score(candidates)
            sums.append(_by_prompt(scored.diagnostics["sum"], at_once))
            parts.append({name: _by_prompt(part, at_once) for name, part in _sums_of_parts(scored).items()})
            if first is None:
                first = _chosen(candidates, np.zeros(len(prompts), np.int32), at_once)
            winner = _chosen((candidates, scored), _winners(sums[-1]), at_once)
            best = winner if best is None else _better(best, winner)
            jax.block_until_ready(best)  # else all draws would be queued, each with its memory
            if drawn is not None:
                drawn(i + at_once)
        assert first is not None and best is not None
        by_source = {name: _columns([part[name] for part in parts]) for name in parts[0]}
        responses, rewards = best
        return Best(responses, rewards.diagnostics["sum"], rewards, _columns(sums), first, by_source)

    return select


def divide(n: int, rows: int, *, prompt_unit: int, row_unit: int, slot_unit: int | None = None) -> tuple[int, int]:
    """Prompts of a draw, and responses to each of them, that are at most ``rows`` together.

    A prompt is read once for the responses of a draw, so that these are as many of the n as can be (jaxrm choice).

    Args:
      n: responses to each prompt.
      rows: most responses of a draw.
      prompt_unit: what divides the number of prompts; a divisor of ``rows``.
      row_unit: what divides the number of responses; a divisor of ``rows``.
      slot_unit: slots of a device, a whole number of times the responses to a prompt; None for no slots.
    """
    for at_once in (size for size in range(n, 0, -1) if n % size == 0):
        if slot_unit is not None and slot_unit % at_once:
            continue
        for prompts in range(rows // at_once // prompt_unit * prompt_unit, 0, -prompt_unit):
            if prompts * at_once % row_unit == 0:
                return prompts, at_once
    raise AssertionError((n, rows, prompt_unit, row_unit))  # one response to each of ``rows`` prompts fits


def kl_bound(n: int) -> float:
    """Upper bound of ``KL(best of n || policy)`` in nats a response: ``log n - (n - 1) / n`` (arXiv 2401.01879).

    The KL itself where every response has a probability of nearly 0 and a reward of its own; less where few responses
    carry much of the probability, or ties are many.
    """
    return math.log(n) - (n - 1) / n


def _sums_of_parts(rewards: TokenRewards) -> dict[str, jax.Array]:
    """Sum ``[B]`` of the token rewards of each source."""
    return {name: part.diagnostics["sum"] for name, part in rewards.parts.items()}


@functools.partial(jax.jit, static_argnames="at_once")
def _by_prompt(x: jax.Array, at_once: int) -> jax.Array:
    """``[B at_once, ...] -> [B, at_once, ...]``, responses to a prompt being next to each other."""
    return x.reshape(-1, at_once, *x.shape[1:])


@jax.jit
def _winners(sums: jax.Array) -> jax.Array:
    """Place ``[B]`` of the highest of each row of ``sums [B, at_once]``."""
    return jnp.argmax(jnp.where(jnp.isnan(sums), -jnp.inf, sums), axis=1)


@functools.partial(jax.jit, static_argnames="at_once")
def _chosen(tree: Any, places: jax.Array, at_once: int) -> Any:
    """Of the responses to each prompt the one at its place ``[B]``."""

    def choose(x: jax.Array) -> jax.Array:
        grouped = _by_prompt(x, at_once)
        return jnp.take_along_axis(grouped, jnp.expand_dims(places, tuple(range(1, grouped.ndim))), axis=1)[:, 0]

    return jax.tree.map(choose, tree)


@jax.jit
def _better(
    best: tuple[ResponseBatch, TokenRewards], candidate: tuple[ResponseBatch, TokenRewards]
) -> tuple[ResponseBatch, TokenRewards]:
    """Row by row the candidate where its sum is higher, else the best so far."""
    ours, theirs = best[1].diagnostics["sum"], candidate[1].diagnostics["sum"]
    wins = (theirs > ours) | (jnp.isnan(ours) & ~jnp.isnan(theirs))

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(wins, tuple(range(1, new.ndim))), new, old)

    return jax.tree.map(choose, candidate, best)


@jax.jit
def _columns(sums: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(sums, axis=1)
