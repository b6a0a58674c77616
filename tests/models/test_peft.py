"""PEFT folders written and read back, and what of PEFT is refused; `test_peft_torch.py` compares with PEFT itself."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.adapters import (
    LLAMA,
    adapter_folder,
    change_config,
    change_tensors,
    our_logits,
    random_adapters,
    random_params,
)

from jaxrm.errors import UserError
from jaxrm.models import lora as low_rank
from jaxrm.models.hub import export_model
from jaxrm.models.hub.peft import describe_adapter, read_adapter, write_adapter
from jaxrm.models.lora import LoRAConfig

Q = "base_model.model.model.layers.1.self_attn.q_proj"
INSTEAD = "merge the adapter into its base with PEFT's merge_and_unload, and give that model"
BIASED = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True)


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert mine.dtype == theirs.dtype == np.float32
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("lora", [LoRAConfig(3), LoRAConfig(2, 5.5, True, ("v_proj", "o_proj"))], ids=str)
def test_a_written_folder_is_read_back_bit_by_bit(tmp_path, lora, scalar_head):
    tree = random_adapters(BIASED, lora, scalar_head=scalar_head)
    folder = write_adapter(tmp_path / "out", tree, BIASED, lora, base="Qwen/Qwen2-tiny")
    adapter, again = read_adapter(str(folder), BIASED)
    assert (adapter.lora, adapter.scalar_head, adapter.base) == (lora, scalar_head, "Qwen/Qwen2-tiny")
    assert describe_adapter(str(folder), BIASED) == adapter
    assert_trees_equal(again, tree)


def test_a_tensor_holds_what_peft_multiplies(tmp_path):
    """``lora_A`` is [rank, in], ``lora_B`` [out, rank], with heads flattened in the order of the projection's rows."""
    lora = LoRAConfig(4, targets=("q_proj", "o_proj"))
    tree = random_adapters(LLAMA, lora)
    tensors = load_file(write_adapter(tmp_path / "out", tree, LLAMA, lora, base=None) / "adapter_model.safetensors")
    query, output = (tree["layers"]["attention"][name] for name in ("query", "output"))
    assert len(tensors) == 2 * 2 * LLAMA.num_layers
    for head, row, rank in ((0, 0, 0), (2, 5, 3), (3, 1, 2)):
        assert tensors[f"{Q}.lora_A.weight"][rank, row] == query["lora_a"][1, row, rank]
        assert tensors[f"{Q}.lora_B.weight"][head * 6 + row, rank] == query["lora_b"][1, rank, head, row]
        o_proj = Q.replace("q_proj", "o_proj")
        assert tensors[f"{o_proj}.lora_A.weight"][rank, head * 6 + row] == output["lora_a"][1, head, row, rank]
        assert tensors[f"{o_proj}.lora_B.weight"][row, rank] == output["lora_b"][1, rank, row]


def test_sharded_adapters_are_written_as_whole_ones(tmp_path):
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    lora = LoRAConfig(4)
    tree = random_adapters(LLAMA, lora)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "x"))), tree)
    folder = write_adapter(tmp_path / "out", spread, LLAMA, lora, base=None)
    assert_trees_equal(read_adapter(str(folder), LLAMA)[1], tree)


def test_adapters_in_16_bits_are_read_as_their_exact_values(tmp_path):
    lora = LoRAConfig(2)
    tree = random_adapters(LLAMA, lora)
    folder = write_adapter(tmp_path / "out", tree, LLAMA, lora, base=None, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), tree)
    assert_trees_equal(read_adapter(str(folder), LLAMA)[1], rounded)


def test_merged_weights_compute_what_base_and_adapter_do():
    """``W + scale A B`` of a projection, by a loop over layers; and the logits of the forward pass with adapters."""
    lora = LoRAConfig(4, rank_stabilized=True)
    base, adapters = random_params(LLAMA), random_adapters(LLAMA, lora)
    joined = low_rank.join(base, adapters)
    merged = low_rank.merge(joined, lora)
    down, pair = base["layers"]["mlp"]["down"]["kernel"], adapters["layers"]["mlp"]["down"]
    for layer in range(LLAMA.num_layers):
        expected = down[layer] + 16 / 2 * pair["lora_a"][layer] @ pair["lora_b"][layer]
        assert np.abs(np.asarray(merged["layers"]["mlp"]["down"]["kernel"][layer]) - expected).max() < 1e-5
    tokens = np.arange(1, 9)[None]
    logits = our_logits(merged, LLAMA, tokens)
    assert np.abs(logits - our_logits(joined, LLAMA, tokens, lora)).max() < 1e-5
    assert np.abs(logits - our_logits(base, LLAMA, tokens)).max() > 0.01


def test_names_with_the_name_of_the_adapter_are_read(tmp_path):
    """As PEFT reads ``lora_A.default.weight``; and those of a decoder alone, which have one ``model.`` less."""
    folder = adapter_folder(tmp_path / "out")
    _, expected = read_adapter(str(folder), LLAMA)
    change_tensors(folder, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    assert_trees_equal(read_adapter(str(folder), LLAMA)[1], expected)
    change_tensors(folder, lambda t: {k.replace("model.model.layers", "model.layers"): v for k, v in t.items()})
    assert_trees_equal(read_adapter(str(folder), LLAMA)[1], expected)


def test_adapters_of_a_vision_tower_are_left_where_they_are(tmp_path):
    gemma = dataclasses.replace(LLAMA, family="gemma3_text", qk_norm=True, post_norms=True)
    folder = adapter_folder(tmp_path / "out")
    _, expected = read_adapter(str(folder), gemma)
    names = ("model.model.layers", "model.model.language_model.layers")
    vision = {"base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 9))}
    change_tensors(folder, lambda t: {k.replace(*names): v for k, v in t.items()} | vision)
    assert_trees_equal(read_adapter(str(folder), gemma)[1], expected)
    with pytest.raises(UserError, match="vision_tower"):
        read_adapter(str(folder), LLAMA)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        r".*\.(q_proj|down_proj)",
        None,
        ["self_attn.q_proj", "down_proj", "c_attn"],
        [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")],
    ],
    ids=["all", "pattern", "none", "ends", "whole names"],
)
def test_targets_are_those_whose_tensors_are_there(tmp_path, targets):
    folder = adapter_folder(tmp_path / "out", target_modules=targets)
    assert describe_adapter(str(folder), LLAMA).lora.targets == ("q_proj", "down_proj")


def test_excluded_modules_are_no_targets(tmp_path):
    targets = ["q_proj", "k_proj", "down_proj"]
    folder = adapter_folder(tmp_path / "out", target_modules=targets, exclude_modules=["self_attn.k_proj"])
    assert describe_adapter(str(folder), LLAMA).lora.targets == ("q_proj", "down_proj")
    change_config(folder, exclude_modules=["q_proj", "k_proj"])
    with pytest.raises(UserError, match=r"which target_modules in .* does not name"):
        describe_adapter(str(folder), LLAMA)


def test_what_matters_in_training_alone_is_passed_over(tmp_path):
    folder = adapter_folder(
        tmp_path / "out",
        lora_dropout=0.1,
        init_lora_weights="gaussian",
        inference_mode=False,
        revision="main",
        peft_version="0.4.0",
        loftq_config={},
        qalora_group_size=16,
        megatron_core="megatron.core",
        a_field_of_tomorrow=None,
        rank_pattern={},
    )
    read_adapter(str(folder), LLAMA)


REFUSED = {
    "peft_type": ("IA3", f"peft_type is 'IA3'; jaxrm reads LORA alone; {INSTEAD}"),
    "use_dora": (True, f"use_dora is True; jaxrm does not do DoRA; {INSTEAD}"),
    "use_qalora": (True, "jaxrm does not do QALoRA"),
    "use_bdlora": ({"nblocks": 2}, "jaxrm does not do block-diagonal LoRA"),
    "lora_bias": (True, "jaxrm does not do biases of adapters"),
    "fan_in_fan_out": (True, "jaxrm does not do transposed weights"),
    "rank_pattern": ({"q_proj": 8}, "rank_pattern is {'q_proj': 8}; jaxrm does not do ranks that differ"),
    "alpha_pattern": ({"q_proj": 8}, "jaxrm does not do alphas that differ"),
    "layers_to_transform": ([0, 1], "jaxrm does not do adapters of some layers alone"),
    "layer_replication": ([[0, 2], [1, 3]], "jaxrm does not do layers that are repeated"),
    "trainable_token_indices": ([5], "jaxrm does not do trained tokens"),
    "target_parameters": (["experts.up"], "jaxrm does not do adapters of parameters"),
    "megatron_config": ({"a": 1}, "jaxrm does not do Megatron's layers"),
    "velora_config": ({"scale": 1.0}, "jaxrm does not do VeLoRA"),
    "alora_invocation_tokens": ([1, 2], "jaxrm does not do activated LoRA"),
    "monteclora_config": ({"num_samples": 8}, "jaxrm does not do Monte Carlo LoRA"),
    "arrow_config": ({"top_k": 3}, "jaxrm does not do Arrow routing"),
    "kasa_config": ({"a": 1}, "jaxrm does not do KaSA"),
    "bias": ("all", "bias is 'all'; jaxrm reads adapters without trained biases"),
    "task_type": ("SEQ_2_SEQ_LM", "task_type is 'SEQ_2_SEQ_LM'; jaxrm reads CAUSAL_LM, and SEQ_CLS of one label"),
    "init_lora_weights": ("pissa_niter_16", "init_lora_weights is 'pissa_niter_16'; its adapters stand on a base"),
    "modules_to_save": (["embed_tokens"], "modules_to_save is ['embed_tokens']; jaxrm reads the head of a classifier"),
    "target_modules": (["q_proj", "lm_head"], "jaxrm has no adapters of lm_head"),
    "base_model_name_or_path": (7, "base_model_name_or_path is 7; it must be a text or null"),
    "r": (0, "r is 0; it must be a whole number of at least 1"),
    "lora_alpha": (0, "lora_alpha is 0; it must be a number above 0"),
    "use_rslora": ("yes", "use_rslora is 'yes'; it must be true or false"),
    "exclude_modules": ([4], "exclude_modules is [4]; it must be a list of names, a pattern or null"),
    "a_field_of_tomorrow": (2, "a_field_of_tomorrow is 2; jaxrm does not know this field"),
}


def refusal(folder) -> str:
    """The one line of a folder that is refused, of whose tensors nothing was read."""
    with pytest.raises(UserError) as error:
        describe_adapter(str(folder), LLAMA)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_jaxrm_does_not_do_of_peft_is_named(tmp_path, name):
    value, line = REFUSED[name]
    folder = adapter_folder(tmp_path / "out", **{name: value})
    message = refusal(folder)
    assert message.startswith(f"{folder / 'adapter_config.json'}: ")
    assert line in message


def with_rank(rank):
    return lambda t: {k: v[:rank] if "lora_A" in k else v[:, :rank] for k, v in t.items()}


TENSORS = {
    "rank of all": (with_rank(2), "has rank 2, but r in adapter_config.json is 4; correct the wrong one"),
    "rank of one": (lambda t: t | {f"{Q}.lora_B.weight": np.ones((24, 3))}, f"{Q}.lora_B.weight has rank 3, but r"),
    "another base": (
        lambda t: t | {f"{Q}.lora_A.weight": np.ones((4, 18))},
        "has shape [4, 18], but the base asks for [4, 16]: the adapter is of another base; the adapter says that its "
        "base is 'some/base'",
    ),
    "more layers": (
        lambda t: t | {Q.replace(".1.", ".3.") + ".lora_A.weight": np.ones((4, 16))},
        "holds layers.3.self_attn.q_proj, but the base has 3 layers",
    ),
    "a layer less": (
        lambda t: {k: v for k, v in t.items() if not k.startswith(f"{Q}.")},
        "lacks adapters of layers.1.self_attn.q_proj; jaxrm needs those of a projection in all 3 layers or in none",
    ),
    "a projection less": (
        lambda t: {k: v for k, v in t.items() if "q_proj" not in k},
        "lacks adapters of layers.0.self_attn.q_proj",
    ),
    "half of a pair": (
        lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"},
        f"lacks {Q}.lora_B.weight; save the adapter again",
    ),
    "a projection more": (
        lambda t: t | {f"{Q.replace('q_', 'k_')}.lora_A.weight": np.ones((4, 16))},
        "holds adapters of layers.1.self_attn.k_proj, which target_modules in adapter_config.json does not name",
    ),
    "no such projection": (
        lambda t: t | {f"{Q.replace('q_', 'qkv_')}.lora_A.weight": np.ones((4, 16))},
        "holds 'base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight', ",
    ),
    "in the wrong part": (
        lambda t: t | {f"{Q.replace('self_attn', 'mlp')}.lora_A.weight": np.ones((4, 16))},
        "a projection that the base has not",
    ),
    "nothing": (lambda t: {}, "holds no adapters; save them with PEFT's save_pretrained"),
    "twice": (
        lambda t: t | {f"{Q}.lora_A.default.weight": np.ones((4, 16))},
        f"holds {Q}.lora_A.weight twice, with and without .default",
    ),
    "two decoders": (
        lambda t: t | {Q.replace("model.model.", "model.") + ".lora_A.weight": np.ones((4, 16))},
        "holds adapters of base_model.model. and of base_model.model.model.; jaxrm reads those of one decoder",
    ),
    "integers": (
        lambda t: t | {f"{Q}.lora_A.weight": np.ones((4, 16), np.int8)},
        "lora_A.weight is stored as I8",
    ),
    "DoRA": (
        lambda t: t | {f"{Q}.lora_magnitude_vector.weight": np.ones(24)},
        f"holds '{Q}.lora_magnitude_vector.weight', DoRA; jaxrm reads adapters of projections alone; {INSTEAD}",
    ),
    "embeddings": (lambda t: t | {"base_model.model.model.embed_tokens.weight": np.ones((48, 16))}, "embeddings"),
    "embeddings' adapters": (
        lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 48))},
        "adapters of embeddings",
    ),
    "head": (lambda t: t | {"base_model.model.lm_head.lora_A.weight": np.ones((4, 16))}, "a trained output head"),
    "biases": (lambda t: t | {f"{Q}.bias": np.ones(24)}, "trained biases"),
    "another thing": (lambda t: t | {"thing": np.ones(2)}, "holds 'thing'; jaxrm reads"),
    "a head of its own": (
        lambda t: t | {"base_model.model.score.weight": np.ones((1, 16))},
        "holds base_model.model.score.weight, though adapter_config.json has no modules_to_save",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(tmp_path, case):
    change, line = TENSORS[case]
    folder = adapter_folder(tmp_path / "out")
    change_tensors(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'adapter_model.safetensors'}")
    assert line in message


def test_a_classifier_has_one_label(tmp_path):
    folder = adapter_folder(tmp_path / "out", scalar_head=True)
    name = "base_model.model.score.weight"
    change_tensors(folder, lambda t: t | {name: np.ones((3, 16))})
    assert f"{name} has 3 labels; jaxrm reads a classifier of one label" in refusal(folder)
    change_tensors(folder, lambda t: {k: v for k, v in t.items() if k != name})
    assert f"lacks {name}, the head of a classifier" in refusal(folder)


def test_places_that_hold_no_adapter_are_explained(tmp_path):
    folder = adapter_folder(tmp_path / "out")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "only as adapter_model.bin, a pickle, which can run code when read" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in refusal(folder)
    (folder / "adapter_config.json").write_text("[]")
    assert "holds a JSON list; it must be an object" in refusal(folder)
    assert "which has no adapter_config.json; give a folder of PEFT" in refusal(tmp_path)
    assert "but there is nothing at that place" in refusal(tmp_path / "none" / "at" / "all")
    assert "hub" in refusal("nobody/nothing")


def test_an_export_of_the_other_sort_may_be_replaced(tmp_path):
    folder = adapter_folder(tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        export_model(folder, random_params(LLAMA), LLAMA)
    export_model(folder, random_params(LLAMA), LLAMA, overwrite=True)
    lora = LoRAConfig(2)
    write_adapter(folder, random_adapters(LLAMA, lora), LLAMA, lora, base=None, overwrite=True)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["r"], fields["base_model_name_or_path"]) == (2, None)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
