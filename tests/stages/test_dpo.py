"""The DPO stage on a policy made in a moment: what it keeps of its reference, stopping, bad input."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrm.algorithms.dpo import DPOConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.inference import run_checkpoint
from jaxrm.inference.load import load_policy
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import WALL_CLOCK, LoggingConfig, read_rows
from jaxrm.runtime.preemption import EXIT_PREEMPTED, StopRequest
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import DPO, POLICIES
from jaxrm.stages.dpo import reference as dpo_pairs
from jaxrm.stages.dpo import run as dpo
from jaxrm.stages.dpo.reference import load_or_compute_reference
from jaxrm.stages.supervised import train as supervised

STEPS = 4


@pytest.fixture(scope="module")
def policy(make_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "sft"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def config(policy, task_folder):
    def build(run_dir, **fields):
        return DPO(
            **{
                "run_dir": str(run_dir),
                "num_steps": STEPS,
                "model": ModelSource(path=str(policy)),
                "data": DataConfig(
                    path=str(task_folder / "pairs.jsonl"),
                    max_length=128,
                    batch_size=4,
                    max_records=60,
                    max_eval_records=12,
                ),
                "dpo": DPOConfig(beta=0.1),
                "optimizer": OptimizerConfig(lr=3e-3),
                "mesh": MeshConfig(1, 1, 1),
                "checkpoint": CheckpointConfig(every=2),
                "evaluation": JudgedEvaluationConfig(
                    every=2, samples=1, judge="task:safety", sampling=SamplingConfig(max_new_tokens=4)
                ),
                "logging": LoggingConfig(every=1, tensorboard=False, progress=False),
            }
            | fields
        )

    return build


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The stage takes all devices there are; one compiles sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "build_mesh", lambda given: build_mesh(given, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "dpo"
    assert dpo.run(config(folder)) == 0
    return folder


def rows(folder):
    found = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in found]


def params(folder):
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return jax.tree.leaves(jax.device_get(load_policy(str(folder), mesh=mesh).params))


def test_training_starts_at_the_reference_and_learns_preferences(unbroken):
    first, last = (row for row in rows(unbroken) if "eval_loss" in row and row["step"] in (0, STEPS))
    np.testing.assert_allclose(first["eval_loss"], np.log(2.0), rtol=1e-5)
    np.testing.assert_allclose(first["eval_reward_gap"], 0.0, atol=1e-4)
    assert last["eval_loss"] < 0.6 and last["eval_reward_gap"] > 0.2


def test_the_result_is_a_policy_that_others_start_from(unbroken):
    found = run_checkpoint.find_checkpoint(str(unbroken), algorithms=POLICIES)
    assert (found.step, found.config.algorithm) == (STEPS, "dpo")


def test_a_continued_run_ends_like_one_that_was_not_stopped(unbroken, config, policy, tmp_path, monkeypatch):
    """The reference is read once: what began the run is what it goes on with."""
    read, times = dpo.read_reference, []
    monkeypatch.setattr(dpo, "read_reference", lambda *args, **more: times.append(1) or read(*args, **more))

    class AfterTheFirstStep(StopRequest):
        def __init__(self):
            super().__init__()
            self.requested = True

        def checked(self, items):  # the evaluation before it is made
            return iter(items)

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "catch_signals", lambda **_: contextlib.nullcontext(AfterTheFirstStep()))
        assert dpo.run(config(tmp_path / "dpo")) == EXIT_PREEMPTED
    assert rows(tmp_path / "dpo")[-1]["step"] < STEPS
    assert dpo.run(config(tmp_path / "dpo")) == 0
    assert times == [1]
    assert rows(tmp_path / "dpo") == rows(unbroken)
    for mine, whole in zip(params(tmp_path / "dpo"), params(unbroken), strict=True):
        np.testing.assert_array_equal(mine, whole)


# --- what the reference said


KEPT = np.asarray([[-1.5, -2.5], [-3.0, -4.0]], np.float32)
NOTE = {"data": "d", "pairs": 2, "policy": "runs/sft, step 4"}


def keep(file, note=NOTE, value=KEPT, **more):
    asked = []
    found = load_or_compute_reference(
        file, note, lambda: asked.append(1) or value, **{"has_trained": False, "is_writer": True} | more
    )
    return found, bool(asked)


def test_other_pairs_or_another_policy_reread_the_reference(tmp_path):
    """Nothing else does."""
    file = tmp_path / "reference_log_probs.npy"
    np.testing.assert_array_equal(keep(file)[0], KEPT)
    found, was_read = keep(file, value=None)
    np.testing.assert_array_equal(found, KEPT)
    assert not was_read
    other = NOTE | {"policy": "runs/sft, step 8"}
    found, was_read = keep(file, other, value=None, has_trained=True)
    np.testing.assert_array_equal(found, KEPT)  # the run began with the policy that was there then
    assert not was_read
    assert keep(file, other, KEPT + 1)[1]
    assert keep(file, NOTE | {"data": "e"}, KEPT + 2)[1]
    np.testing.assert_array_equal(np.load(file), KEPT + 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "reference_log_probs.json",
        "reference_log_probs.npy",
    ]


def test_log_probs_without_their_note_are_computed_again(tmp_path):
    """So is a note without its log-probs."""
    file = tmp_path / "reference_log_probs.npy"
    for lost in (file, file.with_suffix(".json")):
        keep(file)
        lost.unlink()
        assert keep(file)[1]
        lost.write_bytes(b"{")
        assert keep(file)[1]


def test_a_trained_run_refuses_a_lost_reference_or_other_pairs(tmp_path):
    file = tmp_path / "reference_log_probs.npy"
    with pytest.raises(UserError, match=r"reference_log_probs.npy is lost or damaged.*--config.on_existing=restart"):
        keep(file, has_trained=True)
    keep(file)
    with pytest.raises(UserError, match=r"config.data.path no longer gives the pairs .*--config.on_existing=restart"):
        keep(file, NOTE | {"data": "e"}, has_trained=True)


def test_the_note_is_of_the_policy_and_all_pairs(unbroken, policy):
    note = json.loads((unbroken / "reference_log_probs.json").read_text())
    assert str(policy) in note["policy"] and "step 4" in note["policy"]
    kept = np.load(unbroken / "reference_log_probs.npy")
    assert kept.shape == (note["pairs"], 2) and (kept < 0).all() and len(np.unique(kept)) > note["pairs"]


def test_examples_mark_the_tokens_of_both_responses():
    one = dpo_pairs.DPOExample(
        np.arange(9, dtype=np.int32), 4, "here", (2, 3), 5, (-1.5, -2.5)
    )  # 0 1 | 2 3, 4 5 | 6 7 8
    columns = one.columns()
    assert np.flatnonzero(columns["loss_mask"]).tolist() == [2, 3, 6, 7, 8]
    assert np.flatnonzero(columns["is_chosen_end"]).tolist() == [3]
    at_end = {name: columns[name][3].item() for name in ("pair", "reference_chosen", "reference_rejected")}
    assert at_end == {"pair": 5, "reference_chosen": -1.5, "reference_rejected": -2.5}
    assert all(columns[name].astype(bool).sum() == 1 for name in at_end)


# --- bad input


def test_without_a_policy_there_is_nothing_to_go_on_from(config, tmp_path):
    with pytest.raises(UserError, match=r"config.model.path is None.*--config.model.path=runs/quickstart/sft"):
        dpo.run(config(tmp_path / "run", model=ModelSource(preset="tiny")))
    assert not (tmp_path / "run").exists()


def test_a_reward_model_is_no_policy(config, make_run, tmp_path):
    make_run(tmp_path / "rm", algorithm="seq2seq_rm")
    with pytest.raises(UserError, match="a run of seq2seq_rm; required a model of sft or ppo or dpo"):
        dpo.run(config(tmp_path / "run", model=ModelSource(path=str(tmp_path / "rm"))))
    assert not (tmp_path / "run").exists()


def test_demonstrations_are_no_pairs(config, task_folder, tmp_path):
    data = dataclasses.replace(config("x").data, path=str(task_folder / "train.jsonl"))
    with pytest.raises(UserError, match="a record without a chosen and a rejected response"):
        dpo.run(config(tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()
