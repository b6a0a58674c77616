"""Runs with adapters and the bases that they stand on: found, moved, changed, mistaken for others.

The runs are made in a moment; `test_adapters_in_training.py` trains some.
"""

import hashlib
import json
import shutil
import weakref

import jax
import numpy as np
import pytest

from jaxrm.algorithms.ppo_config import CriticConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.evaluation.config import EvaluationConfig, JudgedEvaluationConfig
from jaxrm.inference import base as bases
from jaxrm.inference import parameters
from jaxrm.inference.load import load_policy, load_reward_model
from jaxrm.inference.run_checkpoint import find_checkpoint
from jaxrm.inference.sharded_model import shard_model
from jaxrm.models import lora
from jaxrm.models.build import ModelSource
from jaxrm.models.hub import export_model
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO, SFT
from jaxrm.stages import stage
from jaxrm.stages.ppo import run as ppo
from jaxrm.stages.sft import run as run_sft

LORA = LoRAConfig(rank=2)
DATA = DataConfig(path="task:safety", max_length=64, batch_size=8, max_records=40, max_eval_records=8)


@pytest.fixture(scope="module")
def mesh():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def made(make_run, tmp_path_factory):
    """A base, and runs that stand on it; nobody changes it."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder / "base")
    for algorithm in ("sft", "seq2seq_rm", "scalar_rm"):
        make_run(folder / algorithm, algorithm, base=folder / "base", lora=LORA)
    make_run(folder / "other_base", seed=1)
    make_run(folder / "on_other_base", base=folder / "other_base", lora=LORA)
    return folder


@pytest.fixture
def place(made, make_run, tmp_path):
    """A base and adapters on it, to be spoiled."""
    make_run(tmp_path / "base")
    make_run(tmp_path / "adapters", base=tmp_path / "base", lora=LORA, data=DATA)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    """Bases of other tests, which have the same content, are not remembered."""
    monkeypatch.setattr(bases, "_seen", {})


def same(mine, theirs):
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def refused(path, **more):
    with pytest.raises(UserError) as caught:
        load_policy(str(path), **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- where the base is


def test_an_adapter_run_opens_as_its_base_with_its_adapters(made, mesh):
    policy, base = load_policy(str(made / "sft"), mesh=mesh), load_policy(str(made / "base"), mesh=mesh)
    adapters, frozen = lora.split(policy.params)
    same(frozen, base.params)
    assert policy.model.lora == LORA
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapters)} == {"lora_a", "lora_b"}


def test_models_on_one_base_share_its_arrays(made, mesh):
    """Policy and both sorts of reward model; the scalar one has no language head."""
    policy = lora.split(load_policy(str(made / "sft"), mesh=mesh).params)[1]
    seq2seq = lora.split(load_reward_model(str(made / "seq2seq_rm"), mesh=mesh).params)[1]
    scalar = lora.split(load_reward_model(str(made / "scalar_rm"), mesh=mesh).params)[1]["decoder"]
    assert all(a is b for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(seq2seq), strict=True))
    trunk = {name: part for name, part in policy.items() if name != "head"}
    assert all(a is b for a, b in zip(jax.tree.leaves(trunk), jax.tree.leaves(scalar), strict=True))
    gone = weakref.ref(jax.tree.leaves(policy)[0])
    del policy, seq2seq, scalar, trunk
    assert gone() is None  # nobody has it any more
    load_policy(str(made / "sft"), mesh=mesh)  # so it is read again


def test_a_base_that_moved_is_given_beside_its_adapters(place, mesh):
    wanted = load_policy(str(place / "adapters"), mesh=mesh).params
    (place / "base").rename(place / "moved")
    message = refused(place / "adapters")
    assert message.startswith(f"{place / 'adapters'}, step 4 stands on the base {place / 'base'}/checkpoints/4, where ")
    assert message.endswith(f"there is none now; say where it is now, path=BASE adapter={place / 'adapters'}")
    same(load_policy(str(place / "moved"), adapter=str(place / "adapters"), mesh=mesh).params, wanted)


def test_a_stage_says_what_to_type_for_a_base_that_moved(place, mesh):
    (place / "base").rename(place / "moved")
    source = ModelSource(path=str(place / "adapters"))
    with pytest.raises(
        UserError, match=r"; say where it is now, --config.model.path=BASE --config.model.adapter=.*ers$"
    ):
        parameters.base_of(source, 0)
    pointed = ModelSource(path=str(place / "moved"), adapter=str(place / "adapters"))
    assert parameters.base_of(pointed, 0).path == str(place / "moved" / "checkpoints" / "4")
    model = shard_model(pointed, mesh, lora=LORA)
    loaded = load_policy(str(pointed.path), adapter=pointed.adapter, mesh=mesh).params
    same(parameters.init_params(model, jax.random.key(0), 0), loaded)


def test_a_base_that_was_shown_is_there_for_all_that_stand_on_it(place, make_run, mesh):
    """A reward model on the base of a policy that says where it is now."""
    make_run(place / "reward_model", "scalar_rm", base=place / "base", lora=LORA)
    (place / "base").rename(place / "moved")
    with pytest.raises(UserError, match="where there is none now"):
        load_reward_model(str(place / "reward_model"), mesh=mesh)
    parameters.base_of(ModelSource(path=str(place / "moved"), adapter=str(place / "adapters")), 0)
    assert load_reward_model(str(place / "reward_model"), mesh=mesh).model.lora == LORA


def test_other_adapters_are_merged_where_nothing_is_trained(made, make_run, tmp_path, mesh):
    """As those of a reference whose rank is not the policy's."""
    other = LoRAConfig(rank=3, alpha=2)
    make_run(tmp_path / "other", base=made / "base", lora=other)
    model = shard_model(ModelSource(path=str(tmp_path / "other")), mesh, lora=LORA)
    mine = lora.merge(parameters.init_params(model, jax.random.key(0), 0), LORA)
    theirs = lora.merge(load_policy(str(tmp_path / "other"), mesh=mesh).params, other)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("is_relative", [False, True])
def test_base_and_adapters_may_move_together(made, make_run, tmp_path, monkeypatch, mesh, is_relative):
    """As a pipeline's folder does; and another base at the old place does not count."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path.joinpath("runs").relative_to(tmp_path) if is_relative else tmp_path / "runs"
    make_run(folder / "base")
    make_run(folder / "adapters", base=folder / "base", lora=LORA)
    wanted = load_policy(str(folder / "adapters"), mesh=mesh).params
    folder.rename(tmp_path / "elsewhere")
    make_run(folder / "base", seed=1)
    same(load_policy(str(tmp_path / "elsewhere" / "adapters"), mesh=mesh).params, wanted)


def test_a_checkpoint_that_the_base_run_removed_is_named(place):
    shutil.rmtree(place / "base" / "checkpoints" / "4")
    assert "stands on the base" in (message := refused(place / "adapters"))
    assert f"{place / 'base'}/checkpoints/4, where there is none now; say where it is now" in message


# --- which base it is


def test_a_run_that_became_another_base_is_refused(place, make_run):
    shutil.rmtree(place / "base")
    make_run(place / "base", seed=1)
    message = refused(place / "adapters")
    assert f"stands on the base {place / 'base'}/checkpoints/4 (sha256 " in message
    assert "is now another (sha256 " in message and message.endswith(f"path=BASE adapter={place / 'adapters'}")


def test_another_base_beside_the_adapters_is_refused(made, place):
    message = refused(made / "other_base", adapter=str(place / "adapters"))
    assert message.endswith("give that one") and f"{made / 'other_base'} is now another" in message


@pytest.fixture
def published(make_run, small, tmp_path):
    """A small folder of published weights, and an SFT run with adapters on it."""
    params = make_run(tmp_path / "sft")[4]
    export_model(tmp_path / "weights", params, small)
    shutil.copytree(tmp_path / "sft" / "tokenizer", tmp_path / "weights", dirs_exist_ok=True)
    make_run(tmp_path / "adapters", base=tmp_path / "weights", lora=LORA)
    return tmp_path


def test_published_weights_are_a_base_like_a_run(published, mesh):
    frozen = lora.split(load_policy(str(published / "adapters"), mesh=mesh).params)[1]
    same(frozen, load_policy(str(published / "sft"), mesh=mesh).params)


def test_published_weights_that_changed_are_refused(published, make_run, small):
    params = make_run(published / "another", seed=1)[4]
    shutil.rmtree(published / "weights")
    export_model(published / "weights", params, small)
    message = refused(published / "adapters")
    assert f"{published / 'weights'} is now another (sha256 " in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "has adapters, but no base.json, which says what they stand on; give another run"),
        (lambda file: file.write_text("{"), "base.json is damaged"),
        (lambda file: file.write_text('{"path": 3}'), "base.json is damaged"),
        (lambda file: file.write_text("[]"), "base.json is damaged"),
    ],
    ids=["gone", "cut", "fields", "list"],
)
def test_a_lost_or_damaged_record_of_the_base_is_one_line(place, damage, words):
    damage(place / "adapters" / "base.json")
    assert words in refused(place / "adapters")


def test_a_whole_run_is_no_adapter(made):
    message = refused(made / "base", adapter=str(made / "other_base"))
    assert message.endswith(f"give it as path={made / 'other_base'} and no adapter")


# --- what a stage refuses


def sft(run_dir, path, **fields):
    return SFT(
        **{
            "run_dir": str(run_dir),
            "num_steps": 1,
            "model": ModelSource(path=str(path)),
            "data": DATA,
            "lora": LORA,
            "evaluation": EvaluationConfig(samples=0, sampling=SamplingConfig(max_new_tokens=8)),
            "logging": LoggingConfig(progress=False, tensorboard=False),
        }
        | fields
    )


def refused_by(run, config):
    with pytest.raises(UserError) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("other", "flags"),
    [
        (LoRAConfig(rank=3), "--config.lora.rank=2, or merge"),
        (LoRAConfig(rank=2, alpha=4), "--config.lora.rank=2, or merge"),
        (LoRAConfig(rank=2, targets=("q_proj",)), "--config.lora.rank=2, or merge"),
    ],
    ids=["rank", "alpha", "targets"],
)
def test_other_adapters_than_those_of_the_run_are_refused(made, tmp_path, other, flags):
    message = refused_by(run_sft, sft(tmp_path / "new", made / "sft", lora=other))
    assert message.startswith(
        f"config.lora is {other}, but {made / 'sft'}, step 4 has LoRA of rank 2, alpha 16, on all"
    )
    assert flags in message and f"--checkpoint={made / 'sft'} --merge" in message
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_only_with_the_base_that_it_began_with(place, make_run):
    shutil.rmtree(place / "base")
    make_run(place / "base", seed=1)
    message = refused_by(run_sft, find_checkpoint(str(place / "adapters")).config)
    assert message.startswith(f"{place / 'adapters'} was begun on the base {place / 'base'}/checkpoints/4 (sha256 ")
    assert "config.model.path now gives" in message and message.endswith("--config.on_existing=restart")


class OpenedError(Exception):
    """The run's folder would have been opened: nothing is wrong with the config."""


@pytest.fixture
def ppo_with(made, tmp_path, monkeypatch):
    """Runs PPO on the adapters up to where it opens its folder."""

    def opened(*_, **__):
        raise OpenedError

    monkeypatch.setattr(stage, "open_run", opened)

    def run(**fields):
        sampling = SamplingConfig(max_new_tokens=24)
        ppo.run(
            PPO(
                **{
                    "run_dir": str(tmp_path / "ppo"),
                    "num_steps": 1,
                    "lora": LORA,
                    "model": ModelSource(path=str(made / "sft")),
                    "reward": RewardConfig(kind="scalar", model=str(made / "scalar_rm")),
                    "data": DataConfig(path="task:safety", max_length=64, batch_size=8, max_records=60),
                    "rollout": RolloutConfig(sampling=sampling),
                    "evaluation": JudgedEvaluationConfig(sampling=sampling),
                    "mesh": MeshConfig(data=4, fsdp=2),
                    "logging": LoggingConfig(progress=False, tensorboard=False),
                }
                | fields
            )
        )

    return run


def test_four_roles_on_one_base_come_as_far_as_their_folder(ppo_with):
    with pytest.raises(OpenedError):
        ppo_with()


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({"critic": CriticConfig(path="on_other_base")}, "LoRA of rank 2, alpha 16, on all projections, on the base"),
        ({"critic": CriticConfig(path="base")}, "is 'base', a run with all of its weights trained"),
        (
            {"model": ModelSource(path="base"), "lora": LoRAConfig(rank=3)},
            "scalar_rm, step 4, a run with LoRA of rank 2",
        ),
    ],
    ids=["base", "whole", "rank"],
)
def test_a_critic_that_cannot_share_the_base_is_refused(made, ppo_with, monkeypatch, fields, has):
    monkeypatch.chdir(made)
    message = refused_by(lambda more: ppo_with(**more), fields)
    assert message.startswith("config.critic.path is ") and has in message
    assert ", on the policy's base; e.g. the policy, --config.critic.path=" in message


def test_an_unknown_projection_is_answered_with_the_list():
    with pytest.raises(UserError) as caught:
        LoRAConfig(targets=("q_prj",))
    assert "'q_prj' is none; they are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in str(
        caught.value
    )


def test_the_record_of_a_base_has_its_place_and_its_content(made):
    record = json.loads((made / "sft" / "base.json").read_text())
    step, digest = made / "base" / "checkpoints" / "4", hashlib.sha256()
    for path in (made / "base" / "model.json", *sorted(p for p in (step / "params").rglob("*") if p.is_file())):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    assert record["path"] == str(step) and record["sha256"] == digest.hexdigest()
