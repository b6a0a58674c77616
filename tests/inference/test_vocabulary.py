"""Which ids a model may draw, and which of them end a response: of published weights and of runs alike."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError
from jaxrm.inference import weights
from jaxrm.inference.load import load_policy, load_reward_model
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.hub import export_model
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import SFT
from jaxrm.stages.stage import open_stage

PROMPTS = ["how do i repair a lamp?", "how do i steal a lamp?"]


@pytest.fixture(scope="module")
def mesh():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def tokenizer(task_folder):
    return load_tokenizer(str(task_folder / "tokenizer"))


@pytest.fixture(scope="module")
def published(small, tokenizer, tmp_path_factory):
    """Weights of 512 rows with a tokenizer of fewer tokens, whose makers end responses with three ids."""
    folder = tmp_path_factory.mktemp("published") / "model"
    _, shapes, _ = build.abstract_decoder(small, ModelSource())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    export_model(folder, params, small, tokenizer=tokenizer)
    generation = {"eos_token_id": [tokenizer.eos_token_id, 20, 21]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_a_published_model_draws_tokens_alone(published, tokenizer, mesh):
    policy = load_policy(str(published), mesh=mesh)
    assert policy.model.config.drawable == ((0, len(tokenizer)),) and len(tokenizer) < 512
    responses = policy.generate(PROMPTS * 8, max_new_tokens=24, temperature=5.0)
    ids = np.concatenate([response.token_ids for response in responses])
    assert len(ids) > 50 and ids.max() < len(tokenizer)


def test_every_listed_id_ends_a_response(published, tokenizer, mesh):
    policy = load_policy(str(published), mesh=mesh)
    ends = policy.model.end_ids(policy.tokenizer, policy.template)
    assert ends == tuple(sorted({tokenizer.eos_token_id, 20, 21}))
    responses = policy.generate(PROMPTS * 32, max_new_tokens=64, temperature=5.0)
    for response in responses:
        inside = [token in ends for token in response.token_ids]
        assert not any(inside[:-1])
        assert response.ended == inside[-1]
    assert {int(response.token_ids[-1]) for response in responses} >= set(ends)


def test_a_row_of_training_ends_as_the_template_says(published, tokenizer, mesh):
    from jaxrm.data import templates

    policy = load_policy(str(published), mesh=mesh)
    assert templates.end_ids(policy.tokenizer, policy.template) == {tokenizer.eos_token_id}


def test_a_stage_has_the_ids_of_its_weights(published, tokenizer, mesh, task_folder, tmp_path):
    data = DataConfig(path=str(task_folder / "train.jsonl"), max_length=64, batch_size=8)
    config = SFT(run_dir=str(tmp_path / "run"), model=ModelSource(path=str(published)), data=data)
    with open_stage(config, mesh, records="demonstrations") as stage:
        assert stage.end_ids == tuple(sorted({tokenizer.eos_token_id, 20, 21}))
        assert stage.model.config.drawable == ((0, len(tokenizer)),)


def test_a_run_keeps_the_ids_that_end_a_response(make_run, small, tokenizer, mesh, tmp_path):
    make_run(tmp_path / "run", config=dataclasses.replace(small, end_ids=(20, 21)))
    policy = load_policy(str(tmp_path / "run"), mesh=mesh)
    assert policy.model.end_ids(policy.tokenizer, policy.template) == tuple(sorted({tokenizer.eos_token_id, 20, 21}))
    assert policy.model.config.drawable == ((0, len(tokenizer)),)
    assert weights.read_shape(ModelSource(path=str(tmp_path / "run"))).end_ids == (20, 21)


@pytest.mark.parametrize("algorithm", ["seq2seq_rm", "scalar_rm"])
def test_a_reward_model_has_them_too(make_run, small, tokenizer, mesh, tmp_path, algorithm):
    make_run(tmp_path / "run", algorithm, config=dataclasses.replace(small, end_ids=(20,)))
    model = load_reward_model(str(tmp_path / "run"), mesh=mesh)
    assert model.end_ids == tuple(sorted({tokenizer.eos_token_id, 20}))
    assert model.model.config.drawable == ((0, len(tokenizer)),)


def test_a_run_of_an_earlier_version_never_draws_them_either(make_run, tokenizer, mesh, tmp_path):
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "model.json"
    shape = json.loads(file.read_text())
    del shape["drawable"], shape["end_ids"]
    file.write_text(json.dumps(shape))
    assert load_policy(str(tmp_path / "run"), mesh=mesh).model.config.drawable == ((0, len(tokenizer)),)


def test_padding_without_a_row_is_read_as_another_id(published, small, tokenizer, mesh, tmp_path):
    """Padding is never attended to: a tokenizer may have a token for it that the model has no row for."""
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.add_tokens([f"<reserved{i}>" for i in range(512 - len(tokenizer))], special_tokens=True)
    padded.add_special_tokens({"pad_token": "<new pad>"})
    assert padded.pad_token_id == 512
    padded.save_pretrained(str(tmp_path))
    policy = load_policy(str(published), mesh=mesh, tokenizer=str(tmp_path))
    assert policy.model.config.drawable == ()
    assert all(len(response.token_ids) for response in policy.generate(PROMPTS, max_new_tokens=4, seed=1))
    padded.add_tokens(["typed"])
    padded.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"has 'typed' with id 513, but the model's vocabulary holds 512 tokens"):
        load_policy(str(published), mesh=mesh, tokenizer=str(tmp_path))


def test_a_missing_template_is_refused_before_weights_are_read(published, tokenizer, mesh, tmp_path, monkeypatch):
    """Those of a GGUF file take minutes."""
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(str(tmp_path))
    monkeypatch.setattr(build, "init_params", lambda *_: pytest.fail("weights were read"))
    for load in (load_policy, load_reward_model):
        with pytest.raises(UserError, match=r"has no chat template; name one of .*, e.g. template=hh"):
            load(str(published), mesh=mesh, tokenizer=str(tmp_path))
