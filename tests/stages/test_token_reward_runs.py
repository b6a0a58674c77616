"""PPO runs of two steps with kinds of token reward that need more than one look at a reward model."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.algorithms.scalar_rm import ScalarRMConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig, read_rows
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO, ScalarRM
from jaxrm.stages.ppo import run as ppo
from jaxrm.stages.reward_model import run as reward_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

SAMPLING = SamplingConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory):
    """Folder with runs of a policy, of both sorts of reward model, and of DPO."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "sft")
    make_run(folder / "scalar", algorithm="scalar_rm")
    make_run(folder / "seq2seq", algorithm="seq2seq_rm")
    make_run(folder / "dpo", algorithm="dpo", losses=((5, 1.0),))
    return folder


@pytest.fixture
def train(runs, task_folder, tmp_path, monkeypatch):
    """Function that trains on one device and returns the folder of the run."""

    def run(reward, **fields):
        config = PPO(
            run_dir=str(tmp_path / "run"),
            num_steps=2,
            model=ModelSource(path=str(runs / "sft")),
            reward=dataclasses.replace(reward, calibration_responses=8) if reward.model else reward,
            data=DataConfig(
                path=str(task_folder / "prompts.jsonl"), max_length=48, batch_size=4, max_records=40, max_eval_records=4
            ),
            rollout=RolloutConfig(sampling=SAMPLING),
            ppo=PPOConfig(num_epochs=1),
            mesh=MeshConfig(1, 1, 1),
            evaluation=JudgedEvaluationConfig(every=2, samples=1, sampling=SAMPLING),
            logging=LoggingConfig(every=1, tensorboard=False, progress=False),
            **fields,
        )
        monkeypatch.setattr(ppo, "build_mesh", lambda given: build_mesh(given, jax.devices()[:1]))
        assert ppo.run(config) == 0
        return tmp_path / "run"

    return run


def samples_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def arrays_of(folder, name, step):
    """One of the items of a checkpoint as it lies on disk."""
    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore()})
        return manager.restore(step, args=args)[name]


def head_of(folder, name, step):
    return np.asarray(arrays_of(folder, name, step)["scalar_head"]["kernel"])


def test_value_difference_trains(train, runs):
    """A sample's rewards are of every token, in the units of the calibration."""
    folder = train(RewardConfig(kind="value_difference", model=str(runs / "scalar")))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "reward" in row]
    assert len(rows) == 2 and all(
        np.isfinite([row["reward"], row["policy_loss"], row["value_loss"]]).all() for row in rows
    )
    rewards = [sample["rewards"] for sample in samples_of(folder)]
    assert all(np.count_nonzero(own) == len(own) for own in rewards) and any(len(own) > 1 for own in rewards)


def test_edit_aligned_trains(train, runs):
    """In two microbatches; every token of a sample is paid for, in two sizes: kept or not."""
    reward = RewardConfig(kind="edit_aligned", model=str(runs / "seq2seq"), center="fixed")
    folder = train(reward, num_microbatches=2)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "policy_loss" in row]
    assert len(rows) == 2 and all(np.isfinite([row["reward"], row["policy_loss"]]).all() for row in rows)
    paid = {round(reward, 4) for sample in samples_of(folder) for reward in sample["rewards"]}
    assert 1 <= len(paid) <= 2


def test_dpo_trains_beside_a_scalar_reward(train, runs):
    """As RTO adds them: each has a calibration and a mean of its own, and both pay in the end."""
    sources = {"scalar": "scalar", "tokens": "dpo"}
    rewards = {
        name: RewardConfig(kind=path, model=str(runs / path), calibration_responses=8) for name, path in sources.items()
    }
    folder = train(RewardConfig(), rewards=rewards)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "policy_loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert np.isfinite([row["reward"], row["policy_loss"], row["reward/scalar"], row["reward/tokens"]]).all()
        assert 0 < row["reward_share/tokens"] < 1


def test_a_reward_model_learns_to_be_a_value_function(runs, task_folder, tmp_path, monkeypatch):
    """Two steps of the loss with both options; what they add is in the rows, and the held-out loss has it too."""
    config = ScalarRM(
        run_dir=str(tmp_path / "run"),
        num_steps=2,
        model=ModelSource(path=str(runs / "sft")),
        data=DataConfig(
            path=str(task_folder / "pairs.jsonl"), max_length=128, batch_size=4, max_records=40, max_eval_records=4
        ),
        scalar_rm=ScalarRMConfig(prefix_coef=0.5, neighbor_coef=0.1),
        optimizer=OptimizerConfig(lr=1e-2),
        mesh=MeshConfig(1, 1, 1),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
    )
    monkeypatch.setattr(reward_model, "build_mesh", lambda given: build_mesh(given, jax.devices()[:1]))
    assert reward_model.run(config) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    trained = [row for row in rows if "prefix_error" in row]
    assert len(trained) == 2 and all(row["prefix_error"] > 0 and row["neighbor_error"] > 0 for row in trained)
    kinds = [kind["kind"] for kind in json.loads((tmp_path / "run" / "evaluation.json").read_text())["kinds"]]
    assert kinds == ["scalar", "value_difference", "scalar_length_residual"]


def test_a_critic_begins_with_the_reward_models_head(train, runs):
    """In the units of the calibrated rewards; an optimizer that barely moves leaves it there."""
    slow = OptimizerConfig(lr=1e-12, weight_decay=0.0)
    critic = CriticConfig(head="reward_model", optimizer=slow)
    folder = train(RewardConfig(kind="scalar", model=str(runs / "scalar")), critic=critic, optimizer=slow)

    kernel = head_of(folder, "critic_params", 2)
    scale = float(arrays_of(folder, "feedback", 2)["initial_calibration"]["scale"])
    assert abs(scale - 1) > 0.01
    np.testing.assert_allclose(kernel, head_of(runs / "scalar", "params", 4) * scale, rtol=1e-5)
