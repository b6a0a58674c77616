"""Reading the fields of a Hugging Face ``config.json``, with each family's defaults and errors that name them."""

from typing import Any, NoReturn

from jaxrm.errors import UserError

MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1  # no model is near; a damaged number would ask for all memory
_LARGEST = 1e30
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

# What a family's config.json may leave out. Fields absent here and there are an error.
_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "hidden_act": "silu", "mlp_bias": False},
    "mistral": {
        "max_position_embeddings": 131_072,
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32_768, "hidden_act": "silu"},
    "qwen3": {"max_position_embeddings": 32_768, "hidden_act": "silu", "head_dim": 128},
    "gemma": _GEMMA | {"max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _GEMMA
    | {
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    # Hub configs of the multimodal Gemma 3 list only what differs from the class's defaults.
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1_000_000.0,
    },
}


class Fields:
    """The fields of one config.json with its family's defaults; every complaint names file and field."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.where = where
        self.family = values.get("model_type")
        if not isinstance(self.family, str) or self.family not in ARCHITECTURES:
            raise UserError(f"{where}: model_type is {self.family!r}; jaxrm supports {', '.join(ARCHITECTURES)}")
        self.values = _COMMON | _DEFAULTS[self.family] | values

    def get(self, name: str) -> Any:
        """The field's value, or its family's default, or None."""
        return self.values.get(name)

    def integer(self, name: str, least: int = 1) -> int:
        """A whole number of at least ``least`` that must be there."""
        value = self.values.get(name)
        if value is None:
            raise UserError(f"{self.where} has no {name!r}; a {self.family} model needs it")
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{self.where}: {name} is {value!r}; it must be a whole number")
        if value < least:
            raise UserError(f"{self.where}: {name} is {value}; it must be at least {least}")
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if value > most:
            raise UserError(f"{self.where}: {name} is {value}; it must be at most {most}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; an absent field and null are false."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return bool(value)

    def number(self, name: str, value: Any = None) -> float:
        """The number ``value``, or where that is None the field's; ``name`` is for the error."""
        value = self.values.get(name) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {name} is {value!r}; it must be a number")
        if not -_LARGEST < value < _LARGEST:  # NaN too
            raise UserError(f"{self.where}: {name} is {value}; it must be a finite number")
        return float(value)

    def positive(self, name: str, value: Any = None) -> float:
        """As ``number``, above 0."""
        number = self.number(name, value)
        if number <= 0:
            raise UserError(f"{self.where}: {name} is {number}; it must be above 0")
        return number

    def optional_number(self, name: str) -> float | None:
        """The field's number, above 0, or None."""
        return None if self.values.get(name) is None else self.positive(name)

    def mapping(self, name: str, value: Any = None) -> dict[str, Any]:
        """The JSON object ``value``, or where that is None the field's, empty where it is absent."""
        value = self.values.get(name) if value is None else value
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.where}: {name} is {value!r}; it must be an object")
        return value or {}

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise the error that the field's value is unsupported."""
        raise UserError(f"{self.where}: {name} is {self.values.get(name)!r}; {reason}")
