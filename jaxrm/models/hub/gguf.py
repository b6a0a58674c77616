"""GGUF files (llama.cpp's format) as a ModelConfig and as the tensors of a Hugging Face checkpoint.

Metadata keys follow llama.cpp's specification of the format. Its converter changes two things that are
undone here: Llama-architecture files hold query and key rows in the order of interleaved rotary pairs, and
Gemma files hold 1 + w for a norm's w. Quantized tensors are dequantized one at a time.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.errors import UserError
from jaxrm.gguf_file import gguf_parts, open_reader
from jaxrm.models.config import ModelConfig, RopeScaling, alternating
from jaxrm.models.hub.hf_fields import MAX_LAYERS, MAX_SIZE
from jaxrm.models.hub.safetensors_file import StoredTensor

_FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_INTERLEAVED = ("llama", "mistral")  # families whose query and key rows the converter reorders

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_POST_NORMS = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class _Model:
    """What the files of one model hold: the metadata of the first, the tensors of all."""

    def __init__(self, file: Path) -> None:
        parts = gguf_parts(file)
        readers = [open_reader(part) for part in parts]
        self.get_field = readers[0].get_field
        self.tensors = [tensor for reader in readers for tensor in reader.tensors]
        for i, (part, reader) in enumerate(zip(parts, readers, strict=True)):
            number = _whole(reader.get_field("split.no"), i)
            count = _whole(reader.get_field("split.count"), len(parts))
            if max(count, 1) != len(parts) or number != i:
                raise UserError(
                    f"{part} is part {number + 1} of {count} of a model; give the parts the names that they were "
                    f"published with, NAME-00001-of-{count:05d}.gguf and so on, or join them: llama-gguf-split --merge"
                )
        total = _whole(readers[0].get_field("split.tensors.count"), len(self.tensors))
        if total != len(self.tensors):
            raise UserError(f"{file} and its other parts hold {len(self.tensors)} tensors of {total}; fetch them again")


def _whole(field: Any, default: int) -> int:
    return default if field is None else int(field.contents())


class _Metadata:
    """A GGUF file's key-value pairs under its architecture's prefix."""

    def __init__(self, file: Path, reader: Any) -> None:
        self.file, self.reader = file, reader
        field = reader.get_field("general.architecture")
        self.architecture: str = "none" if field is None else field.contents()
        if self.architecture not in _FAMILIES:
            raise UserError(
                f"{file}: general.architecture is {self.architecture!r}; jaxrm supports {', '.join(_FAMILIES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(f"{self.architecture}.{key}")
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.file} has no {self.architecture}.{key}; convert the model again")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A size: a whole number from 1 that is no model's undoing."""
        value = self.get(key, default) if default is not None else self.need(key)
        most = MAX_LAYERS if key == "block_count" else MAX_SIZE
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            name = f"{self.architecture}.{key}"
            raise UserError(f"{self.file}: {name} is {value!r}; it must be a whole number from 1 to {most}")
        return value


def gguf_model_config(file: Path) -> ModelConfig:
    """Read the ModelConfig of a GGUF file.

    A head is tied when the file has no ``output.weight``. Llama 3's rotary scaling, which such files hold
    as a tensor of divisors, is recognized from it.

    Raises:
      UserError: if the architecture, or something that the file asks for, is not supported.
    """
    try:
        return _model_config(file)
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise UserError(f"{file} has metadata of a wrong type ({error}); fetch it again") from error


def _model_config(file: Path) -> ModelConfig:
    reader = _Model(file)
    meta = _Metadata(file, reader)
    family = _FAMILIES[meta.architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if meta.get("expert_count", 0):
        raise UserError(f"{file}: {meta.architecture}.expert_count is set; jaxrm has no mixtures of experts")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file} lacks token_embd.weight; it does not hold a whole model")

    hidden_size, num_heads = meta.whole("embedding_length"), meta.whole("attention.head_count")
    num_layers = meta.whole("block_count")
    window = meta.whole("attention.sliding_window") if meta.get("attention.sliding_window") else None
    layer_is_sliding: tuple[bool, ...] = ()
    if window and family not in ("qwen2", "qwen3", "gemma"):
        pattern = {"gemma2": 2, "gemma3_text": 6}.get(family, 0)
        layer_is_sliding = alternating(num_layers, pattern) if pattern else (True,) * num_layers
        family = "mistral" if family == "llama" else family
    head_dim = meta.whole("attention.key_length", hidden_size // num_heads)
    if meta.get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"{file}: {meta.architecture}.rope.dimension_count is {meta.get('rope.dimension_count')}, "
            f"the head has {head_dim}; jaxrm rotates whole heads only"
        )
    gemma = family.startswith("gemma")
    late_gemma = family in ("gemma2", "gemma3_text")
    # The largest Gemma 2 and 3 scale queries by the width per head instead of the head's own size.
    wide = (family, num_layers) in (("gemma2", 46), ("gemma3_text", 62))
    theta_default = 1_000_000.0 if family == "gemma3_text" else 10_000.0
    return ModelConfig(
        family=family,
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=hidden_size,
        intermediate_size=meta.whole("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=meta.whole("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=meta.whole("context_length"),
        activation="gelu_tanh" if gemma else "silu",
        norm_eps=_short(meta.need("attention.layer_norm_rms_epsilon")),
        unit_offset_norm=gemma,
        scale_embedding=gemma,
        post_norms=late_gemma,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        query_scale=(hidden_size / num_heads if wide else head_dim) ** -0.5 if late_gemma else None,
        attention_softcap=_softcap(meta, "attn_logit_softcapping", 50.0) if family == "gemma2" else None,
        logit_softcap=_softcap(meta, "final_logit_softcapping", 30.0) if family == "gemma2" else None,
        rope_theta=_short(meta.get("rope.freq_base", theta_default)),
        rope_scaling=_rope_scaling(meta, tensors.get("rope_freqs.weight"), head_dim),
        local_rope_theta=10_000.0 if family == "gemma3_text" else None,
        sliding_window=window if layer_is_sliding else None,
        layer_is_sliding=layer_is_sliding,
        end_ids=_end_ids(meta),
    )


def _end_ids(meta: _Metadata) -> tuple[int, ...]:
    """Ids at which llama.cpp stops: the end of the text, of a turn, of a message."""
    fields = [meta.reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return tuple(sorted({int(field.contents()) for field in fields if field is not None}))


def _short(value: float) -> float:
    """The decimal number that was meant: GGUF stores 1e-5 as the float32 9.99999974e-06."""
    return float(str(np.float32(value)))


def _softcap(meta: _Metadata, key: str, default: float) -> float:
    return _short(meta.get(key, default))


def _rope_scaling(meta: _Metadata, divisors: Any, head_dim: int) -> RopeScaling | None:
    kind = meta.get("rope.scaling.type", "none")
    if divisors is not None:
        return _llama3_scaling(meta, np.asarray(divisors.data, np.float64).reshape(-1), head_dim)
    if kind == "none":
        return None
    if kind != "linear":
        raise UserError(
            f"{meta.file}: {meta.architecture}.rope.scaling.type is {kind!r}; jaxrm supports none and linear"
        )
    return RopeScaling("linear", _short(meta.need("rope.scaling.factor")))


def _llama3_scaling(meta: _Metadata, divisors: np.ndarray, head_dim: int) -> RopeScaling | None:
    """Find the Llama 3 scaling that a table of divisors of the rotary frequencies came from."""
    if np.all(divisors == 1.0):
        return None
    theta = meta.get("rope.freq_base", 10_000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = RopeScaling("llama3", _short(divisors.max()))
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    unscaled_share = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = 1 / ((1 - unscaled_share) / scaling.factor + unscaled_share)
    expected = np.where(wavelengths < high, 1.0, np.where(wavelengths > low, scaling.factor, blended))
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(f"{meta.file}: rope_freqs.weight is not Llama 3's rotary scaling; jaxrm knows no other")
    return scaling


def open_gguf(file: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """List the tensors of a GGUF file under their Hugging Face names, shapes and row order.

    Tensors with no such name keep their own, so that the caller can report them.

    Raises:
      UserError: if the file cannot be read.
    """
    reader = _Model(file)
    _Metadata(file, reader)  # refuses other architectures
    layer_names = _LAYER_POST_NORMS if config.post_norms else _LAYER
    stored = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":  # part of the config
            continue
        name = _hub_name(tensor.name, layer_names)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        stored[name] = StoredTensor(shape, _reader(tensor, name, config), _unreadable(tensor.name, tensor.tensor_type))
    return stored


def _hub_name(name: str, layer_names: dict[str, str]) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match:
        layer, part, kind = match.groups()
        if layer is None and part in _TOP:
            return f"{_TOP[part]}.{kind}"
        if layer is not None and part in layer_names:
            return f"model.layers.{layer}.{layer_names[part]}.{kind}"
    return name


def _unreadable(name: str, kind: Any) -> str | None:
    if _can_dequantize(kind):
        return None
    return f"{name} has the type {kind.name}, which gguf cannot dequantize; choose a file of another quantization"


@cache
def _can_dequantize(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    _, bytes_per_block = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, bytes_per_block), np.uint8), kind)
    except NotImplementedError:  # the library has no kernel for this kind
        return False
    return True


def _reader(tensor: Any, name: str, config: ModelConfig) -> Any:
    interleaved = config.family in _INTERLEAVED and (".q_proj." in name or ".k_proj." in name)
    unit_offset = config.unit_offset_norm and "norm." in name

    def read() -> np.ndarray:
        from gguf.quants import dequantize

        array = dequantize(tensor.data, tensor.tensor_type)
        if interleaved:
            # [head, pair, half, in] in the file; [head, half, pair, in] in a Hugging Face checkpoint.
            pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array - np.float32(1) if unit_offset else array

    return read
