"""Which checkpoint is the best. What they hold is tested with the training step and in test_resume.py."""

import jax.numpy as jnp

from jaxrm.runtime.checkpoint import CheckpointConfig, Checkpoints


def save(folder, losses):
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=len(losses)))
    for step, loss in enumerate(losses, 1):
        checkpoints.save(step, {"params": {"x": jnp.zeros(2)}}, {}, loss)
    checkpoints.wait()
    return checkpoints


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    assert save(tmp_path / "run", [float("nan"), 2.0, 1.0, float("-inf")]).best_step() == 3


def test_the_latest_is_the_best_where_none_was_evaluated(tmp_path):
    assert save(tmp_path / "run", [None, float("nan")]).best_step() == 2
    assert Checkpoints(tmp_path / "empty").best_step() is None
