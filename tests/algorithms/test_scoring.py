"""Token rewards by one forward pass: the paper's rule to the letter, hand-built rows, and what every scorer returns."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm.algorithms import reading, reward_config, scoring
from jaxrm.errors import UserError
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.models.generate import generate
from jaxrm.models.kernels import Kernels
from jaxrm.models.sampling import GenerateOptions, SamplingConfig
from jaxrm.ops import reward_scaling, token_rewards
from jaxrm.ops.reward_kinds import KINDS, names_for
from jaxrm.ops.vocab import TokenStatistics
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import ResponseBatch

SOURCE = ModelSource(preset="tiny")
EOS = 1
REQUEST = (4, 2, 4)
ENDS = (EOS,)
LLAMA = dataclasses.replace(
    PRESETS["tiny"],
    vocab_size=6,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=False,
)
SLIDING = dataclasses.replace(LLAMA, layer_is_sliding=(True, True), sliding_window=4)
CAPPED = dataclasses.replace(
    LLAMA,
    post_norms=True,
    unit_offset_norm=True,
    scale_embedding=True,
    attention_softcap=5.0,
    logit_softcap=2.0,
    layer_is_sliding=(True, False),
    sliding_window=5,
    tie_embeddings=True,
)
NORMED = dataclasses.replace(LLAMA, vocab_size=7, qk_norm=True, num_kv_heads=2)
SHAPES = {"llama": LLAMA, "sliding": SLIDING, "capped": CAPPED, "normed": NORMED}


@functools.cache
def graph(config):
    return build.abstract_decoder(config, SOURCE)[:2]


def draw(config, seed):
    """A random model, in NumPy: layers weigh as much as the token itself, and norms are uneven."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return jnp.asarray((0.0 if config.unit_offset_norm else 1.0) + 0.3 * values)
        return jnp.asarray(values * (config.hidden_size**-0.5 if path[-1].key == "embedding" else 0.3))

    return jax.tree_util.tree_map_with_path(one, graph(config)[1])


statistics = functools.partial(jax.jit, static_argnums=(0, 3), static_argnames="pad_to_multiple_of")(
    reading.response_statistics
)


def batch_of(prompts, responses, P=None, T=None, fill=EOS):
    """Prompts padded on the left and responses on the right, with a token that means something in both."""
    P, T = P or max(map(len, prompts)), T or max(map(len, responses))
    B = len(prompts)
    arrays = [np.full((B, P), fill), np.zeros((B, P), bool), np.full((B, T), fill), np.zeros((B, T), bool)]
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        arrays[0][b, P - len(prompt) :], arrays[1][b, P - len(prompt) :] = prompt, True
        arrays[2][b, : len(response)], arrays[3][b, : len(response)] = response, True
    return ResponseBatch(*(jnp.asarray(x, jnp.int32 if x.dtype == int else bool) for x in arrays))


def random_texts(rng, lengths, vocab):
    return [rng.integers(2, vocab, n) for n in lengths]


# --- the paper's rule, to the letter

DRAWS, RESPONSES, MOST_PROMPT, MOST_RESPONSE = 16, 20, 5, 8


@functools.partial(jax.jit, static_argnums=0)
def next_logits(graphdef, params, rows, lengths):
    """Logits ``[B, V]`` of what follows the first tokens of each row."""
    model = nnx.merge(graphdef, params)
    index = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32)[None], rows.shape)
    hidden = model(rows, positions=index, segment_ids=(index < lengths[:, None]).astype(jnp.int32))
    return model.logits(jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0])


def greedy_then_force(graphdef, params, prompts, responses, width):
    """Decode greedily from the template until the output differs from the response; from there feed the response.

    Every token is a forward over the whole sequence so far, without a cache. Returns tags, greedy tokens and how far
    the best logit is above the second, ``[B, T]`` each.
    """
    B, T = len(prompts), MOST_RESPONSE + 1
    tags, greedy, lead = np.zeros((B, T), bool), np.full((B, T), -1), np.zeros((B, T))
    rows, lengths = np.zeros((B, width), np.int32), np.zeros(B, np.int32)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        context = np.concatenate([prompt, response, REQUEST])
        lengths[b] = len(context)
        rows[b, : len(context)] = context
    writes_itself = np.ones(B, bool)
    for t in range(max(map(len, responses))):
        logits = np.asarray(next_logits(graphdef, params, rows, lengths))
        for b in range(B):
            if t >= len(responses[b]):
                continue
            second, first = np.sort(logits[b])[-2:]
            greedy[b, t], lead[b, t] = logits[b].argmax(), first - second
            tags[b, t] = greedy[b, t] == responses[b][t]
            writes_itself[b] &= tags[b, t]
            rows[b, lengths[b]] = greedy[b, t] if writes_itself[b] else responses[b][t]
            lengths[b] += 1
    return tags, greedy, lead


def agreeable_responses(rng, model, prompts, lengths, ends, vocab):
    """Responses that the model writes itself for a while: its own greedy token, more often than not.

    Those that end do so where the model would, if it would. A response is its own source, so each round of
    replacements moves what the model would write.
    """
    responses = [
        np.append(rng.integers(2, vocab, n - 1), EOS if end else 2) for n, end in zip(lengths, ends, strict=True)
    ]
    for _ in range(3):
        batch = batch_of(prompts, responses, P=MOST_PROMPT + 2, T=MOST_RESPONSE + 1)
        own = np.asarray(statistics(*model, batch, REQUEST).argmax)
        for b, end in enumerate(ends):
            n = len(responses[b])
            stops = np.flatnonzero(own[b, :n] == EOS)
            if end and len(stops):
                n = stops[0] + 1
            mixed = np.where((rng.random(n) < 0.8) & (own[b, :n] != EOS), own[b, :n], rng.integers(2, vocab, n))
            mixed[-1] = EOS if end else mixed[-1]
            responses[b] = mixed
    return responses


@pytest.mark.parametrize("name", SHAPES)
def test_one_pass_gives_the_tags_of_decoding_and_then_forcing(name):
    """4 shapes x 16 draws of their parameters = 64 models, 20 responses to each: 1,280 models and responses."""
    config = SHAPES[name]
    graphdef, rng = graph(config)[0], np.random.default_rng(sorted(SHAPES).index(name))
    width = MOST_PROMPT + 2 * MOST_RESPONSE + len(REQUEST)
    seen = {"at once": 0, "later": 0, "never": 0, "end +": 0, "end -": 0, "truncated": 0}
    undecided = 0
    for i in range(DRAWS):
        params = draw(config, i)
        # The first two are a lone EOS and a lone truncated token, the third and fourth as long as any.
        lengths = [1, 1, MOST_RESPONSE, MOST_RESPONSE, *rng.integers(2, MOST_RESPONSE + 1, RESPONSES - 4)]
        ends = [b % 2 == 0 for b in range(RESPONSES)]
        prompts = random_texts(rng, rng.integers(1, MOST_PROMPT + 1, RESPONSES), config.vocab_size)
        responses = agreeable_responses(rng, (graphdef, params), prompts, lengths, ends, config.vocab_size)

        batch = batch_of(prompts, responses, P=MOST_PROMPT + 2, T=MOST_RESPONSE + 1)
        found = statistics(graphdef, params, batch, REQUEST)
        got = np.asarray(token_rewards.token_tags(batch.responses, found.argmax, batch.response_mask))
        want, greedy, lead = greedy_then_force(graphdef, params, prompts, responses, width)
        # Logits as close as rounding have no order that two computations must agree on.
        decided = lead > 1e-5
        undecided += int((~decided & batch.response_mask).sum())
        np.testing.assert_array_equal(got[decided], want[decided])
        np.testing.assert_array_equal(np.asarray(found.argmax)[decided], greedy[decided])
        assert not got[~np.asarray(batch.response_mask)].any()

        for b in range(RESPONSES):
            tags = want[b, : len(responses[b])]
            seen["never" if tags.all() else "later" if tags[0] else "at once"] += 1
            seen[("end +" if tags[-1] else "end -") if ends[b] else "truncated"] += 1
    assert undecided <= 2
    assert min(seen.values()) >= 10, seen  # or the responses were not those that the rule is hard on


# --- the rows


def plain_log_probs(graphdef, params, rows):
    """``log softmax [B, N, V]`` at each token of rows without any padding, from whole logits."""

    @jax.jit
    def forward(params, rows):
        model = nnx.merge(graphdef, params)
        index = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32)[None], rows.shape)
        return model.logits(model(rows, positions=index, segment_ids=jnp.ones_like(rows)))

    logits = np.asarray(forward(params, jnp.asarray(rows, jnp.int32)), np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


WIDE = {name: dataclasses.replace(config, vocab_size=29) for name, config in SHAPES.items()}


@pytest.mark.parametrize("name", ["sliding", "capped"])
@pytest.mark.parametrize("request_ids", [REQUEST, (), None], ids=["reward model", "bare turn", "policy"])
def test_statistics_are_those_of_hand_built_rows(name, request_ids):
    """Prompts and responses of many lengths whose rows all come out 20 tokens long, so none has padding."""
    config = WIDE[name]
    graphdef, params = graph(config)[0], draw(config, 3)
    rng = np.random.default_rng(5)
    times = 1 if request_ids is None else 2
    lengths = [n for n in range(1, 9) if 20 - times * n - len(request_ids or ()) > 0]
    responses = random_texts(rng, lengths, 29)
    prompts = random_texts(rng, [20 - times * n - len(request_ids or ()) for n in lengths], 29)
    rows = []
    for x, y in zip(prompts, responses, strict=True):
        rows.append(np.concatenate([x, y] if request_ids is None else [x, y, np.array(request_ids, int), y]))
    want = plain_log_probs(graphdef, params, rows)
    got = statistics(graphdef, params, batch_of(prompts, responses, T=10), request_ids)
    for b, y in enumerate(responses):
        n = len(y)
        at = want[b, 20 - n - 1 : -1]  # the last part of the row is the response, each token told by the one before it
        np.testing.assert_allclose(got.log_probs[b, :n], at[np.arange(n), y], atol=1e-5)
        np.testing.assert_allclose(got.max_log_prob[b, :n], at.max(axis=-1), atol=1e-5)
        np.testing.assert_allclose(got.entropy[b, :n], -(np.exp(at) * at).sum(axis=-1), atol=1e-5)
        np.testing.assert_array_equal(got.argmax[b, :n], at.argmax(axis=-1))


def small_batch(seed=0, B=6, vocab=29, P=5, T=7, **options):
    rng = np.random.default_rng(seed)
    prompts = random_texts(rng, rng.integers(1, 6, B), vocab)
    responses = random_texts(rng, rng.integers(1, 8, B), vocab)
    for response in responses[::2]:
        response[-1] = EOS
    responses[1] = responses[1][:0]
    return batch_of(prompts, responses, P=P, T=T, **options)


def inside(mask, tree):
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(mask)], tree)


@pytest.mark.parametrize("request_ids", [REQUEST, None], ids=["reward model", "policy"])
def test_padding_and_row_multiples_change_nothing(request_ids):
    """Wider arrays, whatever id stands in them, and longer rows."""
    config = WIDE["capped"]
    model = graph(config)[0], draw(config, 0)
    narrow, wide = small_batch(), small_batch(P=11, T=13, fill=28)
    want = inside(narrow.response_mask, statistics(*model, narrow, request_ids))
    for batch, multiple in ((wide, 1), (narrow, 32), (wide, 7)):
        got = inside(batch.response_mask, statistics(*model, batch, request_ids, pad_to_multiple_of=multiple))
        chex.assert_trees_all_close(got, want, atol=1e-5)


def test_rows_are_filled_up_to_the_multiple():
    """P 5 + T 7, request 3 and T 7 again are 22 tokens."""
    config = WIDE["llama"]
    batch = small_batch(P=5, T=7)
    seen = []

    def attend(query, key, value, segment_ids, **options):
        seen.append(query.shape[1])
        return jnp.zeros_like(query)

    graphdef = build.abstract_decoder(config, SOURCE, kernels=Kernels(attend))[0]
    params = draw(config, 0)
    for multiple in (1, 16, 22):
        seen.clear()
        jax.eval_shape(
            lambda m=multiple: reading.response_statistics(graphdef, params, batch, REQUEST, pad_to_multiple_of=m)
        )
        assert set(seen) == {{1: 22, 16: 32, 22: 22}[multiple]}


# --- what scorers return

MODEL_KINDS = [name for name, kind in KINDS.items() if kind.needs != "text"]


class Scorers:
    """Every kind's scorer, over one seq2seq and one scalar reward model of the same shape."""

    def __init__(self, mesh=None):
        config = dataclasses.replace(WIDE["llama"], vocab_size=32)
        constrain = partition.activation_constraint(mesh) if mesh else (lambda x, axes: x)
        self.decoder, shapes, axes = build.abstract_decoder(config, SOURCE, constrain=constrain)
        self.scalar, scalar_shapes, scalar_axes = build.abstract_scalar_model(config, SOURCE, constrain=constrain)
        self.params = draw(config, 0)
        head = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=config.hidden_size), jnp.float32)}
        trunk = {name: part for name, part in self.params.items() if name != "head"}
        self.scalar_params = {"decoder": trunk, "scalar_head": head}
        if mesh:
            self.shardings = partition.parameter_shardings(shapes, axes, mesh)
            self.scalar_shardings = partition.parameter_shardings(scalar_shapes, scalar_axes, mesh)
        self.scorers = {kind: self._scorer(kind) for kind in MODEL_KINDS}
        self.jitted = {kind: (jax.jit(score), params) for kind, (score, params) in self.scorers.items()}

    def _scorer(self, kind):
        is_scalar = KINDS[kind].needs == "scalar"
        graphdef, params = (self.scalar, self.scalar_params) if is_scalar else (self.decoder, self.params)
        return scoring.build_scorer(KINDS[kind], graphdef, request=REQUEST, end_ids=ENDS), params

    def score(self, kind, batch, calibration=None, reference=None):
        score, params = self.jitted[kind]
        if KINDS[kind].needs_reference and reference is None:
            reference = jnp.full(batch.responses.shape, -3.0)
        return score(params, calibration or reward_scaling.uncalibrated(), batch, reference)


@pytest.fixture(scope="module")
def scorers():
    return Scorers()


def test_values_of_each_kind_by_hand():
    """Four tokens, tagged + - + +, of probability .5, .1, .5 and .75 where the best has .5, .8, .5 and .75."""
    batch = batch_of([[2]], [[3, 4, 5, EOS]], T=5)
    nan = float("nan")
    found = TokenStatistics(
        log_probs=jnp.log(jnp.asarray([[0.5, 0.1, 0.5, 0.75, nan]])),
        entropy=jnp.full((1, 5), nan),
        argmax=jnp.asarray([[3, 9, 5, EOS, EOS]], jnp.int32),
        max_log_prob=jnp.log(jnp.asarray([[0.5, 0.8, 0.5, 0.75, nan]])),
    )
    reference = jnp.log(jnp.asarray([[0.4, 0.9, 0.5, 0.1, nan]]))
    by_hand = {
        "literal": [1, -1, 0, 0],
        "signed": [1, -1, 1, 1],
        "prefix": [1, -1, -1, -1],
        "soft": [0, -0.8, 0, 0.5],
        "margin": [0, -1, 0, 0],  # log(.1 / .8) is -2.1
        "contrast": [np.log(1.25), -1, 0, 1],
    }
    assert set(by_hand) == set(names_for("seq2seq", "tokens"))
    for kind, want in by_hand.items():
        got = KINDS[kind].values(found, batch.responses, batch.response_mask, reference)
        np.testing.assert_allclose(got[0], [*want, 0], atol=1e-6, err_msg=kind)


def test_no_consumer_can_tell_the_scorers_apart(scorers):
    batch = small_batch(vocab=32)
    shapes = {
        kind: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), scorers.score(kind, batch))
        for kind in MODEL_KINDS
    }
    for kind, shape in shapes.items():
        assert shape == shapes["literal"], kind
    B, T = batch.responses.shape
    one = shapes["literal"]
    assert one.rewards == one.values == ((B, T), np.dtype("float32"), False)
    assert one.mask == ((B, T), np.dtype(bool), False)
    assert one.tags == ((B, T), np.dtype(bool), False)
    assert set(one.diagnostics) == {"sum", "mean", "length", "tag_rate", "divergence", "ended", "end_tag"}
    assert set(one.diagnostics.values()) == {((B,), np.dtype("float32"), False)}


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_diagnostics_are_those_of_the_rewards(scorers, kind):
    """By a loop over responses; a scalar reward model or a policy disagrees with no token."""
    batch = small_batch(vocab=32)
    calibration = reward_scaling.Calibration(*(jnp.asarray(x, jnp.float32) for x in (2.0, 0.25, 0.5, -1.0)))
    got = jax.device_get(scorers.score(kind, batch, calibration))
    argmax = np.asarray(statistics(scorers.decoder, scorers.params, batch, REQUEST).argmax)
    for b in range(batch.responses.shape[0]):
        n = int(batch.response_mask[b].sum())
        response = np.asarray(batch.responses[b, :n])
        tags = response == argmax[b, :n] if KINDS[kind].needs == "seq2seq" else np.ones(n, bool)
        values = got.values[b, :n]
        if kind == "edit_aligned":
            tags = values > 0
        if KINDS[kind].is_centered:
            rewards = 2.0 * (values - 0.25)
        else:
            rewards = 2.0 * values
            if kind == "scalar_length_residual" and n:
                rewards[-1] -= 2.0 * (0.5 * n - 1.0)
        np.testing.assert_allclose(got.rewards[b, :n], rewards, atol=1e-5)
        assert (got.rewards[b, n:] == 0).all() and (got.values[b, n:] == 0).all()
        want = {
            "sum": rewards.sum(),
            "mean": rewards.mean() if n else 0.0,
            "length": n,
            "tag_rate": tags.mean() if n else 0.0,
            "divergence": n if tags.all() else tags.argmin(),
            "ended": float(n > 0 and response[-1] == EOS),
            "end_tag": float(n > 0 and tags[-1] and response[-1] == EOS),
        }
        assert (got.tags[b, :n] == tags).all() and not got.tags[b, n:].any()
        for name, value in want.items():
            np.testing.assert_allclose(got.diagnostics[name][b], value, atol=1e-5, err_msg=f"{name} of response {b}")


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_a_response_of_no_token_earns_nothing(scorers, kind):
    """Nor does a row without even a prompt, which fills up a batch."""
    batch = batch_of([[3, 4], [], [5, 6], [], [], []], [[7, EOS], [], [], [], [], []], P=5, T=7)
    got = jax.device_get(scorers.score(kind, batch))
    chex.assert_tree_all_finite(got)
    for row in range(1, 6):
        assert not got.rewards[row].any() and not any(values[row] for values in got.diagnostics.values())
    assert got.diagnostics["length"][0] == 2


def test_a_score_is_the_head_on_the_last_response_token(scorers):
    """Of rows without padding, 12 tokens each; the head is applied in NumPy."""
    rng = np.random.default_rng(2)
    lengths = [1, 4, 7, 11]
    responses, prompts = random_texts(rng, lengths, 32), random_texts(rng, [12 - n for n in lengths], 32)
    rows = jnp.asarray([np.concatenate(row) for row in zip(prompts, responses, strict=True)], jnp.int32)

    @jax.jit
    def forward(params):
        index = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], rows.shape)
        return nnx.merge(scorers.decoder, params)(rows, positions=index, segment_ids=jnp.ones_like(rows))

    want = np.asarray(forward(scorers.params))[:, -1] @ np.asarray(scorers.scalar_params["scalar_head"]["kernel"])
    for kind in names_for("scalar", "response"):
        got = scorers.score(kind, batch_of(prompts, responses, P=14, T=15, fill=9))
        np.testing.assert_allclose(got.diagnostics["sum"], want, atol=1e-5)
        at_the_end = np.asarray(got.rewards)[np.arange(4), np.array(lengths) - 1]
        np.testing.assert_allclose(at_the_end, want, atol=1e-5)


def test_value_difference_is_the_head_at_every_token(scorers):
    """Of rows of unequal prompts, 12 tokens each; the head is applied in NumPy, from the last prompt token on."""
    rng = np.random.default_rng(3)
    lengths = [1, 4, 7, 11]
    responses, prompts = random_texts(rng, lengths, 32), random_texts(rng, [12 - n for n in lengths], 32)
    rows = jnp.asarray([np.concatenate(row) for row in zip(prompts, responses, strict=True)], jnp.int32)

    @jax.jit
    def forward(params):
        index = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], rows.shape)
        return nnx.merge(scorers.decoder, params)(rows, positions=index, segment_ids=jnp.ones_like(rows))

    scores = np.asarray(forward(scorers.params)) @ np.asarray(scorers.scalar_params["scalar_head"]["kernel"])
    got = jax.device_get(scorers.score("value_difference", batch_of(prompts, responses, P=14, T=15, fill=9)))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(got.rewards[row, :n], np.diff(scores[row, 11 - n :]), atol=1e-5)
        np.testing.assert_allclose(got.diagnostics["sum"][row], scores[row, -1] - scores[row, 11 - n], atol=1e-5)
    assert (got.tags == got.mask).all() and not got.rewards[~got.mask].any()


def test_contrast_compares_with_the_policys_own_log_probs(scorers):
    """Clipped to one nat either way; the policy reads prompt and response alone."""
    batch = small_batch(vocab=32)
    reward_model = statistics(scorers.decoder, scorers.params, batch, REQUEST).log_probs
    policy = statistics(scorers.decoder, scorers.params, batch, None).log_probs
    got = scorers.score("contrast", batch, reference=policy)
    want = np.clip(np.asarray(reward_model) - np.asarray(policy), -1, 1)
    np.testing.assert_allclose(got.rewards, np.where(batch.response_mask, want, 0), atol=1e-5)
    assert np.asarray(got.rewards).std() > 0.05


def test_edit_aligned_compares_with_the_models_own_correction(scorers):
    """Greedily written after prompt, response and request, each in a row of its own; compared by a plain loop."""
    batch, length = small_batch(vocab=32), 6
    score = scoring.build_scorer(
        KINDS["edit_aligned"], scorers.decoder, request=REQUEST, end_ids=ENDS, correction_length=length
    )
    got = jax.device_get(jax.jit(score)(scorers.params, reward_scaling.uncalibrated(), batch))
    greedy = SamplingConfig(max_new_tokens=length, temperature=0.0)
    rows = [
        [*np.asarray(batch.prompts[b])[np.asarray(batch.prompt_mask[b])], *np.asarray(batch.responses[b, :n]), *REQUEST]
        for b, n in enumerate(np.asarray(batch.response_mask).sum(axis=1))
    ]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
    real = np.array([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    written = generate(
        scorers.decoder, scorers.params, ids, real, jax.random.key(1), options=GenerateOptions(greedy, ENDS)
    )
    kept_at_all = 0
    for b, row in enumerate(rows):
        n = int(batch.response_mask[b].sum())
        response = np.asarray(batch.responses[b, :n]).tolist()
        correction = np.asarray(written.tokens[b])[np.asarray(written.mask[b])].tolist()
        kept = got.values[b, :n] > 0
        assert len(row) >= n and kept.sum() == common_length(response, correction)
        rest = iter(correction)
        assert all(token in rest for token, is_kept in zip(response, kept, strict=True) if is_kept)
        assert (np.abs(got.values[b, :n]) == 1).all() and not got.values[b, n:].any()
        assert (got.tags[b, :n] == kept).all()
        kept_at_all += int(kept.sum())
    assert 0 < kept_at_all < int(batch.response_mask.sum())


def common_length(a, b):
    """Length of the longest common subsequence."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in np.ndindex(len(a), len(b)):
        same = table[i, j] + 1 if a[i] == b[j] else 0
        table[i + 1, j + 1] = max(same, table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_dpo_compares_two_policies_at_the_temperature(scorers, temperature):
    """Both read prompt and response alone; two policies that are the same differ nowhere."""
    batch = small_batch(vocab=32)
    score = jax.jit(
        scoring.build_scorer(KINDS["dpo"], scorers.decoder, request=REQUEST, end_ids=ENDS, temperature=temperature)
    )

    @jax.jit
    def log_probs(params):
        return reading.response_statistics(scorers.decoder, params, batch, None, temperature=temperature).log_probs

    other = draw(dataclasses.replace(WIDE["llama"], vocab_size=32), 5)
    want = np.clip(np.asarray(log_probs(scorers.params)) - np.asarray(log_probs(other)), -1, 1)
    got = score(scorers.params, reward_scaling.uncalibrated(), batch, log_probs(other))
    np.testing.assert_allclose(got.rewards, np.where(batch.response_mask, want, 0), atol=1e-5)
    assert np.asarray(got.rewards).std() > 0.05
    same = score(scorers.params, reward_scaling.uncalibrated(), batch, log_probs(scorers.params))
    np.testing.assert_allclose(same.rewards, 0.0, atol=1e-5)


def test_diagnostics_of_all_kinds_are_those_of_their_scorers(scorers):
    batch = small_batch(vocab=32)
    reference = jnp.full(batch.responses.shape, -3.0)
    of_all = jax.jit(scoring.build_diagnostics("seq2seq", scorers.decoder, request=REQUEST, end_ids=ENDS))
    found = of_all(scorers.params, batch, reference)
    assert set(found) == set(names_for("seq2seq", "tokens"))  # not of what costs a generation
    for kind, diagnostics in found.items():
        chex.assert_trees_all_close(diagnostics, scorers.score(kind, batch).diagnostics, atol=1e-5)
    assert set(of_all(scorers.params, batch, None)) == set(found) - {"contrast"}
    of_scalar = jax.jit(scoring.build_diagnostics("scalar", scorers.scalar, request=(), end_ids=ENDS))
    found = of_scalar(scorers.scalar_params, batch, None)
    assert list(found) == ["scalar", "value_difference"]
    for kind, diagnostics in found.items():
        chex.assert_trees_all_close(diagnostics, scorers.score(kind, batch).diagnostics, atol=1e-5)


def test_no_end_token_is_no_end_tag(scorers):
    score = scoring.build_scorer(KINDS["scalar"], scorers.scalar, request=(), end_ids=())
    got = jax.jit(score)(scorers.scalar_params, reward_scaling.uncalibrated(), small_batch(vocab=32))
    assert not np.asarray(got.diagnostics["end_tag"]).any()


# --- devices and memory


@pytest.mark.parametrize("kind", ["literal", "contrast", "scalar_length_residual", "value_difference"])
def test_one_device_and_eight_give_the_same_rewards(scorers, kind):
    batch = small_batch(B=8, vocab=32)
    mesh = build_mesh(MeshConfig(2, 2, 2))
    eight, rows = Scorers(mesh), partition.batch_sharding(mesh)
    score, params = eight.scorers[kind]
    sharding = eight.scalar_shardings if kind in names_for("scalar") else eight.shardings
    copied = NamedSharding(mesh, PartitionSpec())
    step = scoring.build_score_step(score, params_sharding=sharding, batch_sharding=rows, output_sharding=copied)
    calibration = reward_scaling.Calibration(*(jnp.asarray(x, jnp.float32) for x in (2.0, 0.25, 0.5, -1.0)))
    reference = jax.device_put(jnp.full(batch.responses.shape, -3.0), rows) if kind == "contrast" else None
    got = step(jax.device_put(params, sharding), calibration, jax.device_put(batch, rows), reference)
    want = scorers.score(kind, batch, calibration)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), rtol=1e-5, atol=1e-5)
    assert got.rewards.sharding.is_equivalent_to(copied, 2)


def test_no_array_of_responses_by_vocabulary_is_made():
    """At 256,000 words, by the compiler's own account; the same account sees the array where there is one."""
    config = dataclasses.replace(LLAMA, vocab_size=256_000)
    graphdef, shapes, _ = build.abstract_decoder(config, SOURCE)
    B, P, T = 4, 32, 256
    ids = {"prompts": (B, P), "prompt_mask": (B, P), "responses": (B, T), "response_mask": (B, T)}
    batch = ResponseBatch(
        **{n: jax.ShapeDtypeStruct(shape, bool if "mask" in n else jnp.int32) for n, shape in ids.items()}
    )
    score = scoring.build_scorer(KINDS["soft"], graphdef, request=REQUEST, end_ids=ENDS)

    def temporary(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    def with_logits(params, tokens):
        model = nnx.merge(graphdef, params)
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], tokens.shape)
        logits = model.logits(model(tokens, positions=index, segment_ids=jnp.ones_like(tokens)))
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=2)
        return log_probs, logits.argmax(axis=-1)

    whole = B * T * 256_000 * 4
    assert temporary(score, shapes, jax.eval_shape(reward_scaling.uncalibrated), batch) < whole / 8
    assert temporary(with_logits, shapes, batch.responses) >= whole


# --- options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "literally"},
            r"RewardConfig.kind is 'literally'; it must be one of literal, signed.*kind=",
        ),
        (
            {"scale": 0.0},
            r"RewardConfig.scale is 0.0; it must be unit or a finite number above 0.*scale='unit'",
        ),
        ({"scale": float("nan")}, "RewardConfig.scale is nan"),
        ({"scale": float("inf")}, "RewardConfig.scale is inf"),
        ({"center_momentum": 1.0}, r"RewardConfig.center_momentum is 1.0; .*below 1"),
        ({"center_momentum": -0.1}, "RewardConfig.center_momentum is -0.1"),
    ],
)
def test_reward_options_that_make_no_sense_are_errors(fields, message):
    with pytest.raises(UserError, match=message):
        reward_config.RewardConfig(**fields)


def test_reward_options_are_the_papers_by_default():
    assert reward_config.RewardConfig() == reward_config.RewardConfig(kind="literal", scale="unit", center="running")
