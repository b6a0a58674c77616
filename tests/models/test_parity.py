"""Every family's logits against transformers' torch models: live where torch is installed, recorded elsewhere.

The weights are a fixed function of a tensor's name in the checkpoint and its shape, so a recording holds only a
config.json and logits. To make the recordings again, with torch installed:

    JAXRM_RECORD_LOGITS=1 python -m pytest tests/models/test_parity.py -k recorded
"""

import dataclasses
import functools
import importlib.util
import json
import os
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxrm.models.hub import export_model, load_params, parse_hf_config, read_model_config
from jaxrm.models.hub.names import tensor_table
from jaxrm.models.transformer import Decoder

RECORDED = Path(__file__).parent / "recorded"
TOLERANCE = 1e-4

needs_torch = [
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="torch is not installed (tests/requirements-torch.txt); the recorded logits are compared instead",
    ),
]

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
# The config.json of each case in the form of transformers 4; windows are shorter than the rows.
CASES: dict[str, dict] = {
    "llama": {"model_type": "llama", "rope_theta": 10_000.0},
    "llama_biases_head_dim": {
        "model_type": "llama",
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "llama_rope_llama3": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE},
    "llama_rope_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral_no_window": {"model_type": "mistral", "sliding_window": None, "head_dim": 16, "rope_theta": 1e6},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "gemma": {
        "model_type": "gemma",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 4,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
LENGTHS = (16, 11)  # tokens of the two sequences that are compared
TOKENS = [np.random.default_rng(n).integers(1, SMALL["vocab_size"], n) for n in LENGTHS]
every_case = pytest.mark.parametrize("case", CASES)


def config_fields(case: str) -> dict:
    return SMALL | CASES[case]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that depend on the name and shape alone: splitmix64 of the name's checksum and the index."""
    with np.errstate(over="ignore"):
        x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    if "norm" in name:
        values = 1 + 0.5 * uniform
    elif len(shape) == 1:
        values = 0.5 * uniform
    else:
        values = 2.5 * uniform / np.sqrt(shape[-1])
    return values.astype(np.float32).reshape(shape)


def write_folder(folder: Path, fields: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    table = tensor_table(parse_hf_config(fields))
    save_file({t.name: weight(t.name, t.file_shape) for t in table}, folder / "model.safetensors")
    return folder


def decoder_of(folder: Path, **changes) -> Decoder:
    config = read_model_config(str(folder))
    params = load_params(str(folder), config)
    config = dataclasses.replace(config, **changes)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


@nnx.jit
def forward(decoder, tokens, positions, segment_ids):
    return decoder.logits(decoder(tokens, positions=positions, segment_ids=segment_ids))


def our_logits(decoder: Decoder, tokens, positions, segment_ids) -> np.ndarray:
    return np.asarray(forward(decoder, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segment_ids)))


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four rows of 30: each sequence with padding on the left, both packed, the first with padding on the right."""
    T = 30
    tokens, positions, segment_ids = (np.zeros((4, T), np.int32) for _ in range(3))

    def place(row, start, sequence, segment):
        span = slice(start, start + len(sequence))
        tokens[row, span], positions[row, span], segment_ids[row, span] = (
            sequence,
            np.arange(len(sequence)),
            segment,
        )

    place(0, T - LENGTHS[0], TOKENS[0], 1)
    place(1, T - LENGTHS[1], TOKENS[1], 1)
    place(2, 0, TOKENS[0], 1)
    place(2, LENGTHS[0], TOKENS[1], 2)
    place(3, 0, TOKENS[0], 1)
    tokens[segment_ids == 0] = 7  # padding is not a token id of its own: it must change nothing
    return tokens, positions, segment_ids


@functools.cache
def logits_of_rows(folder: Path) -> np.ndarray:
    return our_logits(decoder_of(folder), *rows())


def assert_rows_agree(ours: np.ndarray, expected: list[np.ndarray]) -> None:
    first, second = LENGTHS
    np.testing.assert_allclose(ours[3, :first], expected[0], rtol=0, atol=TOLERANCE, err_msg="one sequence")
    np.testing.assert_allclose(ours[0, -first:], expected[0], rtol=0, atol=TOLERANCE, err_msg="left padding")
    np.testing.assert_allclose(ours[1, -second:], expected[1], rtol=0, atol=TOLERANCE, err_msg="left padding")
    np.testing.assert_allclose(ours[2, :first], expected[0], rtol=0, atol=TOLERANCE, err_msg="packed, first")
    packed = ours[2, first : first + second]
    np.testing.assert_allclose(packed, expected[1], rtol=0, atol=TOLERANCE, err_msg="packed, second")


def torch_model(case: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config_fields(case)
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    import torch

    inputs = {"input_ids": torch.from_numpy(tokens.astype(np.int64))}
    if mask is not None:
        inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        inputs["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0))
    with torch.no_grad():
        return model(**inputs).logits.numpy()


@functools.cache
def separate_torch_logits(case: str) -> list[np.ndarray]:
    model = torch_model(case)
    return [torch_logits(model, tokens[None])[0] for tokens in TOKENS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> functools.partial:
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda case: write_folder(root / case, config_fields(case)))


@every_case
def test_logits_equal_the_recorded_ones_packed_and_padded(case, folders):
    if os.environ.get("JAXRM_RECORD_LOGITS"):
        first, second = separate_torch_logits(case)
        np.savez_compressed(RECORDED / f"{case}.npz", first=first, second=second)
    with np.load(RECORDED / f"{case}.npz", allow_pickle=False) as recorded:
        assert_rows_agree(logits_of_rows(folders(case)), [recorded["first"], recorded["second"]])


class TestLive:
    pytestmark = needs_torch

    @every_case
    def test_a_checkpoint_saved_by_transformers_gives_its_logits(self, case, tmp_path):
        model = torch_model(case)
        model.save_pretrained(tmp_path)  # names tensors, and writes config.json in the form of transformers 5
        assert_rows_agree(our_logits(decoder_of(tmp_path), *rows()), separate_torch_logits(case))

    @every_case
    def test_left_padding_is_treated_as_transformers_does(self, case, folders):
        tokens, _, segment_ids = (part[:2] for part in rows())
        theirs = torch_logits(torch_model(case), tokens, mask=segment_ids)
        ours = logits_of_rows(folders(case))[:2]
        real = segment_ids == 1
        np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=TOLERANCE)

    @every_case
    def test_recorded_logits_are_those_of_installed_transformers(self, case):
        with np.load(RECORDED / f"{case}.npz", allow_pickle=False) as recorded:
            for name, live in zip(("first", "second"), separate_torch_logits(case), strict=True):
                np.testing.assert_allclose(recorded[name], live, rtol=0, atol=1e-5)

    @every_case
    def test_an_export_loads_in_transformers_with_the_same_logits(self, case, folders, tmp_path):
        import torch
        from transformers import AutoModelForCausalLM

        folder = folders(case)
        config = read_model_config(str(folder))
        out = export_model(tmp_path / "out", load_params(str(folder), config), config, max_shard_bytes=20_000)
        model, info = AutoModelForCausalLM.from_pretrained(
            out, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        for row, sequence in enumerate(TOKENS):
            ours = logits_of_rows(folder)[row, -len(sequence) :]
            theirs = torch_logits(model.eval(), sequence[None])[0]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)

    def test_the_text_part_of_a_multimodal_gemma_3_gives_its_logits(self, tmp_path):
        import torch
        from transformers import AutoModelForImageTextToText, Gemma3Config

        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        config = Gemma3Config(text_config=config_fields("gemma3"), vision_config=vision, mm_tokens_per_image=4)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
        model.eval().save_pretrained(tmp_path)
        expected = [torch_logits(model, tokens[None])[0] for tokens in TOKENS]
        assert_rows_agree(our_logits(decoder_of(tmp_path), *rows()), expected)


@pytest.mark.parametrize("case", ["mistral", "qwen2_window", "gemma2", "gemma3"])
def test_the_rows_are_long_enough_for_windows_to_matter(case, folders):
    everywhere = decoder_of(folders(case), layer_is_sliding=())
    difference = np.abs(our_logits(everywhere, *rows()) - logits_of_rows(folders(case)))
    assert difference[3, : LENGTHS[0]].max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama_rope_llama3", {"rope_scaling": None}),
        ("llama_rope_linear", {"rope_scaling": None}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"query_scale": None}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"local_rope_theta": 1e6}),
        ("gemma", {"scale_embedding": False}),
        ("gemma", {"unit_offset_norm": False}),
    ],
)
def test_the_comparison_would_notice_a_feature_that_is_missing(case, change, folders):
    without = our_logits(decoder_of(folders(case), **change), *rows())
    assert np.abs(without - logits_of_rows(folders(case)))[3, : LENGTHS[0]].max() > 100 * TOLERANCE
