"""What is computed from the rewards of both sides of held-out pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.data.pairs import TokenPair
from jaxrm.errors import UserError
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.reward_model.evaluation import HeldOutPairs, metrics, with_centered, with_length_residual

ONE = MeshConfig(1, 1, 1)


def sides(kind, chosen, rejected, lengths):
    names = {"sum": np.array([chosen, rejected], float), "length": np.array(lengths, float)}
    names["mean"] = names["sum"] / names["length"]
    names |= {name: np.zeros_like(names["sum"]) for name in ("divergence", "tag_rate", "end_tag")}
    return {kind: names}


def test_centring_takes_the_pay_for_length_off():
    """Rejected responses are longer, so that their raw sums of + tags are higher; per token they earn less."""
    found = with_centered(sides("signed", [4, 3], [6, 5], [[5, 4], [10, 9]]), "running")["signed"]
    center = 18 / 28  # all rewards over all tokens
    np.testing.assert_allclose(found["centered"][0], [4 - 5 * center, 3 - 4 * center])
    assert (found["sum"][0] < found["sum"][1]).all() and (found["centered"][0] > found["centered"][1]).all()
    of_run = metrics({"signed": found}, "signed")
    assert (of_run["eval_pair_accuracy"], of_run["eval_pairs/signed_by_sum"]) == (1.0, 0.0)


@pytest.mark.parametrize(("kind", "center"), [("signed", "none"), ("margin", "running"), ("scalar", "fixed")])
def test_nothing_is_centred_that_has_no_centre(kind, center):
    found = with_centered(sides(kind, [4, 3], [6, 5], [[5, 4], [10, 9]]), center)[kind]
    np.testing.assert_array_equal(found["centered"], found["sum"])


def test_the_residual_has_no_length_left():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, (2, 50))
    scores = 0.3 * lengths - 2 + rng.normal(size=(2, 50))
    residual = with_length_residual(sides("scalar", *scores, lengths))["scalar_length_residual"]["sum"]
    assert abs(np.corrcoef(residual.ravel(), lengths.ravel())[0, 1]) < 1e-9 and abs(residual.mean()) < 1e-9
    assert np.corrcoef(residual.ravel(), (scores - 0.3 * lengths).ravel())[0, 1] > 0.98


def pairs(count):
    rng = np.random.default_rng(1)
    ids = [rng.integers(3, 30, n).astype(np.int32) for n in rng.integers(1, 70, 3 * count)]
    return [TokenPair(*ids[3 * i : 3 * i + 3], source=f"pairs.jsonl:{i + 1}") for i in range(count)]


def test_rewards_that_are_not_finite_are_refused():
    held_out = HeldOutPairs(pairs(3), 4, build_mesh(ONE, jax.devices()[:1]))
    read = held_out.reader(
        lambda params, batch, reference: {"soft": {"sum": params * batch.response_mask.sum(1)}}, None
    )
    assert read(jnp.float32(1.0))["soft"]["sum"].shape == (2, 3)
    with pytest.raises(UserError, match="soft rewards of held-out pairs are not finite"):
        read(jnp.float32(jnp.nan))


def test_the_reference_is_opened_once_and_kept(tmp_path):
    """On other devices and batches too, each response keeps the log-probs that it had."""
    opened = []

    def open_policy():
        opened.append(1)
        return jax.jit(lambda batch: -(batch.responses * 1.5).astype(jnp.float32))

    def diagnostics(params, batch, reference):
        return {"contrast": {"sum": jnp.where(batch.response_mask, reference, 0).sum(1)}}

    file = tmp_path / "reference_log_probs.npy"
    found = []
    for rows, mesh in ((4, build_mesh(ONE, jax.devices()[:1])), (8, build_mesh(MeshConfig(2, 2, 2)))):
        held_out = HeldOutPairs(pairs(6), rows, mesh)
        held_out.keep_reference(file, open_policy, is_writer=True)
        found.append(held_out.reader(diagnostics, None)(jnp.zeros(()))["contrast"]["sum"])
    want = [[-1.5 * getattr(pair, side).sum() for pair in pairs(6)] for side in ("chosen", "rejected")]
    for sums in found:
        np.testing.assert_allclose(sums, want, rtol=1e-5)
    assert len(opened) == 1 and [path.name for path in tmp_path.iterdir()] == ["reference_log_probs.npy"]
