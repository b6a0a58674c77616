"""Two steps of every algorithm in bfloat16, the dtype that accelerators train in, beside the same in float32."""

import importlib

import jax
import numpy as np
import pytest
from support.stage_configs import stage_config

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig, read_rows
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.table import module_of, run_stage

SAMPLING = SamplingConfig(max_new_tokens=8)
FILES = {"sft": "train.jsonl", "ppo": "prompts.jsonl"}


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "sft")
    make_run(folder / "rm", algorithm="seq2seq_rm")
    return folder


def train(algorithm, dtype, runs, task_folder, folder):
    """Rows of the metrics of a run of two steps on one device."""
    data = DataConfig(
        path=str(task_folder / FILES.get(algorithm, "pairs.jsonl")),
        max_length=128,
        batch_size=4,
        max_records=40,
        max_eval_records=4,
    )
    rewards = {}
    if algorithm == "ppo":
        rewards["reward"] = RewardConfig(kind="soft", model=str(runs / "rm"), calibration_responses=4)
    config = stage_config(
        algorithm,
        run_dir=str(folder),
        num_steps=2,
        model=ModelSource(path=str(runs / "sft"), dtype=dtype),
        data=data,
        optimizer=OptimizerConfig(lr=1e-3),
        mesh=MeshConfig(1, 1, 1),
        rollout=RolloutConfig(sampling=SAMPLING),
        ppo=PPOConfig(num_epochs=1),
        evaluation={"every": 2, "samples": 1, "corrections": 0, "judge": None, "sampling": SAMPLING},
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
        **rewards,
    )
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module(module_of(config))
        patch.setattr(module, "build_mesh", lambda given: build_mesh(given, jax.devices()[:1]))
        assert run_stage(config) == 0
    return read_rows(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "seq2seq_rm", "scalar_rm", "dpo", "ppo"])
def test_bfloat16_trains_as_float32_does(algorithm, runs, task_folder, tmp_path):
    """The first loss, before rounding adds up, is that of float32 to two digits; every metric is finite."""
    half = train(algorithm, "bfloat16", runs, task_folder, tmp_path / "half")
    assert all(np.isfinite(value) for row in half for value in row.values() if isinstance(value, float))
    if algorithm == "ppo":  # its rollouts differ, since other tokens are drawn
        return
    whole = train(algorithm, "float32", runs, task_folder, tmp_path / "whole")
    for name in ("loss", "grad_norm"):
        first = [next(row[name] for row in rows if name in row) for rows in (half, whole)]
        np.testing.assert_allclose(*first, rtol=0.03)
