"""Which checkpoints stay: the same ones, however often the run was stopped."""

import jax.numpy as jnp
import pytest

from jaxrm.runtime.checkpoint import CheckpointConfig, Checkpoints
from jaxrm.runtime.preservation import Preservation, SavedStep

ARRAYS = {"params": {"x": jnp.zeros(2)}}


@pytest.mark.parametrize(
    ("keep", "keep_best", "saved", "kept"),
    [
        (1, 0, {2: 1.0, 4: 2.0}, {4}),
        (1, 1, {2: 1.0, 4: 2.0}, {2, 4}),
        (2, 1, {2: 1.0, 4: 2.0, 6: None}, {2, 4, 6}),
        (1, 1, {2: 1.0, 4: 1.0, 6: None}, {4, 6}),  # of equal losses the later one
        (1, 1, {2: float("nan"), 4: None}, {4}),
        (2, 0, {2: None, 4: None, 5: "passing"}, {4, 5}),
        (2, 0, {2: None, 4: None, 5: "passing", 6: None}, {4, 6}),  # it took nobody's place
        (1, 1, {2: 1.0, 3: "passing", 4: 2.0}, {2, 4}),
        (3, 0, {2: None, 3: "passing", 5: "passing"}, {2, 5}),
    ],
)
def test_what_stays_is_a_matter_of_steps_and_losses(keep, keep_best, saved, kept):
    preservation = Preservation(keep, keep_best)
    for step, loss in saved.items():
        preservation.saved[step] = SavedStep(None, True) if loss == "passing" else SavedStep(loss)
    assert preservation.preserved(saved) == kept


def save(folder, **losses):
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1, keep_best=1))
    for name, loss in losses.items():
        step = int(name.removeprefix("step"))
        is_passing = loss == "passing"
        checkpoints.save(step, ARRAYS, {}, None if is_passing else loss, is_passing=is_passing)
        checkpoints.wait()
    return checkpoints


def test_a_late_loss_counts_as_one_that_was_saved(tmp_path):
    """Step 4 is saved before its evaluation, which shows it to be the best: step 2 goes, as if it had come in time."""
    save(tmp_path / "run", step2=3.0, step4=None).close()
    late = Checkpoints(tmp_path / "run", CheckpointConfig(keep=1, keep_best=1))
    assert (late.steps(), late.best_step()) == ([2, 4], 2)
    late.add_loss(4, 1.0)
    assert (late.steps(), late.best_step()) == ([4], 4)
    late.add_loss(4, 9.0)  # it has one
    assert late.progress(4)["loss"] == 1.0
    late.save(6, ARRAYS, {}, 2.0)
    late.wait()
    assert late.steps() == save(tmp_path / "unbroken", step2=3.0, step4=1.0, step6=2.0).steps() == [4, 6]
    assert Checkpoints(tmp_path / "run", read_only=True).best_step() == 4


def test_a_late_loss_that_is_worse_leaves_the_best_where_it_is(tmp_path):
    checkpoints = save(tmp_path / "run", step2=1.0, step4=None)
    checkpoints.add_loss(4, float("nan"))
    assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 4], 2)


def test_a_passing_checkpoint_is_continued_and_never_the_best(tmp_path):
    checkpoints = save(tmp_path / "run", step2=3.0, step3="passing")
    checkpoints.add_loss(3, 1.0)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 3], 2)
    again = Checkpoints(tmp_path / "run", CheckpointConfig(keep=1, keep_best=1))
    again.save(4, ARRAYS, {}, 4.0)
    again.wait()
    assert again.steps() == [2, 4]
