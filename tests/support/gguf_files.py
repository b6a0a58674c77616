"""GGUF files of small models, written as llama.cpp's converter does."""

from pathlib import Path

import gguf
import numpy as np

from jaxrm.models.config import ModelConfig
from jaxrm.models.hub.names import tensor_table

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
NAMES_POST_NORMS = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, config: ModelConfig) -> str:
    *parents, part, kind = name.split(".")
    layer = next((piece for piece in parents if piece.isdigit()), None)
    part = (NAMES_POST_NORMS if config.post_norms else NAMES)[part]
    return f"{part}.{kind}" if layer is None else f"blk.{layer}.{part}.{kind}"


def interleaved(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs, one row at a time."""
    H = config.head_dim
    out = np.empty_like(array)
    for head in range(len(array) // H):
        for i in range(H // 2):
            out[head * H + 2 * i] = array[head * H + i]
            out[head * H + 2 * i + 1] = array[head * H + H // 2 + i]
    return out


def hub_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {t.name: rng.standard_normal(t.file_shape, np.float32) for t in tensor_table(config)}


def write_gguf(
    file: Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str | None = None,
    metadata: dict | None = None,
    extra: dict[str, np.ndarray] | None = None,
    top: dict[str, int] | None = None,
) -> Path:
    architecture = architecture or {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.family, config.family)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.family == "gemma2":
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.logit_softcap)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{key}", value)
    for key, value in (top or {}).items():
        writer.add_uint32(key, value)
    for name, array in tensors.items():
        if config.family in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
            array = interleaved(array, config)
        if config.unit_offset_norm and "norm" in name:
            array = array + 1
        if array.ndim == 1 or quantization == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name, config), array)
        else:
            data = gguf.quants.quantize(array, quantization)
            writer.add_tensor(gguf_name(name, config), data, raw_dtype=quantization)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
