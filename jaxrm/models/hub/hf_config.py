"""The ``config.json`` of a Hugging Face model, to and from a ModelConfig.

Field names and defaults follow transformers' configuration classes. Two forms of the rotary fields are in
use: transformers 4 has ``rope_theta`` and ``rope_scaling`` at the top, transformers 5 has
``rope_parameters``, nested by layer type for Gemma 3; both are read, and the first, which both versions
understand, is written.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxrm.errors import UserError
from jaxrm.models.config import ModelConfig, RopeScaling, alternating
from jaxrm.models.hub.hf_fields import ARCHITECTURES, Fields

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_SCALAR_ARCHITECTURES = {
    family: name.removesuffix("ForCausalLM") + "ForSequenceClassification" for family, name in ARCHITECTURES.items()
} | {"gemma3_text": "Gemma3TextForSequenceClassification"}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def parse_hf_config(values: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Turn the fields of a ``config.json`` into a ModelConfig.

    The text part of a multimodal Gemma 3 (``model_type`` ``gemma3``) is read as ``gemma3_text``.

    Args:
      values: the JSON object, in the form of transformers 4 or 5.
      where: named in errors.

    Raises:
      UserError: naming the field that is missing, malformed, or asks for something unsupported.
    """
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{where}: quantization_config is set; jaxrm trains unquantized weights: "
            "choose the original checkpoint, or a GGUF file of it"
        )
    if values.get("model_type") == "gemma3":
        text = values.get("text_config") or {}
        if not isinstance(text, dict):
            raise UserError(f"{where}: text_config is {text!r}; it must be an object")
        values = {"tie_word_embeddings": values.get("tie_word_embeddings", True)} | text
        values["model_type"] = "gemma3_text"
    fields = Fields(values, where)
    family = str(fields.family)
    _refuse_unsupported(fields)

    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    attention_bias = fields.flag("attention_bias") and family not in ("mistral", "qwen2")
    theta, scaling, local_theta = _rope(fields)
    window, layer_is_sliding = _sliding(fields, num_layers)
    gemma = family.startswith("gemma")
    late_gemma = family in ("gemma2", "gemma3_text")
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if fields.get("num_key_value_heads") is None else fields.integer("num_key_value_heads"),
        head_dim=hidden_size // num_heads if fields.get("head_dim") is None else fields.integer("head_dim"),
        max_position=fields.integer("max_position_embeddings"),
        activation=_activation(fields),
        norm_eps=fields.positive("rms_norm_eps"),
        unit_offset_norm=gemma,
        scale_embedding=gemma,
        post_norms=late_gemma,
        qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        query_scale=_query_scale(fields) if late_gemma else None,
        attention_softcap=fields.optional_number("attn_logit_softcapping") if family == "gemma2" else None,
        logit_softcap=fields.optional_number("final_logit_softcapping") if late_gemma else None,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        sliding_window=window,
        layer_is_sliding=layer_is_sliding,
    )


def parse_end_ids(values: dict[str, Any], *, where: str) -> tuple[int, ...]:
    """Ids that end a response: ``eos_token_id`` of a ``generation_config.json`` or ``config.json``, one or a list.

    Raises:
      UserError: they are no ids.
    """
    given = values.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in ids):
        raise UserError(f"{where}: eos_token_id is {given!r}; it must be a token id, or a list of them")
    return tuple(sorted(set(ids)))


def _refuse_unsupported(fields: Fields) -> None:
    if fields.flag("use_bidirectional_attention"):
        fields.refuse("use_bidirectional_attention", "jaxrm's decoders are causal")
    if fields.family == "gemma3_text" and fields.get("attn_logit_softcapping") is not None:
        fields.refuse("attn_logit_softcapping", "Gemma 3 attention has no soft-cap: remove the field")
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        fields.refuse("partial_rotary_factor", "jaxrm rotates whole heads only")


def _activation(fields: Fields) -> str:
    field = "hidden_activation" if fields.get("hidden_activation") is not None else "hidden_act"
    name = fields.get(field)
    if fields.family == "gemma" and name == "gelu":
        # The first Gemma configs said "gelu" and meant the approximation that the model was trained with.
        name = "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        fields.refuse(field, f"jaxrm supports {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _query_scale(fields: Fields) -> float:
    return fields.positive("query_pre_attn_scalar") ** -0.5


def _rope(fields: Fields) -> tuple[float, RopeScaling | None, float | None]:
    """Base and scaling of the rotary frequencies, and the base of Gemma 3's sliding layers."""
    parameters = fields.mapping("rope_parameters")
    local: dict[str, Any] = {}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        local = fields.mapping("rope_parameters.sliding_attention", parameters.get("sliding_attention"))
        parameters = fields.mapping("rope_parameters.full_attention", parameters.get("full_attention"))
        if fields.family != "gemma3_text" and local != parameters:
            fields.refuse("rope_parameters", "only Gemma 3 may rotate sliding layers differently")
    given = parameters.get("rope_theta", fields.get("rope_theta"))
    theta = fields.positive("rope_theta", 10_000.0 if given is None else given)
    scaling = _rope_scaling(fields, fields.mapping("rope_scaling") or parameters)
    if fields.family != "gemma3_text":
        return theta, scaling, None
    if _rope_scaling(fields, local) is not None:
        fields.refuse("rope_parameters", "jaxrm does not scale the rotation of Gemma 3's sliding layers")
    given = local.get("rope_theta", fields.get("rope_local_base_freq"))
    return theta, scaling, fields.positive("rope_local_base_freq", 10_000.0 if given is None else given)


def _rope_scaling(fields: Fields, scaling: dict[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(
            f"{fields.where}: partial_rotary_factor is {scaling['partial_rotary_factor']!r}; "
            "jaxrm rotates whole heads only"
        )
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"{fields.where}: rope_type is {kind!r}; jaxrm supports default, linear and llama3 "
            "(for a base model below its original context, remove the rope scaling)"
        )
    factor = fields.positive("rope_scaling.factor", scaling.get("factor", ""))
    if kind == "linear":
        return RopeScaling("linear", factor)
    original = scaling.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return RopeScaling(
        "llama3",
        factor,
        fields.positive("rope_scaling.low_freq_factor", scaling.get("low_freq_factor", "")),
        fields.positive("rope_scaling.high_freq_factor", scaling.get("high_freq_factor", "")),
        int(fields.positive("rope_scaling.original_max_position_embeddings", original)),
    )


def _sliding(fields: Fields, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window in tokens and which layers have it."""
    family = fields.family
    if fields.get("sliding_window") is None or family in ("llama", "gemma"):
        return None, ()
    if family in ("qwen2", "qwen3") and not fields.flag("use_sliding_window"):
        return None, ()
    window = fields.integer("sliding_window")
    layer_types = fields.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            fields.refuse("layer_types", "it must be a list")
        unknown = sorted({str(kind) for kind in layer_types} - {"sliding_attention", "full_attention"})
        if unknown:
            fields.refuse("layer_types", f"jaxrm does not know {', '.join(unknown)}")
        sliding = tuple(kind == "sliding_attention" for kind in layer_types)
        if len(sliding) != num_layers:
            fields.refuse("layer_types", f"it needs one entry for each of the {num_layers} layers")
        if family == "mistral" and len(set(sliding)) > 1:
            fields.refuse("layer_types", "the layers of a mistral model are all alike")
    elif family == "mistral":
        sliding = (True,) * num_layers
    elif family in ("qwen2", "qwen3"):
        first = 28 if fields.get("max_window_layers") is None else fields.integer("max_window_layers", least=0)
        sliding = tuple(layer >= first for layer in range(num_layers))
    else:
        names = ("sliding_window_pattern", "_sliding_window_pattern")
        pattern = next((fields.integer(name) for name in names if fields.get(name) is not None), 6)
        sliding = alternating(num_layers, 2 if family == "gemma2" else pattern)
    return (window, sliding) if any(sliding) else (None, ())


def to_hf_config(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    bos_id: int | None = None,
    eos_ids: Iterable[int] = (),
    pad_id: int | None = None,
    scalar_head: bool = False,
) -> dict[str, Any]:
    """Write a ModelConfig as the fields of a ``config.json`` that transformers 4 and 5 and vLLM read.

    With ``scalar_head``, of a sequence classification model of one label instead of a causal language model.

    Raises:
      UserError: if the family cannot express the config, naming the fields.
    """
    eos = list(eos_ids)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": pad_id,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_fields(config.rope_scaling),
    }
    activation = _ACTIVATION_NAMES[config.activation]
    if config.family.startswith("gemma"):
        values["hidden_activation"] = activation
    if config.family not in ("gemma2", "gemma3_text"):
        values["hidden_act"] = activation
    if config.family not in ("mistral", "qwen2"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    values |= _family_fields(config)

    wanted, read_back = dataclasses.asdict(config), dataclasses.asdict(parse_hf_config(values))
    if config.query_scale is None and read_back["query_scale"] == config.head_dim**-0.5:
        read_back["query_scale"] = None  # the same scale, which Gemma 2 and 3 must spell out
    differing = [name for name in wanted if wanted[name] != read_back[name] and name not in ("drawable", "end_ids")]
    if differing:
        raise UserError(
            f"a {config.family} config.json cannot express ModelConfig's {', '.join(differing)}; "
            "change them, or the family"
        )
    if scalar_head:
        values["architectures"] = [_SCALAR_ARCHITECTURES[config.family]]
        values["id2label"], values["label2id"] = {"0": "reward"}, {"reward": 0}  # which says that there is one label
    return values


def _family_fields(config: ModelConfig) -> dict[str, Any]:
    sliding = config.layer_is_sliding or (False,) * config.num_layers
    layer_types = ["sliding_attention" if layer else "full_attention" for layer in sliding]
    window = {"sliding_window": config.sliding_window}
    match config.family:
        case "mistral":
            return window
        case "qwen2" | "qwen3":
            first = sliding.index(True) if any(sliding) else config.num_layers
            return window | {
                "use_sliding_window": any(sliding),
                "max_window_layers": first,
                "layer_types": layer_types,
            }
        case "gemma2" | "gemma3_text":
            scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
            fields = window | {
                "layer_types": layer_types,
                "query_pre_attn_scalar": round(scale**-2),
                "final_logit_softcapping": config.logit_softcap,
                "attn_logit_softcapping": config.attention_softcap,
            }
            if config.family == "gemma3_text":
                fields["rope_local_base_freq"] = config.local_rope_theta
            return fields
    return {}


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return fields
