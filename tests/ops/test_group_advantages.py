"""RLOO, GRPO and REINFORCE++ against hand-worked groups, NumPy loops and an enumerable problem."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.ops import advantages
from jaxrm.ops.masking import last_token, masked_whiten

FUNCTIONS = {
    name: jax.jit(getattr(advantages, name), static_argnames=("group_size", "is_terminal"))
    for name in ("rloo", "grpo", "reinforce_plus_plus")
}
rloo, grpo, reinforce_plus_plus = FUNCTIONS.values()
equal_groups = jax.jit(advantages.equal_groups, static_argnames="group_size")

# One group of two, of three and two tokens, with fractional rewards; what is outside the mask means nothing.
REWARDS = jnp.asarray([[0.5, -0.25, 0.75], [0.2, 0.3, 9.0]])
MASK = jnp.asarray([[True, True, True], [True, True, False]])


def random_groups(seed, n, groups=4, T=6):
    """Rewards and the mask of responses of 0 to T tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T + 1, groups * n)
    lengths[:3] = T, 0, 1
    rewards = rng.normal(0.3, 0.8, (groups * n, T)).astype(np.float32)
    return jnp.asarray(rewards), jnp.asarray(np.arange(T) < lengths[:, None])


# --- by hand


def test_rloo_by_hand():
    """G is 1, 1/2, 3/4 and 1/2, 3/10, and 0 after the end of the second."""
    np.testing.assert_allclose(rloo(REWARDS, MASK, group_size=2), [[0.5, 0.2, 0.75], [-0.5, -0.2, 0]], rtol=1e-6)


def test_reinforce_plus_plus_by_hand():
    """Of two, the group mean leaves half of what the other one leaves; alone, a response keeps its G."""
    got = reinforce_plus_plus(REWARDS, MASK, group_size=2)
    np.testing.assert_allclose(got, [[0.25, 0.1, 0.375], [-0.25, -0.1, 0]], rtol=1e-6)
    alone = reinforce_plus_plus(REWARDS, MASK, group_size=1)
    np.testing.assert_allclose(alone, [[1.0, 0.5, 0.75], [0.5, 0.3, 0]], rtol=1e-6)
    inside = np.asarray([1.0, 0.5, 0.75, 0.5, 0.3])
    whitened = np.asarray(masked_whiten(alone, MASK))[np.asarray(MASK)]
    np.testing.assert_allclose(whitened, (inside - inside.mean()) / inside.std(), rtol=1e-5)


def test_grpo_by_hand():
    """Mean 3/10; squares of the rest 0.04, 0.3025, 0.2025, 0.01 and 0, over four."""
    std = np.sqrt(0.555 / 4)
    expected = np.asarray([[0.1, -0.1, 0.45], [-0.1, 0, 0]]) / (std + 1e-4)
    np.testing.assert_allclose(grpo(REWARDS, MASK, group_size=2), expected, atol=1e-6)


def test_a_terminal_reward_counts_at_every_token():
    """As published: 3/4 on the third token and 1/4 on the second, so 1/2 apart also where one has ended."""
    rewards = jnp.asarray([[0.0, 0.0, 0.75], [0.0, 0.25, 0.0]])
    got = rloo(rewards, MASK, group_size=2, is_terminal=True)
    np.testing.assert_allclose(got, [[0.5, 0.5, 0.5], [-0.5, -0.5, 0]])
    np.testing.assert_allclose(rloo(rewards, MASK, group_size=2), [[0.5, 0.5, 0.75], [-0.5, -0.5, 0]])
    share = 0.25 / (np.sqrt(0.125) + 1e-4)
    got = grpo(rewards, MASK, group_size=2, is_terminal=True)
    np.testing.assert_allclose(got, [[share] * 3, [-share, -share, 0]], rtol=1e-6)


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_group_of_equal_rewards_has_no_advantage(name, is_terminal):
    """A tenth in every one of seven responses: its mean in float32 is not exactly that."""
    mask = jnp.arange(5)[None] < jnp.asarray([5, 5, 5, 5, 5, 5, 5, 2, 4, 1, 3, 5, 1, 2])[:, None]
    mask = mask if is_terminal or name == "grpo" else mask.at[:].set(True)
    rewards = jnp.where(last_token(mask) if is_terminal else mask, 0.1, 0.0)
    got = FUNCTIONS[name](rewards, mask, group_size=7, is_terminal=is_terminal)
    assert not got.any() and float(equal_groups(got, mask, group_size=7)) == 1.0
    other = FUNCTIONS[name](rewards.at[0, 4].set(0.2), mask, group_size=7, is_terminal=is_terminal)
    assert other[:7].any() and not other[7:].any() and float(equal_groups(other, mask, group_size=7)) == 0.5


def test_a_group_without_a_token_is_not_counted():
    mask = jnp.asarray([[True], [True], [False], [False]])
    assert float(equal_groups(jnp.asarray([[1.0], [-1.0], [0.0], [0.0]]), mask, group_size=2)) == 0.0


# --- a plain loop


def numpy_advantages(name, rewards, mask, n, is_terminal):
    """METHOD, one response and token at a time."""
    B, T = mask.shape
    lengths, result = mask.sum(axis=1), np.zeros((B, T))
    for i, t in itertools.product(range(B), range(T)):
        if t >= lengths[i]:
            continue
        group = range(i // n * n, i // n * n + n)
        if name == "grpo":
            carried = [
                float(rewards[j, k]) for j in group for k in range(lengths[j]) if not is_terminal or k == lengths[j] - 1
            ]
            std = np.std(carried, ddof=1) if len(carried) > 1 else 0.0
            own = [k for k in range(t, lengths[i]) if not is_terminal or k == lengths[i] - 1]
            result[i, t] = sum((float(rewards[i, k]) - np.mean(carried)) / (std + 1e-4) for k in own)
            continue
        to_go = {}
        for j in group:
            to_go[j] = sum(float(rewards[j, k]) for k in range(t, lengths[j]))
            if is_terminal and t >= lengths[j] > 0:
                to_go[j] = float(rewards[j, lengths[j] - 1])
        others = [to_go[j] for j in group if j != i or name != "rloo"]
        result[i, t] = to_go[i] - np.mean(others)
    return result


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_advantages_equal_a_numpy_loop(name, n, is_terminal):
    rewards, mask = random_groups(n, n)
    if is_terminal:
        rewards = jnp.where(last_token(mask), rewards, 0.0)
    got = FUNCTIONS[name](jnp.where(mask, rewards, jnp.nan), mask, group_size=n, is_terminal=is_terminal)
    assert got.dtype == jnp.float32
    expected = numpy_advantages(name, np.asarray(rewards), np.asarray(mask), n, is_terminal)
    np.testing.assert_allclose(got, expected, atol=1e-5)


# --- what must hold


@pytest.mark.parametrize("name", FUNCTIONS)
def test_order_and_other_groups_change_nothing(name):
    rewards, mask = random_groups(5, 3)
    got = FUNCTIONS[name](rewards, mask, group_size=3)
    order = np.asarray([5, 3, 4, 0, 2, 1, 8, 7, 6, 11, 9, 10])
    np.testing.assert_allclose(FUNCTIONS[name](rewards[order], mask[order], group_size=3), got[order], atol=1e-5)
    np.testing.assert_allclose(FUNCTIONS[name](rewards[3:6], mask[3:6], group_size=3), got[3:6], atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_terminal_rewards_may_all_be_shifted(name):
    """Only differences within a group count; for GRPO their size does not count either."""
    rewards, mask = random_groups(6, 4)
    mask = mask.at[:, 0].set(True)
    advantage = functools.partial(FUNCTIONS[name], mask=mask, group_size=4, is_terminal=True)
    terminal = jnp.where(last_token(mask), rewards, 0.0)
    got, moved = advantage(terminal), advantage(jnp.where(last_token(mask), rewards + 3.0, 0.0))
    np.testing.assert_allclose(moved, got, atol=1e-5)
    scaled = got if name == "grpo" else 5.0 * got
    np.testing.assert_allclose(advantage(5.0 * terminal), scaled, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got[:, 0].reshape(-1, 4).sum(axis=1), 0.0, atol=1e-5)


def test_a_reward_that_is_not_a_number_stays_in_its_group():
    rewards, mask = random_groups(7, 3)
    for function in FUNCTIONS.values():
        got = function(rewards.at[0, 2].set(jnp.nan), mask, group_size=3)
        assert np.isnan(got[:3]).any() and not np.isnan(got[3:]).any()


def test_whole_numbers_and_a_group_of_one_are_refused():
    for name in FUNCTIONS:
        with pytest.raises(AssertionError):
            getattr(advantages, name)(REWARDS.astype(int), MASK, group_size=2)
    for function in (advantages.rloo, advantages.grpo):
        with pytest.raises(AssertionError):
            function(REWARDS, MASK, group_size=1)


# --- the expected gradient


def every_response():
    """All responses of at most two tokens of which token 0 is the end: tokens, mask and a reward a token."""
    whole = [(0,), *((first, second) for first in (1, 2) for second in (0, 1, 2))]
    tokens = np.asarray([y + (0,) * (2 - len(y)) for y in whole])
    mask = np.arange(2) < np.asarray([len(y) for y in whole])[:, None]
    return tokens, mask, np.where(mask, np.random.default_rng(3).normal(0.6, 1.0, mask.shape), 0.0)


@pytest.mark.parametrize(("name", "is_terminal"), [("rloo", False), ("rloo", True), ("grpo", False)])
def test_the_expected_gradient_of_rloo_is_that_of_reinforce(name, is_terminal):
    """Exact sums over all groups of three of the seven responses there are; GRPO's is another one."""
    tokens, mask, rewards = every_response()
    if is_terminal:
        rewards = np.where(last_token(jnp.asarray(mask)), rewards, 0.0)
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(4, 3)), jnp.float32)
    states = np.stack([np.zeros(len(tokens), int), 1 + tokens[:, 0]], axis=1)  # the start, or the token before

    def log_probs(logits):
        return jnp.where(mask, jax.nn.log_softmax(logits)[states, tokens], 0.0)

    probability = np.exp(log_probs(logits).sum(axis=1))
    assert probability.sum() == pytest.approx(1.0, abs=1e-6)
    to_go = rewards[:, ::-1].cumsum(axis=1)[:, ::-1]
    reinforce = jax.grad(lambda x: (probability[:, None] * to_go * log_probs(x)).sum())(logits)

    groups = np.asarray(list(itertools.product(range(len(tokens)), repeat=3))).reshape(-1)
    flat = jnp.asarray(rewards[groups], jnp.float32), jnp.asarray(mask[groups])
    advantage = np.where(mask[groups], FUNCTIONS[name](*flat, group_size=3, is_terminal=is_terminal), 0.0)
    weight = np.repeat(probability[groups.reshape(-1, 3)].prod(axis=1) / 3, 3)
    assert weight.sum() == pytest.approx(1.0, abs=1e-5)
    expected = jax.grad(lambda x: (weight[:, None] * advantage * log_probs(x)[groups]).sum())(logits)
    is_close = np.allclose(expected, reinforce, atol=1e-5)
    assert is_close == (name == "rloo"), np.abs(expected - reinforce).max()
