"""Runs stopped in the middle of an evaluation: rows, samples and best checkpoint are those of an unbroken one."""

import jax
import pytest
from support.same_run import differences

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig, Checkpoints
from jaxrm.runtime.metrics import LoggingConfig, append_row
from jaxrm.runtime.preemption import EXIT_PREEMPTED, StoppedError, StopRequest
from jaxrm.runtime.run_folder import open_run
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import DPO, PPO
from jaxrm.stages.dpo import run as dpo
from jaxrm.stages.late_evaluation import is_evaluation_pending
from jaxrm.stages.ppo import run as ppo

STAGES = {"dpo": dpo, "ppo": ppo}


def variety(prompts, responses):
    """A reward function."""
    return [len(set(response.split())) / 7 for response in responses]


@pytest.fixture(scope="module")
def run(make_run, task_folder, tmp_path_factory):
    """Runs a stage in a folder; returns its exit status."""
    policy = tmp_path_factory.mktemp("policy") / "sft"
    make_run(policy)
    sampling = SamplingConfig(max_new_tokens=6)
    shared = {
        "model": ModelSource(path=str(policy)),
        "mesh": MeshConfig(1, 1, 1),
        "optimizer": OptimizerConfig(lr=3e-2),
        "checkpoint": CheckpointConfig(every=2),
        "evaluation": JudgedEvaluationConfig(every=2, samples=2, judge="task:safety", sampling=sampling),
        "logging": LoggingConfig(every=1, tensorboard=False, progress=False),
        "num_steps": 5,
    }
    pairs = DataConfig(
        path=str(task_folder / "pairs.jsonl"), max_length=128, batch_size=4, max_records=60, max_eval_records=12
    )
    prompts = DataConfig(path="task:safety", max_length=64, batch_size=8, max_eval_records=16)
    reward = RewardConfig(kind="scalar", function=f"{__name__}:variety", model=None, calibration_responses=8)

    def run(stage, folder):
        if stage == "dpo":
            return dpo.run(DPO(run_dir=str(folder), data=pairs, **shared))
        return ppo.run(
            PPO(run_dir=str(folder), data=prompts, reward=reward, rollout=RolloutConfig(sampling=sampling), **shared)
        )

    with pytest.MonkeyPatch.context() as patch:
        for module in STAGES.values():  # one device compiles sooner than all
            patch.setattr(module, "build_mesh", lambda given: build_mesh(given, jax.devices()[:1]))
        yield run


@pytest.fixture
def stop_at(monkeypatch):
    """Stops what runs at its so many-th look between two batches of an evaluation; returns how often it looked."""

    def stop_at(number):
        looks = []

        def check(self):
            looks.append(self)
            if len(looks) == number:
                self.requested = True
                raise StoppedError

        monkeypatch.setattr(StopRequest, "check", check)
        return looks

    return stop_at


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_cut_short_is_made_on_resume(stage, run, stop_at, tmp_path):
    looks = stop_at(None)
    assert run(stage, tmp_path / "unbroken") == 0
    number_in_all = len(looks)
    for number in (number_in_all // 2, number_in_all):  # at step 2, and at the last
        folder = tmp_path / f"stopped{number}"
        stop_at(number)
        assert run(stage, folder) == EXIT_PREEMPTED
        assert not (folder / "evaluation.json").exists()
        if stage == "ppo":  # as if the next launch had been killed among its samples
            last = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
            append_row(folder / "samples.jsonl", {"step": last, "prompt": "a", "response": "b"})
        stop_at(None)
        assert run(stage, folder) == 0
        assert differences(folder, tmp_path / "unbroken") == []


def evaluated(tmp_path, *, loss):
    """Whether an evaluation is pending after step 4, which has a checkpoint; and the loss that belongs to it then."""
    folder = open_run(str(tmp_path / "run"), {"seed": 0})
    checkpoints = Checkpoints(folder.checkpoints, CheckpointConfig(every=2))
    checkpoints.save(4, {"params": {"x": jax.numpy.zeros(2)}}, {})
    checkpoints.wait()
    append_row(folder.metrics, {"step": 4, "loss": 1.0})
    if loss is not None:
        append_row(folder.metrics, {"step": 4, "eval_loss": loss})
    pending = [is_evaluation_pending(folder, checkpoints, *at, lambda row: row.get("eval_loss")) for at in AT]
    return pending, checkpoints.progress(4)["loss"]


AT = [(4, 9, 2), (4, 9, 3), (4, 4, 3), (0, 9, 2)]  # step, last step, steps between evaluations


def test_an_evaluation_is_pending_where_its_row_is_not_there(tmp_path):
    assert evaluated(tmp_path, loss=None) == ([True, False, True, False], None)


def test_a_checkpoint_saved_before_its_row_gets_its_loss(tmp_path):
    """A kill between the row and the loss."""
    assert evaluated(tmp_path, loss=0.1 + 0.2) == ([False] * 4, 0.1 + 0.2)


def test_warnings_of_a_continued_run_know_the_steps_before(tmp_path, capsys):
    from jaxrm.runtime.metrics import MetricsWriter
    from jaxrm.runtime.progress import Progress
    from jaxrm.stages.ppo.report import PPOReporter

    step = {"reward": 0.0, "kl": 0.1, "kl_error": 0.1, "value_loss": 1.0}
    step |= {"ended": 1.0, "end_tag": 1.0, "response_length": 3.0}
    with Progress("ppo", 9) as progress:
        writer = MetricsWriter(None, None, None)
        options = {"every": 1, "num_steps": 9, "learning_rate": lambda _: 0.0}
        reporter = PPOReporter(writer, progress, **options, seen=[step | {"entropy": 3.0, "step": 1}])
        reporter.step(2, step | {"entropy": 0.1, "tokens_per_second": 1.0})
    assert "the entropy fell from 3 to 0.1" in capsys.readouterr().err
