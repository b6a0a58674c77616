"""Which checkpoint a path names, what is refused, and what a model starts from."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrm.errors import UserError
from jaxrm.inference import run_checkpoint, sharded_model, weights
from jaxrm.inference.load import load_policy, load_reward_model
from jaxrm.inference.run_checkpoint import find_checkpoint
from jaxrm.models.build import ModelSource
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import LANGUAGE_MODELS, REWARD_MODELS

LOSSES = ((2, 3.0), (4, 1.0), (6, None), (8, 2.0))


@pytest.fixture(scope="module")
def mesh():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory):
    """One run of each kind that has a model; returns their folder and what was saved."""
    folder = tmp_path_factory.mktemp("runs")
    saved = {
        "sft": make_run(folder / "sft", "sft", LOSSES),
        "seq2seq_rm": make_run(folder / "seq2seq_rm", "seq2seq_rm"),
        "scalar_rm": make_run(folder / "scalar_rm", "scalar_rm"),
    }
    make_run(folder / "unsaved", "sft", ())
    return folder, saved


def same(mine, theirs):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), b)


@pytest.mark.parametrize(
    ("suffix", "step"),
    [
        ("", 8),
        ("/", 8),
        ("/checkpoints/latest", 8),
        ("/checkpoints/best", 4),
        ("/checkpoints/2", 2),
        ("/checkpoints/6", 6),
    ],
)
def test_a_path_names_the_latest_the_best_or_a_step(runs, mesh, suffix, step):
    folder, saved = runs
    path = f"{folder / 'sft'}{suffix}"
    found = find_checkpoint(path)
    assert found.step == step and found.name == f"{folder / 'sft'}, step {step}"
    same(load_policy(path, mesh=mesh).params, saved["sft"][step])


def test_a_run_may_lie_in_a_folder_called_checkpoints(make_run, tmp_path):
    make_run(tmp_path / "checkpoints" / "mine", losses=LOSSES)
    path = str(tmp_path / "checkpoints" / "mine")
    assert run_checkpoint.is_run(path) and find_checkpoint(path).step == 8
    assert run_checkpoint.is_run(f"{path}/checkpoints/best") and find_checkpoint(f"{path}/checkpoints/best").step == 4


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "nowhere",
            r"has no run.json; give the folder of a run, e.g. --config.path=",
        ),
        ("sft/checkpoints/5", r"sft/checkpoints/5', but the checkpoints of that run are 2, 4, 6, 8, and best"),
        ("sft/checkpoints/worst", r"but the checkpoints of that run are 2, 4, 6, 8, and best"),
        ("unsaved", r"has no checkpoint yet"),
        ("unsaved/checkpoints/best", r"has no checkpoint yet"),
    ],
)
def test_what_is_not_there_is_refused(runs, path, message):
    with pytest.raises(UserError, match=message):
        find_checkpoint(str(runs[0] / path))


@pytest.mark.parametrize(
    ("run", "algorithms", "wanted"),
    [
        ("scalar_rm", LANGUAGE_MODELS, "sft or ppo or dpo or seq2seq_rm"),
        ("sft", REWARD_MODELS, "seq2seq_rm or scalar_rm or dpo"),
        ("scalar_rm", ("seq2seq_rm",), "seq2seq_rm"),
    ],
)
def test_a_model_of_another_kind_is_refused(runs, run, algorithms, wanted):
    message = rf"^config.x is '.*{run}', a run of {run}; required a model of {wanted}; .* --config.x=runs/"
    with pytest.raises(UserError, match=message):
        find_checkpoint(str(runs[0] / run), "x", algorithms)


def test_each_opener_takes_its_own_kinds_of_model(runs, mesh):
    folder, saved = runs
    for run, is_seq2seq in (("seq2seq_rm", True), ("scalar_rm", False)):
        model = load_reward_model(str(folder / run), mesh=mesh)
        assert model.is_seq2seq is is_seq2seq
        same(model.params, saved[run][4])
    same(load_policy(str(folder / "seq2seq_rm"), mesh=mesh).params, saved["seq2seq_rm"][4])
    with pytest.raises(UserError, match="a run of sft"):
        load_reward_model(str(folder / "sft"), mesh=mesh)
    with pytest.raises(UserError, match="a run of scalar_rm"):
        load_policy(str(folder / "scalar_rm"), mesh=mesh)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", '{"launches": []}'),
        ("run.json", "null"),
        ("model.json", "{"),
        ("model.json", "null"),
    ],
)
def test_a_damaged_run_is_one_line(make_run, tmp_path, file, damage):
    make_run(tmp_path / "run")
    (tmp_path / "run" / file).write_text(damage)
    with pytest.raises(UserError, match=rf"^config.path is '.*run', whose {file} is damaged"):
        find_checkpoint(str(tmp_path / "run"))


def test_a_run_without_its_model_or_tokenizer_says_what_it_lacks(make_run, tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "model.json").unlink()
    (tmp_path / "run" / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"has no model.json and no tokenizer; give the folder of a run"):
        find_checkpoint(str(tmp_path / "run"))


def test_a_config_path_says_whether_it_is_a_run(runs, tmp_path):
    folder, _ = runs
    assert run_checkpoint.is_run(str(folder / "sft")) and run_checkpoint.is_run(
        str(folder / "sft" / "checkpoints" / "best")
    )
    (tmp_path / "config.json").write_text("{}")
    for path in (None, str(tmp_path), str(tmp_path / "nowhere"), "org/name"):
        assert not run_checkpoint.is_run(path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_starts_from_the_parameters_of_a_run_on_any_mesh(make_run, small, tmp_path, mesh, tied):
    shape = dataclasses.replace(small, tie_embeddings=tied)
    saved = make_run(tmp_path / "run", losses=LOSSES, config=shape)
    source = ModelSource(path=str(tmp_path / "run" / "checkpoints" / "best"))
    assert weights.read_shape(source) == shape
    assert weights.tokenizer_of(source) == str(tmp_path / "run" / "tokenizer")
    weights.check_weights(shape, source)
    for devices in (mesh, build_mesh(MeshConfig(2, 2, 2))):
        model = sharded_model.shard_model(source, devices)
        params = weights.load_or_init_params(model.config, source, jax.random.key(0), model.shapes, model.shardings)
        assert ("head" in params) is not tied
        same(params, saved[4])
        for array, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(model.shardings), strict=True):
            assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_a_scalar_reward_model_is_no_policy_to_start_from(runs):
    source = ModelSource(path=str(runs[0] / "scalar_rm"))
    with pytest.raises(UserError, match=r"^config.model.path is .* a run of scalar_rm; required a model of sft or"):
        weights.read_shape(source)


def test_a_run_of_a_newer_config_names_the_field(make_run, tmp_path):
    make_run(tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    recorded["config"]["later"] = 3
    (tmp_path / "run" / "run.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="later"):
        find_checkpoint(str(tmp_path / "run"))


@pytest.fixture
def folder_of_weights(tmp_path):
    """Writes a published folder; returns its path."""

    def write(value, name="published"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file({"w": np.full(4, value, np.float32)}, folder / "model.safetensors")
        return str(folder)

    return write


def test_published_weights_are_known_by_their_bytes(folder_of_weights):
    """Not by the names and sizes of their files, which another export of the same model has too."""
    path = folder_of_weights(1.0)
    first = weights.identity_of(path)
    assert first.startswith(f"{path} (sha256 ")
    assert weights.identity_of(path) == first
    folder_of_weights(2.0)
    other = weights.identity_of(path)
    assert other != first and not weights.is_same_identity(first, other)
    moved = weights.identity_of(folder_of_weights(1.0, "moved"))
    assert moved != first and weights.is_same_identity(first, moved)
    assert weights.split_identity(first)[0] == path


def test_a_record_without_hashes_is_compared_by_its_paths(folder_of_weights):
    """As versions before wrote it."""
    path = folder_of_weights(1.0)
    now = f"prompts 12ab; {weights.identity_of(path)}; runs/rm, step 4, of 2026"
    assert weights.is_recorded_as(now, now)
    assert weights.is_recorded_as(f"prompts 12ab; {path}; runs/rm, step 4, of 2026", now)
    rewards = "my:score (file sha256 0123456789ab); my:other (file sha256 ba9876543210)"  # functions had none yet
    assert weights.is_recorded_as(f"{now}; my:score; my:other", f"{now}; {rewards}")
    assert not weights.is_recorded_as(f"{now}; my:score; my:another", f"{now}; {rewards}")
    assert not weights.is_recorded_as(f"{now}; my:score (file sha256 999999999999); my:other", f"{now}; {rewards}")
    assert not weights.is_recorded_as(f"prompts 12ab; {path}; runs/rm, step 8, of 2026", now)
    assert not weights.is_recorded_as(now.replace("sha256 ", "sha256 0")[:-1], now)
    assert weights.is_same_identity(path, weights.identity_of(path))
    assert not weights.is_same_identity(path, f"{path}, step 4, of 2026")


def test_an_adapter_is_known_by_its_bytes(folder_of_weights, tmp_path):
    source = ModelSource(path=folder_of_weights(1.0), adapter=str(tmp_path / "adapter"))
    seen = set()
    for value in (1.0, 2.0):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        save_file({"w": np.full(4, value, np.float32)}, tmp_path / "adapter" / "adapter_model.safetensors")
        seen.add(weights.identity_of_source(source))
    assert len(seen) == 2
