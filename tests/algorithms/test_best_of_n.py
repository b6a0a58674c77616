"""The best of several responses: who wins is worked out by hand, with a policy that the tests write themselves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.algorithms.best_of_n import BestOfNConfig, best_of_n, divide, kl_bound
from jaxrm.algorithms.rollout import Sampled
from jaxrm.algorithms.scoring import as_token_rewards
from jaxrm.errors import UserError
from jaxrm.ops import reward_scaling, token_rewards
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.types import ResponseBatch

KEY = jax.random.key(3)
KEYS = jax.random.split(KEY, 3)
PROMPTS, MASK = np.array([[0, 1], [2, 3], [0, 4]], np.int32), np.array([[0, 1], [1, 1], [0, 1]], bool)


def policy(draws):
    """Answers with ``draws [n, B]``, response i with token ``draws[i]`` repeated i + 1 times; the keys it was given."""
    keys = []

    def respond(params, prompts, mask, key):
        i = len(keys)
        keys.append(key[:, 0])
        kept = np.arange(4)[None, :] <= i
        responses = np.where(kept, np.asarray(draws[i], np.int32)[:, None], 0)
        batch = ResponseBatch(
            jnp.asarray(prompts), jnp.asarray(mask), jnp.asarray(responses), jnp.asarray(np.broadcast_to(kept, (3, 4)))
        )
        return Sampled(batch, jnp.zeros((3, 4)))

    return respond, keys


@jax.jit
def by_token(batch):
    """A response is worth its first token."""
    values = token_rewards.scalar(batch.responses[:, 0].astype(jnp.float32), batch.response_mask)
    plain = reward_scaling.uncalibrated()
    return as_token_rewards(plain, KINDS["scalar"], values, batch.response_mask, batch, (9,))


def test_the_highest_sum_wins_each_row_and_ties_go_to_the_first():
    respond, keys = policy([[5, 2, 7], [6, 2, 1], [6, 1, 7], [3, 2, 2]])
    best = jax.device_get(best_of_n(respond, by_token, 4)("params", PROMPTS, MASK, KEYS))
    np.testing.assert_array_equal(best.rewards, [6, 2, 7])
    np.testing.assert_array_equal(best.candidate_rewards, [[5, 6, 6, 3], [2, 2, 1, 2], [7, 1, 7, 2]])
    # Response i has i + 1 tokens, so that which of equal ones won can be seen.
    np.testing.assert_array_equal(best.responses.response_mask.sum(axis=1), [2, 1, 1])
    np.testing.assert_array_equal(best.responses.responses, [[6, 6, 0, 0], [2, 0, 0, 0], [7, 0, 0, 0]])
    np.testing.assert_array_equal(best.token_rewards.rewards, [[0, 6, 0, 0], [2, 0, 0, 0], [7, 0, 0, 0]])
    np.testing.assert_array_equal(best.first.responses[:, 0], [5, 2, 7])
    np.testing.assert_array_equal(best.responses.prompts, PROMPTS)
    expected = [[jax.random.fold_in(key, i) for key in KEYS] for i in range(4)]
    assert [jax.random.key_data(key).tolist() for key in keys] == [
        [jax.random.key_data(one).tolist() for one in row] for row in expected
    ]


def test_draws_that_share_a_prompt_have_the_same_winners():
    """Four responses to each prompt, two at a time and next to each other."""
    draws = np.array([[5, 2, 7], [6, 2, 1], [6, 1, 7], [3, 2, 2]])

    def respond(params, prompts, mask, keys):
        first = 0 if jnp.array_equal(keys[0, 0], jax.random.fold_in(KEYS[0], 0)) else 2
        tokens = jnp.asarray(draws[first : first + 2].T.reshape(6, 1), jnp.int32)
        rows = [jnp.repeat(jnp.asarray(x), 2, axis=0) for x in (prompts, mask)]
        return Sampled(ResponseBatch(*rows, tokens, jnp.ones_like(tokens, bool)), jnp.zeros((6, 1)))

    drawn = []
    select = best_of_n(respond, by_token, 4, at_once=2, drawn=drawn.append)
    best = jax.device_get(select("params", PROMPTS, MASK, KEYS))
    np.testing.assert_array_equal(best.candidate_rewards, draws.T)
    np.testing.assert_array_equal(best.rewards, [6, 2, 7])
    np.testing.assert_array_equal(best.responses.responses[:, 0], [6, 2, 7])
    np.testing.assert_array_equal(best.token_rewards.rewards[:, 0], [6, 2, 7])
    np.testing.assert_array_equal(best.responses.prompts, PROMPTS)
    np.testing.assert_array_equal(best.first.responses[:, 0], [5, 2, 7])
    assert drawn == [2, 4]


@pytest.mark.parametrize(
    ("n", "rows", "units", "expected"),
    [
        (16, 32, {"prompt_unit": 1, "row_unit": 1}, (2, 16)),
        (16, 8, {"prompt_unit": 1, "row_unit": 1}, (1, 8)),  # a prompt is read twice
        (4, 64, {"prompt_unit": 8, "row_unit": 8}, (16, 4)),
        (4, 8, {"prompt_unit": 8, "row_unit": 8}, (8, 1)),
        (5, 32, {"prompt_unit": 1, "row_unit": 4}, (4, 5)),
        (6, 32, {"prompt_unit": 1, "row_unit": 1, "slot_unit": 9}, (10, 3)),
    ],
)
def test_a_draw_has_as_many_responses_a_prompt_as_fit(n, rows, units, expected):
    assert divide(n, rows, **units) == expected


def test_the_best_of_one_is_the_plain_sample():
    """More draws begin with that sample."""
    drawn = []
    ones = best_of_n(policy([[5, 2, 7]])[0], by_token, 1, drawn=drawn.append)("params", PROMPTS, MASK, KEYS)
    many = best_of_n(policy([[5, 2, 7], [6, 1, 8]])[0], by_token, 2, drawn=drawn.append)("params", PROMPTS, MASK, KEYS)
    plain = policy([[5, 2, 7]])[0]("params", PROMPTS, MASK, KEYS[:, None]).responses
    for mine in (ones.responses, ones.first, many.first):
        for name in ("responses", "response_mask", "prompts", "prompt_mask"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(plain, name))
    np.testing.assert_array_equal(many.rewards, [6, 2, 8])
    assert drawn == [1, 1, 2]


def test_a_reward_that_is_no_number_never_takes_a_place():
    draws = [[5, 2, 7], [6, 6, 6]]

    def score(batch):
        found = by_token(batch)
        bad = jnp.where(batch.responses[:, 0] == 6, jnp.nan, found.diagnostics["sum"])
        return type(found)(found.rewards, found.values, found.tags, found.mask, found.diagnostics | {"sum": bad})

    best = best_of_n(policy(draws)[0], score, 2)("params", PROMPTS, MASK, KEYS)
    np.testing.assert_array_equal(best.rewards, [5, 2, 7])


def test_the_reward_of_the_winner_never_falls_with_n():
    rng = np.random.default_rng(0)
    draws = rng.integers(1, 100, (8, 3))
    found = [best_of_n(policy(draws)[0], by_token, n)("params", PROMPTS, MASK, KEYS).rewards for n in range(1, 9)]
    np.testing.assert_array_equal(np.array(found), np.maximum.accumulate(draws, axis=0))


def test_the_kl_bound_is_met_by_many_equally_likely_responses():
    """Best of n of m equally likely responses, all ranked: P(rank k wins) = (k/m)^n - ((k-1)/m)^n."""
    m = 4000
    ranks = np.arange(m + 1) / m
    for n in (1, 2, 4, 16):
        won = np.diff(ranks**n)
        kl = float((won * np.log(won * m)).sum())
        assert kl <= kl_bound(n) + 1e-9 and kl == pytest.approx(kl_bound(n), abs=2e-2)
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_less_than_one_response_is_refused():
    with pytest.raises(UserError, match=r"BestOfNConfig.n is 0; it must be at least 1, e.g. n=16"):
        BestOfNConfig(n=0)
