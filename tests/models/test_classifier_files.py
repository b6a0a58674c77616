"""Sequence classifiers of one label as files: which heads are read, and what is refused in one line."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.classifiers import classifier_fields, write_classifier

from jaxrm.errors import UserError
from jaxrm.models import hub
from jaxrm.models.build import ModelSource, abstract_scalar_model
from jaxrm.models.hub import check_classifier, is_classifier, load_classifier, read_classifier_config


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def head_of(folder, name="score"):
    return load_file(folder / "model.safetensors")[f"{name}.weight"]


def load(folder, **options):
    return load_classifier(str(folder), shardings=None, **options)


@pytest.mark.parametrize(
    ("head", "architecture"),
    [
        ("score", "LlamaForSequenceClassification"),
        ("score", "LlamaForCausalLM"),
        ("v_head", "LlamaForCausalLM"),
        ("v_head.summary", "LlamaForCausalLM"),
        ("reward_head", "LlamaRewardModel"),
    ],
)
def test_each_published_head_is_read(head, architecture, tmp_path):
    folder = write_classifier(tmp_path / "m", head=head, architectures=[architecture])
    assert is_classifier(str(folder))
    loaded = load(folder)
    np.testing.assert_array_equal(loaded.params["scalar_head"]["kernel"], head_of(folder, head)[0])
    assert (loaded.bias, loaded.pad_id) == (0.0, 350 if head == "score" else None)


def test_a_value_head_may_have_a_bias(tmp_path):
    bias = {"v_head.summary.bias": np.array([0.75], np.float32)}
    folder = write_classifier(tmp_path / "m", head="v_head.summary", architectures=["LlamaForCausalLM"], extra=bias)
    assert load(folder).bias == 0.75


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_head_beside_is_left_out(tied, tmp_path):
    """Also one that differs from the embeddings that config.json ties it to, which a policy would need."""
    head = {"lm_head.weight": np.ones((352, 16), np.float32)}
    folder = write_classifier(tmp_path / "m", extra=head, tie_word_embeddings=tied)
    assert set(load(folder).params) == {"decoder", "scalar_head"}
    assert "head" not in load(folder).params["decoder"]


def test_bfloat16_weights_in_several_files_are_read(tmp_path):
    import ml_dtypes

    folder = write_classifier(tmp_path / "m", "qwen2")
    whole = load(folder)
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(folder / "model.safetensors").items()}
    parts = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    (folder / "model.safetensors").unlink()
    index = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = load(folder, dtype=jnp.bfloat16).params
    assert loaded["decoder"]["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert loaded["decoder"]["final_norm"]["scale"].dtype == loaded["scalar_head"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(loaded["scalar_head"]["kernel"], whole.params["scalar_head"]["kernel"], rtol=0.01)


def test_a_classifier_may_be_stored_in_codes(tmp_path):
    """Shapes are those of its graph."""
    folder = write_classifier(tmp_path / "m", hidden_size=64, head_dim=16, intermediate_size=64)
    _, shapes, _ = abstract_scalar_model(
        read_classifier_config(str(folder)), ModelSource(preset="given", quantize="int8")
    )
    params = load(folder, quantize="int8").params
    expected = shapes["decoder"]["layers"]["mlp"]["up"]
    assert {name: x.shape for name, x in params["decoder"]["layers"]["mlp"]["up"].items()} == {
        name: x.shape for name, x in expected.items()
    }


@pytest.mark.parametrize(
    ("family", "fields", "pad_id"),
    [
        ("llama", {"pad_token_id": "absent"}, None),
        ("gemma", {"pad_token_id": "absent"}, 0),
        ("gemma", {"pad_token_id": None}, None),
        ("qwen2", {"pad_token_id": 5}, 5),
    ],
)
def test_padding_is_that_of_the_family_where_unsaid(family, fields, pad_id, tmp_path):
    assert load(write_classifier(tmp_path / "m", family, **fields)).pad_id == pad_id


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"id2label": {"0": "BAD", "1": "GOOD"}}, "has 2 labels (BAD, GOOD)"),
        ({"num_labels": 5}, "has 5 labels"),
        ({"problem_type": "single_label_classification"}, "problem_type is 'single_label_classification'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures is 'LlamaForTokenClassification'"),
        ({"architectures": ["LlamaForRewardModelWithGating"]}, "code of a model's makers is never run"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"quantization_config": {}}, "quantization_config is set"),
    ],
)
def test_a_config_of_something_else_is_refused(fields, words, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    fields = classifier_fields("llama", **fields)
    (folder / "config.json").write_text(json.dumps(fields))
    assert words in refusal(read_classifier_config, str(folder))


@pytest.mark.parametrize(
    ("head", "extra", "fields", "words"),
    [
        ("score", {"score.weight": None}, {}, "lacks score.weight, the head of LlamaForSequenceClassification"),
        ("v_head", None, {}, "transformers would draw by chance, though it holds v_head.weight"),
        (
            "score",
            {"score.weight": None, "value_head.weight": np.ones((1, 16), np.float32)},
            {"architectures": ["LlamaForCausalLM"]},
            "holds no head of a reward model, though it holds value_head.weight",
        ),
        ("score", {"score.weight": np.ones((2, 16), np.float32)}, {"id2label": "absent"}, "score.weight has 2 labels"),
        ("score", {"score.weight": np.ones((1, 8), np.float32)}, {}, "score.weight has shape [1, 8]"),
        ("score", {"score.bias": np.ones(1, np.float32)}, {}, "holds 1 tensor: score.bias"),
        ("score", {"v_head.weight": np.ones((1, 16), np.float32)}, {}, "holds the heads score and v_head"),
        ("score", {"model.norm.weight": None}, {}, "lacks 1 tensor: model.norm.weight"),
        (
            "v_head",
            {"v_head.bias": np.ones(2, np.float32)},
            {"architectures": ["LlamaForCausalLM"]},
            "v_head.bias has shape [2]",
        ),
    ],
)
def test_weights_without_one_known_head_are_refused(head, extra, fields, words, tmp_path):
    folder = write_classifier(tmp_path / "m", head=head, extra=extra, **fields)
    assert words in refusal(check_classifier, str(folder))


def test_pickles_and_gguf_files_are_refused(tmp_path):
    folder = write_classifier(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "a pickle, which can run code" in refusal(check_classifier, str(folder))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert not is_classifier(str(file))
    assert "which holds a language model" in refusal(read_classifier_config, str(file))


def test_a_language_model_is_no_classifier(tmp_path):
    folder = write_classifier(
        tmp_path / "m",
        architectures=["LlamaForCausalLM"],
        extra={"score.weight": None, "lm_head.weight": np.ones((352, 16), np.float32)},
    )
    assert not is_classifier(str(folder))
    assert hub.read_model_config(str(folder)).vocab_size == 352
