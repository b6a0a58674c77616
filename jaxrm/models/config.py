"""The shape and the choices of a decoder, and the published models by name."""

import difflib
from dataclasses import dataclass
from typing import Any

from jaxrm.errors import UserError, flag, option

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
ROPE_SCALINGS = ("linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to contexts longer than those of pre-training.

    ``linear`` divides every frequency by ``factor`` (Chen et al. 2023, arXiv:2306.15595). ``llama3`` divides
    the low frequencies by ``factor``, keeps the high ones, and blends between the wavelengths
    ``original_max_position / high_freq_factor`` and ``original_max_position / low_freq_factor``
    (Llama 3 herd of models, arXiv:2407.21783).

    Attributes:
      kind: ``linear`` or ``llama3``.
      factor: by which frequencies are divided.
      low_freq_factor: ``llama3`` alone, as ``high_freq_factor``.
      high_freq_factor: above ``low_freq_factor``.
      original_max_position: tokens of the context of pre-training, ``llama3`` alone.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise UserError(f"RopeScaling.kind is {self.kind!r}; jaxrm supports {', '.join(ROPE_SCALINGS)}")
        if self.factor <= 0:
            raise UserError(f"RopeScaling.factor is {self.factor}; it must be above 0")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"RopeScaling.high_freq_factor is {self.high_freq_factor}; "
                f"it must be above low_freq_factor, {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the computation of a decoder; hashable, so it may be static under jit.

    Token ids (BOS, EOS, padding) belong to the tokenizer and are not here, but for what it does not know: which rows of
    the output have no token, and where the model's makers let a response end.

    Attributes:
      family: the Hugging Face ``model_type``.
      vocab_size: ``V``, rows of the embedding table.
      hidden_size: ``D``.
      intermediate_size: ``F``, width of the MLP.
      num_layers: ``L``.
      num_heads: ``N``, of queries; a multiple of ``num_kv_heads``.
      num_kv_heads: ``K``, of keys and values.
      head_dim: ``H``, even.
      max_position: tokens of the longest row.
      activation: of the MLP's gate: ``silu``, ``gelu_tanh`` (the tanh approximation) or ``gelu`` (exact).
      norm_eps: added to the mean square in a norm.
      unit_offset_norm: Gemma: a norm multiplies by ``1 + scale``.
      scale_embedding: Gemma: embeddings are multiplied by ``sqrt(hidden_size)``, rounded to the compute dtype.
      post_norms: Gemma 2 and 3: norms after attention and after the MLP as well.
      qk_norm: Qwen 3 and Gemma 3: norms of queries and keys of each head, before the rotation.
      qkv_bias: Qwen 2: biases on queries, keys and values.
      output_bias: a bias on attention's output.
      mlp_bias: biases in the MLP.
      tie_embeddings: the head is the embedding table.
      query_scale: factor on the logits of attention; None for ``head_dim ** -0.5``.
      attention_softcap: Gemma 2: bound on the logits of attention, or None.
      logit_softcap: Gemma 2: bound on the logits of tokens, or None.
      rope_theta: base of the rotary frequencies.
      rope_scaling: for contexts longer than those of pre-training, or None.
      local_rope_theta: Gemma 3: base of the sliding layers, which are not scaled; None for ``rope_theta``.
      sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it.
      layer_is_sliding: one for each layer; ``()`` for none.
      drawable: ids that have a token, as ranges ``(first, last + 1)``; ``()`` where all rows have one. The others are
        never drawn, and what is drawn is normalized without them.
      end_ids: ids that end a response besides those of tokenizer and template, from ``generation_config.json``.

    Raises:
      UserError: naming the field, where values do not fit together.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int = 2048
    activation: str = "silu"
    norm_eps: float = 1e-6
    unit_offset_norm: bool = False
    scale_embedding: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    sliding_window: int | None = None
    layer_is_sliding: tuple[bool, ...] = ()
    drawable: tuple[tuple[int, int], ...] = ()
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"ModelConfig.family is {self.family!r}; jaxrm supports {', '.join(FAMILIES)}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"ModelConfig.activation is {self.activation!r}; jaxrm supports {', '.join(ACTIVATIONS)}")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"ModelConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"ModelConfig.num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"ModelConfig.head_dim is {self.head_dim}; rotary position embedding needs an even number")
        if self.layer_is_sliding and len(self.layer_is_sliding) != self.num_layers:
            raise UserError(
                f"ModelConfig.layer_is_sliding has {len(self.layer_is_sliding)} entries; "
                f"it needs one for each of the {self.num_layers} layers, or none"
            )
        if any(self.layer_is_sliding) and (self.sliding_window is None or self.sliding_window < 1):
            raise UserError(
                f"ModelConfig.sliding_window is {self.sliding_window}, but layer_is_sliding asks for one; "
                "give the number of tokens, at least 1"
            )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position",
)


def _llama(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    fields: dict[str, Any] = {"family": "llama", "head_dim": hidden // heads, "norm_eps": 1e-5} | more
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **fields,
    )


def _qwen(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    fields: dict[str, Any] = {"norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position": 32768} | more
    return _llama(vocab, hidden, mlp, layers, heads, kv_heads, **fields)


def _gemma(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "family": "gemma",
        "head_dim": 256,
        "max_position": 8192,
        "activation": "gelu_tanh",
        "norm_eps": 1e-6,
        "unit_offset_norm": True,
        "scale_embedding": True,
        "tie_embeddings": True,
    } | more
    return _llama(vocab, hidden, mlp, layers, heads, kv_heads, **fields)


def _gemma2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "family": "gemma2",
        "post_norms": True,
        "query_scale": 256**-0.5,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "sliding_window": 4096,
        "layer_is_sliding": alternating(layers, 2),
    } | more
    return _gemma(256_000, hidden, mlp, layers, heads, kv_heads, **fields)


def _gemma3(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "family": "gemma3_text",
        "post_norms": True,
        "qk_norm": True,
        "query_scale": 256**-0.5,
        "rope_theta": 1_000_000.0,
        "local_rope_theta": 10_000.0,
        "layer_is_sliding": alternating(layers, 6),
    } | more
    return _gemma(vocab, hidden, mlp, layers, heads, kv_heads, **fields)


def alternating(num_layers: int, pattern: int) -> tuple[bool, ...]:
    """Which layers slide when every ``pattern``-th layer, counted from 1, sees the whole context."""
    return tuple((i + 1) % pattern != 0 for i in range(num_layers))


_LLAMA3: dict[str, Any] = {"rope_theta": 500_000.0, "max_position": 8192}
_LLAMA31: dict[str, Any] = _LLAMA3 | {"max_position": 131_072, "rope_scaling": RopeScaling("llama3", 8.0)}
_LLAMA32: dict[str, Any] = _LLAMA31 | {"rope_scaling": RopeScaling("llama3", 32.0), "tie_embeddings": True}
_SMOLLM2: dict[str, Any] = {"rope_theta": 100_000.0, "max_position": 8192, "tie_embeddings": True}
_QWEN2: dict[str, Any] = {"family": "qwen2", "qkv_bias": True}
_QWEN3: dict[str, Any] = {"family": "qwen3", "qk_norm": True, "head_dim": 128, "max_position": 40_960}

# fmt: off
PRESETS: dict[str, ModelConfig] = {
    "tiny": _llama(512, 128, 512, 4, 4, 2, tie_embeddings=True),
    "lab-tiny": _llama(512, 128, 256, 2, 4, 2, tie_embeddings=True),  # 0.36 M parameters; sizes of the study
    "lab-small": _llama(512, 320, 1024, 4, 5, 5, tie_embeddings=True),  # 6 M
    "lab-base": _llama(512, 576, 1792, 7, 9, 9, tie_embeddings=True),  # 31 M
    "gemma-2b": _gemma(256_000, 2048, 16_384, 18, 8, 1),
    "gemma-7b": _gemma(256_000, 3072, 24_576, 28, 16, 16),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _gemma2(3584, 14_336, 42, 16, 8),
    "gemma-2-27b": _gemma2(4608, 36_864, 46, 32, 16, head_dim=128, query_scale=144**-0.5),
    "gemma-3-1b": _gemma3(262_144, 1152, 6912, 26, 4, 1, max_position=32_768, sliding_window=512),
    "gemma-3-4b": _gemma3(262_208, 2560, 10_240, 34, 8, 4, max_position=131_072, sliding_window=1024,
                          rope_scaling=RopeScaling("linear", 8.0)),
    "llama-2-7b": _llama(32_000, 4096, 11_008, 32, 32, 32, max_position=4096),
    "llama-2-13b": _llama(32_000, 5120, 13_824, 40, 40, 40, max_position=4096),
    "llama-3-8b": _llama(128_256, 4096, 14_336, 32, 32, 8, **_LLAMA3),
    "llama-3.1-8b": _llama(128_256, 4096, 14_336, 32, 32, 8, **_LLAMA31),
    "llama-3.2-1b": _llama(128_256, 2048, 8192, 16, 32, 8, **_LLAMA32),
    "llama-3.2-3b": _llama(128_256, 3072, 8192, 28, 24, 8, **_LLAMA32),
    "smollm2-135m": _llama(49_152, 576, 1536, 30, 9, 3, **_SMOLLM2),
    "smollm2-360m": _llama(49_152, 960, 2560, 32, 15, 5, **_SMOLLM2),
    "smollm2-1.7b": _llama(49_152, 2048, 8192, 24, 32, 32, **_SMOLLM2 | {"rope_theta": 130_000.0}),
    "mistral-7b": _llama(32_000, 4096, 14_336, 32, 32, 8, family="mistral", max_position=32_768,
                         sliding_window=4096, layer_is_sliding=(True,) * 32),
    "mistral-7b-v0.3": _llama(32_768, 4096, 14_336, 32, 32, 8, family="mistral", max_position=32_768,
                              rope_theta=1_000_000.0),
    "qwen2.5-0.5b": _qwen(151_936, 896, 4864, 24, 14, 2, tie_embeddings=True, **_QWEN2),
    "qwen2.5-1.5b": _qwen(151_936, 1536, 8960, 28, 12, 2, tie_embeddings=True, **_QWEN2),
    "qwen2.5-7b": _qwen(152_064, 3584, 18_944, 28, 28, 4, **_QWEN2),
    "qwen3-0.6b": _qwen(151_936, 1024, 3072, 28, 16, 8, tie_embeddings=True, **_QWEN3),
    "qwen3-8b": _qwen(151_936, 4096, 12_288, 36, 32, 8, **_QWEN3),
}
# fmt: on


def preset(name: str) -> ModelConfig:
    """Look up a published model, e.g. ``preset("gemma-2b")``; upper and lower case are alike.

    Raises:
      UserError: with the nearest names, where there is none.
    """
    config = PRESETS.get(name.lower())
    if config is None:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"{option('model.preset')} is {name!r}, which is no preset; {meant}known are {', '.join(sorted(PRESETS))}; "
            f"e.g. {flag('model.preset')}={near[0] if near else 'tiny'}"
        )
    return config
