"""Best-of-n: of several responses to a prompt, the one that the reward model likes best.

It needs no training, and it is a policy of its own: at most ``log n - (n - 1) / n`` nats from the one that it draws
from. Fine-tuning on the winners (rejection sampling fine-tuning, Touvron et al. 2023, arXiv 2307.09288, section 3.2.3;
RAFT, Dong et al. 2023, arXiv 2304.06767) puts what it gains into the weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
      n: responses drawn for each prompt.
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
    sample: SampleFn, score: Score, n: int, *, drawn: Callable[[int], None] | None = None
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], Best]:
    """Function ``(params, prompts [B, P], prompt_mask [B, P], keys [B]) -> Best``.

    Draw ``i`` to a prompt is made with ``fold_in(its key, i)`` by the one program that draws a single response, so the
    n responses are the first of those of ``n + 1``, and a few batches are in memory, whatever n is. The
    winner has the highest sum of token rewards, which PPO maximizes; of equal ones the first wins, and a NaN
    wins nowhere but in the first place.

    Args:
      sample: samples one response to each prompt, e.g. a `jaxrm.algorithms.rollout.BatchSampler`.
      score: token rewards of a batch, calibrated; it need not be a jax program.
      n: responses to each prompt.
      drawn: called after each draw with how many have been made; what it raises ends the work.
    """
    assert n >= 1, n

    def select(params: Any, prompts: jax.Array, prompt_mask: jax.Array, keys: jax.Array) -> Best:
        every = jax.vmap(lambda key: prompt_keys(key, 0, n))(keys)
        first = best = sample(params, prompts, prompt_mask, every[:, :1]).responses
        rewards = score(best)
        sums, parts = [rewards.diagnostics["sum"]], [_sums_of_parts(rewards)]
        for i in range(n):
            if i:
                candidate = sample(params, prompts, prompt_mask, every[:, i : i + 1]).responses
                candidate_rewards = score(candidate)
                sums.append(candidate_rewards.diagnostics["sum"])
                parts.append(_sums_of_parts(candidate_rewards))
                best, rewards = _better((best, rewards), (candidate, candidate_rewards))
            jax.block_until_ready(rewards)  # else all draws would be queued, each with its memory
            if drawn is not None:
                drawn(i + 1)
        by_source = {name: _columns([part[name] for part in parts]) for name in parts[0]}
        return Best(best, rewards.diagnostics["sum"], rewards, _columns(sums), first, by_source)

    return select


def kl_bound(n: int) -> float:
    """Upper bound of ``KL(best of n || policy)`` in nats a response: ``log n - (n - 1) / n`` (arXiv 2401.01879).

    The KL itself where every response has a probability of nearly 0 and a reward of its own; less where few responses
    carry much of the probability, or ties are many.
    """
    return math.log(n) - (n - 1) / n


def _sums_of_parts(rewards: TokenRewards) -> dict[str, jax.Array]:
    """Sum ``[B]`` of the token rewards of each source."""
    return {name: part.diagnostics["sum"] for name, part in rewards.parts.items()}


@jax.jit
def _better(
    best: tuple[ResponseBatch, TokenRewards], candidate: tuple[ResponseBatch, TokenRewards]
) -> tuple[ResponseBatch, TokenRewards]:
    """Row by row the candidate where its sum is higher, else the best so far."""
    wins = candidate[1].diagnostics["sum"] > best[1].diagnostics["sum"]

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(wins, tuple(range(1, new.ndim))), new, old)

    return jax.tree.map(choose, candidate, best)


@jax.jit
def _columns(sums: list[jax.Array]) -> jax.Array:
    return jnp.stack(sums, axis=1)
