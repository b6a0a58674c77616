"""Checkpoints in and out: config.json, tensors, errors, memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxrm.errors import UserError
from jaxrm.models.config import PRESETS, ModelConfig, RopeScaling, alternating, preset
from jaxrm.models.hub import export_model, load_params, parse_hf_config, read_model_config, to_hf_config
from jaxrm.models.hub.names import tensor_table

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# What the published config.json files say, the fields that bear on the computation.
PUBLISHED = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3.2-1b": LLAMA_2_7B
    | {
        "attention_bias": False,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "smollm2-135m": LLAMA_2_7B
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-2b": {
        "model_type": "gemma",
        "attention_bias": False,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "gemma-3-4b": {  # multimodal; the text part leaves out what equals its class's defaults
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
}

SMALL = ModelConfig(
    family="llama",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)
GEMMA = {
    "activation": "gelu_tanh",
    "unit_offset_norm": True,
    "scale_embedding": True,
    "tie_embeddings": True,
}
LATE_GEMMA = GEMMA | {
    "post_norms": True,
    "query_scale": 6**-0.5,
    "sliding_window": 3,
    "logit_softcap": 30.0,
    "num_layers": 3,
}
FAMILIES = {
    "llama": SMALL,
    "llama with biases": dataclasses.replace(SMALL, qkv_bias=True, output_bias=True, mlp_bias=True),
    "llama 3": dataclasses.replace(SMALL, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 512), tie_embeddings=True),
    "mistral": dataclasses.replace(
        SMALL, family="mistral", sliding_window=3, layer_is_sliding=(True, True), head_dim=6
    ),
    "qwen2": dataclasses.replace(
        SMALL, family="qwen2", qkv_bias=True, sliding_window=3, layer_is_sliding=(False, True)
    ),
    "qwen3": dataclasses.replace(SMALL, family="qwen3", qk_norm=True, head_dim=8),
    "gemma": dataclasses.replace(SMALL, family="gemma", num_kv_heads=1, **GEMMA),
    "gemma2": dataclasses.replace(
        SMALL, family="gemma2", attention_softcap=50.0, layer_is_sliding=alternating(3, 2), **LATE_GEMMA
    ),
    "gemma3": dataclasses.replace(
        SMALL,
        family="gemma3_text",
        qk_norm=True,
        local_rope_theta=100.0,
        rope_scaling=RopeScaling("linear", 8.0),
        layer_is_sliding=(True, False, True),
        **LATE_GEMMA,
    ),
}


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """NumPy parameters of the decoder's tree."""
    rng = np.random.default_rng(seed)
    params: dict = {}
    for tensor in tensor_table(config):
        *parents, leaf = tensor.path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        if tensor.layer is None:
            node[leaf] = rng.standard_normal(tensor.shape, np.float32)
        elif tensor.layer == 0:
            node[leaf] = rng.standard_normal((config.num_layers, *tensor.shape), np.float32)
    return params


def write_checkpoint(folder: Path, config: ModelConfig = SMALL, **changes) -> Path:
    """A checkpoint by the safetensors library; ``changes`` replaces tensors, None removes one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    rng = np.random.default_rng(0)
    tensors = {t.name: rng.standard_normal(t.file_shape, np.float32) for t in tensor_table(config)} | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def assert_identical(tree: dict, other: dict) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


class TestConfig:
    @pytest.mark.parametrize(
        ("generation", "eos", "end_ids"),
        [
            ({"eos_token_id": [9, 3, 5]}, 3, (3, 5, 9)),  # as Llama 3's: the end of text, of a message, of a turn
            ({"eos_token_id": 7}, None, (7,)),
            ({"max_length": 9}, [4, 2], (2, 4)),
            (None, [1, 106], (1, 106)),
            (None, None, ()),
        ],
    )
    def test_end_ids_are_those_of_the_generation_config(self, tmp_path, generation, eos, end_ids):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B | {"eos_token_id": eos}))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        config = read_model_config(str(tmp_path))
        assert config.end_ids == end_ids
        assert dataclasses.replace(config, end_ids=()) == preset("llama-2-7b")

    @pytest.mark.parametrize("eos", ["</s>", [1, "2"], True, -1, 1.5, {}, [[1]]])
    def test_end_ids_that_are_no_ids_are_refused(self, tmp_path, eos):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is .*; it must be a token id"):
            read_model_config(str(tmp_path))

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_a_published_config_json_is_read_as_the_preset(self, name, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
        assert read_model_config(str(tmp_path)) == preset(name)

    def test_rope_fields_of_transformers_5_and_4_mean_the_same(self):
        old = PUBLISHED["llama-3.2-1b"]
        new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
        new["rope_parameters"] = LLAMA3_ROPE | {"rope_theta": 500000.0}
        assert parse_hf_config(new) == parse_hf_config(old) == preset("llama-3.2-1b")

        old = PUBLISHED["gemma-3-4b"]["text_config"]
        new = {key: value for key, value in old.items() if key != "rope_scaling"}
        new["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
        assert parse_hf_config(new) == parse_hf_config(old) == preset("gemma-3-4b")

    @pytest.mark.slow
    @pytest.mark.parametrize("config", [*PRESETS.values(), *FAMILIES.values()])
    def test_transformers_reads_and_writes_back_an_exported_config(self, config):
        from transformers import AutoConfig

        fields = to_hf_config(config)
        assert parse_hf_config(fields) == config
        assert parse_hf_config(AutoConfig.for_model(**fields).to_dict()) == config

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
            ({"model_type": None}, "model_type is None"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
            ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is ''"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
            ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
            ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
            ({"hidden_size": None}, "has no 'hidden_size'"),
            ({"hidden_size": "4096"}, "hidden_size is '4096'"),
            ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
            ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4,
              "layer_types": ["chunked_attention"] * 32}, "chunked_attention"),
            ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ],
    )  # fmt: skip
    def test_what_is_unsupported_is_named(self, change, named):
        with pytest.raises(UserError, match=named) as error:
            parse_hf_config(LLAMA_2_7B | change, where="some/config.json")
        assert "some/config.json" in str(error.value) and "\n" not in str(error.value)

    def test_a_config_that_its_family_cannot_express_is_not_exported(self):
        config = dataclasses.replace(SMALL, qk_norm=True, unit_offset_norm=True)
        with pytest.raises(UserError, match=r"llama config\.json cannot express .* unit_offset_norm, qk_norm"):
            to_hf_config(config)


class TestRoundTrip:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_export_and_import_are_bit_identical(self, family, dtype, tmp_path):
        config = FAMILIES[family]
        params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
        first = export_model(tmp_path / "first", params, config, max_shard_bytes=4000)
        assert read_model_config(str(first)) == config
        loaded = load_params(str(first), config, dtype=jnp.dtype(dtype))
        assert_identical(loaded, params)
        second = export_model(tmp_path / "second", loaded, config, max_shard_bytes=4000)
        names = sorted(file.name for file in first.iterdir())
        assert len(names) > 4 and names == sorted(file.name for file in second.iterdir())
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes()

    def test_sharded_parameters_load_and_export_as_whole_ones_do(self, tmp_path):
        config = FAMILIES["gemma3"]
        folder = write_checkpoint(tmp_path / "model", dataclasses.replace(config, tie_embeddings=False))
        config = read_model_config(str(folder))
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
        specs = {3: P(None, "fsdp", "tensor"), 4: P(None, "fsdp", "tensor", None), 2: P("tensor", "fsdp"), 1: P()}
        whole = load_params(str(folder), config)

        def sharding(path, leaf):
            if leaf.ndim == 2 and path[0].key == "layers":
                return NamedSharding(mesh, P())
            return NamedSharding(mesh, specs[leaf.ndim])

        shardings = jax.tree.map_with_path(sharding, whole)
        sharded = load_params(str(folder), config, shardings=shardings)
        assert_identical(sharded, whole)
        assert jax.tree.map(lambda x: x.sharding, sharded) == shardings
        kernel = sharded["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (3, 8, 16)

        out = export_model(tmp_path / "out", sharded, config)
        again = load_params(str(out), config)
        assert_identical(again, whole)

    @pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
    def test_16_bit_files_are_read_as_their_exact_values(self, stored, tmp_path):
        params = jax.tree.map(lambda x: x.astype(stored), random_params(SMALL))
        folder = export_model(tmp_path / "model", params, SMALL)
        loaded = load_params(str(folder), SMALL)
        assert_identical(loaded, jax.tree.map(lambda x: x.astype(np.float32), params))

    def test_projections_follow_the_layout_of_the_checkpoint(self, tmp_path):
        weight = np.arange(2 * 4 * 16, dtype=np.float32).reshape(8, 16)  # [K * H, D] of K=2 heads of H=4
        output = np.arange(16 * 16, dtype=np.float32).reshape(16, 16)  # [D, N * H]
        names = ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.o_proj.weight")
        folder = write_checkpoint(tmp_path / "model", **dict(zip(names, (weight, output), strict=True)))
        attention = load_params(str(folder), SMALL)["layers"]["attention"]
        assert attention["key"]["kernel"][1, 5, 1, 2] == weight[1 * 4 + 2, 5]
        assert attention["output"]["kernel"][1, 3, 2, 7] == output[7, 3 * 4 + 2]


class TestErrors:
    def refused(self, folder: Path, match: str, config: ModelConfig = SMALL) -> None:
        with pytest.raises(UserError, match=match) as error:
            load_params(str(folder), config)
        assert "\n" not in str(error.value)

    def test_missing_tensors_are_named(self, tmp_path):
        name = "model.layers.1.mlp.up_proj.weight"
        folder = write_checkpoint(tmp_path / "model", **{name: None, "model.norm.weight": None})
        self.refused(folder, f"lacks 2 tensors: {name}, model.norm.weight")

    def test_extra_tensors_are_named(self, tmp_path):
        folder = write_checkpoint(tmp_path / "model", **{"score.weight": np.zeros((1, 16), np.float32)})
        self.refused(folder, "holds 1 tensor: score.weight")
        fewer = dataclasses.replace(SMALL, num_layers=1)
        folder = write_checkpoint(tmp_path / "deeper")
        self.refused(folder, r"holds 9 tensors: model\.layers\.1\.input_layernorm\.weight, .* and 6 more", fewer)

    def test_misshapen_tensors_are_named(self, tmp_path):
        name = "model.embed_tokens.weight"
        folder = write_checkpoint(tmp_path / "model", **{name: np.zeros((25, 16), np.float32)})
        self.refused(folder, rf"{name} has shape \[25, 16\]; the model config asks for \[24, 16\]")

    def test_second_copies_and_rotary_tables_are_ignored(self, tmp_path):
        config = dataclasses.replace(SMALL, tie_embeddings=True)
        plain = load_params(str(write_checkpoint(tmp_path / "plain", config)), config)
        embedding = np.asarray(plain["embedder"]["embedding"])
        extra = {
            "lm_head.weight": embedding,
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        }
        folder = write_checkpoint(tmp_path / "extra", config, **extra)
        assert_identical(load_params(str(folder), config), plain)
        assert read_model_config(str(folder)).tie_embeddings

    def test_a_head_that_differs_from_tied_embeddings_is_kept(self, tmp_path, capsys):
        """As transformers does: config.json says tie_word_embeddings, but the weights are of a head of its own."""
        tied = dataclasses.replace(SMALL, tie_embeddings=True)
        head = np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32)
        folder = write_checkpoint(tmp_path / "model", tied, **{"lm_head.weight": head})
        for _ in range(2):
            config = read_model_config(str(folder))
        assert config == dataclasses.replace(tied, tie_embeddings=False)
        assert capsys.readouterr().out.count("weights hold an output head that differs from the embeddings; it is") == 1
        np.testing.assert_array_equal(load_params(str(folder), config)["head"]["embedding"], head)
        export_model(tmp_path / "out", load_params(str(folder), config), config)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        self.refused(folder, "holds an output head that differs .*; the files are here now, so give the same", tied)

    def test_integer_tensors_are_refused_by_name(self, tmp_path):
        name = "model.norm.weight"
        folder = write_checkpoint(tmp_path / "model", **{name: np.zeros(16, np.int8)})
        self.refused(folder, f"{name} is stored as I8")

    def test_pickles_are_refused(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(to_hf_config(SMALL)))
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
        self.refused(tmp_path, "pytorch_model.bin, a pickle.*convert it to safetensors")

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "a\\b.safetensors", ".."])
    def test_an_index_cannot_reach_out_of_its_folder(self, name, tmp_path):
        write_checkpoint(tmp_path / "model")
        (tmp_path / "outside.safetensors").write_bytes((tmp_path / "model/model.safetensors").read_bytes())
        index = {"weight_map": {"model.norm.weight": name}}
        (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(tmp_path / "model", "must be a .safetensors file in the same folder")

    def test_an_index_that_names_an_absent_file_is_refused(self, tmp_path):
        folder = write_checkpoint(tmp_path / "model")
        index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, "names model-00002-of-00002.safetensors, which is not in the folder")

    @pytest.mark.parametrize("keep", [0, 5, 200, 4000])
    def test_a_file_that_is_cut_short_is_refused(self, keep, tmp_path):
        file = write_checkpoint(tmp_path / "model") / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        self.refused(file.parent, "cut short|damaged")

    @pytest.mark.parametrize("header", [b"[]", b"{]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2]}}'])
    def test_a_damaged_header_is_refused(self, header, tmp_path):
        folder = write_checkpoint(tmp_path / "model")
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        self.refused(folder, "damaged")

    def test_a_header_whose_bytes_do_not_fit_the_shape_is_refused(self, tmp_path):
        folder = write_checkpoint(tmp_path / "model")
        header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        self.refused(folder, "bytes of a do not fit its shape")

    @pytest.mark.parametrize("text", ["{", "[]", ""])
    def test_a_config_json_that_is_no_object_is_refused(self, text, tmp_path):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json (is not valid JSON|holds a JSON list)"):
            read_model_config(str(tmp_path))

    def test_paths_that_hold_no_model_are_explained(self, tmp_path):
        for path, match in [
            (tmp_path, "has no config.json"),
            (tmp_path / "absent", "there is no model at"),
            (Path("./absent"), "neither a folder here nor a model|there is no model at"),
        ]:
            with pytest.raises(UserError, match=match):
                read_model_config(str(path))
        (tmp_path / "weights.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match="is a file; give the folder"):
            read_model_config(str(tmp_path / "weights.safetensors"))
        (tmp_path / "config.json").write_text(json.dumps(to_hf_config(SMALL)))
        (tmp_path / "weights.safetensors").unlink()
        self.refused(tmp_path, "holds no .safetensors files")

    def test_a_hub_name_that_cannot_be_fetched_is_one_line(self):
        with pytest.raises(UserError, match="nobody/no-such-model is neither a folder here nor a model") as error:
            read_model_config("nobody/no-such-model")
        assert "\n" not in str(error.value)


class FakeTokenizer:
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


class TestExport:
    def test_the_safetensors_library_reads_what_is_written(self, tmp_path):
        params = random_params(SMALL)
        folder = export_model(tmp_path / "out", params, SMALL, dtype="float16")
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {tensor.name for tensor in tensor_table(SMALL)}
            up = file.get_tensor("model.layers.1.mlp.up_proj.weight")
        np.testing.assert_array_equal(up, params["layers"]["mlp"]["up"]["kernel"][1].T.astype(np.float16))

    def test_shards_stay_below_the_limit_and_the_index_lists_them(self, tmp_path):
        folder = export_model(tmp_path / "out", random_params(SMALL), SMALL, max_shard_bytes=5000)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert files == {file.name for file in folder.glob("*.safetensors")} and len(files) > 3
        sizes = []
        for name in files:
            with safe_open(folder / name, framework="numpy") as file:
                sizes.append(sum(file.get_tensor(key).nbytes for key in file.keys()))  # noqa: SIM118  # no dict
        assert max(sizes) <= 5000 and sum(sizes) == index["metadata"]["total_size"]

    def test_tokenizer_and_ids_travel_with_the_model(self, tmp_path):
        folder = export_model(
            tmp_path / "out",
            random_params(SMALL),
            SMALL,
            tokenizer=FakeTokenizer(),
            end_ids={2, 7},
        )
        names = {file.name for file in folder.iterdir()}
        weights = {"model.safetensors", "config.json", "generation_config.json"}
        assert names == weights | {"tokenizer.json"}
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config["bos_token_id"], config["pad_token_id"], config["torch_dtype"]) == (1, 0, "float32")
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}

    def test_only_the_tokenizer_files_of_a_folder_are_copied(self, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other/tokenizer.model").write_bytes(b"spm")
        (tmp_path / "other/secret.txt").write_bytes(b"no")
        folder = export_model(tmp_path / "out", random_params(SMALL), SMALL, tokenizer=tmp_path / "other")
        weights = {"model.safetensors", "config.json", "generation_config.json"}
        assert {file.name for file in folder.iterdir()} == weights | {"tokenizer.model"}
        with pytest.raises(UserError, match="holds no tokenizer"):
            export_model(tmp_path / "b", random_params(SMALL), SMALL, tokenizer=tmp_path / "out" / "..")

    def test_a_folder_in_use_is_kept_unless_told(self, tmp_path):
        target = tmp_path / "out"
        target.mkdir()
        export_model(target, random_params(SMALL), SMALL)  # an empty folder is taken
        before = (target / "model.safetensors").read_bytes()
        with pytest.raises(UserError, match="is not empty"):
            export_model(target, random_params(SMALL, seed=1), SMALL)
        assert (target / "model.safetensors").read_bytes() == before
        export_model(target, random_params(SMALL, seed=1), SMALL, overwrite=True)
        assert (target / "model.safetensors").read_bytes() != before
        (tmp_path / "documents").mkdir()
        (tmp_path / "documents/thesis.txt").write_text("dear")
        with pytest.raises(UserError, match="something that is not a model"):
            export_model(tmp_path / "documents", random_params(SMALL), SMALL, overwrite=True)
        assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []

    def test_a_failed_export_leaves_nothing(self, tmp_path):
        class FullDisk(FakeTokenizer):
            def save_pretrained(self, folder):
                raise OSError("no space left")

        with pytest.raises(OSError, match="no space left"):
            export_model(tmp_path / "out", random_params(SMALL), SMALL, tokenizer=FullDisk())
        with pytest.raises(UserError, match="export dtype is 'int8'"):
            export_model(tmp_path / "out", random_params(SMALL), SMALL, dtype="int8")
        assert list(tmp_path.iterdir()) == []


MEASURE_LOADING = """
import sys
import jax
from jaxrm.models.hub import load_params, read_model_config

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

small, large = sys.argv[1:]
load_params(small, read_model_config(small))  # compiles, so that this is not counted below
before = memory("VmRSS")
params = load_params(large, read_model_config(large))
parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(memory("VmHWM") - before - parameter_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which is Linux's")
def test_loading_needs_memory_of_parameters_and_a_few_tensors(tmp_path):
    config = dataclasses.replace(
        SMALL, hidden_size=512, intermediate_size=2048, num_layers=12, num_heads=8, num_kv_heads=8, head_dim=64
    )
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2048, 512), np.float32)
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(to_hf_config(config)))
    tensors = {t.name: np.resize(noise, t.file_shape) for t in tensor_table(config)}
    save_file(tensors, large / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in tensors.values())
    del tensors

    small = write_checkpoint(tmp_path / "small")
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_LOADING, str(small), str(large)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    excess = int(process.stdout)
    # 201 MB of parameters, tensors of at most 4 MB: reading the file whole would take 200 MB more.
    assert stored > 200e6
    assert excess < 60e6, f"{excess / 1e6:.0f} MB above the parameters"
