"""Training with adapters: what its checkpoints hold, what goes on from them, and PPO whose four roles share a base."""

import contextlib
import functools
import gc
import json

import jax
import numpy as np
import pytest

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import EvaluationConfig, JudgedEvaluationConfig
from jaxrm.inference.load import load_policy
from jaxrm.inference.run_checkpoint import find_checkpoint
from jaxrm.models import lora
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig, read_rows
from jaxrm.runtime.preemption import EXIT_PREEMPTED, StopRequest
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO, SFT
from jaxrm.stages import sft
from jaxrm.stages.ppo import run as ppo
from jaxrm.stages.ppo import train as ppo_train
from jaxrm.stages.supervised import train as supervised

pytestmark = pytest.mark.slow

LORA, SMALL_LORA = LoRAConfig(rank=2), LoRAConfig(rank=1, targets=("q_proj", "v_proj"))
STEPS = 4
QUIET = LoggingConfig(every=1, tensorboard=False, progress=False)


@pytest.fixture(scope="module")
def base(make_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    make_run(folder)
    return folder


def run_sft(folder, base, mesh=None, **fields):
    """Runs SFT with adapters; on one device, which compiles sooner, unless ``mesh`` says more."""
    config = {
        "run_dir": str(folder),
        "num_steps": STEPS,
        "model": ModelSource(path=str(base)),
        "data": DataConfig(path="task:safety", max_length=64, batch_size=8, max_records=80, max_eval_records=8),
        "lora": LORA,
        "optimizer": OptimizerConfig(lr=1e-2),
        "mesh": mesh or MeshConfig(1, 1, 1),
        "checkpoint": CheckpointConfig(every=2),
        "evaluation": EvaluationConfig(every=2, samples=0),
        "logging": QUIET,
    }
    devices = jax.devices() if mesh else jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "build_mesh", functools.partial(build_mesh, devices=devices))
        return sft.run(SFT(**config | fields))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Folder of a run with adapters that nothing interrupted."""
    folder = tmp_path_factory.mktemp("trained") / "sft"
    assert run_sft(folder, base) == 0
    return folder


def eval_losses(folder):
    return [row["eval_loss"] for row in read_rows(folder / "metrics.jsonl") if "eval_loss" in row]


def arrays_of(folder):
    """Every array of a checkpoint's parameters as it lies on disk, by its path."""
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(folder / "checkpoints" / str(STEPS) / "params")
    return {jax.tree_util.keystr(path): array for path, array in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_checkpoint_holds_the_adapters_and_no_weights(trained, base, small):
    arrays = arrays_of(trained)
    assert len(arrays) == 14 and {name.split("'")[-2] for name in arrays} == {"lora_a", "lora_b"}
    d, f, heads, kv = small.hidden_size, small.intermediate_size, small.num_heads, small.num_kv_heads
    widths = [d + heads * small.head_dim] * 2 + [d + kv * small.head_dim] * 2 + [d + f] * 3
    assert sum(array.nbytes for array in arrays.values()) == 4 * small.num_layers * LORA.rank * sum(widths)
    record = json.loads((trained / "base.json").read_text())
    assert record["path"] == str(base / "checkpoints" / "4") and len(record["sha256"]) == 64


def test_adapters_learn(trained):
    first, *_, last = eval_losses(trained)
    assert last < first


@pytest.mark.parametrize("fields", [{}, {"lora": LoRAConfig()}], ids=["trained on", "merged"])
def test_a_run_goes_on_from_adapters_where_they_ended(trained, base, tmp_path, fields):
    """With the same adapters those are trained on; without any they are merged, and all weights are trained."""
    assert run_sft(tmp_path / "more", trained, **fields) == 0
    np.testing.assert_allclose(eval_losses(tmp_path / "more")[0], eval_losses(trained)[-1], rtol=1e-5)
    assert (tmp_path / "more" / "base.json").exists() == (not fields)
    if not fields:
        assert (tmp_path / "more" / "base.json").read_text() == (trained / "base.json").read_text()


class AfterTheFirstStep(StopRequest):
    def __init__(self):
        super().__init__()
        self.requested = True

    def checked(self, items):  # the evaluation before it is made
        return iter(items)


def test_a_stopped_run_continues_on_another_mesh(trained, base, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "catch_signals", lambda **_: contextlib.nullcontext(AfterTheFirstStep()))
        assert run_sft(tmp_path / "sft", base, MeshConfig(data=4, fsdp=2)) == EXIT_PREEMPTED
    assert run_sft(tmp_path / "sft", base, MeshConfig(data=1, fsdp=4, tensor=2)) == 0
    np.testing.assert_allclose(eval_losses(tmp_path / "sft"), eval_losses(trained), rtol=1e-5)
    mine, theirs = (lora.split(load_policy(str(folder)).params)[0] for folder in (tmp_path / "sft", trained))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- one base, four roles


@pytest.fixture(scope="module")
def roles(make_run, tmp_path_factory):
    """Adapters of a policy and of both sorts of reward model, on a base that is large beside all else in memory."""
    folder, shape = tmp_path_factory.mktemp("roles"), PRESETS["tiny"]
    make_run(folder / "base", config=shape)
    for algorithm in ("sft", "seq2seq_rm", "scalar_rm"):
        make_run(folder / algorithm, algorithm, base=folder / "base", lora=SMALL_LORA, config=shape)
    return folder


def bytes_of(arrays):
    """Bytes of arrays on all devices, each buffer counted once, since copies on fake devices may share theirs."""
    sizes = {}
    for shard in [shard for array in arrays if not array.is_deleted() for shard in array.addressable_shards]:
        # An array may share its buffer with one that was donated, and does not know that it is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            sizes[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(sizes.values())


def bytes_in_memory():
    gc.collect()
    return bytes_of(jax.live_arrays())


@pytest.mark.parametrize("is_shared", [False, True], ids=["critic", "shared trunk"])
def test_four_roles_of_ppo_have_one_base_in_memory(roles, tmp_path, monkeypatch, is_shared):
    """Policy, reference, critic and reward model on eight devices, counted after every step and evaluation."""
    counted, runs, before = [], [], bytes_in_memory()
    fit = ppo_train.fit

    def watched_fit(run, *args, **more):
        runs.append(run)
        step = run.reporter.step
        run.reporter.step = lambda *row: counted.append(bytes_in_memory()) or step(*row)
        return fit(run, *args, **more)

    monkeypatch.setattr(ppo_train, "fit", watched_fit)
    sampling = SamplingConfig(max_new_tokens=8)
    config = PPO(
        run_dir=str(tmp_path / "ppo"),
        num_steps=2,
        lora=SMALL_LORA,
        model=ModelSource(path=str(roles / "sft")),
        reward=RewardConfig(kind="literal", model=str(roles / "seq2seq_rm"), calibration_responses=8),
        ppo=PPOConfig(shared_trunk=is_shared),
        critic=CriticConfig(path=None if is_shared else str(roles / "scalar_rm")),
        data=DataConfig(path="task:safety", max_length=36, batch_size=8, max_eval_records=8),
        rollout=RolloutConfig(sampling=sampling),
        optimizer=OptimizerConfig(lr=1e-2),
        evaluation=JudgedEvaluationConfig(samples=0, sampling=sampling),
        mesh=MeshConfig(data=2, fsdp=4),
        logging=QUIET,
    )
    assert ppo.run(config) == 0

    # Of the base every device has its share, of what is not split a copy. Beside it are the adapters of four roles, the
    # moments of two, and the rows of a step, all of them small.
    once = bytes_of(jax.tree.leaves(runs[0].base))
    assert len(counted) == 2
    assert once <= max(counted) - before < 1.3 * once
    # The reward model has the very arrays of the policy's base.
    scored = lora.split(runs[0].programs.scoring.model.params)[1]
    assert all(a is b for a, b in zip(jax.tree.leaves(scored), jax.tree.leaves(runs[0].base), strict=True))
    # The reference is what the policy began as.
    began = lora.split(load_policy(str(roles / "sft"), mesh=runs[0].learner.mesh).params)[0]
    for mine, theirs in zip(jax.tree.leaves(runs[0].reference_params), jax.tree.leaves(began), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    rows = read_rows(tmp_path / "ppo" / "metrics.jsonl")
    first, last = (row["eval_kl"] for row in rows if "eval_kl" in row)
    assert abs(first) < 1e-5 < 1e-3 < last
    assert find_checkpoint(str(tmp_path / "ppo")).lora == SMALL_LORA
